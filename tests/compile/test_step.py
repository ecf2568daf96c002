import copy
import warnings

import pytest
import torch
from toy import Molecules, Toy, as_dict, random_batch

import ddpkit
from ddpkit.compile import gradients as compiled_gradients
from ddpkit.errors import InputError, ParityError
from ddpkit.testing import run_ranks


def criterion(output, batch):
    energy = (output["energy"] - batch.energy).square().mean()
    forces = (output["forces"] - batch.forces).square().mean()
    return {"loss": energy + 10 * forces, "loss_energy": energy, "loss_forces": forces}


def still(model):
    """An optimizer that changes nothing."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


def eager(model, batches, criterion=criterion):
    model = copy.deepcopy(model)
    losses = [criterion(model(batch), batch) for batch in batches]
    sum(loss["loss"] for loss in losses).backward()
    return [loss["loss"].detach() for loss in losses], {name: p.grad for name, p in model.named_parameters()}


def assert_gradients(model, expected, tolerance=1e-10):
    for name, p in model.named_parameters():
        if expected[name] is None:
            assert p.grad is None, name
        else:
            torch.testing.assert_close(
                p.grad, expected[name], rtol=tolerance, atol=tolerance * float(expected[name].norm())
            )


@pytest.fixture(scope="module")
def toy():
    model = Toy()
    return model, ddpkit.make_step(model, criterion, still(model), strategy="none", compile=True)


SHAPES = [[6, 5, 4], [7], [2, 9, 3, 5, 4], [3, 3]]


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_gradients_at_shapes_unseen_in_the_trace(toy, sizes):
    model, step = toy
    batch = random_batch(sizes, seed=len(sizes))
    losses, expected = eager(model, [batch])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing may fall back to eager code
        output = step(batch)
    assert set(output) == {"loss", "loss_energy", "loss_forces"}
    torch.testing.assert_close(output["loss"], losses[0])
    assert_gradients(model, expected)
    assert step.seconds_compile > 0


@pytest.mark.parametrize("sizes", [[2], [1, 1], [1]], ids=str)
def test_sizes_of_one_and_zero_are_right(toy, sizes):
    model, step = toy
    batch = random_batch(sizes, r_max=9.0)
    losses, expected = eager(model, [batch])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eager code steps in
        torch.testing.assert_close(step(batch)["loss"], losses[0])
    assert_gradients(model, expected)


def test_micro_batches_add_up(toy):
    model, step = toy
    batches = [random_batch([4, 5], seed=1), random_batch([6], seed=2), random_batch([3, 3, 3], seed=3)]
    losses, expected = eager(model, batches)
    torch.testing.assert_close(step(batches)["loss"], sum(losses))
    assert_gradients(model, expected)


def test_buffers_change_as_in_eager_code():
    model = Toy()
    step = ddpkit.make_step(model, criterion, still(model), strategy="none", compile=True)
    step.prepare(random_batch([4, 5]))
    assert model.calls == 0
    for _ in range(3):
        step(random_batch([4, 5]))
    assert model.calls == 3


def test_parameters_unfrozen_later_are_trained(toy):
    model, _ = toy
    model = copy.deepcopy(model)
    step = ddpkit.make_step(model, criterion, still(model), strategy="custom", compile=True)
    batch = random_batch([4, 5])
    step(batch)
    model.frozen.requires_grad_(True)
    model.shift.requires_grad_(False)
    _, expected = eager(model, [batch])
    model.shift.grad = None
    step(batch)
    step(batch)
    assert expected["frozen"].norm() > 0
    assert_gradients(model, expected)
    trained = [expected[name] for name, p in model.named_parameters() if p.requires_grad and p.grad is not None]
    torch.testing.assert_close(step.grad_norm, torch.nn.utils.get_total_norm(trained))


@pytest.mark.parametrize("strategy", ["custom", "none", "ingraph", "standard", "overlap"])
def test_trains_as_eager_does(strategy):
    results = []
    for compile_ in (False, True):
        model = Toy()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        step = ddpkit.make_step(
            model, criterion, optimizer, strategy=strategy if compile_ else "custom", compile=compile_, clip_norm=1.0
        )
        norms = []
        for seed in range(4):
            step(random_batch([4, 5, 3], seed=seed))
            norms.append(step.grad_norm)
        results.append([*norms, *model.parameters()])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("interpreted")
def test_a_sabotaged_graph_is_refused_by_name(monkeypatch):
    honest = compiled_gradients.trace

    def sabotage(function, *arguments):
        traced = honest(function, *arguments)
        graph = traced.graph.graph
        *_, last = (node for node in graph.nodes if node.target is torch.ops.aten.copy_.default)
        target, gradient = last.args
        with graph.inserting_before(last):
            wrong = graph.call_function(torch.ops.aten.mul.Tensor, (gradient, 1.001))
            wrong.meta["val"] = gradient.meta["val"]
        last.args = (target, wrong)
        return traced

    monkeypatch.setattr(compiled_gradients, "trace", sabotage)
    model = Toy()
    before = copy.deepcopy(model.state_dict())
    step = ddpkit.make_step(model, criterion, still(model), strategy="none", compile=True)
    with pytest.raises(ParityError, match=r"'shift' by 0\.001 relative"):
        step(random_batch([4, 5]))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("compile_", [False, True])
def test_a_bad_gradient_is_not_applied(compile_, fused):
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    step = ddpkit.make_step(model, criterion, optimizer, strategy="none", compile=compile_, clip_norm=1.0)
    step(random_batch([4, 5]))
    before = [p.detach().clone() for p in model.parameters()]
    batch = random_batch([4, 5])
    batch.energy[0] = torch.inf
    with pytest.warns(UserWarning, match="'embedding'.*is NaN or infinite: the update was not applied"):
        step(batch)
    assert step.skipped == 1
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)
    step(random_batch([4, 5]))
    assert step.skipped == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_batches_that_are_dicts():
    def dict_criterion(output, data):
        return {"loss": (output["y"] - data["y"]).square().mean() + (output["neg_dy"] - data["dy"]).square().mean()}

    model = Molecules()
    examples = [as_dict(random_batch([5, 4, 6, 3], seed=1))]
    step = ddpkit.make_step(model, dict_criterion, still(model), strategy="none", compile=True, examples=examples)
    for sizes in ([6, 5], [4, 4, 4], [7]):
        batch = as_dict(random_batch(sizes))
        _, expected = eager(model, [batch], dict_criterion)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(batch)
        assert_gradients(model, expected)


@pytest.mark.usefixtures("interpreted")
def test_what_varies_in_a_dict_is_learned():
    """In the first batch there are as many frames as channels; the second batch tells them apart."""

    def dict_criterion(output, data):
        return (output - data["y"]).square().sum()

    class Means(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))

        def forward(self, data):
            return (data["x"] * self.weight).sum(1)

    model = Means()
    step = ddpkit.make_step(model, dict_criterion, still(model), strategy="none", compile=True)
    for frames in (6, 9, 11):
        batch = {"x": torch.randn(frames, 6, dtype=torch.float64), "y": torch.randn(frames, dtype=torch.float64)}
        loss = dict_criterion(model(batch), batch)
        (expected,) = torch.autograd.grad(loss, model.weight)
        torch.testing.assert_close(step(batch), loss.detach())
        torch.testing.assert_close(model.weight.grad, expected)


def test_ingraph_refuses_what_it_cannot_do():
    model = Toy()
    with pytest.raises(InputError, match="compile=True"):
        ddpkit.make_step(model, criterion, still(model), strategy="ingraph")
    with pytest.raises(InputError, match="make_step"):
        ddpkit.make_sync("ingraph", model)
    with pytest.raises(InputError, match="buckets=0"):
        ddpkit.make_step(model, criterion, still(model), strategy="ingraph", compile=True, buckets=0)


def test_a_model_without_anything_to_train_is_refused():
    model = Toy().requires_grad_(requires_grad=False)
    with pytest.raises(InputError, match="no parameter to train"):
        ddpkit.make_step(model, criterion, None, strategy="custom")


def test_the_loss_must_be_a_scalar():
    model = Toy()
    step = ddpkit.make_step(model, lambda output, batch: output["energy"] - batch.energy, still(model), strategy="none")
    with pytest.raises(InputError, match="0-d"):
        step(random_batch([4, 5]))


class Asking(Toy):
    """Lets Python look at a value."""

    def forward(self, batch):
        assert batch.positions.sum().item() < 1e9
        return super().forward(batch)


def test_a_model_that_asks_for_values_is_refused_in_a_sentence():
    model = Asking()
    step = ddpkit.make_step(model, criterion, still(model), strategy="none", compile=True)
    with pytest.raises(
        InputError, match=r"depends on the values.*test_step.py, line \d+: assert batch.*compile=False"
    ) as raised:
        step(random_batch([4, 5]))
    assert "\n" not in str(raised.value)


class Sharing(torch.nn.Module):
    """Has a module under two names, as PyG's SchNet has, and a weight in two modules."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh()).double()
        self.inner = torch.nn.Module()
        self.inner.layers = self.layers
        self.last = torch.nn.Linear(3, 3).double()
        self.last.weight = self.layers[0].weight

    def forward(self, x):
        return self.last(self.inner.layers(x))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("strategy", ["custom", "standard", "overlap", "ingraph"])
def test_shared_modules_and_weights(strategy):
    torch.manual_seed(0)
    model, x = Sharing(), torch.randn(7, 3).double()
    twin = copy.deepcopy(model)
    twin(x).square().mean().backward()
    step = ddpkit.make_step(
        model,
        lambda y, _: y.square().mean(),
        torch.optim.SGD(model.parameters(), lr=1.0),
        strategy=strategy,
        compile=True,
    )
    step(x)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert type(p) is torch.nn.Parameter
        torch.testing.assert_close(p, q.detach() - q.grad, rtol=1e-12, atol=1e-14)


class Overwriting(torch.nn.Module):
    """Writes its output into the batch, as SchNetPack's models do."""

    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(3, 1, dtype=torch.float64)

    def forward(self, batch):
        batch["value"] = self.line(batch["x"])
        return batch


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("strategy", "compiled"),
    [("custom", False), ("custom", True), ("standard", True), ("overlap", True), ("ingraph", True)],
)
def test_targets_stay_what_they_are_where_a_model_writes_over_them(strategy, compiled):
    torch.manual_seed(0)
    model = Overwriting()
    batch = {"x": torch.randn(6, 3).double(), "value": torch.randn(6, 1).double()}
    x, target = batch.values()
    expected = (model.line(x) - target).square().mean().detach()

    def distance(output, batch):
        return (output["value"] - batch["value"]).square().mean()

    step = ddpkit.make_step(model, distance, still(model), strategy=strategy, compile=compiled)
    for _ in range(2):
        torch.testing.assert_close(step(batch), expected)
    assert batch["value"] is target


def train_once():
    model = Toy(width=7)
    step = ddpkit.make_step(model, criterion, still(model), strategy="none", compile=True)
    return float(step(random_batch([4, 5]))["loss"])


@pytest.mark.long
def test_a_library_torn_by_a_killed_compiler_is_made_again(tmp_path):
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    (before,) = run_ranks(train_once, 1, timeout=300, environment=cache)
    libraries = list(tmp_path.rglob("*.main.so"))
    assert libraries
    libraries[0].write_bytes(b"")
    assert run_ranks(train_once, 1, timeout=300, environment=cache) == [before]
    assert libraries[0].stat().st_size
