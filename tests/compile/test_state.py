"""What model, criterion and optimizer hold beside tensors, and who holds the tensors; graphs are interpreted."""

import contextlib
import copy
import functools
import warnings
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from toy import Toy, random_batch

import ddpkit
from ddpkit.compile import forces, gradients, situations
from ddpkit.compile.backend import using
from ddpkit.compile.snapshot import Snapshot
from ddpkit.errors import InputError, ParityError, RankDisagreementError
from ddpkit.sync.graph_update import GraphUpdate
from ddpkit.testing import run_ranks

COMPILED = ["none", "custom", "standard", "overlap", "ingraph"]


@pytest.fixture(autouse=True)
def _interpreted():
    with using("interpreted"):
        yield


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(3, 1, generator=generator, dtype=torch.float64))

    def forward(self, x):
        return torch.tanh(x @ self.first) @ self.second


def rows(seed=0, count=6):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def square(output, batch):
    return (output[:, 0] - batch.sum(1)).square().mean()


def both(make_model, make_criterion, change, strategy="none", steps=6, **options):
    """Trains eagerly and compiled, with a change before each step; the weights of both."""
    found = []
    for compiled in (False, True):
        model, criterion = make_model(), make_criterion()
        held = [*criterion.parameters()] if isinstance(criterion, nn.Module) else []
        optimizer = torch.optim.SGD([*model.parameters(), *held], lr=0.05, momentum=0.5)
        used = strategy if compiled or strategy != "ingraph" else "none"
        step = ddpkit.make_step(
            model, criterion, optimizer, strategy=used, compile=compiled, **(options if compiled else {})
        )
        for number in range(steps):
            change(SimpleNamespace(number=number, model=model, criterion=criterion, optimizer=optimizer))
            step(rows(number))
        step.sync.close()
        found.append([p.detach().clone() for p in [*model.parameters(), *held]])
    return found


def assert_alike(found):
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-11)


# --- snapshots ----------------------------------------------------------------------------------------------------------


class Slotted:
    __slots__ = ("weight",)

    def __init__(self):
        self.weight = 1.0


class Settings:
    level = 1

    def __init__(self):
        self.weights = [1.0, (2.0, "a")]
        self.named = {"energy": 1.0, "inner": {"forces": 2}}
        self.inner = SimpleNamespace(flag=True)
        self.slotted = Slotted()
        self.function = torch.tanh
        self.array = np.ones(3)
        self.fixed = (torch.ones(2),)
        self.module = nn.Dropout(0.5)

    def method(self, output, batch):
        raise NotImplementedError


CHANGES = {
    "a value": lambda s: setattr(s.inner, "flag", False),
    "another type": lambda s: s.named.update(energy=1),
    "the sign of zero": lambda s: s.weights.__setitem__(0, -1.0),
    "an item of a list": lambda s: s.weights.__setitem__(1, (2.0, "b")),
    "a longer list": lambda s: s.weights.append(None),
    "a key deep inside": lambda s: s.named["inner"].update(forces=3),
    "a new key": lambda s: s.named.update(new=0),
    "a key less": lambda s: s.named.pop("inner"),
    "a slot": lambda s: setattr(s.slotted, "weight", 2.0),
    "a function": lambda s: setattr(s, "function", torch.sin),
    "an array in place": lambda s: s.array.__setitem__(0, 2),
    "a tensor of a tuple in place": lambda s: s.fixed[0].fill_(2),
    "a new attribute": lambda s: setattr(s, "level", 2),
    "a mode": lambda s: s.module.eval(),
    "a probability": lambda s: setattr(s.module, "p", 0.1),
    "a hook": lambda s: s.module.register_forward_hook(print),
    "a buffer": lambda s: s.module.register_buffer("new", torch.ones(1)),
}


@pytest.mark.parametrize("wrapped", [lambda s: s, lambda s: functools.partial(print, s), lambda s: s.method])
@pytest.mark.parametrize("what", CHANGES)
def test_a_snapshot_sees(what, wrapped):
    held = Settings()
    before = Snapshot({"criterion": wrapped(held)})
    assert before.stands()
    CHANGES[what](held)
    assert not before.stands()
    assert Snapshot({"criterion": wrapped(held)}).key != before.key


def test_a_snapshot_sees_attributes_of_classes(monkeypatch):
    before = Snapshot({"criterion": Settings()})
    monkeypatch.setattr(Settings, "level", 2)
    assert not before.stands()


def test_equal_values_are_no_change():
    held = Settings()
    held.value, held.nan = 0.1, float("nan")
    before = Snapshot({"criterion": held})
    held.value, held.nan, held.weights[1] = float("0.1"), float("nan"), (2.0, "a")
    assert before.stands() or Snapshot({"criterion": held}).key == before.key


# --- attributes ---------------------------------------------------------------------------------------------------------


class Plain:
    def __init__(self):
        self.weight, self.tensor = 1.0, torch.ones((), dtype=torch.float64)

    def __call__(self, output, batch):
        return self.weight * self.tensor * square(output, batch)


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.weight, self.tensor = 1.0, torch.ones((), dtype=torch.float64)

    def forward(self, output, batch):
        return self.weight * self.tensor * torch.exp(-self.scale) * square(output, batch) + self.scale


@pytest.mark.parametrize("make", [Plain, Learned])
@pytest.mark.parametrize("strategy", COMPILED)
def test_attributes_are_obeyed_and_code_is_kept(strategy, make):
    def change(it):
        it.criterion.weight = [1.0, 0.5][it.number % 2]
        it.criterion.tensor.fill_(it.number + 1.0)
        if it.number == 4:
            it.criterion.tensor = torch.full((), 7.0, dtype=torch.float64)

    with (
        mock.patch.object(gradients, "trace", wraps=gradients.trace) as step,
        mock.patch.object(forces, "trace", wraps=forces.trace) as model,
    ):
        assert_alike(both(Pair, make, change, strategy))
    assert step.call_count + model.call_count == (1 if strategy in ("standard", "overlap") else 2)


@pytest.mark.parametrize("strategy", COMPILED)
def test_a_value_that_changes_at_every_step_is_obeyed_and_told_once(strategy, monkeypatch):
    monkeypatch.setattr(situations, "_STEADY", 3)

    class Tempered(Pair):
        temperature = 1.0

        def forward(self, x):
            return super().forward(x / self.temperature)

    def change(it):
        it.model.temperature = 1.0 + 0.1 * min(it.number, 8)

    with (
        warnings.catch_warnings(record=True) as said,
        mock.patch.object(gradients, "trace", wraps=gradients.trace) as step,
        mock.patch.object(forces, "trace", wraps=forces.trace) as model,
    ):
        warnings.simplefilter("always")
        assert_alike(both(Tempered, lambda: square, change, strategy, steps=14))
    told = [str(w.message) for w in said]
    assert len([s for s in told if "model.temperature has had 5 values" in s]) == 1, told
    assert "register_buffer" in "".join(told)
    assert step.call_count + model.call_count == 5  # four at once, and one when the last value had stood


def test_an_unsteady_value_is_refused_where_there_is_no_eager_code():
    criterion = Plain()
    model = Pair()
    step = ddpkit.make_step(
        model,
        criterion,
        torch.optim.SGD(model.parameters(), lr=0.1),
        strategy="ingraph",
        compile=True,
        optimizer_in_graph=True,
    )

    def train():
        for number in range(9):
            criterion.weight = float(number)
            step(rows(number))

    with (
        pytest.warns(UserWarning, match=r"criterion\.weight"),
        pytest.raises(InputError, match=r"criterion\.weight changes too"),
    ):
        train()


class Counting(Pair):
    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, x):
        self.count += 1
        return super().forward(x)


class Replacing(Pair):
    """Replaces a buffer, and keeps what it has computed."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.kept, self.ready = None, False

    def forward(self, x):
        self.count = self.count + 1
        self.ready = True
        self.kept = super().forward(x)
        return self.kept / self.count


@pytest.mark.parametrize("strategy", COMPILED)
def test_a_model_that_counts_its_calls_is_refused(strategy):
    with pytest.raises(InputError, match=r"counts in 'model.count'.*buffer"):
        both(Counting, lambda: square, lambda *_: None, strategy)


@pytest.mark.parametrize("strategy", COMPILED)
def test_a_model_may_replace_buffers_and_keep_tensors(strategy):
    seen = []

    def change(it):
        seen.append(it.model)
        if it.model.kept is not None:
            assert type(it.model.kept) is torch.Tensor

    assert_alike(both(Replacing, lambda: square, change, strategy))
    assert seen[0].count == seen[-1].count == 6


@torch.library.custom_op("ddpkit_tests::through_workspace", mutates_args=())
def through_workspace(x: torch.Tensor, workspace: torch.Tensor) -> torch.Tensor:
    """As kernels do that use memory given to them without saying so."""
    workspace.copy_(torch.rand_like(workspace))
    return x.clone()


@through_workspace.register_fake
def _(x, workspace):  # noqa: ARG001
    return torch.empty_like(x)


class Scribbling(Pair):
    def __init__(self, *, says_so):
        super().__init__()
        self.workspace = torch.zeros(7, dtype=torch.float64)
        if says_so:
            self.ddpkit_scratch = ("workspace",)

    def forward(self, x):
        return super().forward(through_workspace(x, self.workspace))


def test_workspaces_are_not_compared():
    for says_so, ends in ((False, pytest.raises(ParityError, match="'workspace'")), (True, contextlib.nullcontext())):
        model = Scribbling(says_so=says_so)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ends:
            ddpkit.make_step(model, square, optimizer, strategy="none", compile=True)(rows())


# --- parameters ---------------------------------------------------------------------------------------------------------


def test_parameters_that_the_optimizer_alone_holds():
    scale = nn.Parameter(torch.zeros((), dtype=torch.float64))
    model = Pair()
    optimizer = torch.optim.SGD([*model.parameters(), scale], lr=0.1)
    closure = lambda output, batch: torch.exp(-scale) * square(output, batch) + scale  # noqa: E731
    ddpkit.make_step(model, closure, optimizer, strategy="custom")(rows())
    assert scale != 0
    for strategy in ("none", "custom", "ingraph"):
        with pytest.raises(InputError, match=r"'OptimizerParameters.group_0_number_2'.*torch.nn.Module"):
            ddpkit.make_step(model, closure, optimizer, strategy=strategy, compile=True)
    before = scale.detach().clone()
    ddpkit.make_step(model, closure, optimizer, strategy="overlap", compile=True)(rows())
    assert scale != before


def test_a_criterion_may_hold_its_parameters_as_it_likes():
    class Loose:
        def __init__(self):
            self.scales = [nn.Parameter(torch.zeros((), dtype=torch.float64))]

        def __call__(self, output, batch):
            return torch.exp(-self.scales[0]) * square(output, batch) + self.scales[0]

    found = []
    for compiled in (False, True):
        model, criterion = Pair(), Loose()
        optimizer = torch.optim.SGD([*model.parameters(), *criterion.scales], lr=0.1)
        step = ddpkit.make_step(model, criterion, optimizer, compile=compiled)
        for number in range(3):
            step(rows(number))
        found.append([*model.parameters(), *criterion.scales])
    assert found[1][-1] != 0
    assert_alike(found)


def test_a_teacher_in_the_criterion_is_left_alone():
    class Distilled(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher = Pair()

        def forward(self, output, batch):
            return (output - self.teacher(batch)).square().mean()

    for compiled in (False, True):
        model, criterion = Pair(), Distilled()
        model.first.data.mul_(2)
        before = copy.deepcopy(criterion.state_dict())
        step = ddpkit.make_step(model, criterion, torch.optim.SGD(model.parameters(), lr=0.1), compile=compiled)
        step(rows())
        assert list(step.sync.parameters) == ["first", "second"]
        assert all(torch.equal(value, before[name]) for name, value in criterion.state_dict().items())


def renew(model):
    model.second = nn.Parameter(torch.ones(3, 1, dtype=torch.float64))


OTHERS = {
    "'third' has been added": lambda m, _: m.register_parameter("third", nn.Parameter(torch.ones(1))),
    "'first' has been removed": lambda m, _: delattr(m, "first"),
    "'second' has been replaced": lambda m, _: renew(m),
    "group 1 of the optimizer": lambda _, o: o.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
    "dtype or device of parameter 'first'": lambda m, _: m.float(),
    "All parameters are frozen": lambda m, _: m.requires_grad_(requires_grad=False),
}


@pytest.mark.parametrize("change", OTHERS)
@pytest.mark.parametrize("strategy", [None, *COMPILED])
def test_other_parameters_are_refused(strategy, change):
    model = Pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = ddpkit.make_step(model, square, optimizer, strategy=strategy or "custom", compile=strategy is not None)
    step(rows())
    OTHERS[change](model, optimizer)
    with pytest.raises(InputError, match=change) as raised:
        step(rows())
    assert "\n" not in str(raised.value)


# --- optimizers ---------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01, dtype=torch.float64)),
}
SCHEDULES = {
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, base_lr=0.001, max_lr=0.1, step_size_up=3),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_schedules_of_all_numbers_are_obeyed_in_the_graph(name, schedule):
    found = []
    for compiled in (False, True):
        model = Pair()
        optimizer = OPTIMIZERS[name](model.parameters())
        scheduler = SCHEDULES[schedule](optimizer)
        options = {"strategy": "ingraph", "optimizer_in_graph": True} if compiled else {"strategy": "none"}
        step = ddpkit.make_step(model, square, optimizer, compile=compiled, **options)
        for number in range(10):
            step(rows(number))
            scheduler.step()
        found.append([*model.parameters(), *(s[key] for s in optimizer.state.values() for key in sorted(s))])
    assert_alike(found)


def test_flags_changed_later_are_obeyed_or_refused():
    def change(it):
        (group,) = it.optimizer.param_groups
        if it.number == 2:
            group["nesterov"] = True
        if it.number == 4:
            group["momentum"], group["nesterov"] = 0, False
        if it.number == 6:
            group["momentum"] = 0.3
        if it.number == 8:
            group["maximize"] = True

    assert_alike(both(Pair, lambda: square, change, "ingraph", steps=8, optimizer_in_graph=True))
    with pytest.raises(InputError, match="maximize=True"):
        both(Pair, lambda: square, change, "ingraph", steps=9, optimizer_in_graph=True)


def test_an_update_is_not_judged_by_gradients_that_are_not_finite():
    model = Pair()
    named = dict(model.named_parameters())
    update = GraphUpdate(torch.optim.AdamW(model.parameters()), 1.0, named)
    gradients = [torch.full_like(p, torch.nan) for p in named.values()]
    updated = [p.detach().clone() for p in named.values()]
    found = update.differences(list(named), updated, gradients, torch.ones(2, dtype=torch.bool), 1e-10, "6 rows")
    assert all(difference.error == 0 for difference in found)


# --- random numbers -----------------------------------------------------------------------------------------------------


class Dropping(Pair):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return super().forward(self.dropout(x))


@pytest.mark.parametrize("strategy", COMPILED)
def test_dropout_is_refused_while_it_drops(strategy):
    def off(it):
        it.model.dropout.eval() if it.number % 2 else setattr(it.model.dropout, "p", 0.0)

    assert_alike(both(Dropping, lambda: square, off, strategy))

    def on(it):
        torch.manual_seed(0)
        it.model.dropout.p = 0.5 if it.number == 2 else 0.0

    with pytest.raises(InputError, match=r"random numbers \(.*dropout"):
        both(Dropping, lambda: square, on, strategy)


# --- several ranks ------------------------------------------------------------------------------------------------------


def energies(output, batch):
    return (output["energy"] - batch.energy).square().mean() + (output["forces"] - batch.forces).square().mean()


def train_where_a_rank_is_unlike(strategy, compiled, *, several):
    """A rank's first batch has no edges."""
    rank = torch.distributed.get_rank()
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = ddpkit.make_step(model, energies, optimizer, strategy=strategy, compile=compiled, timeout=30.0)
    for number in range(3):
        lonely = rank == 1 and number == 0
        sizes = [([1], 1e-6) if lonely and not part else ([3, 4 + rank], 3.5) for part in range(1 + several)]
        batches = [random_batch(s, seed=10 * number + n + rank, r_max=r) for n, (s, r) in enumerate(sizes)]
        step(batches if several else batches[0])
    step.sync.close()
    return [p.detach().clone() for p in model.parameters()], step.eager_batches


def change_on_one_rank(strategy, compiled):
    rank = torch.distributed.get_rank()
    model, criterion = Pair(), Plain()
    options = {"bucket_mb": 1e-4, "first_bucket_mb": 1e-4} if strategy == "overlap" else {}
    step = ddpkit.make_step(
        model, criterion, torch.optim.SGD(model.parameters(), lr=0.1), strategy=strategy, compile=compiled, **options
    )
    for number in range(4):
        criterion.weight = 0.5 if rank and number > 1 else 1.0
        step(rows(number + 10 * rank))
    step.sync.close()
    return [p.detach().clone() for p in model.parameters()]


def say(function, *arguments):
    try:
        function(*arguments)
    except (InputError, RankDisagreementError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def several_on_one_rank():
    model = Pair()
    step = ddpkit.make_step(
        model, square, torch.optim.SGD(model.parameters(), lr=0.1), strategy="ingraph", compile=True
    )
    step([rows(), rows(1)] if torch.distributed.get_rank() else rows())


def change_alone_in_the_graph():
    model, criterion = Pair(), Plain()
    step = ddpkit.make_step(
        model, criterion, torch.optim.SGD(model.parameters(), lr=0.1), strategy="ingraph", compile=True, timeout=3.0
    )
    for _ in range(3):
        step(rows())
        criterion.weight -= 0.1 * torch.distributed.get_rank()


def unlike_ranks():
    with using("interpreted"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lonely = {
            (strategy, several): train_where_a_rank_is_unlike(strategy, True, several=several)
            for strategy in ("custom", "overlap", "ingraph")
            for several in (False, True)
        }
        eager = {s: train_where_a_rank_is_unlike("custom", False, several=s) for s in (False, True)}
        alone = {s: change_on_one_rank(s, True) for s in ("custom", "overlap", "standard")}
        alone["eager"] = change_on_one_rank("custom", False)
        said = [say(several_on_one_rank), say(change_alone_in_the_graph)]
    return lonely, eager, alone, said


@pytest.fixture(scope="module")
def unlike():
    return run_ranks(unlike_ranks, 2, timeout=200)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("strategy", ["custom", "overlap", "ingraph"])
def test_a_rank_whose_first_batch_has_no_edges(unlike, strategy, several):
    for lonely, eager, _, _ in unlike:
        (mine, fallbacks), (theirs, _) = lonely[strategy, several], eager[several]
        assert_alike([theirs, mine])
        assert fallbacks <= 1


@pytest.mark.parametrize("strategy", ["custom", "overlap", "standard"])
def test_an_attribute_that_changes_on_one_rank_is_harmless(unlike, strategy):
    for _, _, alone, _ in unlike:
        assert_alike([alone["eager"], alone[strategy]])


def test_what_ranks_must_do_together_ends_in_a_sentence(unlike):
    (first, second), (third, fourth) = zip(*(said for *_, said in unlike), strict=True)
    for sentence in (first, second):
        assert sentence.startswith("InputError: Rank 1 gave several micro-batches where the others gave one")
    assert "RankDisagreementError: Rank 0 waited" in third
    assert "RankDisagreementError: Rank 1 has waited 3 s for rank 0 in order to compile the step" in fourth
