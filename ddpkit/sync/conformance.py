"""The cases that a strategy must pass; `ddpkit.testing.run_conformance` runs them on real ranks, on GPUs where each has one.

Each case is a function of a `Setting`, called on every rank; it asserts. Gradients are compared in float64 with those of one
process that holds the batches of all ranks.
"""

import copy
import itertools
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from ddpkit.errors import InputError, NonFiniteGradientError, RankDisagreementError
from ddpkit.ranks.group import environment, store
from ddpkit.sync import GradientSync, acts_of, make_sync

TOLERANCE = 1e-10  # relative, float64

UNUSED = {"find_unused_parameters": True}

# What torch's DistributedDataParallel cannot do, and which of its options a case needs.
CANNOT = {
    "standard": {
        "unfrozen": "DistributedDataParallel never synchronises parameters that were frozen when it was built",
        "unfrozen_on_one_rank": "DistributedDataParallel never looks again at what is trained",
        "unfrozen_on_one_rank_from_nothing": "DistributedDataParallel never looks again at what is trained",
        "frozen_after_backward": "DistributedDataParallel never looks again at what is trained",
        "no_backward_on_some": "DistributedDataParallel communicates in backward(), so that every rank needs one",
        "not_finite": "DistributedDataParallel averages NaN into all ranks without a word",
        "calls": "synchronize() is a no-op: DistributedDataParallel communicates in backward()",
        "zero_grad_on_some": "DistributedDataParallel compares nothing",
        "no_gradient": "synchronize() is a no-op: DistributedDataParallel communicates in backward()",
    },
}
NEEDS = {"standard": {"unused": UNUSED, "partly_used": UNUSED, "changing_use": UNUSED}}


class Potential(nn.Module):
    """Energies of points and the forces on them, by a derivative that the loss differentiates again."""

    def __init__(self, *, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 5, dtype=dtype)
        self.outer = nn.Linear(5, 1, dtype=dtype)

    def energy(self, points: Tensor) -> Tensor:
        """`[points]`."""
        return self.outer(torch.tanh(self.inner(points))).squeeze(-1)  # type: ignore[no-any-return]

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Energies `[points]` and forces `[points, 3]`."""
        points = points.detach().requires_grad_()
        energy = self.energy(points)
        (gradient,) = torch.autograd.grad(energy.sum(), points, create_graph=True)
        return energy, -gradient


class Switched(nn.Module):
    """Layers that a call may or may not use."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(3, 1, dtype=torch.float64) for name in "abc"})

    def forward(self, points: Tensor, used: str) -> Tensor:
        """The sum of the layers named."""
        return sum((self.layers[name](points).tanh() for name in used), start=points.new_zeros(len(points), 1))


@dataclass
class Setting:
    """What a case is given.

    Attributes:
        strategy: the strategy under test.
        comm: how it communicates.
        options: its options.
        tolerance: difference that is allowed, relative and absolute, where it is more than rounding in float64: for a strategy
            that sends less than the whole gradient.
    """

    strategy: Any
    comm: str
    options: dict[str, Any]
    rank: int
    size: int
    tolerance: float = 0.0
    made: list[GradientSync] = field(default_factory=list)

    def sync(self, module: nn.Module, *others: nn.Module, **options: Any) -> GradientSync:
        """Attaches the strategy."""
        made = make_sync(
            self.strategy, module, *others, **({"comm": self.comm, "timeout": 20.0} | self.options | options)
        )
        self.made.append(made)
        return made

    def points(self, rank: int, step: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        """The batch of a rank, of unequal lengths: `[2 + 3 * rank, 3]`."""
        return random(2 + 3 * rank, 3, seed=100 * step + rank).to(dtype)

    def all_points(self, step: int = 0) -> Tensor:
        """The batches of all ranks."""
        return torch.cat([self.points(rank, step) for rank in range(self.size)])

    def assert_close(self, value: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
        """Asserts that tensors differ by no more than `tolerance`, or what is allowed of the strategy; `what` names them."""
        allowed = max(tolerance, self.tolerance)
        torch.testing.assert_close(
            value, expected, rtol=allowed, atol=allowed, msg=lambda message: f"{what}: {message}"
        )

    def share(self, terms: Tensor, step: int = 0) -> Tensor:
        """This rank's loss: the mean over ranks is the mean over all points."""
        return terms.sum() * self.size / len(self.all_points(step))


def random(*shape: int, seed: int) -> Tensor:
    """Normal numbers in float64, the same on any device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(environment().device)


Case = Callable[[Setting], None]
CASES: dict[str, Case] = {}
SEVERAL_RANKS: set[str] = set()
COMPILED: set[str] = set()


def case(*, ranks: int = 1) -> Callable[[Case], Case]:
    """Registers a case under its function's name."""

    def register(function: Case) -> Case:
        CASES[function.__name__] = function
        if ranks > 1:
            SEVERAL_RANKS.add(function.__name__)
        return function

    return register


def applicable(world_size: int, *, compiled: bool = False) -> list[str]:
    """The names of the cases for so many ranks, through the plain loop or through a compiled step."""
    names = [name for name in CASES if (name in COMPILED) == compiled]
    return [name for name in names if world_size > 1 or name not in SEVERAL_RANKS]


def run_cases(
    strategy: Any,
    names: Sequence[str],
    comm: str,
    options: dict[str, Any],
    tolerance: float = 0.0,
) -> list[tuple[str, str, str]]:
    """Runs cases on this rank, up to the first that fails on any rank.

    Args:
        strategy: a name, an import path, or a class.
        names: of the cases.
        comm: `"torch"` or `"mpi"`.
        options: the strategy's own.
        tolerance: see `Setting`.

    Returns:
        `(case, state, why)` of each, the same on all ranks.
    """
    here, reports = environment(), []
    known = strategy if isinstance(strategy, str) else ""
    for name in names:
        if name in CANNOT.get(known, {}):
            reports.append((name, "cannot", CANNOT[known][name]))
            continue
        needed = NEEDS.get(known, {}).get(name, {})
        setting = Setting(strategy, comm, options | needed, here.rank, here.world_size, tolerance)
        torch.manual_seed(here.rank)
        failure = ""
        try:
            with torch.device(here.device):
                CASES[name](setting)
        except Exception as error:  # noqa: BLE001  (reported)
            where = traceback.extract_tb(error.__traceback__)[-1]
            failure = f"rank {here.rank}: {type(error).__name__}: {error} ({where.name}, line {where.lineno})"
        for made in setting.made:
            made.close()
        everyone = _exchange(name, failure, here.rank, here.world_size)
        if any(everyone):
            return [*reports, (name, "failed", "; ".join(filter(None, everyone)))]
        reports.append((name, "passed", ", ".join(f"{k}={v}" for k, v in needed.items())))
    return reports


_exchanges = itertools.count()


def _exchange(name: str, failure: str, rank: int, size: int) -> list[str]:
    """What each rank has to say, through the store: after a failure, collectives may be out of step."""
    shared, here = store(), f"conformance/{next(_exchanges)}/{name}"
    shared.set(f"{here}/{rank}", failure or " ")
    keys = [f"{here}/{other}" for other in range(size)]
    shared.wait(keys, timedelta(seconds=60))
    return [shared.get(key).decode().strip() for key in keys]


def assert_gradients(setting: Setting, module: nn.Module, reference: nn.Module) -> None:
    """Compares all gradients with those of a reference, None included."""
    for (name, mine), (_, theirs) in zip(module.named_parameters(), reference.named_parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), f"{name}.grad is {mine.grad}, not {theirs.grad}"
        if mine.grad is not None and theirs.grad is not None:
            setting.assert_close(mine.grad, theirs.grad, TOLERANCE, name)


def assert_equal_on_ranks(setting: Setting, tensors: Sequence[Tensor]) -> None:
    """Asserts that all ranks hold the same bits."""
    if setting.size == 1:
        return
    mine = torch.cat([t.detach().double().flatten() for t in tensors])
    everyone = [torch.empty_like(mine) for _ in range(setting.size)]
    torch.distributed.all_gather(everyone, mine)
    assert all(torch.equal(mine, theirs) for theirs in everyone), "ranks hold different values"


def _backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def force_loss(setting: Setting, module: nn.Module, points: Tensor, step: int = 0) -> Tensor:
    """A loss on energies and forces; needs a double backward pass."""
    energy, forces = module(points)
    return setting.share((energy - 1) ** 2 + ((forces - points) ** 2).sum(-1), step)


def _train_beside_reference(setting: Setting, *, set_to_none: bool) -> None:
    model = Potential()
    sync = setting.sync(model)
    reference = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.5) for m in (model, reference)]
    for step in range(4):
        _backward(force_loss(setting, sync.module, setting.points(setting.rank, step), step))
        sync.synchronize()
        energy, forces = reference(setting.all_points(step))
        points = setting.all_points(step)
        _backward(((energy - 1) ** 2 + ((forces - points) ** 2).sum(-1)).sum() / len(points))
        assert_gradients(setting, model, reference)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    assert_equal_on_ranks(setting, list(model.parameters()))


@case()
def union_batch(setting: Setting) -> None:
    """Gradients of energies and forces (double backward) on unequal batches are those of one process with all of them."""
    _train_beside_reference(setting, set_to_none=True)


@case()
def zero_grad_in_place(setting: Setting) -> None:
    """The same with gradients that are set to zero instead of dropped."""
    _train_beside_reference(setting, set_to_none=False)


@case(ranks=2)
def different_seeds(setting: Setting) -> None:
    """Ranks that start from different weights and buffers hold rank 0's afterwards."""
    torch.manual_seed(setting.rank)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model.register_buffer("count", torch.tensor(7 + setting.rank))
    sync = setting.sync(model)
    torch.manual_seed(0)
    expected = nn.Linear(3, 4)
    assert torch.equal(model.get_parameter("0.weight"), expected.weight)
    assert int(model.get_buffer("count")) == 7
    _backward(sync.module(torch.randn(5, 3)).sum())
    sync.synchronize()
    assert_equal_on_ranks(setting, [p.grad for p in model.parameters() if p.grad is not None])


def _switched(setting: Setting, uses: Sequence[Sequence[str]]) -> None:
    """Trains with layers that change, `uses[step][rank]`, and compares with the sum over ranks."""
    model = Switched()
    sync = setting.sync(model)
    reference = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
    for step, used in enumerate(uses):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None if step % 2 else p.grad
        _backward(setting.share(sync.module(setting.points(setting.rank, step), used[setting.rank]) ** 2, step))
        sync.synchronize()
        total = sum(
            ((reference(setting.points(rank, step), used[rank]) ** 2).sum() for rank in range(setting.size)),
            start=torch.zeros(()),
        )
        _backward(total / len(setting.all_points(step)))
        assert_gradients(setting, model, reference)
        for optimizer in optimizers:
            optimizer.step()


@case()
def unused(setting: Setting) -> None:
    """A parameter that no rank uses keeps None."""
    _switched(setting, [["ab"] * setting.size] * 3)


@case(ranks=2)
def partly_used(setting: Setting) -> None:
    """A parameter that some ranks do not use gets the mean over all ranks, theirs being zero."""
    _switched(setting, [["ab"] + ["a"] * (setting.size - 1)] * 3)


@case(ranks=2)
def changing_use(setting: Setting) -> None:
    """What is used, and where, changes from step to step."""
    rest = setting.size - 1
    _switched(
        setting,
        [["abc"] * (rest + 1), ["a"] + ["ab"] * rest, ["c"] * rest + ["a"], ["abc"] * (rest + 1), ["b"] * (rest + 1)],
    )


@case(ranks=2)
def no_backward_on_some(setting: Setting) -> None:
    """A rank without any backward pass counts as zero: in the first step, later, and after another set was trained."""
    last = setting.size - 1
    for away in (0, last):
        _with_ranks_away(setting, away)


def _with_ranks_away(setting: Setting, away: int) -> None:
    """Trains while one rank has no backward pass in some steps, and compares with the sum over the others."""
    model = Potential()
    sync = setting.sync(model)
    reference = copy.deepcopy(model)
    for step in range(7):
        for m in (model, reference):
            m.inner.bias.requires_grad_(not 3 <= step < 5)
            m.zero_grad(set_to_none=step % 2 == 0)
            m.inner.bias.grad = None
        present = [rank for rank in range(setting.size) if rank != away or step in (1, 4)]
        if setting.rank in present:
            _backward(force_loss(setting, sync.module, setting.points(setting.rank, step), step))
        sync.synchronize()
        for rank in present:
            _backward(force_loss(setting, reference, setting.points(rank, step), step) / setting.size)
        assert_gradients(setting, model, reference)
    assert_equal_on_ranks(setting, [p.grad for p in model.parameters() if p.grad is not None])


@case()
def unfrozen(setting: Setting) -> None:
    """A parameter that is frozen at first is synchronised once it is not, and left alone once it is frozen again."""
    model = Potential()
    model.inner.requires_grad_(False)
    sync = setting.sync(model)
    reference = copy.deepcopy(model)
    for step in range(6):
        for m in (model, reference):
            m.inner.requires_grad_(2 <= step < 4)
            m.zero_grad()
        _backward(force_loss(setting, sync.module, setting.points(setting.rank, step), step))
        sync.synchronize()
        energy, forces = reference(setting.all_points(step))
        points = setting.all_points(step)
        _backward(((energy - 1) ** 2 + ((forces - points) ** 2).sum(-1)).sum() / len(points))
        assert_gradients(setting, model, reference)


@case()
def mixed_dtypes(setting: Setting) -> None:
    """Parameters of several dtypes."""
    dtypes = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16}
    model = nn.ModuleDict({name: nn.Linear(3, 2, dtype=dtype) for name, dtype in dtypes.items()})
    whole = _Sum(model)
    sync = setting.sync(whole)
    reference = copy.deepcopy(whole)
    for step in range(2):
        _backward(setting.share(sync.module(setting.points(setting.rank, step)), step))
        sync.synchronize()
        points = setting.all_points(step)
        _backward(reference(points).sum() / len(points))
        for (name, p), q in zip(whole.named_parameters(), reference.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert p.grad.dtype == p.dtype
            tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}[p.dtype]
            setting.assert_close(p.grad, q.grad, tolerance, name)
        whole.zero_grad()
        reference.zero_grad()


class _Sum(nn.Module):
    """Adds layers of several dtypes in float64."""

    def __init__(self, layers: nn.ModuleDict) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, points: Tensor) -> Tensor:
        return sum(
            (layer(points.to(next(layer.parameters()).dtype)).double().sin().sum(-1) for layer in self.layers.values()),
            start=torch.zeros(()),
        )


@case()
def shared(setting: Setting) -> None:
    """A parameter that two layers share counts once."""
    model = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), nn.Tanh(), nn.Linear(3, 3, dtype=torch.float64))
    model[2].weight = model[0].weight
    sync = setting.sync(model)
    reference = copy.deepcopy(model)
    for step in range(3):
        _backward(setting.share(sync.module(setting.points(setting.rank, step)) ** 2, step))
        sync.synchronize()
        points = setting.all_points(step)
        _backward((reference(points) ** 2).sum() / len(points))
        assert_gradients(setting, model, reference)
        model.zero_grad()
        reference.zero_grad()


@case()
def accumulation(setting: Setting) -> None:
    """Micro-batches inside `no_sync()` stay on their rank; the one after them brings the sum of all."""
    model = Potential()
    sync = setting.sync(model)
    reference = copy.deepcopy(model)
    for step in range(3):
        calls = sync.stats.calls
        halves = setting.points(setting.rank, step).tensor_split(3)
        for half in halves[:-1]:
            with sync.no_sync():
                _backward(force_loss(setting, sync.module, half, step))
                before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
                sync.synchronize()
                after = [p.grad for p in model.parameters() if p.grad is not None]
                assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "no_sync() communicated"
        _backward(force_loss(setting, sync.module, halves[-1], step))
        sync.synchronize()
        assert sync.stats.calls == calls + 1
        points = setting.all_points(step)
        energy, forces = reference(points)
        _backward(((energy - 1) ** 2 + ((forces - points) ** 2).sum(-1)).sum() / len(points))
        assert_gradients(setting, model, reference)
        model.zero_grad(set_to_none=step % 2 == 0)
        reference.zero_grad(set_to_none=step % 2 == 0)


class Weights(nn.Module):
    """A criterion that learns how much each term counts, by the logarithm of its variance (arXiv:1705.07115)."""

    def __init__(self, *, start: float = 0.0) -> None:
        super().__init__()
        self.energy = nn.Parameter(torch.full((), start, dtype=torch.float64))
        self.forces = nn.Parameter(torch.full((), start, dtype=torch.float64))
        self.register_buffer("count", torch.full((), start))

    def forward(self, output: tuple[Tensor, Tensor], points: Tensor) -> Tensor:
        """The terms of all points, `[points]`."""
        energy, forces = output
        terms = (energy - 1) ** 2, ((forces - points) ** 2).sum(-1)
        weights = self.energy, self.forces
        return sum(
            (torch.exp(-w) * term + w for w, term in zip(weights, terms, strict=True)), start=points.new_zeros(())
        )


@case()
def further_modules(setting: Setting) -> None:
    """A criterion's trained parameters are made alike, and follow the gradient over the union; likewise with micro-batches."""
    torch.manual_seed(setting.rank)
    model, criterion, second = Potential(), Weights(start=setting.rank / 10), Weights()
    criterion.shared, second.frozen = model.outer.bias, nn.Parameter(torch.ones(2), requires_grad=False)
    sync = setting.sync(model, criterion, second)
    expected = [
        *dict(model.named_parameters()),
        *(f"{kind}.{n}" for kind in ("Weights", "Weights_2") for n in ("energy", "forces")),
    ]
    assert list(sync.parameters) == expected, f"{list(sync.parameters)} instead of {expected}"
    trained = nn.ModuleList([model, criterion, second])
    assert_equal_on_ranks(setting, [*trained.parameters(), *trained.buffers()])
    reference = copy.deepcopy(trained)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.5) for m in (trained, reference)]
    for step in range(4):
        parts = setting.points(setting.rank, step).tensor_split(1 + step % 2)
        for part in parts[:-1]:
            with sync.no_sync():
                _backward(setting.share(criterion(sync.module(part), part) + second(sync.module(part), part), step))
                sync.synchronize()
        _backward(
            setting.share(
                criterion(sync.module(parts[-1]), parts[-1]) + second(sync.module(parts[-1]), parts[-1]), step
            )
        )
        sync.synchronize()
        points = setting.all_points(step)
        output = reference[0](points)
        _backward((reference[1](output, points) + reference[2](output, points)).sum() / len(points))
        assert_gradients(setting, trained, reference)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
    assert_equal_on_ranks(setting, list(trained.parameters()))


@case(ranks=2)
def further_modules_partly_used(setting: Setting) -> None:
    """Of a further module that some ranks do not use, or none."""
    model, beside = nn.Linear(3, 1, dtype=torch.float64), Switched()
    sync = setting.sync(model, beside)
    reference = copy.deepcopy(beside)
    rest = setting.size - 1
    for step, used in enumerate([["ab"] + ["a"] * rest, [""] * (rest + 1), ["c"] * rest + [""], ["abc"] * (rest + 1)]):
        for m in (model, beside, reference):
            m.zero_grad()
        points = setting.points(setting.rank, step)
        _backward(setting.share(sync.module(points) ** 2 + beside(points, used[setting.rank]) ** 2, step))
        sync.synchronize()
        terms = [(reference(setting.points(rank, step), used[rank]) ** 2).sum() for rank in range(setting.size)]
        if any(used):
            _backward(torch.stack(terms).sum() / len(setting.all_points(step)))
        assert_gradients(setting, beside, reference)


@case(ranks=2)
def mismatch_of_further_modules(setting: Setting) -> None:
    """A further module that differs on one rank, or that it lacks; and one that drifts away."""
    odd = setting.rank == setting.size - 1
    last = f"rank {setting.size - 1}"
    beside = nn.Linear(*((2, 3) if odd else (3, 2)), bias=False)
    with _expects(RankDisagreementError, last, "'Linear.weight'", "shape"):
        setting.sync(Potential(), beside)
    with _expects(RankDisagreementError, last, "'Weights.energy'"):
        setting.sync(Potential(), *([] if odd else [Weights()]))
    criterion, model = Weights(), Potential()
    sync = setting.sync(model, criterion, check_every=1)
    if odd:
        criterion.energy.data += 1e-9
    points = setting.points(setting.rank)
    with _expects(RankDisagreementError, last, "'Weights.energy'"):
        _backward(setting.share(criterion(sync.module(points), points)))
        sync.synchronize()


@case(ranks=2)
def two_ranks_bitwise(setting: Setting) -> None:
    """At two ranks the average has the bits of (a + b) / 2; at any number of them, all ranks have the same bits."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(17, 17, bias=False) for _ in range(5)))
    sync = setting.sync(model)
    for step in range(3):
        local = []
        for rank in range(setting.size):
            copied = copy.deepcopy(model)
            copied.zero_grad()
            _backward(copied(random(9, 17, seed=10 * step + rank).float()).square().sum())
            local.append([p.grad for p in copied.parameters()])
        _backward(sync.module(random(9, 17, seed=10 * step + setting.rank).float()).square().sum())
        sync.synchronize()
        gradients = [p.grad for p in model.parameters()]
        if setting.size == 2:
            for mine, a, b in zip(gradients, *local, strict=True):
                assert mine is not None
                average = (a + b) / 2  # type: ignore[operator]
                setting.assert_close(mine, average, 0.0, "the average of two ranks has other bits than (a + b) / 2")
        assert_equal_on_ranks(setting, [g for g in gradients if g is not None])
        model.zero_grad()


@case()
def not_finite(setting: Setting) -> None:
    """NaN or inf on one rank is an error on all, names rank and parameter, and is not applied."""
    for bad in (torch.nan, torch.inf):
        _expect_not_finite(setting, bad, setting.size - 1)


@contextmanager
def _expects(kind: type[Exception], *words: str) -> Iterator[None]:
    """Asserts that an error is raised whose message has these words."""
    try:
        yield
    except kind as error:
        lacking = [word for word in words if word.lower() not in str(error).lower()]
        if lacking:
            raise AssertionError(f"{lacking} not in: {error}") from error
        return
    raise AssertionError(f"no {kind.__name__} was raised")


def _expect_not_finite(setting: Setting, bad: float, guilty: int) -> None:
    model = Switched()
    sync = setting.sync(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    if setting.rank == guilty:
        model.get_parameter("layers.b.weight").register_hook(lambda g: g * bad)  # type: ignore[no-untyped-call]
    before = [p.detach().clone() for p in model.parameters()]
    _backward(sync.module(setting.points(setting.rank), "abc").sum())
    with _expects(NonFiniteGradientError, f"rank {guilty}", "layers.b.weight"):
        sync.synchronize()
        optimizer.step()
        sync.stats  # noqa: B018  (looks at the flags)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "the update was applied"


def _expect_disagreement(setting: Setting, model: nn.Module, *words: str) -> None:
    with _expects(RankDisagreementError, f"rank {setting.size - 1}", *words):
        setting.sync(model)


@case(ranks=2)
def mismatch_of_names(setting: Setting) -> None:
    """A parameter that one rank lacks or has in excess."""
    odd = setting.rank == setting.size - 1
    _expect_disagreement(setting, nn.Linear(3, 2, bias=not odd), "'bias'")
    _expect_disagreement(setting, nn.Linear(3, 2, bias=odd), "'bias'")


@case(ranks=2)
def mismatch_of_shapes(setting: Setting) -> None:
    """A parameter of another shape, even of the same length."""
    odd = setting.rank == setting.size - 1
    _expect_disagreement(setting, nn.Linear(*((2, 3) if odd else (3, 2)), bias=False), "weight", "shape", "(3, 2)")


@case(ranks=2)
def mismatch_of_dtypes(setting: Setting) -> None:
    """A parameter of another dtype."""
    odd = setting.rank == setting.size - 1
    _expect_disagreement(setting, nn.Linear(3, 2, dtype=torch.float64 if odd else None), "weight", "float64")


@case(ranks=2)
def mismatch_of_frozen(setting: Setting) -> None:
    """A parameter that one rank does not train."""
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(setting.rank != setting.size - 1)
    _expect_disagreement(setting, model, "bias", "requires_grad")


@case(ranks=2)
def unfrozen_on_one_rank(setting: Setting) -> None:
    """A parameter that one rank alone begins to train."""
    model = Potential()
    model.inner.requires_grad_(False)
    sync = setting.sync(model)
    if setting.rank == setting.size - 1:
        model.inner.requires_grad_(True)
    _backward(force_loss(setting, sync.module, setting.points(setting.rank)))
    with _expects(RankDisagreementError, f"rank {setting.size - 1}"):
        sync.synchronize()
        sync.stats  # noqa: B018  (looks at the flags)


@case(ranks=2)
def unfrozen_on_one_rank_from_nothing(setting: Setting) -> None:
    """A rank that begins to train where no rank has trained anything."""
    model = Potential().requires_grad_(False)
    sync = setting.sync(model)
    sync.synchronize()
    if setting.rank == setting.size - 1:
        model.requires_grad_(True)
        _backward(force_loss(setting, sync.module, setting.points(setting.rank)))
    with _expects(RankDisagreementError, f"rank {setting.size - 1}", "requires_grad"):
        sync.synchronize()


@case(ranks=2)
def frozen_after_backward(setting: Setting) -> None:
    """What is frozen between the backward pass and `synchronize()`, on all ranks or on one, is agreed upon first."""
    model = Potential()
    sync = setting.sync(model)
    reference = copy.deepcopy(model)
    for step in range(4):
        model.zero_grad()
        reference.zero_grad()
        _backward(force_loss(setting, sync.module, setting.points(setting.rank, step), step))
        if step == 1:
            model.inner.weight.requires_grad_(False)
        sync.synchronize()
        for rank in range(setting.size):
            _backward(force_loss(setting, reference, setting.points(rank, step), step) / setting.size)
        if step:
            model.inner.weight.grad = reference.inner.weight.grad
        assert_gradients(setting, model, reference)
    model.zero_grad()
    _backward(force_loss(setting, sync.module, setting.points(setting.rank)))
    if setting.rank == 0:
        model.outer.bias.requires_grad_(False)
    with _expects(RankDisagreementError, "rank 0", "requires_grad"):
        sync.synchronize()
        _backward(force_loss(setting, sync.module, setting.points(setting.rank)))
        sync.synchronize()


@case(ranks=2)
def zero_grad_on_some(setting: Setting) -> None:
    """A rank that forgets `zero_grad()` would bring the last average in again."""
    model = Potential()
    sync = setting.sync(model)
    with _expects(RankDisagreementError, f"rank {setting.size - 1}", "zero_grad"):
        for step in range(3):
            _backward(force_loss(setting, sync.module, setting.points(setting.rank, step), step))
            sync.synchronize()
            if setting.rank < setting.size - 1 or step == 0:
                model.zero_grad()
        sync.stats  # noqa: B018  (looks at the flags)


@case(ranks=2)
def mismatch_of_options(setting: Setting) -> None:
    """Options that differ on one rank, and a strategy that one rank alone has not come to make."""
    odd = setting.rank == setting.size - 1
    with _expects(RankDisagreementError, f"rank {setting.size - 1}", "check_every"):
        setting.sync(Potential(), check_every=3 if odd else 2)


@case(ranks=2)
def calls(setting: Setting) -> None:
    """A rank that synchronises twice where the others do once."""
    model = Potential()
    sync = setting.sync(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with _expects(RankDisagreementError, "number of optimizer steps"):
        for step in range(2):
            _backward(force_loss(setting, sync.module, setting.points(setting.rank)))
            sync.synchronize()
            if setting.rank != 0 or step:
                optimizer.step()
        sync.stats  # noqa: B018  (looks at the flags)


@case()
def no_gradient(setting: Setting) -> None:
    """`synchronize()` without any backward pass."""
    sync = setting.sync(Potential())
    with _expects(ValueError, "backward"):
        sync.synchronize()


@case(ranks=2)
def drift(setting: Setting) -> None:
    """`check_every` finds parameters that differ between ranks."""
    model = Potential()
    sync = setting.sync(model, check_every=2)
    _backward(force_loss(setting, sync.module, setting.points(setting.rank)))
    sync.synchronize()
    if setting.rank == setting.size - 1:
        with torch.no_grad():
            model.outer.weight[0, 0].add_(1e-9)
    model.zero_grad()
    with _expects(RankDisagreementError, f"rank {setting.size - 1}", "outer.weight"):
        _backward(force_loss(setting, sync.module, setting.points(setting.rank)))
        sync.synchronize()


@case(ranks=2)
def stats(setting: Setting) -> None:
    """Bytes, collectives and seconds are told."""
    model = Potential()
    sync = setting.sync(model)
    for _ in range(2):
        _backward(force_loss(setting, sync.module, setting.points(setting.rank)))
        sync.synchronize()
        model.zero_grad()
    told = sync.stats
    assert told.calls == 2
    assert told.bytes >= sum(p.numel() for p in model.parameters()) * 2
    assert told.collectives >= 1
    assert told.seconds > 0


def compiled(function: Case) -> Case:
    """Registers a case that goes through a compiled step."""
    CASES[function.__name__] = function
    COMPILED.add(function.__name__)
    return function


def _compiled_step(setting: Setting, parts: int, steps: int = 3, **options: Any) -> int:
    """Takes compiled steps of SGD, and compares what they change with gradients over the union of the ranks' batches.

    Returns:
        How many were replayed.
    """
    from ddpkit.step import make_step

    def batches(rank: int, step: int) -> list[dict[str, Tensor]]:
        count = torch.tensor(float(len(setting.all_points(step))), dtype=torch.float64)
        doubled = torch.cat([setting.points(rank, step)] * 2)
        return [{"points": part, "count": 2 * count} for part in doubled.tensor_split(parts)]

    def criterion(output: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> Tensor:
        energy, forces = output
        terms = (energy - 1) ** 2 + ((forces - batch["points"]) ** 2).sum(-1)
        return terms.sum() * (setting.size / batch["count"])

    torch.manual_seed(setting.rank)
    model = _OfDict(Potential())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    step = make_step(
        model, criterion, optimizer, strategy=setting.strategy, compile=True, comm=setting.comm,
        examples=batches(setting.rank, 9), **({"timeout": 60.0} | setting.options | options),
    )  # fmt: skip
    setting.made.append(step.sync)
    for number in range(steps):
        before = copy.deepcopy(model)
        step(batches(setting.rank, number), planned=True)
        for rank in range(setting.size):
            for batch in batches(rank, number):
                _backward(criterion(before(batch), batch) / setting.size)
        for (name, mine), theirs in zip(model.named_parameters(), before.parameters(), strict=True):
            assert theirs.grad is not None
            change = (theirs - mine).detach()
            setting.assert_close(change, theirs.grad, 1e-9, name)
        with torch.no_grad():  # a small step from where it was, lest it diverges
            for mine, theirs in zip(model.parameters(), before.parameters(), strict=True):
                mine.copy_(theirs - 0.01 * (theirs - mine))
    assert_equal_on_ranks(setting, list(model.parameters()))
    return step.captured_steps


class _OfDict(nn.Module):
    """A potential that takes its points from a dict."""

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self.potential = potential

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.potential(batch["points"])  # type: ignore[no-any-return]


@compiled
def compiled_union_batch(setting: Setting) -> None:
    """A compiled step follows the gradient over the union of unequal batches, double backward included."""
    _compiled_step(setting, 1)


@compiled
def compiled_accumulation(setting: Setting) -> None:
    """Likewise with micro-batches."""
    _compiled_step(setting, 2)


@compiled
def recorded_steps(setting: Setting) -> None:
    """Steps that are recorded and replayed follow it as well; a strategy that acts during the backward pass refuses them."""
    from ddpkit.capture.steps import STEADY
    from ddpkit.compile.backend import using

    steps = STEADY + 6  # in the last ones the update is replayed too
    with using("interpreted") if environment().device.type == "cpu" else nullcontext():
        if acts_of(setting.strategy) == "during backward":
            try:
                _compiled_step(setting, 1, cuda_graphs=True)
            except InputError as error:
                assert "cuda_graphs" in str(error), error  # noqa: PT017  (no pytest here)
                return
            raise AssertionError("cuda_graphs=True was taken by a strategy whose steps cannot be recorded")
        for parts in (1, 2):
            replayed = _compiled_step(setting, parts, steps, cuda_graphs=True)
            assert replayed >= steps - 2, f"{replayed} of {steps} steps were replayed"


class _Weighted(Weights):
    """With an attribute that is no tensor."""

    factor = 1.0

    def __call__(self, output: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return self.factor * super().__call__(output, batch["points"]).sum() / batch["count"]


def _changing_steps(setting: Setting, *, compile: bool) -> None:  # noqa: A002  (as in make_step)
    """Takes steps between which parameters are frozen, unfrozen and given to the optimizer, and an attribute changes."""
    from ddpkit.compile.backend import using
    from ddpkit.step import make_step

    def optimizer_of(model: _OfDict, criterion: _Weighted) -> torch.optim.Optimizer:
        """Without the last bias."""
        held = [p for p in model.parameters() if p is not model.potential.outer.bias]
        return torch.optim.SGD([*held, *criterion.parameters()], lr=0.1, momentum=0.5, weight_decay=0.01)

    torch.manual_seed(setting.rank)
    model, criterion = _OfDict(Potential()), _Weighted()
    optimizer = optimizer_of(model, criterion)
    with using("interpreted"):  # what is traced counts here, not what is made of it
        step = make_step(
            model, criterion, optimizer, strategy=setting.strategy, compile=compile, comm=setting.comm,
            **({"timeout": 60.0} | (UNUSED if setting.strategy == "standard" else {}) | setting.options),
        )  # fmt: skip
        setting.made.append(step.sync)
        model_2, criterion_2 = copy.deepcopy((model, criterion))
        reference = optimizer_of(model_2, criterion_2)
        both = (model, criterion, optimizer), (model_2, criterion_2, reference)
        trained, expected = nn.ModuleList([model, criterion]), nn.ModuleList([model_2, criterion_2])
        for number in range(6):
            for one, loss_of, opt in both:
                one.potential.inner.requires_grad_(number not in (1, 2))
                loss_of.energy.requires_grad_(number != 3)
                loss_of.factor = 0.5 if number in (2, 4) else 1.0
                if number == 5:
                    opt.add_param_group({"params": [one.potential.outer.bias]})
            count = torch.tensor(float(len(setting.all_points(number))), dtype=torch.float64)
            step({"points": setting.points(setting.rank, number), "count": count / setting.size})
            expected.zero_grad()
            whole = {"points": setting.all_points(number), "count": count}
            _backward(criterion_2(model_2(whole), whole))
            reference.step()
            for (name, p), q in zip(trained.named_parameters(), expected.parameters(), strict=True):
                setting.assert_close(p, q, 1e-9, f"{name} at step {number}")
                assert p.requires_grad or p.grad is None, f"{name} is frozen and has a gradient at step {number}"
        assert_equal_on_ranks(setting, list(trained.parameters()))


@compiled
def changing_steps(setting: Setting) -> None:
    """What is frozen, unfrozen, given to the optimizer or changed between steps is obeyed; a criterion is trained too."""
    if acts_of(setting.strategy) != "in graph":
        _changing_steps(setting, compile=False)
    _changing_steps(setting, compile=True)
