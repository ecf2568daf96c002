import numpy as np
import pytest
import torch
from helpers import crystal, molecule

from ddpkit.data import collate
from ddpkit.packing import ALIGNMENT, pack, to_device
from ddpkit.padding import own_sizes, pad


def batches():
    rng = np.random.default_rng(0)
    one = collate([molecule(rng, n) for n in (3, 1, 7)], ("H", "C", "O"), 2.5)
    other = collate([crystal(rng, n) for n in (3, 4)], ("H", "C", "O"), 2.5)
    lonely = collate([molecule(rng, 1)], ("H", "C", "O"), 2.5)
    total = torch.tensor(3.0, dtype=torch.float64)
    strided = other.replace(forces=other.forces.t().contiguous().t(), frames_total=total)
    filled = pad(one, own_sizes(one)._replace(atoms=19), 2.5)
    return {"molecules": one, "strided": strided, "lonely": lonely, "padded": filled}


@pytest.mark.parametrize("name", batches())
def test_a_packed_batch_is_the_batch_in_one_aligned_buffer(name):
    batch = batches()[name]
    flat, packed = pack(batch)
    assert (flat.dtype, flat.dim()) == (torch.uint8, 1)
    ends = [0]
    for field, value in batch.tensors().items():
        part = getattr(packed, field)
        assert (part.dtype, part.shape) == (value.dtype, value.shape)
        torch.testing.assert_close(part, value, rtol=0, atol=0, equal_nan=True)
        assert part.is_contiguous()
        assert part.untyped_storage().data_ptr() == flat.data_ptr()
        first = part.storage_offset() * part.itemsize
        assert first % ALIGNMENT == 0
        assert first >= ends[-1]
        ends.append(first + part.nbytes)
    assert ends[-1] <= len(flat) <= ends[-1] + ALIGNMENT
    assert (packed.num_frames, packed.tensors().keys()) == (batch.num_frames, batch.tensors().keys())


@pytest.mark.parametrize("name", batches())
def test_one_copy_takes_it_elsewhere(name):
    flat, packed = pack(batches()[name])
    copied, there = to_device(flat.clone(), packed, "cpu")
    for field, value in packed.tensors().items():
        torch.testing.assert_close(getattr(there, field), value, rtol=0, atol=0, equal_nan=True)
        assert getattr(there, field).untyped_storage().data_ptr() == copied.data_ptr()
    _, away = to_device(flat, packed, "meta")
    assert {k: (v.shape, v.dtype) for k, v in away.tensors().items()} == {
        k: (v.shape, v.dtype) for k, v in packed.tensors().items()
    }
