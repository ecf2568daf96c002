"""The optimizer's step inside the compiled step, against torch's own optimizers."""

import copy

import pytest
import torch
from toy import Toy, random_batch

import ddpkit
from ddpkit.compile.backend import using
from ddpkit.errors import InputError, ParityError
from ddpkit.sync import graph_update as in_graph

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95)),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
}
# one of each family is compiled; the others' graphs are interpreted where little time is to be taken
QUICK = [(name, "inductor" if name in ("AdamW", "momentum") else "interpreted") for name in OPTIMIZERS]
LONG = [(name, "inductor") for name, compiler in QUICK if compiler == "interpreted"]


def make(optimizer, model, *, clip_norm=None):
    return ddpkit.make_step(
        model,
        ddpkit.EnergyForcesLoss(),
        optimizer,
        strategy="ingraph",
        compile=True,
        optimizer_in_graph=True,
        clip_norm=clip_norm,
    )


@pytest.mark.parametrize(
    ("name", "compiler"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)]
)
def test_trains_as_torch_does(name, compiler):
    """With clipping, a schedule, two groups, a bad batch, accumulation and a change to the ordinary optimizer."""
    with using(compiler):
        compare_with_torch(name)


def compare_with_torch(name):
    found = []
    for compiled in (False, True):
        model = Toy()
        groups = [[p for n, p in model.named_parameters() if ("shift" in n) is own] for own in (True, False)]
        optimizer = OPTIMIZERS[name]([{"params": groups[0], "lr": 1e-3}, {"params": groups[1]}])
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        if compiled:
            step = make(optimizer, model, clip_norm=0.5)
        else:
            step = ddpkit.make_step(model, ddpkit.EnergyForcesLoss(), optimizer, strategy="none", clip_norm=0.5)
        norms = []
        for seed in range(6):
            batch = random_batch([4, 5, 3], seed=seed)
            if seed == 3:
                batch.energy[0] = torch.nan
                with pytest.warns(UserWarning, match="NaN or infinite: the update was not applied"):
                    step(batch)
            elif seed == 4:
                step([batch, random_batch([3, 7], seed=9)])
            else:
                step(batch)
                norms.append(step.grad_norm)
            schedule.step()
        assert step.skipped == 1
        optimizer.step()
        found.append([*norms, *model.parameters(), *copy.deepcopy(optimizer.state_dict())["state"].values()])
    for one, two in zip(*found, strict=False):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("interpreted")
def test_state_goes_on_from_where_the_optimizer_was():
    """A checkpoint of the one is continued by the other."""
    found = []
    for first, second in ((False, False), (True, False), (False, True), (True, True)):
        model = Toy()
        state = None
        for compiled in (first, second):
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            if compiled:
                step = make(optimizer, model)
            else:
                step = ddpkit.make_step(model, ddpkit.EnergyForcesLoss(), optimizer, strategy="none")
            if state is not None:
                optimizer.load_state_dict(state)
            for seed in range(3):
                step(random_batch([4, 5, 3], seed=seed))
            state = copy.deepcopy(optimizer.state_dict())
        found.append([p.detach() for p in model.parameters()])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("interpreted")
def test_the_gate_looks_at_the_update(monkeypatch):
    honest = in_graph._adam

    def sabotage(settings, lr, *rest):
        return honest(settings, lr * 1.01, *rest)

    monkeypatch.setattr(in_graph, "_adam", sabotage)
    model = Toy()
    before = copy.deepcopy(model.state_dict())
    step = make(torch.optim.AdamW(model.parameters(), lr=1e-2), model)
    with pytest.raises(ParityError, match=r"after the update' by 0\.01 relative"):
        step(random_batch([4, 5]))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.usefixtures("interpreted")
def test_a_batch_without_compiled_code_is_an_error():
    model = Toy()
    step = make(torch.optim.SGD(model.parameters(), lr=1e-2), model)
    step(random_batch([4, 5]))
    lonely = random_batch([4, 5])
    empty = lonely.edge_index[:, :0]
    lonely = lonely.replace(edge_index=empty, edge_shift=lonely.edge_shift[:0], neighbours=None, incoming=None)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match="eagerly"), pytest.raises(InputError, match="optimizer_in_graph"):
        step(lonely)
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)


def test_refuses_what_it_cannot_do():
    model = Toy()
    with pytest.raises(InputError, match="not RMSprop"):
        make(torch.optim.RMSprop(model.parameters()), model)
    with pytest.raises(InputError, match="amsgrad=True"):
        make(torch.optim.AdamW(model.parameters(), amsgrad=True), model)
    with pytest.raises(InputError, match="lacks"):
        make(torch.optim.SGD(list(model.parameters())[:1], lr=1e-2), model)
