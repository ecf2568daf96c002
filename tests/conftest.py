import pytest
import torch
import torch.distributed as dist


@pytest.fixture(autouse=True)
def no_process_group_is_left_behind():
    yield
    if dist.is_initialized():
        from ddpkit.ranks import group

        group.shutdown()


@pytest.fixture(autouse=True)
def the_default_dtype_is_put_back():
    """nequip makes float64 the default of the whole process."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float32)
