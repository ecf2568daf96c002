"""Trainings of many steps whose batches change their sizes, recorded and not: bits and memory. Long on a GPU, short on a CPU."""

import copy
import gc
import itertools
from pathlib import Path

import pytest
import torch
from in_memory import interpreted_once
from toy import Toy, random_batch

import ddpkit
from ddpkit.average import MovingAverage
from ddpkit.compile.backend import using
from ddpkit.data.capacities import padding_atoms
from ddpkit.experiments.models_table import build, model_spec
from ddpkit.padding import Capacity, own_sizes, pad

R_MAX = 3.5
SPECIES = ("H", "C", "O")
LEVELS = 3
RAISES = ("custom", "overlap")  # where a gradient is not finite
MIB = 2**20


def on_gpu(*values):
    return pytest.param("cuda", *values, marks=pytest.mark.gpu)


pytestmark = pytest.mark.usefixtures("deterministic")


@pytest.fixture(autouse=True, scope="module")
def _compiler(device):
    with interpreted_once() if device == "cpu" else using("inductor"):
        yield


def padded(number, frames=3, seed=0):
    """Batches of all sizes, filled up to one of few capacities."""
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 9, (number, frames), generator=draw).tolist()
    batches = [random_batch(size, seed=seed + n, r_max=R_MAX) for n, size in enumerate(sizes)]
    own = sorted((own_sizes(batch) for batch in batches), key=lambda sizes: sizes.edges)
    most = max(sizes.most for sizes in own)
    atoms = max(sizes.atoms for sizes in own)
    levels = [own[len(own) * (n + 1) // LEVELS - 1].edges for n in range(LEVELS)]
    filled = []
    for batch in batches:
        edges = next(level for level in levels if level >= batch.edge_index.shape[1])
        filled.append(pad(batch, Capacity(atoms + padding_atoms(edges, most), edges, frames + 1, most), R_MAX))
    return filled


def named(name):
    """A model of the configurations, always with the same weights."""
    torch.manual_seed(0)
    return build(model_spec(name, [f"model.r_max={R_MAX}"]), SPECIES, shifts=[0.0] * 3, precision="mixed")


class Training:
    """A model in training with its moving average."""

    def __init__(self, model, batches, device, *, cuda_graphs, **options):
        self.model = model.to(device)
        self.batches = [batch.to(device) for batch in batches]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.average = MovingAverage(self.model, 0.9)
        self.step = ddpkit.make_step(
            self.model, ddpkit.EnergyForcesLoss(), self.optimizer, compile=True, cuda_graphs=cuda_graphs, **options
        )
        self.rows = []

    def run(self, number, before=None):
        for n in range(number):
            if before is not None:
                before(self, n)
            output = self.step(self.batches[n % len(self.batches)])
            self.average.update()
            self.rows.append(torch.stack([*output.values(), self.step.grad_norm.to(output["loss"].dtype)]))

    def tensors(self):
        kept = {f"{n} {key}": x for n, state in enumerate(self.optimizer.state.values()) for key, x in state.items()}
        average = {f"average {name}": x for name, x in self.average.state_dict().items()}
        return {**self.model.state_dict(), **kept, **average, "skipped": self.step.skipped}


def assert_same(plain, recorded):
    one, two = torch.stack(plain.rows), torch.stack(recorded.rows)
    differ = (one != two) & ~(one.isnan() & two.isnan())
    assert not differ.any(), f"from step {int(differ.any(1).nonzero()[0])} on: {one[differ][:3]}, {two[differ][:3]}"
    second = recorded.tensors()
    for name, value in plain.tensors().items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(
    ("device", "name", "strategy"),
    [
        ("cpu", "allegro_tiny", "custom"),
        on_gpu("allegro_tiny", "custom"),
        on_gpu("allegro_tiny", "ingraph"),
        on_gpu("allegro_tiny", "standard"),
        on_gpu("allegro_tiny", "overlap"),
        on_gpu("allegro_small", "custom"),
    ],
    indirect=["device"],
)
def test_losses_of_many_steps_are_the_same_bits(device, name, strategy):
    steps, batches = (25, padded(4, frames=2)) if device == "cpu" else (2000, padded(200))
    plain, recorded = (
        Training(named(name), batches, device, cuda_graphs=graphs, strategy=strategy) for graphs in (False, True)
    )
    for training in (plain, recorded):
        training.run(steps)
    assert_same(plain, recorded)
    assert torch.stack(plain.rows).isfinite().all()
    assert plain.step.captured_steps == 0
    assert recorded.step.captured_steps >= steps - LEVELS
    assert recorded.step.recordings <= 2 * LEVELS


def schedule(span):
    """What is done between steps in three parts of `span` steps each; see `test_what_trainers_do_between_steps`."""
    rates = {}

    def before(training, n):
        optimizer, key = training.optimizer, id(training)
        half = [p for i, p in enumerate(training.model.parameters()) if i % 2]
        if n == 0:
            rates[key] = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=span + 1)
        elif n < span:
            rates[key].step()
        elif n == span:
            optimizer.param_groups[0]["lr"] = 1e-3
            rates[key] = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=span)
        else:
            rates[key].step(1.0)
        if n == 2 * span:
            training.trained_before = [p.requires_grad for p in half]
            for p in half:
                p.requires_grad_(False)
        if n == 2 * span + span // 2:
            for p, trained in zip(half, training.trained_before, strict=True):
                p.requires_grad_(trained)
        if n == 3 * span - 12:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if n == 3 * span - 4 and training.step.sync.name not in RAISES:
            place = n % len(training.batches)
            batch = training.batches[place]
            training.batches[place] = batch.replace(energy=batch.energy * torch.nan)

    return before


@pytest.mark.filterwarnings("ignore:.*NaN or infinite")
@pytest.mark.parametrize(
    ("device", "strategy"),
    [("cpu", "none"), *map(on_gpu, ("none", "standard", "custom", "overlap", "ingraph"))],
    indirect=["device"],
)
def test_what_trainers_do_between_steps(device, strategy):
    """OneCycleLR, ReduceLROnPlateau, half of the parameters frozen a while, a loaded optimizer, a bad gradient, an average."""
    span, batches = (26, padded(4)) if device == "cpu" else (80, padded(40))
    make = (lambda: Toy(dtype=torch.float32)) if device == "cpu" else (lambda: named("allegro_tiny"))
    plain, recorded = (
        Training(make(), batches, device, cuda_graphs=graphs, strategy=strategy, clip_norm=10.0)
        for graphs in (False, True)
    )
    for training in (plain, recorded):
        training.run(3 * span, schedule(span))
    assert_same(plain, recorded)
    assert recorded.step.skipped == (strategy not in RAISES)
    assert recorded.step.captured_steps >= 3 * span - 4 * LEVELS
    assert recorded.optimizer.param_groups[0]["lr"] < 1e-3


def resident():
    """Bytes of the resident set of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def memory(device):
    gc.collect()
    if device == "cpu":
        return 0, 0, resident()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), resident()


def test_memory_is_flat_over_many_replays(device):
    name, warm, steps = (None, 30, 30) if device == "cpu" else ("allegro_tiny", 100, 10_000)
    training = Training(named(name) if name else Toy(), padded(20), device, cuda_graphs=True, strategy="custom")
    training.run(warm)
    training.rows.clear()
    allocated, reserved, held = memory(device)
    replayed = training.step.captured_steps
    for batch in itertools.islice(itertools.cycle(training.batches), steps):
        training.step(batch)
    now = memory(device)
    assert training.step.captured_steps == replayed + steps
    assert now[0] - allocated < MIB, f"{allocated} to {now[0]} bytes allocated"
    assert now[1] <= reserved, f"{reserved} to {now[1]} bytes reserved"
    assert now[2] - held < 32 * MIB, f"{held} to {now[2]} bytes resident"


@pytest.mark.parametrize("device", [on_gpu()], indirect=True)
def test_no_replayed_step_makes_the_host_wait(device):
    training = Training(named("allegro_tiny"), padded(12), device, cuda_graphs=True, strategy="custom", clip_norm=10.0)
    training.run(40)
    replayed = training.step.captured_steps
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.run(24)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert training.step.captured_steps == replayed + 24
