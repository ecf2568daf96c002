"""Sizes that batches are filled up to, chosen so that few of them serve all steps of a run and waste little."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddpkit.errors import InputError

if TYPE_CHECKING:
    from ddpkit.data.sampler import Sampler

Sizes = NDArray[np.int64]
"""`[batches, 4]`: atoms, edges, frames, and neighbours of the atom that has most, of each batch of a step, on all ranks."""

_CHOSEN_BY, _MEASURED_ON = 600, 300  # steps
_GROUPS = 80  # of steps of about as many edges; a capacity serves neighbouring groups
_MARGIN = 0.02  # of atoms; steps that exceed it use the next capacity
_FURTHER = 0.2  # the largest capacity is that much further from the mean than the fullest batch seen


class Capacity(NamedTuple):
    """The sizes that batches are filled up to.

    Attributes:
        atoms: rows of per-atom tensors.
        edges: edges.
        frames: frames; the last is never a real one.
        most: columns of the neighbour tables.
    """

    atoms: int
    edges: int
    frames: int
    most: int

    def holds(self, atoms: int, edges: int, frames: int, most: int) -> bool:
        """Whether a batch of these sizes fits, with the atoms that its padding edges need and a frame for them."""
        extra = self.edges - edges
        return (
            frames < self.frames
            and extra >= 0
            and most <= self.most
            and (extra == 0 or self.most > 0)
            and atoms + padding_atoms(extra, self.most) <= self.atoms
        )


def padding_atoms(edges: int, most: int) -> int:
    """Atoms that so many padding edges need: each is listed once at its atom, and no row is longer than `most`."""
    return -(-edges // most) if edges else 0


def require_room(capacity: Capacity, atoms: int, edges: int, frames: int, most: int) -> None:
    """Refuses a batch that a capacity does not hold.

    Raises:
        InputError: it does not.
    """
    if not capacity.holds(atoms, edges, frames, most):
        raise InputError(
            f"A batch of {atoms} atoms, {edges} edges, {frames} frames and at most {most} neighbours of an "
            f"atom does not fit into a capacity of {capacity.atoms} atoms, {capacity.edges} edges, {capacity.frames} frames and "
            f"{capacity.most} neighbours, one frame and the atoms at padding edges included: choose a larger one."
        )


def holding(capacities: Sequence[Capacity], sizes: Sizes) -> Capacity | None:
    """The first capacity that holds all batches of a step; None where none does."""
    batches = sizes.tolist()
    return next((c for c in capacities if all(c.holds(*batch) for batch in batches)), None)


@dataclass(frozen=True)
class Capacities:
    """Capacities, and what they waste on steps other than those that they were chosen by.

    Attributes:
        levels: the capacities, the least first.
        steps: how many steps that was measured on.
        edges: edges of a step's capacity over those of the fullest batch, minus 1, averaged over steps.
        atoms: likewise of atoms.
        table: likewise of entries in a neighbour table, atoms times the most neighbours of an atom.
        unheld: steps that no capacity holds, over all.
    """

    levels: tuple[Capacity, ...]
    steps: int
    edges: float
    atoms: float
    table: float
    unheld: float

    def __str__(self) -> str:
        return (
            f"{len(self.levels)} capacities; mean waste {self.edges:.1%} of edges, {self.atoms:.1%} of atoms, "
            f"{self.table:.1%} of tables; {self.unheld:.1%} of steps fit none"
        )


def choose_capacities(sampler: "Sampler", *, waste: float = 0.05, levels: int = 8) -> Capacities:
    """As few capacities as keep the mean waste of edges below a bound, for all ranks and steps of a plan.

    Looks at some hundred steps of the plan. They are sorted by the edges of their fullest batch and cut into consecutive parts,
    one for each capacity, so that the waste is least (dynamic programming); then the least number of parts is taken whose waste
    on further steps is below the bound. The result is the same on every rank.

    Args:
        sampler: the plan; knows the most neighbours of each frame.
        waste: bound of `Capacities.edges`.
        levels: no more capacities than that; sets of very unlike frames in small batches may waste more with these.

    Raises:
        InputError: the plan does not know the most neighbours of its frames.
    """
    if not len(sampler.most_neighbours):
        raise InputError("capacities are to be chosen for a sampler without most_neighbours: give it")
    found = chain.from_iterable(sampler.sizes(epoch) for epoch in count())
    steps = list(islice(found, _CHOSEN_BY))
    others = list(islice(found, _MEASURED_ON))
    frames = min(max(int(step[:, 2].max()) for step in steps) * 5 // 4 + 2, sampler.batch_size + 1)
    mean, fullest = np.mean([step.max(0) for step in steps], axis=0), np.max([step.max(0) for step in steps], axis=0)
    beyond, most = np.ceil(_FURTHER * (fullest - mean)).astype(int).tolist(), int(sampler.most_neighbours.max())
    best: Capacities | None = None
    for parts in _divided(steps, levels):
        needed = [_needed(part, frames) for part in parts]
        edges = needed[-1].edges + beyond[1]
        atoms = max(needed[-1].atoms, _atoms_for(np.concatenate(parts[-1]), edges, most) + beyond[0])
        best = _measured((*needed[:-1], Capacity(atoms, edges, frames, most)), others)
        if best.edges < waste:
            break
    assert best is not None
    return best


def _divided(steps: Sequence[Sizes], levels: int) -> Iterator[list[list[Sizes]]]:
    """The steps in one part, in two, and so on, so that the waste is least."""
    ordered = sorted(steps, key=lambda step: int(step[:, 1].max()))
    fullest = np.array([step[:, 1].max() for step in ordered])
    ends = np.unique(np.linspace(0, len(ordered), min(_GROUPS, len(ordered)) + 1).round().astype(int))
    groups = len(ends) - 1
    # cost[i, j]: waste of one capacity for the groups i to j - 1
    cost = np.full((groups + 1, groups + 1), np.inf)
    relative = np.concatenate([[0.0], np.cumsum(1 / np.maximum(1, fullest))])
    for j in range(1, groups + 1):
        first = ends[:j]
        cost[:j, j] = fullest[ends[j] - 1] * (relative[ends[j]] - relative[first]) - (ends[j] - first)
    least, before = cost[0], [np.zeros(groups + 1, dtype=int)]
    for number in range(1, min(levels, groups) + 1):
        if number > 1:
            both = least[:, None] + cost
            before.append(both.argmin(0))
            least = both.min(0)
        cuts = [groups]
        for choices in reversed(before):
            cuts.append(int(choices[cuts[-1]]))
        bounds = [int(ends[cut]) for cut in reversed(cuts)]
        yield [ordered[a:b] for a, b in pairwise(bounds)]


def _needed(steps: Sequence[Sizes], frames: int) -> Capacity:
    """A capacity for some steps, with a margin of atoms."""
    batches = np.concatenate(steps)
    edges, most = int(batches[:, 1].max()), int(batches[:, 3].max())
    return Capacity(round(_atoms_for(batches, edges, most) * (1 + _MARGIN)), edges, frames, most)


def _atoms_for(batches: Sizes, edges: int, most: int) -> int:
    """The atoms that batches need, with those at padding edges up to so many edges."""
    return int((batches[:, 0] - (batches[:, 1] - edges) // max(1, most)).max())


def _measured(levels: tuple[Capacity, ...], steps: Sequence[Sizes]) -> Capacities:
    ratios = []
    for step in steps:
        capacity = holding(levels, step)
        if capacity is not None:
            atoms, edges, _, most = np.maximum(step.max(0), 1).tolist()
            ratios.append(
                (capacity.edges / edges, capacity.atoms / atoms, capacity.atoms * capacity.most / (atoms * most))
            )
    edges, atoms, table = np.mean(ratios, axis=0).tolist() if ratios else [np.inf] * 3
    return Capacities(levels, len(steps), edges - 1, atoms - 1, table - 1, 1 - len(ratios) / len(steps))
