"""A batch in one piece of memory, so that one copy takes it to a device."""

import torch
from torch import Tensor

from ddpkit.batch import Batch
from ddpkit.data.assembly import Layout

_DTYPES = {"float64": torch.float64, "int64": torch.int64, "bool": torch.bool}


def unpack(memory: Tensor, layout: Layout) -> Batch:
    """The batch that lies in a piece of memory, without a copy.

    Args:
        memory: `[bytes]` uint8, on any device.
        layout: how the batch lies there.
    """
    of_type = {name: memory.view(dtype) for name, dtype in _DTYPES.items()}
    tensors = {
        name: of_type[dtype].as_strided(shape, strides, start)
        for name, (dtype, shape, strides, start) in layout.parts.items()
    }
    return Batch(**tensors, num_frames=layout.num_frames)
