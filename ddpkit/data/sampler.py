"""Which frames make up a global batch, and which rank takes which of them."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddpkit.data.capacities import Capacity, Sizes, holding
from ddpkit.errors import InputError

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class GlobalStep:
    """One step: what this rank does of it, and how large it is over all ranks."""

    micro_batches: tuple[Indices, ...]  # this rank's frames, to be accumulated one after another
    frames: int  # in the global batch: all ranks, all micro-batches
    atoms: int
    edges: int
    stresses: int | None = None  # frames of the global batch that have a stress, where that is known
    is_padded: bool = False  # whether batches are filled up: to `capacity`, or to their own sizes where that is None
    capacity: Capacity | None = None  # what all batches of the step are filled up to, the same on all ranks

    @property
    def indices(self) -> Indices:
        """This rank's frames."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *self.micro_batches])


class Sampler:
    """Shuffled global batches for training, divided so that ranks get equal work.

    The global batches depend on `seed` and the epoch alone, not on the number of ranks: epoch `e` is a permutation of the frames
    cut into batches of exactly `batch_size`. The few frames that do not fill a last batch are left out of that epoch, whatever
    the world size; they are others in each epoch. Within a batch, frames go to ranks by longest-processing-time-first bin packing
    of their edges; every micro-batch gets at least one frame.

    Args:
        indices: `[n]` frame numbers to train on.
        atoms: `[n]` atoms of each.
        edges: `[n]` edges of each.
        batch_size: frames in the global batch.
        world_size: number of ranks.
        rank: this one.
        accumulate: micro-batches that each rank divides its share into.
        seed: `data.seed`.
        stresses: `[n]` whether each has a stress, for a loss on it.
        most_neighbours: `[n]` neighbours of the atom of each that has most; needed for capacities.
        capacities: what batches are filled up to, the least first (`choose_capacities`): the first that holds the batches of
            all ranks. None: batches are not padded.

    Raises:
        InputError: a batch larger than the set, or one with fewer frames than ranks times micro-batches.
    """

    def __init__(
        self,
        indices: Indices,
        atoms: Indices,
        edges: Indices,
        batch_size: int,
        *,
        world_size: int = 1,
        rank: int = 0,
        accumulate: int = 1,
        seed: int = 0,
        stresses: NDArray[np.bool_] | None = None,
        most_neighbours: Indices | None = None,
        capacities: Sequence[Capacity] | None = None,
    ) -> None:
        if min(batch_size, world_size, accumulate) < 1:
            raise InputError(f"{batch_size=}, {world_size=}, {accumulate=}: each must be at least 1")
        if batch_size < world_size * accumulate:
            parts = f"{world_size} ranks" + (f" x {accumulate} micro-batches" if accumulate > 1 else "")
            raise InputError(
                f"a global batch of {batch_size} frames cannot be divided over {parts}: raise train.batch_size"
            )
        if batch_size > len(indices):
            raise InputError(f"train.batch_size={batch_size} exceeds the {len(indices)} training frames: lower it")
        self.indices, self.atoms, self.edges = np.asarray(indices), np.asarray(atoms), np.asarray(edges)
        self.batch_size, self.world_size, self.rank = batch_size, world_size, rank
        self.accumulate, self.seed, self.stresses = accumulate, seed, stresses
        self.capacities = capacities
        if capacities is not None and most_neighbours is None:
            raise InputError("capacities are given without most_neighbours: give both")
        self.most_neighbours: Indices = np.zeros(0, dtype=np.int64) if most_neighbours is None else most_neighbours

    @property
    def steps_per_epoch(self) -> int:
        """Steps in each epoch."""
        return len(self.indices) // self.batch_size

    @property
    def left_out(self) -> int:
        """Frames that each epoch leaves out because they do not fill a batch."""
        return len(self.indices) % self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[GlobalStep]:
        """The steps of an epoch (both counted from 0), from `start` on."""
        for chosen, shares in self._plan(epoch, start):
            yield GlobalStep(
                micro_batches=tuple(self.indices[part] for part in shares[self.rank]),
                frames=len(chosen),
                atoms=int(self.atoms[chosen].sum()),
                edges=int(self.edges[chosen].sum()),
                stresses=None if self.stresses is None else int(self.stresses[chosen].sum()),
                is_padded=self.capacities is not None,
                capacity=holding(self.capacities, self._sizes(shares)) if self.capacities else None,
            )

    def sizes(self, epoch: int) -> Iterator[Sizes]:
        """The sizes of the batches of each step of an epoch, on all ranks."""
        for _, shares in self._plan(epoch):
            yield self._sizes(shares)

    def _sizes(self, shares: list[list[Indices]]) -> Sizes:
        parts = [part for share in shares for part in share]
        frames = np.array([len(part) for part in parts])
        together, first = np.concatenate(parts), np.cumsum(frames) - frames
        atoms, edges = (np.add.reduceat(x[together], first) for x in (self.atoms, self.edges))
        most = np.maximum.reduceat(self.most_neighbours[together], first)
        return np.stack([atoms, edges, frames, most], axis=1)

    def imbalance(self, world_size: int | None = None, steps: int = 200) -> tuple[float, float]:
        """Edges of the fullest rank over the mean, averaged over steps of the first epoch.

        Returns:
            When frames are dealt out in equal numbers as they come, and as they are divided here.
        """
        ranks = world_size or self.world_size
        order = self.order(0)
        before, after = [], []
        for step in range(min(steps, self.steps_per_epoch)):
            edges = self.edges[order[step * self.batch_size : (step + 1) * self.batch_size]]
            before.append(imbalance([part.sum() for part in np.array_split(edges, ranks)]))
            after.append(imbalance([edges[part].sum() for part in pack(edges, ranks)]))
        return float(np.mean(before)), float(np.mean(after))

    def order(self, epoch: int) -> Indices:
        """`[n]` the order in which an epoch takes the frames, as places in `indices`."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.indices))

    def _plan(self, epoch: int, start: int = 0) -> Iterator[tuple[Indices, list[list[Indices]]]]:
        """The frames of each step, and the micro-batches of each rank."""
        order = self.order(epoch)
        for step in range(start, self.steps_per_epoch):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield chosen, self._shares(chosen)

    def _shares(self, chosen: Indices) -> list[list[Indices]]:
        """The micro-batches of each rank."""
        parts = pack(self.edges[chosen], self.world_size * self.accumulate)
        if self.accumulate == 1:
            return [[chosen[part]] for part in parts]
        loads = [int(self.edges[chosen[part]].sum()) for part in parts]
        by_load = sorted(range(len(parts)), key=lambda part: -loads[part])
        shares: list[list[Indices]] = [[] for _ in range(self.world_size)]
        for turn in range(self.accumulate):
            row = by_load[turn * self.world_size : (turn + 1) * self.world_size]
            for rank, part in enumerate(row if turn % 2 == 0 else reversed(row)):
                shares[rank].append(chosen[parts[part]])
        return shares


class Sweep:
    """Every frame exactly once over all ranks, in order, for validation and tests.

    Ranks get equal work; some may get fewer batches than others, or none.

    Args:
        indices, atoms, edges: as for `Sampler`.
        batch_size: frames in a batch, over all ranks.
        world_size: number of ranks.
        rank: this one.
        stresses: as for `Sampler`.
    """

    def __init__(
        self,
        indices: Indices,
        atoms: Indices,
        edges: Indices,
        batch_size: int,
        *,
        world_size: int = 1,
        rank: int = 0,
        stresses: NDArray[np.bool_] | None = None,
    ) -> None:
        self._stresses = None if stresses is None else int(stresses.sum())
        self.indices, self.atoms, self.edges = np.asarray(indices), np.asarray(atoms), np.asarray(edges)
        share = pack(self.edges, world_size)[rank]
        size = max(1, batch_size // world_size)
        self._batches = [share[first : first + size] for first in range(0, len(share), size)]

    @property
    def steps_per_epoch(self) -> int:
        """Batches of this rank."""
        return len(self._batches)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[GlobalStep]:  # noqa: ARG002  (every epoch is the same)
        """This rank's batches. The counts are those of the whole set, so that a loss summed over batches is its mean."""
        atoms, edges = int(self.atoms.sum()), int(self.edges.sum())
        for batch in self._batches[start:]:
            yield GlobalStep((self.indices[batch],), len(self.indices), atoms, edges, self._stresses)


def pack(weights: Sequence[int] | Indices, bins: int) -> list[Indices]:
    """Longest-processing-time-first bin packing.

    Each bin gets at least one item if there are as many items as bins. The result depends on nothing but the weights.

    Returns:
        The items of each bin, ascending.
    """
    if bins == 1:
        return [np.arange(len(weights))]
    order = np.argsort(-np.asarray(weights, dtype=np.int64), kind="stable")
    heap = [(0, 0, b) for b in range(bins)]  # load, items, bin
    contents: list[list[int]] = [[] for _ in range(bins)]
    for item in order.tolist():
        load, items, b = heap[0]
        contents[b].append(item)
        heapq.heapreplace(heap, (load + int(weights[item]), items + 1, b))
    return [np.array(sorted(content), dtype=np.int64) for content in contents]


def imbalance(loads: Sequence[float]) -> float:
    """The largest load over the mean; 1 is perfect, and what idle ranks make of it."""
    mean = float(np.mean(loads))
    return float(np.max(loads)) / mean if mean else 1.0
