"""Steps from recordings against the same steps as they are, bit for bit; on a GPU the recordings are CUDA graphs."""

import contextlib
import copy
import gc
import warnings

import pytest
import torch
from in_memory import interpreted_once
from torch import nn
from toy import Toy, random_batch

import ddpkit
from ddpkit import torch_private
from ddpkit.capture import recording, steps
from ddpkit.capture.recording import as_one, make
from ddpkit.compile.backend import using
from ddpkit.data.assembly import Layout
from ddpkit.errors import InputError, RecordingError
from ddpkit.packing import unpack
from ddpkit.sync.flat import LATE, FlatSync

SIZES = [[6, 5, 4], [7, 7], [3, 4, 5]]
BATCHES = [random_batch(sizes, seed=seed) for seed, sizes in enumerate(SIZES)]
BATCHES.append(BATCHES[0].replace(positions=BATCHES[0].positions * 1.1, energy=BATCHES[0].energy + 1))
BUCKETS = {"bucket_mb": 1e-4, "first_bucket_mb": 1e-4}
STRATEGIES = {
    "none": {"strategy": "none"},
    "standard": {"strategy": "standard"},
    "custom": {"strategy": "custom"},
    "overlap": {"strategy": "overlap", **BUCKETS},
    "overlap in one bucket": {"strategy": "overlap"},
    "ingraph": {"strategy": "ingraph"},
    "ingraph with the update": {"strategy": "ingraph", "optimizer_in_graph": True},
}


here = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _compiler(device):
    global here  # noqa: PLW0603  (read where models and batches are made)
    here = torch.device(device)
    with interpreted_once() if device == "cpu" else using("inductor"):
        yield


@pytest.fixture(autouse=True)
def _ordered(deterministic):
    """On a GPU the toy's sums over edges have no order otherwise."""


def on_device(batches):
    return [on_device(batch) if isinstance(batch, list) else batch.to(here) for batch in batches]


class Criterion(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = 10.0

    def forward(self, output, batch):
        energy = (output["energy"] - batch.energy).square().mean()
        forces = (output["forces"] - batch.forces).square().mean()
        return {"loss": energy + self.weight * forces, "loss_energy": energy, "loss_forces": forces}


class Training:
    """A model in training, and all that comes of its steps."""

    def __init__(
        self,
        *,
        cuda_graphs,
        optimizer=torch.optim.AdamW,
        settings=None,
        batches=BATCHES,
        criterion=Criterion,
        **options,
    ):
        self.model, self.criterion, self.batches = Toy().to(here), criterion(), on_device(batches)
        self.optimizer = optimizer(self.model.parameters(), **{"lr": 1e-2, "fused": True} | (settings or {}))
        self.step = ddpkit.make_step(
            self.model, self.criterion, self.optimizer, compile=True, cuda_graphs=cuda_graphs, timeout=60.0, **options
        )
        self.seen = []

    def run(self, number, before=None):
        for n in range(number):
            if before is not None:
                before(self, n)
            output = self.step(self.batches[len(self.seen) % len(self.batches)])
            gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
            self.seen.append({**output, "norm": self.step.grad_norm.clone(), **gradients})

    def state(self):
        kept = {f"{i} {k}": v for i, state in enumerate(self.optimizer.state.values()) for k, v in state.items()}
        return {**self.model.state_dict(), **kept, "skipped": self.step.skipped}


def assert_same(one, two):
    for n, (a, b) in enumerate(zip(one.seen, two.seen, strict=True)):
        assert a.keys() == b.keys(), n
        assert all(torch.equal(a[key], b[key]) or (a[key].isnan().all() and b[key].isnan().all()) for key in a), n
    first, second = one.state(), two.state()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def both(number, before=None, **options):
    """The same training as it is and from recordings; the second."""
    plain, recorded = Training(cuda_graphs=False, **options), Training(cuda_graphs=True, **options)
    for training in (plain, recorded):
        training.run(number, before)
    assert plain.step.captured_steps == 0
    assert_same(plain, recorded)
    return recorded.step


def test_the_first_step_of_each_size_runs_as_it_is():
    assert both(50, strategy="custom").captured_steps == 50 - len(SIZES)


@pytest.mark.parametrize("strategy", ["custom", "ingraph", "standard", "overlap"])
def test_micro_batches(strategy):
    options = BUCKETS if strategy == "overlap" else {}
    step = both(30, strategy=strategy, **options, batches=[BATCHES[:2], BATCHES[1:3], BATCHES[0]])
    assert step.captured_steps == 27


def change(training, n):
    """All that users change between steps; each stands long enough for recordings to be made of it."""
    group = training.optimizer.param_groups[0]
    if n == 4:
        group["lr"] = 3e-3
    if 8 <= n < 14:
        group["betas"], group["eps"], group["weight_decay"] = (0.9 - n / 1000, 0.999), 1e-8 * n, n / 1000
    if n == 42:  # updates are recorded by then
        training.model.first.requires_grad_(False)
    if n == 50:
        training.model.first.requires_grad_()
    if n == 60:
        training.criterion.weight = 3.0
    if n == 70:
        training.model.eval()
        training.model(training.batches[1])
        training.model.train()
    if n == 80:
        training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
        training.model.load_state_dict({k: v * 0.5 for k, v in training.model.state_dict().items()})
    if n == 90:  # as a moving average does around a validation, but every other weight stays elsewhere
        for i, p in enumerate(training.model.parameters()):
            p.data, before = p.data.clone(), p.data
            if i % 2:
                p.data = before
    training.optimizer.zero_grad(set_to_none=n % 2 == 0)


@pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES)
def test_changes_between_steps_are_obeyed(options):
    step = both(100, change, clip_norm=1.0, **options)
    assert step.captured_steps >= 90


def test_flags_that_are_read_late_are_judged_as_of_their_step(monkeypatch):
    """As on a GPU: what has been frozen since had a gradient then."""
    lay_out = FlatSync._lay_out

    def lay_out_for_late_looks(sync):
        lay_out(sync)
        sync._keep = LATE

    monkeypatch.setattr(FlatSync, "_lay_out", lay_out_for_late_looks)

    def before(training, n):
        training.model.first.requires_grad_(not 30 <= n < 40)

    assert both(50, before, strategy="custom").captured_steps > 40


def test_a_rate_that_changes_at_every_step():
    scheduled = {}

    def before(training, n):
        if n:
            scheduled[id(training)].step()
        else:
            scheduled[id(training)] = torch.optim.lr_scheduler.OneCycleLR(training.optimizer, 0.02, total_steps=60)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the scheduler's too, of steps that it has not seen
        step = both(50, before, strategy="custom")
    assert step.captured_steps == 47


class Scaled(Criterion):
    """Holds a number on the host, as models with kernels of other packages do."""

    def __init__(self):
        super().__init__()
        self.scale = torch.ones((), dtype=torch.float64)

    def forward(self, output, batch):
        return {name: value * self.scale for name, value in super().forward(output, batch).items()}


def test_a_tensor_on_the_host_is_obeyed():
    def before(training, n):
        if n in (12, 13, 20):
            training.criterion.scale.mul_(1.5)

    assert both(30, before, strategy="custom", criterion=Scaled).captured_steps >= 20


@pytest.mark.parametrize("strategy", ["none", "standard", "custom", "overlap", "ingraph"])
def test_a_bad_gradient_changes_nothing(strategy):
    bad = copy.deepcopy(BATCHES[1])
    bad.energy[0] = torch.nan
    batches = [*BATCHES[:3]] * 11 + [bad] + [*BATCHES[:3]] * 2
    training = Training(cuda_graphs=True, strategy=strategy, batches=batches)
    training.run(33)
    before = {name: value.clone() for name, value in training.state().items()}
    with pytest.warns(UserWarning, match="NaN or infinite") if here.type == "cpu" else contextlib.nullcontext():
        training.run(1)
    after = training.state()
    assert after.pop("skipped") == before.pop("skipped") + 1
    assert all(torch.equal(after[name], value) for name, value in before.items() if name != "calls")


@pytest.mark.parametrize(
    ("optimizer", "settings"), [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {"amsgrad": True})]
)
def test_other_optimizers(optimizer, settings):
    assert both(40, strategy="custom", optimizer=optimizer, settings=settings).captured_steps == 37


def test_an_optimizer_that_cannot_skip_on_the_device_steps_outside():
    assert both(40, strategy="custom", settings={"fused": False}).captured_steps == 37


def test_the_optimizer_steps_as_torch_demands_under_capture(monkeypatch):
    seen = []

    def check(optimizer):  # as on a GPU
        capturable = [group["capturable"] for group in optimizer.param_groups]
        if recording._Tape.current is not None:
            assert all(capturable)
        seen.append(capturable)

    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # since 2.12; before
        monkeypatch.setattr(torch.optim.Optimizer, name, check, raising=False)
    training = Training(cuda_graphs=True, strategy="custom")
    training.run(40)
    assert [True] in seen
    assert training.optimizer.param_groups[0]["capturable"] is False


def test_hooks_of_the_optimizer_are_called_at_each_step():
    calls = []

    def before(training, n):
        if n == 30:
            training.optimizer.register_step_post_hook(lambda *_: calls.append(training))

    step = both(60, before, strategy="custom")
    assert len(calls) == 2 * 30
    assert step.captured_steps == 57


class Elsewhere(ddpkit.GradientSync):
    """Brings gradients to other places at every step."""

    def reduce(self):
        self.kept = [p.grad for p in self.parameters.values()]  # so that nothing comes to lie where these do
        for p in self.parameters.values():
            p.grad = None if p.grad is None else p.grad * 2


def test_gradients_that_a_strategy_brings_elsewhere():
    assert both(60, strategy=Elsewhere).captured_steps == 57


def test_settings_that_the_device_does_not_read_are_told_by_their_values():
    group, gpu = {"lr": torch.tensor(0.1)}, torch.device("cuda", 0)
    settings, on_device = steps._value([*group.values()], gpu), steps._value([*group.values()], torch.device("cpu"))
    group["lr"].fill_(0.2)
    assert settings != steps._value([*group.values()], gpu)
    assert on_device == steps._value([*group.values()], torch.device("cpu"))
    assert on_device != steps._value([group["lr"].clone()], torch.device("cpu"))


def test_a_step_is_recorded_once_a_planned_one_of_its_sizes_has_run():
    """Other ranks may not have seen what was not planned."""
    training = Training(cuda_graphs=True, strategy="custom")
    for _ in range(3):
        training.step(training.batches[0])
    assert training.step.captured_steps == 2
    training.step(training.batches[0], planned=True)
    assert training.step.captured_steps == 2
    training.step(training.batches[0], planned=True)
    assert training.step.captured_steps == 3


def test_what_cannot_be_recorded_is_refused():
    model = Toy()
    with pytest.raises(InputError, match="compile=False"):
        ddpkit.make_step(model, Criterion(), torch.optim.SGD(model.parameters(), 0.1), cuda_graphs=True)


# --- recordings themselves --------------------------------------------------------------------------------------------


def test_a_recording_repeats_operations_on_the_same_memory():
    x, total = torch.arange(6.0, device=here).reshape(2, 3), torch.zeros(3, device=here)

    def body():
        y = x.t().contiguous() @ x
        total.add_(y.sum(0))
        return [y[1:], torch.cat((y, y)).relu(), total]

    x.t().contiguous() @ x  # libraries set themselves up
    recording = make(body, here)
    recording.record()
    results = recording.run()
    for scale in (1.0, -2.0, 3.0):
        x.mul_(scale)
        before = total.clone()
        expected = x.t() @ x
        assert recording.run() is results
        torch.testing.assert_close(results[0], expected[1:])
        torch.testing.assert_close(results[1], torch.cat((expected, expected)).relu())
        torch.testing.assert_close(total, before + expected.sum(0))


def test_a_recording_holds_for_the_numbers_of_its_first_run():
    """As a CUDA graph does; otherwise the tests here could not tell what is obeyed from what is not."""
    factor, x = 2.0, torch.ones(3, device=here)
    recording = make(lambda: [x * factor, as_one(lambda given: given[0] + given[1], [x, factor])], here)
    recording.record()
    recording.run()
    factor = 5.0
    x.fill_(10.0)
    product, total = recording.run()
    assert product.tolist() == [20.0] * 3
    assert total.tolist() == [12.0] * 3


class Allocator:
    """How torch accounts for a pool of graphs and for a graph, whose capture fails.

    Args:
        version: of torch.
        fails: "body", "end", "begin" (with the pool in use), "before".
    """

    def __init__(self, version, fails):
        self.uses, self.under_way = 1, False  # another graph uses the pool
        self._version, self._fails = version, fails
        self._holds = self._to_end = self._ended = False

    def end(self, *_):
        if not self.under_way:
            raise RuntimeError("not currently recording")
        self.under_way = False

    def release(self, *_):
        self.uses -= 1

    def pool(self):
        if not self._ended:
            raise RuntimeError("without a preceding successful capture")

    def __enter__(self):
        if self._fails == "before":
            raise RuntimeError("before")
        self.uses += 1
        self.under_way = self._holds = self._to_end = True
        if self._fails == "begin":
            raise RuntimeError("begin")

    def __exit__(self, *_):
        if self._fails == "end" and self._version < (2, 12):
            raise RuntimeError("previous error")
        self.end()
        self._to_end = False
        if self._fails == "end":
            raise RuntimeError("previous error")
        self._ended = True

    def destroyed(self):
        if self._ended or (self._holds and self._version >= (2, 14)):
            if self._to_end:
                self.end()
            self.release()


@pytest.mark.parametrize("fails", ["body", "end", "begin", "before"])
@pytest.mark.parametrize("version", [(2, 11), (2, 12), (2, 13), (2, 14)])
def test_a_capture_that_fails_leaves_stream_and_allocator_as_they_were(version, fails, monkeypatch):
    def body():
        raise RuntimeError("body")

    allocator, streams = Allocator(version, fails), []
    fakes = {"CUDAGraph": lambda: allocator, "graph": lambda *_, **__: allocator, "set_stream": streams.append}
    for name, value in {**fakes, "current_stream": lambda: "before", "current_device": lambda: 0}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name, value in {"_cuda_endAllocateToPool": allocator.end, "_cuda_releasePool": allocator.release}.items():
        monkeypatch.setattr(torch._C, name, value, raising=False)
    monkeypatch.setattr(torch_private, "release", lambda: version)
    with pytest.raises(RecordingError, match=f"as a CUDA graph: {'body' if fails == 'end' else fails}"):
        recording.Cuda(body, "pool").record()
    allocator.destroyed()
    assert (streams, allocator.uses, allocator.under_way) == (["before"], 1, False)


def test_a_capture_that_fails_gives_all_memory_of_its_pool_back():
    if here.type == "cpu":
        pytest.skip("torch's allocator is that of a GPU")

    def allocates():
        return [torch.ones(1 << 24, device=here) * 2]

    def looks():
        (x,) = allocates()
        return [x * float(x.sum())]

    def reserved():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    allocates()[0].sum()  # libraries set themselves up
    before, pool = reserved(), torch.cuda.graph_pool_handle()
    whole, broken = (make(body, here, pool) for body in (allocates, looks))
    whole.record()
    whole.run()
    with pytest.raises(RecordingError):
        broken.record()
    assert reserved() > before
    whole.close()
    broken.close()
    assert reserved() == before


def test_a_look_at_a_number_is_refused():
    x = torch.ones(3, device=here)
    looking = make(lambda: [x * float(x.sum())], here)
    with pytest.raises(RecordingError, match="looks at a number" if here.type == "cpu" else "recorded as a CUDA graph"):
        (looking.run if here.type == "cpu" else looking.record)()


def packed(batch):
    """The same batch in one piece of memory, as loaders bring it."""
    kinds = {name: (str(x.dtype).removeprefix("torch."), tuple(x.shape)) for name, x in batch.tensors().items()}
    layout = Layout.of(kinds, batch.num_frames)
    result = unpack(torch.zeros(layout.size, dtype=torch.uint8, device=batch.positions.device), layout)
    for name, x in batch.tensors().items():
        getattr(result, name).copy_(x)
    return result


def test_a_batch_in_one_piece_of_memory_is_copied_in_one_go(monkeypatch):
    pieces = []
    copy_all = steps.copy_all
    monkeypatch.setattr(steps, "copy_all", lambda to, what: pieces.append(len(to)) or copy_all(to, what))
    plain, recorded = Training(cuda_graphs=False), Training(cuda_graphs=True)
    apart = recorded.batches
    recorded.batches = [packed(batch.with_neighbours()) for batch in apart]
    for training in (plain, recorded):
        training.run(40)
    assert recorded.step.captured_steps > 20
    assert not pieces
    recorded.batches = [
        batch.with_neighbours() if n % 2 else packed(batch.with_neighbours()) for n, batch in enumerate(apart)
    ]
    for training in (plain, recorded):
        training.run(8)
    assert pieces  # those that lie apart are copied tensor by tensor
    assert_same(plain, recorded)


def test_tensors_that_do_not_fill_their_memory_are_copied_apart():
    wide = torch.zeros(1000, dtype=torch.float64)
    few = [wide[:10], wide[20:30]]
    for tensors in ([], [torch.zeros(0)], few, [few[0].clone(), few[1].clone()], [torch.zeros(3, 4).t()]):
        copies, places = steps._copies(tensors)
        assert not places
        assert all(torch.equal(one, other) for one, other in zip(copies, tensors, strict=True))
