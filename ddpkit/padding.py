"""Batches filled up to fixed sizes, so that one recorded step serves many of them."""

import torch
from torch import Tensor

from ddpkit.batch import DIMS, Batch, Dim
from ddpkit.data.capacities import Capacity, require_room

__all__ = ["Capacity", "own_sizes", "pad"]


def own_sizes(batch: Batch) -> Capacity:
    """The least capacity that holds a batch: its own sizes, and a frame of padding that stays empty.

    Args:
        batch: with its neighbour tables.
    """
    assert batch.neighbours is not None
    return Capacity(
        batch.positions.shape[0], batch.edge_index.shape[1], batch.num_frames + 1, batch.neighbours.shape[1]
    )


def pad(batch: Batch, capacity: Capacity, r_max: float) -> Batch:
    """Fills a batch up to a capacity.

    The last frame holds the atoms that only fill up, and there may be empty frames before it. Padding edges lead from such an
    atom to itself, over twice the cutoff. `mask` tells real atoms from others. What is padded has no label: energies and forces
    are 0, stresses NaN; a loss leaves such atoms and frames out by `mask`. A padded batch can be filled up
    further.

    Nothing here waits for a device.

    Args:
        batch: with its neighbour tables.
        capacity: holds the batch.
        r_max: cutoff in Å.

    Raises:
        InputError: the batch does not fit.
    """
    batch = batch.with_neighbours()
    assert batch.neighbours is not None
    assert batch.incoming is not None
    atoms, edges, frames = batch.positions.shape[0], batch.edge_index.shape[1], batch.num_frames
    require_room(capacity, atoms, edges, frames, batch.neighbours.shape[1])
    if batch.mask is None:
        batch = batch.replace(mask=torch.ones_like(batch.frame, dtype=torch.bool))
    lengths: dict[Dim, int] = {"atoms": capacity.atoms, "edges": capacity.edges, "frames": capacity.frames}
    fills = {"frame": capacity.frames - 1, "stress": torch.nan}
    tensors = {
        name: _fill(tensor, lengths[DIMS[name][0]], fills.get(name, 0))
        for name, tensor in batch.tensors().items()
        if DIMS[name] and DIMS[name][0] in lengths and name not in ("neighbours", "incoming")
    }
    extra = torch.arange(edges, capacity.edges, device=batch.edge_index.device)
    ends = atoms + (extra - edges) // max(1, capacity.most)
    tensors["edge_index"] = torch.cat((batch.edge_index, ends.expand(2, -1)), 1)
    tensors["edge_shift"][edges:, 0] = 2 * r_max
    for name in ("neighbours", "incoming"):
        tensors[name] = _fill_table(getattr(batch, name), edges, extra, capacity)
    if batch.cell is not None:
        tensors["cell"][frames:] = torch.eye(3, dtype=batch.cell.dtype, device=batch.cell.device)
    return batch.replace(**tensors, num_frames=capacity.frames)


def _fill(tensor: Tensor, length: int, value: float) -> Tensor:
    """A tensor with rows of `value` after its own."""
    filled = tensor.new_full((length, *tensor.shape[1:]), value)
    filled[: tensor.shape[0]] = tensor
    return filled


def _fill_table(table: Tensor, edges: int, extra: Tensor, capacity: Capacity) -> Tensor:
    """A neighbour table with rows for the padding atoms, which list the padding edges in order."""
    filled = table.new_full((capacity.atoms, capacity.most), capacity.edges)
    rows, columns = table.shape
    filled[:rows, :columns] = table.masked_fill(table == edges, capacity.edges)
    filled[rows:].view(-1)[: len(extra)] = extra
    return filled
