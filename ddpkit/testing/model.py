"""What must hold of any model that is to be trained on forces; `validate_model` looks."""

import dataclasses
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ddpkit.batch import Batch
from ddpkit.data import Frame, collate
from ddpkit.data.frame import NUMBERS
from ddpkit.testing.suite import Outcome

Output = dict[str, Tensor]

_STEP = {torch.float64: 1e-4, torch.float32: 2e-2}  # Å, of finite differences


def validate_model(
    model: nn.Module,
    species: Sequence[str],
    r_max: float,
    *,
    dtype: torch.dtype = torch.float64,
    cases: Sequence[str] | None = None,
) -> list[Outcome]:
    """Checks a model against its contract and against physics, on random molecules and crystals.

    The contract: called with a `Batch`, the model returns a dict with `energy` `[frames]`, `forces` `[atoms, 3]`, and `stress`
    `[frames, 3, 3]` where the batch has cells. Forces and stress are derivatives of the energy. In training mode a loss on them
    can be differentiated by the parameters.

    Args:
        model: on the CPU; its parameters stay as they are.
        species: chemical symbols of the model's species, in order.
        r_max: cutoff, Å.
        dtype: what the model computes in. Float64 finds finer faults: give the model in float64 where it can be had.
        cases: names of cases; by default all.

    Returns:
        One outcome for each case, `"passed"` or `"failed"` with the reason.
    """
    setting = _Setting(model, tuple(species), float(r_max), dtype)
    was_training = model.training
    outcomes = []
    try:
        for name in cases or CASES:
            model.eval()
            try:
                CASES[name](setting)
                outcomes.append(Outcome(name, "passed"))
            except AssertionError as error:
                outcomes.append(Outcome(name, "failed", str(error)))
            except Exception as error:  # noqa: BLE001  (a model may raise anything; the other cases go on)
                line = traceback.extract_tb(error.__traceback__)[-1]
                why = f"{type(error).__name__}: {error} ({line.filename}, line {line.lineno})"
                outcomes.append(Outcome(name, "failed", why))
    finally:
        model.train(was_training)
    return outcomes


@dataclass(frozen=True)
class _Setting:
    model: nn.Module
    species: tuple[str, ...]
    r_max: float
    dtype: torch.dtype

    @property
    def tolerance(self) -> float:
        """By how much two ways of computing the same may differ, relative."""
        return 1e-9 if self.dtype == torch.float64 else 2e-3

    def frame(self, atoms: int, seed: int, *, periodic: bool = False) -> Frame:
        """Random atoms at least 1 Å apart, in a box in which each has some neighbours."""
        random = np.random.default_rng(seed)
        side = max(2.5, 0.6 * self.r_max) * atoms ** (1 / 3)
        positions = np.zeros((0, 3))
        while len(positions) < atoms:
            candidate = random.random(3) * side
            if all(np.linalg.norm(positions - candidate, axis=1) > 1.0):
                positions = np.vstack((positions, candidate))
        numbers = np.array([NUMBERS[self.species[n % len(self.species)]] for n in random.permutation(atoms)])
        cell = np.eye(3) * (side + 1) + random.normal(size=(3, 3)) * 0.2 if periodic else None
        return Frame(numbers, positions, 0.0, np.zeros((atoms, 3)), cell=cell, pbc=np.array([periodic] * 3))

    def batch(self, *frames: Frame) -> Batch:
        return collate(frames, self.species, self.r_max, labels=False)

    def __call__(self, *frames: Frame) -> Output:
        return {name: value.detach().double() for name, value in self.model(self.batch(*frames)).items()}

    def require(self, what: str, value: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
        """Asserts that two tensors agree relative to the largest number in them."""
        tolerance = self.tolerance if tolerance is None else tolerance
        scale = max(float(expected.abs().max()), 1e-6)
        error = float((value - expected).abs().max()) / scale
        assert error <= tolerance, f"{what}: off by {error:.1e} relative, where {tolerance:.0e} is allowed"


def _contract(s: _Setting) -> None:
    """Names, shapes and finite numbers; and a batch that is left as it was."""
    batch = s.batch(s.frame(6, 0, periodic=True), s.frame(3, 1, periodic=True))
    before = {name: tensor.clone() for name, tensor in batch.tensors().items()}
    output = s.model(batch)
    atoms = len(batch.positions)
    assert isinstance(output, dict), f"the model returned a {type(output).__name__}: return a dict"
    for name, shape in {"energy": (2,), "forces": (atoms, 3), "stress": (2, 3, 3)}.items():
        assert name in output, f"{name!r} is missing from the output, which has {', '.join(map(str, output))}"
        got = tuple(output[name].shape)
        assert got == shape, f"{name!r} has the shape {got} instead of {shape}"
        assert bool(torch.isfinite(output[name]).all()), f"{name!r} holds NaN or infinity"
    for name, tensor in batch.tensors().items():
        assert torch.equal(tensor, before[name]), f"the model wrote into {name!r} of its batch: let it work on a copy"
    s.model(s.batch(s.frame(4, 2)))  # without a cell


def _repeatable(s: _Setting) -> None:
    """The same batch twice in eval mode gives the same numbers, and training mode gives them too."""
    frame = s.frame(6, 3)
    first, second = s(frame), s(frame)
    s.model.train()
    training = s(frame)
    for name in ("energy", "forces"):
        s.require(f"{name} of the same batch again", second[name], first[name])
        s.require(f"{name} in training mode against eval mode", training[name], first[name])


def _turned(frame: Frame, matrix: np.ndarray, shift: float = 0.0) -> Frame:
    cell = None if frame.cell is None else frame.cell @ matrix.T
    return dataclasses.replace(frame, positions=frame.positions @ matrix.T + shift, cell=cell)


def _rotation(s: _Setting, sign: float = 1.0) -> None:
    """Energies stay, forces and stress turn along."""
    frame = s.frame(6, 4, periodic=True)
    orthogonal = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]
    matrix = sign * orthogonal * np.sign(np.linalg.det(orthogonal))
    plain, turned, m = s(frame), s(_turned(frame, matrix)), torch.from_numpy(matrix)
    s.require("energy", turned["energy"], plain["energy"])
    s.require("forces", turned["forces"], plain["forces"] @ m.T)
    s.require("stress", turned["stress"], m @ plain["stress"] @ m.T)


def _reflection(s: _Setting) -> None:
    """Energies of mirror images are equal."""
    _rotation(s, -1.0)


def _translation(s: _Setting) -> None:
    """Nothing changes, and forces add up to zero."""
    frame = s.frame(6, 6, periodic=True)
    plain, shifted = s(frame), s(_turned(frame, np.eye(3), 3.1))
    for name, value in plain.items():
        s.require(name, shifted[name], value)
    total = plain["forces"].sum(0)
    scale = float(plain["forces"].abs().max())
    assert float(total.abs().max()) <= max(s.tolerance * scale * 10, 1e-12), f"forces add up to {total.tolist()} eV/Å"


def _permutation(s: _Setting) -> None:
    """The order of atoms does not matter."""
    frame, order = s.frame(6, 7), np.random.default_rng(8).permutation(6)
    mixed = dataclasses.replace(frame, numbers=frame.numbers[order], positions=frame.positions[order])
    plain, out = s(frame), s(mixed)
    s.require("energy", out["energy"], plain["energy"])
    s.require("forces", out["forces"], plain["forces"][torch.from_numpy(order)])


def _batching(s: _Setting) -> None:
    """A batch is its frames one by one, an isolated atom among them."""
    frames = [s.frame(n, 9 + n) for n in (4, 1, 6)]
    together, alone = s(*frames), [s(frame) for frame in frames]
    for name in ("energy", "forces"):
        s.require(f"{name} of frames in one batch", together[name], torch.cat([out[name] for out in alone]))


def _cutoff(s: _Setting) -> None:
    """Energy and forces are continuous where an atom crosses the cutoff."""
    base = s.frame(4, 17)
    centre = base.positions.mean(0)
    outward = (base.positions[-1] - centre) / np.linalg.norm(base.positions[-1] - centre)
    width = 1e-5 if s.dtype == torch.float64 else 1e-3
    outputs = []
    for length in (s.r_max - width, s.r_max + width):  # from the first atom to the last
        positions = base.positions.copy()
        positions[-1] = positions[0] + outward * length
        outputs.append(s(dataclasses.replace(base, positions=positions)))
    for name in ("energy", "forces"):
        allowed = 1e-3 if s.dtype == torch.float64 else 2e-2
        s.require(f"{name} on both sides of the cutoff", outputs[1][name], outputs[0][name], allowed)


def _forces(s: _Setting) -> None:
    """Forces are minus the slope of the energy, by central differences of fourth order."""
    frame, step = s.frame(5, 18, periodic=True), _STEP[s.dtype]
    forces = s(frame)["forces"]
    direction = np.random.default_rng(19).normal(size=frame.positions.shape)

    def energy(t: float) -> float:
        return float(s(dataclasses.replace(frame, positions=frame.positions + t * direction))["energy"])

    expected = -_slope(energy, step)
    _close("forces against finite differences", float((forces * torch.from_numpy(direction)).sum()), expected, s)


def _stress(s: _Setting) -> None:
    """Stress is the slope of the energy by a strain, over the volume."""
    frame, step = s.frame(5, 20, periodic=True), _STEP[s.dtype] / 4
    stress = s(frame)["stress"][0]
    strain = np.random.default_rng(21).normal(size=(3, 3))
    strain = strain + strain.T
    assert frame.cell is not None
    cell = frame.cell

    def energy(t: float) -> float:
        matrix = np.eye(3) + t * strain
        return float(s(dataclasses.replace(frame, positions=frame.positions @ matrix, cell=cell @ matrix))["energy"])

    volume = abs(float(np.linalg.det(cell)))
    _close(
        "stress against finite differences",
        float((stress * torch.from_numpy(strain)).sum()),
        _slope(energy, step) / volume,
        s,
    )


def _parameters(s: _Setting) -> None:
    """Gradients of a loss on energies and forces by the parameters, against finite differences."""
    batch = s.batch(s.frame(5, 22), s.frame(4, 23))
    trained = {name: p for name, p in s.model.named_parameters() if p.requires_grad}
    assert trained, "the model has no parameter to train"
    generator = torch.Generator().manual_seed(24)
    atoms = len(batch.positions)
    weights = torch.randn(atoms, 3, generator=generator, dtype=torch.float64)
    s.model.train()

    def loss() -> Tensor:
        output = s.model(batch)
        return output["energy"].double().sum() / atoms + (output["forces"].double() * weights).sum()

    whole = loss()
    assert whole.requires_grad, "no parameter has a gradient: the output is detached in training mode"
    gradients = torch.autograd.grad(whole, list(trained.values()), allow_unused=True)
    for (name, p), gradient in zip(trained.items(), gradients, strict=True):
        direction = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        start = p.detach().clone()

        def along(t: float, p: Tensor = p, start: Tensor = start, direction: Tensor = direction) -> float:
            with torch.no_grad():
                p.copy_(start + t * direction)
            return float(loss().detach())

        try:
            expected = _slope(along, 1e-4 if s.dtype == torch.float64 else 1e-2)
        finally:
            with torch.no_grad():
                p.copy_(start)
        slope = 0.0 if gradient is None else float((gradient.double() * direction.double()).sum())
        _close(f"the gradient of {name!r} against finite differences", slope, expected, s)


def _slope(function: Callable[[float], float], step: float) -> float:
    """The derivative at 0, to fourth order."""
    near, far = (function(t) - function(-t) for t in (step, 2 * step))
    return (8 * near - far) / (12 * step)


def _close(what: str, value: float, expected: float, s: _Setting) -> None:
    allowed = 1e-6 if s.dtype == torch.float64 else 5e-2
    scale = max(abs(value), abs(expected), 1e-3)
    gap = abs(value - expected) / scale
    assert math.isfinite(value), f"{what}: {value}"
    assert gap <= allowed, f"{what}: {value:.6g} instead of {expected:.6g}"


CASES: dict[str, Callable[[_Setting], None]] = {
    "contract": _contract,
    "repeatable": _repeatable,
    "rotation": _rotation,
    "reflection": _reflection,
    "translation": _translation,
    "permutation": _permutation,
    "batching": _batching,
    "cutoff": _cutoff,
    "forces": _forces,
    "stress": _stress,
    "parameters": _parameters,
}
"""By name, in order."""
