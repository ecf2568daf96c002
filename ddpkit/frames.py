"""From atoms to frames: sums, and the stress."""

import torch
from torch import Tensor

from ddpkit.batch import Batch


def sum_over_frames(x: Tensor, batch: Batch) -> Tensor:
    """`[atoms, ...]` -> `[frames, ...]`."""
    return x.new_zeros((batch.num_frames, *x.shape[1:])).index_add(0, batch.frame, x)


def stress_of(virial: Tensor, cell: Tensor) -> Tensor:
    """The derivative of the energy by a symmetric strain over the volume `[frames, 3, 3]`, eV/Å^3.

    Args:
        virial: `[frames, 3, 3]` the sum over edges of each component of the vector times each of the derivative by it, eV.
        cell: `[frames, 3, 3]`, Å; a frame whose cell has no volume has no stress, NaN.
    """
    a, b, c = cell.unbind(1)
    volume = (a * torch.linalg.cross(b, c)).sum(1).abs().reshape(-1, 1, 1)
    safe = torch.where(volume > 0, volume, torch.ones_like(volume))
    stress = (virial + virial.transpose(1, 2)) / (2 * safe)
    return torch.where(volume > 0, stress, torch.full_like(stress, torch.nan))
