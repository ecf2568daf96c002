import pytest
import torch.distributed as dist


@pytest.fixture(autouse=True)
def no_process_group_is_left_behind():
    yield
    if dist.is_initialized():
        from ddpkit import launch

        launch.shutdown()
