"""Batches of a prepared set, written in one go into one piece of memory.

All is NumPy here, so that a process that only makes batches need not load torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddpkit.data.capacities import Capacity, require_room
from ddpkit.data.frame import complete, index_of_species, require_usable
from ddpkit.data.neighbours import KeptList, KeptLists, shifts
from ddpkit.data.prepared import PreparedSet
from ddpkit.data.sampler import GlobalStep

ALIGNMENT = 128
"""Bytes that every tensor of a batch begins at a multiple of: a line of a GPU's cache."""

Memory = NDArray[np.uint8]
Kind = tuple[str, tuple[int, ...]]
"""Name of a dtype, the same in NumPy and torch, and shape."""


class Part(NamedTuple):
    """Where a tensor of a batch lies.

    Attributes:
        dtype: its name, the same in NumPy and torch.
        shape: of it.
        strides: in elements.
        start: how many elements of its dtype come before it.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Layout:
    """How a batch lies in one piece of memory: its tensors one after another, each contiguous.

    Attributes:
        parts: the tensors, by the names of the fields of `ddpkit.Batch`.
        num_frames: of the batch.
        size: of the memory, bytes.
    """

    parts: Mapping[str, Part]
    num_frames: int
    size: int

    @classmethod
    def of(cls, kinds: Mapping[str, Kind], num_frames: int) -> "Layout":
        """Of tensors of these dtypes and shapes."""
        parts, end = {}, 0
        for name, (dtype, shape) in kinds.items():
            item, count, strides = _ITEM[dtype], 1, []
            for size in reversed(shape):
                strides.append(count)
                count *= max(1, size)
            parts[name] = Part(dtype, shape, tuple(reversed(strides)), end // item)
            end += -(-count * item // ALIGNMENT) * ALIGNMENT
        return cls(parts, num_frames, end)

    def views(self, memory: Memory) -> dict[str, NDArray[Any]]:
        """The tensors in a piece of memory."""
        return {
            name: np.ndarray(shape, dtype, memory.data, start * _ITEM[dtype])
            for name, (dtype, shape, _, start) in self.parts.items()
        }


_ITEM = {"float64": 8, "int64": 8, "bool": 1}  # bytes


class Assembler:
    """Makes batches of a set: those of `collate`, with the counts of the step, filled up by `pad` where it says so, to the bit.

    Neighbour lists of frames that are met again are kept.

    Args:
        frames: the set.
        species: the model's chemical symbols.
        r_max: cutoff in Å.
        limit: bytes of neighbour lists that are kept, about.
    """

    def __init__(self, frames: PreparedSet, species: Sequence[str], r_max: float, limit: int = 512 << 20) -> None:
        self._frames, self._species, self._r_max = frames, tuple(species), r_max
        self._lists = KeptLists(r_max, limit)
        self._index = index_of_species(species)

    def make(self, step: GlobalStep, numbers: Sequence[int], allocate: Callable[[int], Memory]) -> Layout:
        """Writes a batch; returns how it lies in its memory.

        Args:
            step: that it belongs to.
            numbers: of its frames, at least one.
            allocate: gives memory for so many bytes, and is called once.

        Raises:
            InputError: a frame lacks a label, holds what the model does not know, or has atoms on top of one
                another; or the step's capacity does not hold the batch.
        """
        atoms = self._atoms(numbers)
        lists = [self._lists.of(number, self._frames.frame) for number in numbers]
        edges = _Edges.of(lists, atoms.sizes)
        own = len(atoms.species), len(edges.neighbour), len(numbers), int(edges.degree.max(initial=0))
        size = Capacity(*own)
        if step.is_padded:
            size = step.capacity or size._replace(frames=size.frames + 1)
            require_room(size, *own)
        cells = _Cells.of(self._frames, numbers)
        layout = Layout.of(_kinds(size, step, cells), size.frames)
        parts = layout.views(allocate(layout.size))
        atoms.write(parts)
        edges.write(parts, size, self._r_max)
        if "cell" in parts:
            cells.write(parts)
            for one, cell, (begin, end) in zip(lists, cells.cells, pairwise(edges.ends), strict=True):
                if one.images is not None:
                    parts["edge_shift"][begin:end] = shifts(one.images, cell)
        for name, count in _totals(step).items():
            parts[name][...] = count
        return layout

    def _atoms(self, numbers: Sequence[int]) -> "_Atoms":
        """What is known of the atoms, looked through for what cannot be trained on."""
        frames = self._frames
        ranges = [frames.atom_range(number) for number in numbers]
        elements, positions, forces = (
            np.concatenate([of_set[a:b] for a, b in ranges])
            for of_set in map(frames.array, ("numbers", "positions", "forces"))
        )
        made = _Atoms(frames.atoms[numbers], self._index[elements], positions, forces, frames.array("energy")[numbers])
        if made.species.min(initial=0) < 0 or not all(np.isfinite(x).all() for x in (positions, forces, made.energy)):
            for number in numbers:
                frame = frames.frame(number)
                require_usable(frame, frame.name, self._index, self._species)
        return made


class _Atoms(NamedTuple):
    """The atoms and labels of some frames, one frame after another; `sizes` are how many atoms each has."""

    sizes: NDArray[np.int64]
    species: NDArray[np.int64]
    positions: NDArray[np.float64]
    forces: NDArray[np.float64]
    energy: NDArray[np.float64]

    def write(self, parts: Mapping[str, NDArray[Any]]) -> None:
        atoms, frames, last = len(self.species), len(self.sizes), len(parts["energy"]) - 1
        for name, values, length, filling in (
            ("positions", self.positions, atoms, 0),
            ("species", self.species, atoms, 0),
            ("frame", np.arange(frames).repeat(self.sizes), atoms, last),
            ("mask", True, atoms, False),
            ("energy", self.energy, frames, 0),
            ("forces", self.forces, atoms, 0),
        ):
            if name in parts:
                parts[name][:length] = values
                parts[name][length:] = filling


class _Edges(NamedTuple):
    """The edges of some frames, by centre.

    Attributes:
        degree: `[atoms]` how many there are at each atom.
        neighbour: `[edges]` the atom at the other end.
        ends: `[frames + 1]` where those of each frame begin, and the last ends.
    """

    degree: NDArray[np.int64]
    neighbour: NDArray[np.int64]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, lists: Sequence[KeptList], sizes: NDArray[np.int64]) -> "_Edges":
        """Those of frames of so many atoms each."""
        lengths = np.array([len(one.neighbour) for one in lists])
        neighbour = np.concatenate([one.neighbour for one in lists], dtype=np.int64)
        neighbour += (sizes.cumsum() - sizes).repeat(lengths)
        degree = np.concatenate([one.degree for one in lists], dtype=np.int64)
        return cls(degree, neighbour, np.concatenate([[0], lengths.cumsum()]))

    def write(self, parts: Mapping[str, NDArray[Any]], size: Capacity, r_max: float) -> None:
        """Writes edges and tables; edges that fill up lead from an atom that fills up to itself, and are in no other's row."""
        atoms, edges = len(self.degree), len(self.neighbour)
        extra = size.edges - edges
        index, shift = parts["edge_index"], parts["edge_shift"]
        index[0, :edges], index[1, :edges] = np.arange(atoms).repeat(self.degree), self.neighbour
        index[:, edges:] = atoms + np.arange(extra) // max(1, size.most)
        shift[:] = 0.0
        shift[edges:, 0] = 2 * r_max
        columns = np.arange(size.most)
        outgoing, incoming = parts["neighbours"], parts["incoming"]
        np.add((self.degree.cumsum() - self.degree)[:, None], columns, out=outgoing[:atoms])
        outgoing[:atoms][columns >= self.degree[:, None]] = size.edges
        short = np.int16 if atoms < 2**15 else np.int64  # numpy sorts short integers by counting
        counts = np.bincount(self.neighbour, minlength=atoms)
        incoming[:atoms] = size.edges
        incoming[:atoms][columns < counts[:, None]] = np.argsort(self.neighbour.astype(short), kind="stable")
        for table in (outgoing, incoming):
            table[atoms:] = size.edges
            table[atoms:].reshape(-1)[:extra] = np.arange(edges, size.edges)


class _Cells(NamedTuple):
    """The cells of some frames.

    Attributes:
        periodic: `[frames]` which have one.
        labelled: `[frames]` which have a stress too.
        cells: `[frames, 3, 3]`; of those that are not periodic, anything.
        stress: `[frames, 3, 3]`; of those that have none, NaN in some place.
    """

    periodic: NDArray[np.bool_]
    labelled: NDArray[np.bool_]
    cells: NDArray[np.float64]
    stress: NDArray[np.float64]

    @classmethod
    def of(cls, frames: PreparedSet, numbers: Sequence[int]) -> "_Cells":
        """Those of some frames of a set."""
        if not frames.periodic:
            nothing, none = np.zeros(len(numbers), dtype=bool), np.zeros((len(numbers), 3, 3))
            return cls(nothing, nothing, none, none)
        pbc, cells, stress = (frames.array(name)[numbers] for name in ("pbc", "cell", "stress"))
        periodic: NDArray[np.bool_] = pbc.max(axis=1)
        return cls(periodic, periodic & ~np.isnan(stress).any(axis=(1, 2)), cells, stress)

    def write(self, parts: Mapping[str, NDArray[Any]]) -> None:
        """Writes them where there are any; molecules, and frames that fill up, have a unit cell and no stress."""
        cells, stress, frames = parts["cell"], parts.get("stress"), len(self.periodic)
        cells[:] = np.eye(3)
        cells[:frames][self.periodic] = self.cells[self.periodic]
        is_whole = np.linalg.norm(self.cells, axis=2).all(axis=1)
        for place in np.flatnonzero(self.periodic & ~is_whole):
            cells[place] = complete(self.cells[place])
        if stress is not None:
            stress[:] = np.nan
            stress[:frames][self.labelled] = self.stress[self.labelled]


def _kinds(size: Capacity, step: GlobalStep, cells: _Cells) -> dict[str, Kind]:
    """The tensors of a batch, in the order of the fields of `Batch`."""
    atoms, edges, frames, most = size
    return {
        "positions": ("float64", (atoms, 3)),
        "species": ("int64", (atoms,)),
        "frame": ("int64", (atoms,)),
        "edge_index": ("int64", (2, edges)),
        "edge_shift": ("float64", (edges, 3)),
        **({"cell": ("float64", (frames, 3, 3))} if cells.periodic.any() else {}),
        "neighbours": ("int64", (atoms, most)),
        "incoming": ("int64", (atoms, most)),
        **({"mask": ("bool", (atoms,))} if step.is_padded else {}),
        "energy": ("float64", (frames,)),
        "forces": ("float64", (atoms, 3)),
        **({"stress": ("float64", (frames, 3, 3))} if cells.labelled.any() else {}),
        **dict.fromkeys(_totals(step), ("float64", ())),
    }


def _totals(step: GlobalStep) -> dict[str, int]:
    counts = {"frames_total": step.frames, "atoms_total": step.atoms, "stress_total": step.stresses}
    return {name: count for name, count in counts.items() if count is not None}
