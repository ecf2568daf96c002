"""What holds for all tests: one thread, and a cache of the compiler that is theirs alone."""

import os
import shutil
import tempfile

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # threads that wait for one another would take all cores from other processes

import pytest
import torch
import torch.distributed as dist

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # of deterministic products; read once


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    for mark in item.iter_markers("gpu"):
        number = mark.args[0] if mark.args else 1
        if torch.cuda.device_count() < number:
            pytest.skip(f"needs {number} GPU{'s' * (number > 1)}")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], scope="module")
def device(request):
    """Where tests that ask for it run: on the CPU, and once more on a GPU where there is one."""
    return request.param


@pytest.fixture
def deterministic():
    """Kernels whose sums have an order, as `deterministic=true` has them."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_configure(config):
    """A start looks through the whole cache: that of the user may hold gigabytes, and would tell what is compiled."""
    config.compiled = tempfile.mkdtemp(prefix="ddpkit-tests-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = config.compiled


def pytest_unconfigure(config):
    shutil.rmtree(config.compiled, ignore_errors=True)


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
