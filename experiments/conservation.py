"""Whether a model conserves what molecular dynamics conserves: forces against energies, energy, momentum."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.data import covalent_radii
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE
from numpy.typing import NDArray

from ddpkit.data.frame import Frame
from ddpkit.data.neighbours import neighbour_list
from ddpkit.errors import InputError

Vector = NDArray[np.float64]
COUNTS = (60, 85, 120, 170)
"""Time steps of the runs that are compared, all equally long."""

_STEPS_A_PERIOD = 16  # of the fastest vibration, at least
_FARTHEST = 0.04  # Å, that atoms move in a step at most: potentials bend over some tenths of an Å
_FINER = 2  # times that steps are halved where they are too long to tell the order
_ORDER = 2.0
_ORDER_BOUND = 0.2
_RELAXATION = 150  # steps at most
_FAR = 1.0  # Å from where it started: an atom that goes farther finds another shape
_TOO_NEAR = 0.55  # of the sum of covalent radii
_SHAKE = 0.06  # Å, standard deviation of each coordinate
_TOO_HOT = 12.0  # times the temperature asked for
_DISPLACEMENTS = (0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)  # Å, of the atom that moves most
_STENCIL = ((1, 3 / 4), (2, -3 / 20), (3, 1 / 60))  # central differences of sixth order


@dataclass(frozen=True)
class Verdict:
    """One line of the check.

    Attributes:
        what: is compared.
        passes: whether it holds.
        figure: what was measured, in words.
        bound: what it was held against, and why.
    """

    what: str
    passes: bool
    figure: str
    bound: str


@dataclass(frozen=True)
class Bounds:
    """What rounding explains.

    Attributes:
        forces: of differences from finite differences, relative.
        momentum: of the momentum gained, relative to the sum of all atoms' momenta.
        ranks: of forces on several ranks from those on one, relative to the largest.
        why: in words.
    """

    forces: float
    momentum: float
    ranks: float
    why: str


DOUBLE = Bounds(1e-6, 1e-9, 1e-10, "rounding of float64")
SINGLE = Bounds(5e-4, 1e-4, 1e-4, "rounding of float32 layers")


def prepare(atoms: Atoms, temperature: float, seed: int) -> str:
    """Relaxes a configuration as far as it keeps its shape, and gives velocities; says what was done.

    Args:
        atoms: with a calculator; changed in place.
        temperature: K, which is what remains where half of the kinetic energy goes into vibrations.
        seed: of the velocities.
    """
    start = atoms.positions.copy()
    atoms.get_forces()  # what cannot be computed at all is told here
    optimizer = FIRE(atoms, logfile=None, maxstep=0.05)
    collapsed = False
    try:
        for _ in optimizer.irun(fmax=0.05, steps=_RELAXATION):
            collapsed = _collapsed(atoms)
            if collapsed or np.linalg.norm(atoms.positions - start, axis=1).max() > _FAR:
                break
    except InputError:
        collapsed = True
    if collapsed:
        atoms.positions = start
    steps = 0 if collapsed else optimizer.nsteps
    MaxwellBoltzmannDistribution(atoms, temperature_K=2 * temperature, rng=np.random.default_rng(seed))
    Stationary(atoms, preserve_temperature=False)
    return f"relaxed for {steps} steps" if steps else "not relaxed"


def _collapsed(atoms: Atoms) -> bool:
    """Whether atoms are nearer to one another than any bond."""
    if not np.isfinite(atoms.positions).all():
        return True
    radii = covalent_radii[atoms.numbers]
    frame = Frame(
        atoms.numbers, atoms.positions, 0.0, np.zeros_like(atoms.positions),
        cell=np.array(atoms.cell) if atoms.pbc.any() else None, pbc=np.array(atoms.pbc),
    )  # fmt: skip
    try:
        centre, neighbour, shift = neighbour_list(frame, _TOO_NEAR * 2 * float(radii.max()))
    except InputError:
        return True
    lengths = np.linalg.norm(atoms.positions[neighbour] + shift - atoms.positions[centre], axis=1)
    return bool((lengths < _TOO_NEAR * (radii[centre] + radii[neighbour])).any())


def fastest_period(atoms: Atoms, seed: int, *, tries: int = 12) -> float:
    """The period of the fastest vibration, in ASE's unit of time, by power iteration with differences of forces.

    Args:
        atoms: with a calculator.
        seed: of the first direction.
        tries: iterations.
    """
    weights = 1 / np.sqrt(atoms.get_masses())[:, None]
    direction = np.random.default_rng(seed).normal(size=(len(atoms), 3))
    value = 0.0
    for _ in range(tries):
        direction /= np.linalg.norm(direction)
        move = direction * weights
        move *= 0.01 / np.linalg.norm(move, axis=1).max()
        pushed = _forces_at(atoms, -move) - _forces_at(atoms, move)
        image = pushed * weights * (np.linalg.norm(direction) / np.linalg.norm(move / weights)) / 2
        value = float(np.linalg.norm(image))
        if not value > 0:
            break
        direction = image
    return 2 * math.pi / math.sqrt(max(value, 1e-6))


def _forces_at(atoms: Atoms, move: Vector) -> Vector:
    return _at(atoms, move).get_forces()  # type: ignore[no-any-return]


def _energy_at(atoms: Atoms, move: Vector) -> float:
    return float(_at(atoms, move).get_potential_energy())


def _at(atoms: Atoms, move: Vector) -> Atoms:
    moved = Atoms(atoms.numbers, atoms.positions + move, cell=atoms.cell, pbc=atoms.pbc)
    moved.calc = atoms.calc
    return moved


def forces_verdict(atoms: Atoms, bounds: Bounds, seed: int, *, directions: int = 3) -> Verdict:
    """Forces against differences of the energy, along the forces and along random directions.

    Of several displacements the one with the best agreement counts: long ones err by their length, short ones by rounding.

    Args:
        atoms: with a calculator.
        bounds: of the model's precision.
        seed: of the directions.
        directions: random ones.
    """
    forces = np.array(atoms.get_forces())
    size = float(np.linalg.norm(forces))
    random = np.random.default_rng(seed)
    along = [*random.normal(size=(directions, *forces.shape)), *([forces] if size > 0 else [])]
    worst, at = 0.0, 0.0
    for direction in along:
        unit = direction / np.linalg.norm(direction)
        errors = {}
        for most in _DISPLACEMENTS:
            h = most / float(np.linalg.norm(unit, axis=1).max()) / len(_STENCIL)
            slope = (
                sum(
                    factor * (_energy_at(atoms, n * h * unit) - _energy_at(atoms, -n * h * unit))
                    for n, factor in _STENCIL
                )
                / h
            )
            errors[most] = abs(slope + float((forces * unit).sum())) / max(size, 1e-12)
        best = min(errors, key=lambda most: errors[most])
        if errors[best] >= worst:
            worst, at = errors[best], best
    return Verdict(
        "forces",
        worst <= bounds.forces,
        f"differ from the energy's differences by {worst:.1e} of their size (displacements of {at:g} Å; the best of "
        f"{len(_DISPLACEMENTS)}, the worst of {len(along)} directions)",
        f"at most {bounds.forces:g}: {bounds.why}",
    )


@dataclass(frozen=True)
class Run:
    """A stretch of dynamics at constant energy.

    Attributes:
        step: fs.
        energies: of each step, eV.
        hottest: temperature, K.
        momentum: gained, relative to the sum of the atoms' momenta.
        femtoseconds: until it ended, or until the atoms flew apart.
        failed: why it ended early; empty otherwise.
    """

    step: float
    energies: Vector
    hottest: float
    momentum: float
    femtoseconds: float
    failed: str


def run(atoms: Atoms, step: float, steps: int, too_hot: float) -> Run:
    """Velocity Verlet from a configuration, which stays as it is.

    Args:
        atoms: with velocities and a calculator.
        step: ASE's unit of time.
        steps: how many.
        too_hot: temperature at which it ends, K.
    """
    moving = atoms.copy()
    moving.calc = atoms.calc
    dynamics = VelocityVerlet(moving, timestep=step)
    energies, hottest, failed = [moving.get_total_energy()], 0.0, ""
    while len(energies) <= steps and not failed:
        try:
            dynamics.run(1)
        except InputError as error:
            failed = str(error).rstrip(".")
            break
        energies.append(moving.get_total_energy())
        hottest = max(hottest, float(moving.get_temperature()))
        if not np.isfinite(energies[-1]) or hottest > too_hot:
            failed = f"they are at {hottest:.0f} K"
    momenta = moving.get_momenta()
    gained = np.linalg.norm(momenta.sum(0) - atoms.get_momenta().sum(0)) / np.linalg.norm(momenta, axis=1).sum()
    return Run(step / units.fs, np.array(energies), hottest, float(gained), len(energies) * step / units.fs, failed)


def dynamics_verdicts(
    atoms: Atoms, bounds: Bounds, temperature: float, step: float, say: Callable[[str], None]
) -> list[Verdict]:
    """How the error of the energy falls with the time step, and the total momentum.

    Where the error falls too fast the longest steps are beyond the order's reach, and all are halved.

    Args:
        atoms: with velocities and a calculator.
        bounds: of the model's precision.
        temperature: asked for, K.
        step: the longest time step, ASE's unit of time.
        say: is told of each run.
    """
    rounding = _rounding(atoms)
    for finer in range(_FINER + 1):
        longest = step / 2**finer
        runs = []
        for count in COUNTS:
            runs.append(run(atoms, longest * COUNTS[0] / count, count, _TOO_HOT * max(temperature, 50.0)))
            last = runs[-1]
            if last.failed:
                return [_unstable(last)]
            say(f"{count} steps of {last.step:.3f} fs, up to {last.hottest:.0f} K")
        energy = _energy(runs, len(atoms), rounding)
        if energy.passes or _power(runs) < 1:
            break
    return [energy, _momentum(runs, bounds)]


def _unstable(last: Run) -> Verdict:
    return Verdict(
        "stability",
        False,
        f"the atoms fly apart: after {last.femtoseconds:.1f} fs with steps of {last.step:.2f} fs {last.failed}",
        "nothing else can be judged: give a configuration that the model knows (--structure), a lower --temperature, or train "
        "it further",
    )


def _power(runs: Sequence[Run]) -> float:
    """The exponent of the time step that the scatter of the energy goes with."""
    errors = [max(float(np.std(r.energies)), 1e-300) for r in runs]
    return float(np.polyfit(np.log([r.step for r in runs]), np.log(errors), 1)[0])


def _rounding(atoms: Atoms) -> float:
    """How much energies of the same configuration scatter when it is moved by next to nothing, eV."""
    random = np.random.default_rng(0)
    moves = 1e-10 * random.normal(size=(6, len(atoms), 3))
    energies = [_energy_at(atoms, move) for move in moves]
    total = abs(energies[0]) + float(atoms.get_kinetic_energy())
    return float(np.std(energies)) + 1e-15 * total


def _energy(runs: Sequence[Run], atoms: int, rounding: float) -> Verdict:
    errors = [float(np.std(r.energies)) for r in runs]
    told = ", ".join(f"{1000 * e / atoms:.2g} meV at {r.step:.2f} fs" for e, r in zip(errors, runs, strict=True))
    bound = f"{_ORDER - _ORDER_BOUND:g} to {_ORDER + _ORDER_BOUND:g}: velocity Verlet is of second order"
    if max(errors) <= 10 * rounding:
        return Verdict("energy", True, f"is kept to rounding at each step (per atom: {told})", bound)
    power = _power(runs)
    return Verdict(
        "energy",
        abs(power - _ORDER) <= _ORDER_BOUND,
        f"errs with the time step to the power {power:.2f} (per atom: {told})",
        bound,
    )


def _momentum(runs: Sequence[Run], bounds: Bounds) -> Verdict:
    worst = max(r.momentum for r in runs)
    return Verdict(
        "momentum",
        worst <= bounds.momentum,
        f"of all atoms together changes by {worst:.1e} of the sum of theirs",
        f"at most {bounds.momentum:g}: {bounds.why}",
    )


def check(
    atoms: Atoms,
    calculator: Calculator,
    bounds: Bounds,
    *,
    temperature: float = 300.0,
    seed: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> list[Verdict]:
    """All verdicts on a model, for one configuration.

    Args:
        atoms: where to start; stays as it is.
        calculator: the model's.
        bounds: of its precision.
        temperature: K.
        seed: of velocities and directions.
        say: is told what is done.

    Raises:
        InputError: the model cannot compute the configuration.
    """
    atoms = atoms.copy()
    atoms.calc = calculator
    done = prepare(atoms, temperature, seed)
    period = fastest_period(atoms, seed)
    say(f"{done}; velocities for {temperature:g} K; the fastest vibration takes {period / units.fs:.1f} fs")
    # where it is relaxed forces are next to nothing, and all differences are large beside them
    shaken = atoms.copy()
    shaken.calc = calculator
    shaken.rattle(_SHAKE, rng=np.random.default_rng(seed))
    forces = forces_verdict(shaken, bounds, seed)
    fastest = float(np.linalg.norm(atoms.get_velocities(), axis=1).max())
    step = min(period / _STEPS_A_PERIOD, _FARTHEST / fastest)
    return [forces, *dynamics_verdicts(atoms, bounds, temperature, step, say)]


def ranks_verdict(
    atoms: Atoms, calculator: Calculator, bounds: Bounds, forces: Callable[[Atoms, int], Vector], ranks: int, seed: int
) -> Verdict:
    """Whether LAMMPS gives the calculator's forces, on one rank and on several.

    Args:
        atoms: the configuration; stays as it is.
        calculator: the model's.
        bounds: of its precision.
        forces: of a configuration on a number of ranks, by LAMMPS.
        ranks: how many.
        seed: of the displacements that take the configuration out of its symmetry.
    """
    shaken = atoms.copy()
    shaken.rattle(_SHAKE, rng=np.random.default_rng(seed))
    here = shaken.copy()
    here.calc = calculator
    expected = here.get_forces()
    size = float(np.abs(expected).max())
    errors = {n: float(np.abs(forces(shaken, n) - expected).max()) / size for n in dict.fromkeys((1, ranks))}
    worst = max(errors.values())
    told = " and ".join(f"on {n} rank{'s' * (n > 1)} by {error:.1e}" for n, error in errors.items())
    return Verdict(
        "ranks", worst <= bounds.ranks, f"forces in LAMMPS differ from those here {told} of the largest",
        f"at most {bounds.ranks:g}: {bounds.why}",
    )  # fmt: skip
