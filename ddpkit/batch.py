"""What a model is called with."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Dim = int | str  # a fixed size, or the name of one that varies from batch to batch


def _shape(*dims: Dim) -> dict[str, tuple[Dim, ...]]:
    """Metadata of a field that holds a tensor."""
    return {"dims": dims}


def _size(name: str) -> dict[str, str]:
    """Metadata of a field that holds a size."""
    return {"size": name}


@dataclass
class Batch:
    """Several frames (molecules or cells), concatenated, with their edges.

    Edge `e` points from centre `i = edge_index[0, e]` to neighbour `j = edge_index[1, e]`; its vector is
    `positions[j] + edge_shift[e] - positions[i]`. Edges are sorted by centre.

    `neighbours` is the same list by atom: row `i` holds the indices of the edges whose centre is atom `i`, padded with the number
    of edges (one past the last index). Models that contract over the edges of a centre use it. `incoming` has the same shape and
    holds the edges whose neighbour is the atom. `with_neighbours()` makes both if they are missing.

    `frames_total` and `atoms_total` are the counts of the global batch (all ranks, all accumulated micro-batches). The sampler
    sets them, and a loss divides by them (`ddpkit.global_mean`); if they are None, this batch is the global one. `stress_total`
    counts the frames with a stress label; if it is None, all have one.

    In a padded batch (`ddpkit.padding`), `mask` is False for padding atoms. They belong to the last frame, which holds no real
    atom; edges between them are longer than any cutoff. There may be empty frames before it. A loss leaves out what `mask`
    leaves out, and frames without a real atom.
    """

    positions: Tensor = field(metadata=_shape("atoms", 3))  # float64, Å
    species: Tensor = field(metadata=_shape("atoms"))  # int64, index into the model's species
    frame: Tensor = field(metadata=_shape("atoms"))  # int64, the frame of each atom
    edge_index: Tensor = field(metadata=_shape(2, "edges"))  # int64
    edge_shift: Tensor = field(metadata=_shape("edges", 3))  # float64, Å
    num_frames: int = field(metadata=_size("frames"))
    # float64, Å, rows are lattice vectors; None for molecules
    cell: Tensor | None = field(default=None, metadata=_shape("frames", 3, 3))
    neighbours: Tensor | None = field(
        default=None, metadata=_shape("atoms", "most")
    )  # int64, most neighbours of an atom
    incoming: Tensor | None = field(default=None, metadata=_shape("atoms", "most"))  # int64
    mask: Tensor | None = field(default=None, metadata=_shape("atoms"))  # bool
    energy: Tensor | None = field(default=None, metadata=_shape("frames"))  # float64, eV
    forces: Tensor | None = field(default=None, metadata=_shape("atoms", 3))  # float64, eV/Å
    stress: Tensor | None = field(default=None, metadata=_shape("frames", 3, 3))  # float64, eV/Å^3
    frames_total: Tensor | None = field(default=None, metadata=_shape())  # float64
    atoms_total: Tensor | None = field(default=None, metadata=_shape())  # float64
    stress_total: Tensor | None = field(default=None, metadata=_shape())  # float64

    def real_frames(self) -> Tensor:
        """`[frames]` bool: which frames hold an atom that does not only fill the batch up."""
        atoms = torch.ones_like(self.frame) if self.mask is None else self.mask.to(self.frame.dtype)
        return self.frame.new_zeros(self.num_frames).index_add(0, self.frame, atoms) > 0

    def tensors(self) -> dict[str, Tensor]:
        """The fields that hold tensors, by name."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if isinstance(value, Tensor)}

    def replace(self, **changes: Any) -> "Batch":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The same batch on another device."""
        return self.replace(**{k: v.to(device, non_blocking=non_blocking) for k, v in self.tensors().items()})

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory."""
        return self.replace(**{k: v.pin_memory() for k, v in self.tensors().items()})

    def with_neighbours(self) -> "Batch":
        """This batch with `neighbours` and `incoming` filled in (waits for the device where the edges lie on one)."""
        if self.neighbours is not None and self.incoming is not None:
            return self
        centre, neighbour = self.edge_index[0], self.edge_index[1]
        atoms = self.positions.shape[0]
        both = torch.cat((torch.bincount(centre, minlength=atoms), torch.bincount(neighbour, minlength=atoms)))
        most = int(both.max()) if both.numel() else 0
        return self.replace(
            neighbours=neighbour_table(centre, atoms, most), incoming=neighbour_table(neighbour, atoms, most)
        )


DIMS: Mapping[str, tuple[Dim, ...]] = {
    f.name: f.metadata["dims"] for f in dataclasses.fields(Batch) if "dims" in f.metadata
}  # the shape of every tensor of a `Batch`, by the field's name
SIZES: Mapping[str, str] = {
    f.name: f.metadata["size"] for f in dataclasses.fields(Batch) if "size" in f.metadata
}  # which size every integer of a `Batch` is


def select_frames(batch: Batch, frames: Sequence[int]) -> Batch:
    """A batch of some of a batch's frames; a frame may come several times.

    Of a padded batch, the last one chosen should be the last frame, so that the selection is a padded batch as well.
    """
    atoms = [torch.nonzero(batch.frame == n)[:, 0] for n in frames]
    edges = [torch.nonzero(batch.frame[batch.edge_index[0]] == n)[:, 0] for n in frames]
    starts = [sum(len(a) for a in atoms[:n]) for n in range(len(frames))]
    edge_index = torch.cat(
        [
            torch.searchsorted(a, batch.edge_index[:, e].contiguous()) + start
            for a, e, start in zip(atoms, edges, starts, strict=True)
        ],
        1,
    )
    rows: dict[Dim, Tensor] = {
        "atoms": torch.cat(atoms),
        "edges": torch.cat(edges),
        "frames": torch.tensor(frames, device=batch.frame.device),
    }
    tensors = batch.tensors().items()
    selected = {name: x[rows[DIMS[name][0]]] for name, x in tensors if DIMS[name] and DIMS[name][0] in rows}
    numbers = {
        "frame": torch.cat([torch.full_like(a, n) for n, a in enumerate(atoms)]),
        "edge_index": edge_index,
        "num_frames": len(frames),
        "neighbours": None,
        "incoming": None,
    }
    return batch.replace(**selected | numbers).with_neighbours()


def neighbour_table(ends: Tensor, atoms: int, most: int | None = None) -> Tensor:
    """The edges at each atom, padded.

    Args:
        ends: `[edges]`, the atom at one end of each edge.
        atoms: number of atoms.
        most: columns of the table; the most edges at an atom where None.

    Returns:
        `[atoms, most]` int64: edge numbers, ascending, and `edges` where padded.
    """
    edges = ends.shape[0]
    counts = torch.bincount(ends, minlength=atoms)
    if most is None:
        most = int(counts.max()) if counts.numel() else 0
    first = counts.cumsum(0) - counts
    order = torch.argsort(ends, stable=True)
    row = ends[order]
    table = ends.new_full((atoms, most), edges)
    table[row, torch.arange(edges, device=ends.device) - first[row]] = order
    return table
