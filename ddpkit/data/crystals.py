"""The built-in set of crystals: made-up periodic structures labelled with an analytic pair potential.

It mirrors the make-up of MPtrj (Deng et al., Nat. Mach. Intell. 5, 1031 (2023)): 89 elements, 2 to 150 atoms in the cell with a
median near 24, several frames of each material, energies, forces and stress. The labels are no quantum chemistry: the set is for
measuring speed and for tests, and an accuracy reached on it says nothing about materials.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ddpkit.data.frame import SYMBOLS, Frame
from ddpkit.data.neighbours import neighbour_list

LABELS = "analytic Morse pair potential (no quantum chemistry)"
R_CUT = 6.0  # Å, where the potential ends
ELEMENTS = tuple(z for z in range(1, 95) if SYMBOLS[z] not in ("Po", "At", "Rn", "Fr", "Ra"))  # the 89 of MPtrj

_MEDIAN_ATOMS, _SPREAD, _LEAST, _MOST = 24, 0.85, 2, 150  # of a log-normal distribution
_MEAN_FRAMES = 5  # of a material; fewer in small sets, so that these hold all elements too
_LEAST_MATERIALS = 40
_STEEPNESS = 1.7  # 1/Å, of the Morse potential
_RELAXATION = 40  # steps

# Sites in the unit cube, and which of two sublattices each belongs to.
_PROTOTYPES: tuple[tuple[list[list[float]], list[int]], ...] = (
    ([[0, 0, 0], [0.5, 0.5, 0.5]], [0, 1]),  # caesium chloride
    ([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]], [0, 0, 1, 1]),  # face-centred, layered order
    ([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]], [0, 0, 1, 1, 1]),  # perovskite
    (
        [
            [0, 0, 0],
            [0.5, 0.5, 0],
            [0.5, 0, 0.5],
            [0, 0.5, 0.5],
            [0.5, 0.5, 0.5],
            [0, 0, 0.5],
            [0, 0.5, 0],
            [0.5, 0, 0],
        ],
        [0, 0, 0, 0, 1, 1, 1, 1],
    ),  # rock salt
)


def _radii() -> NDArray[np.float64]:
    """Covalent radii by atomic number in Å, without extremes that would make cells of hundreds of neighbours."""
    from ase.data import covalent_radii

    return np.clip(np.asarray(covalent_radii, dtype=np.float64), 0.9, 1.9)


def label(frame: Frame) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Energy [eV], forces [eV/Å] and stress [eV/Å^3] of a periodic frame.

    Half the sum over ordered pairs of `D [exp(-2a(r - r0)) - 2 exp(-a(r - r0))] s(r)`, with `r0` the sum of covalent radii, a
    depth `D` that varies smoothly with the two elements, and `s = (1 - (r/6)^2)^3`, which ends with two derivatives at the
    cutoff; and an energy for each atom that depends on its element alone.
    """
    assert frame.cell is not None
    radii = _radii()
    centre, neighbour, shift = neighbour_list(frame, R_CUT)
    vector = frame.positions[neighbour] + shift - frame.positions[centre]
    r = np.linalg.norm(vector, axis=1)
    zi, zj = frame.numbers[centre], frame.numbers[neighbour]
    depth = 0.12 + 0.06 * np.cos(0.35 * (zi - zj)) + 0.02 * np.cos(0.2 * (zi + zj))
    morse = np.exp(-_STEEPNESS * (r - radii[zi] - radii[zj]))
    well, well_slope = depth * (morse**2 - 2 * morse), -2 * _STEEPNESS * depth * (morse**2 - morse)
    u = 1 - (r / R_CUT) ** 2
    smooth, smooth_slope = u**3, -6 * r / R_CUT**2 * u**2
    slope = (well_slope * smooth + well * smooth_slope) / r
    pull = slope[:, None] * vector
    forces = np.zeros_like(frame.positions)
    np.add.at(forces, centre, pull)
    stress = 0.5 * np.einsum("ei,ej->ij", pull, vector) / abs(np.linalg.det(frame.cell))
    energy = 0.5 * float(well @ smooth) + float(atom_energy(frame.numbers).sum())
    return energy, forces, stress


def atom_energy(numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    """Energy [eV] of a free atom of each element."""
    return np.asarray(-1.0 - 3.0 * np.sin(0.11 * numbers) ** 2)


def generate_crystals(frames: int, seed: int, *, done: Callable[[int], object] = lambda _: None) -> Iterator[Frame]:
    """Makes and labels crystals.

    Args:
        frames: how many.
        seed: of everything.
        done: called with the number of frames as they are finished.
    """
    deck: list[int] = []
    left, material = frames, 0
    while left > 0:
        random = np.random.default_rng([seed, material])
        kinds = 2 + int(random.binomial(3, 0.45))
        if len(deck) < kinds:
            deck += np.random.default_rng([seed, 1, material]).permutation(ELEMENTS).tolist()
        elements, deck = deck[:kinds], deck[kinds:]
        mean = min(_MEAN_FRAMES, max(1.0, frames / _LEAST_MATERIALS))
        count = min(left, 1 + int(random.poisson(mean - 1)))
        numbers, positions, cell = _structure(elements, random)
        deck = [element for element in elements if element not in numbers] + deck
        for _ in range(count):
            yield _shaken(f"crystal-{material}", numbers, positions, cell, random)
        done(count)
        left -= count
        material += 1


def _shaken(
    name: str,
    numbers: NDArray[np.int64],
    positions: NDArray[np.float64],
    cell: NDArray[np.float64],
    random: np.random.Generator,
) -> Frame:
    """A labelled frame of a material: strained and displaced at random."""
    strain = np.eye(3) + random.normal(scale=0.02, size=(3, 3))
    frame = _frame(name, numbers, positions @ strain + random.normal(scale=0.12, size=positions.shape), cell @ strain)
    energy, forces, stress = label(frame)
    return replace(frame, energy=energy, forces=forces, stress=stress, subset="Crystals", group=name)


def _structure(
    elements: list[int], random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """A decorated prototype, sheared, scaled to its atoms' sizes and relaxed for a moment."""
    target = float(np.clip(np.exp(random.normal(np.log(_MEDIAN_ATOMS), _SPREAD)), _LEAST, _MOST))
    sites, kind = _PROTOTYPES[int(random.integers(len(_PROTOTYPES)))]
    repeat = _repeats(target / len(sites), random)
    if len(sites) * int(np.prod(repeat)) > _MOST:
        repeat = (repeat[0], repeat[1], _MOST // (len(sites) * repeat[0] * repeat[1]))
    corners = np.stack(np.meshgrid(*map(np.arange, repeat), indexing="ij"), axis=-1).reshape(-1, 1, 3)
    fractional = (corners + np.array(sites)).reshape(-1, 3)
    sublattice = np.tile(kind, len(corners))
    half = (len(elements) + 1) // 2
    numbers = np.where(
        sublattice == 0,
        random.choice(elements[:half], size=len(fractional)),
        random.choice(elements[half:], size=len(fractional)),
    )
    shear = np.eye(3) + np.triu(random.normal(scale=0.08, size=(3, 3)))
    radii = _radii()[numbers]
    # The volume that spheres of these radii fill to seven tenths.
    edge = (4 / 3 * np.pi * (radii**3).sum() / 0.7 / np.prod(repeat)) ** (1 / 3)
    cell = edge * np.diag(repeat) @ shear
    positions = edge * fractional @ shear
    return numbers, *_relax(numbers, positions, cell)


def _repeats(cells: float, random: np.random.Generator) -> tuple[int, int, int]:
    """How often the unit cube is repeated along each axis to give about so many."""
    first = max(1, round(cells ** (1 / 3) * float(random.uniform(0.7, 1.3))))
    second = max(1, round((cells / first) ** 0.5 * float(random.uniform(0.8, 1.2))))
    return first, second, max(1, round(cells / (first * second)))


def _relax(
    numbers: NDArray[np.int64], positions: NDArray[np.float64], cell: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Some steps of descent with limited moves and strains."""
    for _ in range(_RELAXATION):
        _, forces, stress = label(_frame("", numbers, positions, cell))
        moves = 0.05 * forces
        moves *= np.minimum(1, 0.15 / np.maximum(np.linalg.norm(moves, axis=1, keepdims=True), 1e-9))
        strain = np.eye(3) - np.clip(0.4 * stress, -0.02, 0.02)
        positions, cell = (positions + moves) @ strain, cell @ strain
    return positions, cell


def _frame(name: str, numbers: NDArray[np.int64], positions: NDArray[np.float64], cell: NDArray[np.float64]) -> Frame:
    return Frame(numbers, positions, 0.0, np.zeros_like(positions), cell, np.ones(3, dtype=bool), name=name)
