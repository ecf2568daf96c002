"""A batch in one piece of memory, so that one copy takes it to a device."""

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

from ddpkit.batch import Batch

ALIGNMENT = 128
"""Bytes that every tensor of a packed batch begins at a multiple of: a line of a GPU's cache."""


def pack(batch: Batch, *, pin: bool = False) -> tuple[Tensor, Batch]:
    """Copies the tensors of a batch into one buffer, one after another.

    Args:
        batch: on the CPU.
        pin: whether the buffer is page-locked.

    Returns:
        `[bytes]` uint8, and the batch whose tensors are parts of it.
    """
    tensors = {name: tensor.contiguous() for name, tensor in batch.tensors().items()}
    starts, size = _places(tensors)
    flat = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    packed = _parts(flat, tensors, starts)
    for name, part in packed.items():
        part.copy_(tensors[name])
    return flat, batch.replace(**packed)


def to_device(flat: Tensor, batch: Batch, device: torch.device | str) -> tuple[Tensor, Batch]:
    """A packed batch on another device, by one copy that the host waits for only where the buffer is not page-locked.

    Args:
        flat: `[bytes]` uint8, the buffer of `pack`.
        batch: the batch of `pack`.
        device: where they go.
    """
    flat = flat.to(device, non_blocking=True)
    tensors = batch.tensors()
    return flat, batch.replace(**_parts(flat, tensors, _places(tensors)[0]))


def _places(tensors: Mapping[str, Tensor]) -> tuple[list[int], int]:
    """Where each tensor begins, in bytes, and how long the buffer is."""
    lengths = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors.values()]
    *starts, size = accumulate(lengths, initial=0)
    return starts, size


def _parts(flat: Tensor, tensors: Mapping[str, Tensor], starts: list[int]) -> dict[str, Tensor]:
    """Parts of a buffer with the names, types and shapes of some contiguous tensors."""
    of_type = {dtype: flat.view(dtype) for dtype in {tensor.dtype for tensor in tensors.values()}}
    return {
        name: of_type[tensor.dtype].as_strided(tensor.shape, tensor.stride(), start // tensor.itemsize)
        for (name, tensor), start in zip(tensors.items(), starts, strict=True)
    }
