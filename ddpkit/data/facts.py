"""Facts of the training set that models are built with."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddpkit.data.frame import NUMBERS
from ddpkit.data.prepared import PreparedSet
from ddpkit.errors import InputError

_PRIOR_ATOMS = 10  # how many atoms' worth of the overall force scale each species starts from


@dataclass(frozen=True)
class Statistics:
    """Facts of some frames, per species in the order of `species`."""

    species: tuple[str, ...]
    avg_num_neighbors: float  # edges over atoms
    shifts: NDArray[np.float64]  # [species] energy of an atom, eV
    scales: NDArray[np.float64]  # [species] root mean square of a force component, eV/Å


def statistics(
    frames: PreparedSet,
    indices: NDArray[np.int64],
    r_max: float,
    *,
    isolated: bool = True,
    species: Sequence[str] | None = None,
) -> Statistics:
    """Mean number of neighbours, energy shifts and force scales.

    Shifts are the energies of isolated atoms where the set knows those of all its species (species that are not in it get the
    mean of those that it knows). Where it knows none, or with
    `isolated=False`, they are fitted: least squares of the energies on the compositions, kept near the known energies of
    isolated atoms (or near one energy for all) by a weak ridge, so that directions the data say nothing about stay finite.
    Scales of species with few atoms lean towards that of all.

    Args:
        frames: the set.
        indices: `[n]` frames to look at (the training part).
        r_max: cutoff in Å.
        isolated: whether to take energies of isolated atoms where known.
        species: all of the set, in any order, and maybe others; None: those of the set.

    Raises:
        InputError: they are to be taken, and the set knows those of some of its species alone.
    """
    species = tuple(species or frames.species)
    composition = np.zeros((len(indices), len(species)))
    squares = np.zeros(len(species))
    column = np.full(256, -1)
    for position, symbol in enumerate(species):
        column[NUMBERS[symbol]] = position
    numbers, forces = frames.array("numbers"), frames.array("forces")
    for row, index in enumerate(np.sort(indices)):
        first, last = frames.atom_range(int(index))
        kind = column[numbers[first:last]]
        composition[row] = np.bincount(kind, minlength=len(species))
        squares += np.bincount(kind, (forces[first:last] ** 2).sum(axis=1), minlength=len(species))
    atoms = composition.sum(axis=0)
    overall = float(np.sqrt(squares.sum() / (3 * atoms.sum()))) or 1.0
    known = frames.atom_energies
    lacking = [symbol for symbol in frames.species if symbol not in known]
    prior = np.array([known.get(symbol, np.nan) for symbol in species])
    if isolated and not lacking:
        shifts = np.where(np.isfinite(prior), prior, np.nanmean(prior))
    elif isolated and len(lacking) < len(frames.species):
        raise InputError(
            f"{frames.path} has energies of isolated atoms of {', '.join(s for s in frames.species if s in known)}, but not of "
            f"{', '.join(lacking)}: add a frame of one isolated atom for each, or fit all energy shifts with data.shifts=fitted."
        )
    else:
        shifts = _fit(composition, frames.array("energy")[np.sort(indices)], prior)
    return Statistics(
        species=species,
        avg_num_neighbors=float(frames.edges(r_max)[indices].sum() / atoms.sum()),
        shifts=shifts,
        scales=np.sqrt((squares + 3 * _PRIOR_ATOMS * overall**2) / (3 * (atoms + _PRIOR_ATOMS))),
    )


def _fit(
    composition: NDArray[np.float64], energy: NDArray[np.float64], prior: NDArray[np.float64]
) -> NDArray[np.float64]:
    if not np.isfinite(prior).all():
        prior = np.full(composition.shape[1], energy.sum() / composition.sum())
    size = composition.sum(axis=1, keepdims=True)
    x = composition / size
    normal = x.T @ x
    ridge = 1e-6 * np.trace(normal) * np.eye(len(prior))
    return prior + np.linalg.solve(normal + ridge, x.T @ (energy / size[:, 0] - x @ prior))
