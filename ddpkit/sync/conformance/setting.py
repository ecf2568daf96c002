"""What a case of the conformance suite is made of: its setting, its models, and what it asserts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ddpkit.ranks.group import environment
from ddpkit.sync import GradientSync, make_sync

TOLERANCE = 1e-10  # relative, float64
UNUSED = {"find_unused_parameters": True}  # of torch's wrapper, for what a step may leave unused


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


def case(*, ranks: int = 1, compiled: bool = False) -> Callable[[Case], Case]:
    """Registers a case under its function's name.

    Args:
        ranks: the fewest that it needs, 1 or 2.
        compiled: whether it goes through a compiled step.
    """

    def register(function: Case) -> Case:
        CASES[function.__name__] = function
        if ranks > 1:
            SEVERAL_RANKS.add(function.__name__)
        if compiled:
            COMPILED.add(function.__name__)
        return function

    return register


def applicable(world_size: int, *, compiled: bool = False) -> list[str]:
    """The names of the cases for so many ranks, through the plain loop or through a compiled step."""
    names = [name for name in CASES if (name in COMPILED) == compiled]
    return [name for name in names if world_size > 1 or name not in SEVERAL_RANKS]


def backward(loss: Tensor) -> None:
    """`loss.backward()`."""
    loss.backward()  # type: ignore[no-untyped-call]


def force_loss(setting: Setting, module: nn.Module, points: Tensor, step: int = 0) -> Tensor:
    """A loss on energies and forces; needs a double backward pass."""
    energy, forces = module(points)
    return setting.share((energy - 1) ** 2 + ((forces - points) ** 2).sum(-1), step)


def reference_loss(setting: Setting, reference: nn.Module, step: int = 0) -> Tensor:
    """The same in one process that has all points."""
    points = setting.all_points(step)
    energy, forces = reference(points)
    return ((energy - 1) ** 2 + ((forces - points) ** 2).sum(-1)).sum() / len(points)


def assert_gradients(setting: Setting, module: nn.Module, reference: nn.Module) -> None:
    """Compares all gradients with those of a reference, None included."""
    for (name, value), (_, expected) in zip(module.named_parameters(), reference.named_parameters(), strict=True):
        assert (value.grad is None) == (expected.grad is None), f"{name}.grad is {value.grad}, not {expected.grad}"
        if value.grad is not None and expected.grad is not None:
            setting.assert_close(value.grad, expected.grad, TOLERANCE, name)


def assert_equal_on_ranks(setting: Setting, tensors: Sequence[Tensor]) -> None:
    """Asserts that all ranks hold the same bits."""
    if setting.size == 1:
        return
    value = torch.cat([t.detach().double().flatten() for t in tensors])
    everyone = [torch.empty_like(value) for _ in range(setting.size)]
    torch.distributed.all_gather(everyone, value)
    assert all(torch.equal(value, other) for other in everyone), "ranks hold different values"


@contextmanager
def expects(kind: type[Exception], *words: str) -> Iterator[None]:
    """Asserts that an error is raised whose message has these words."""
    try:
        yield
    except kind as error:
        lacking = [word for word in words if word.lower() not in str(error).lower()]
        if lacking:
            raise AssertionError(f"{lacking} not in: {error}") from error
        return
    raise AssertionError(f"no {kind.__name__} was raised")
