"""What a computation costs at least: its counted operations and bytes, and how fast this machine does those."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ddpkit.torch_private import DispatchMode, pytree, writes_in_place


class Counts(NamedTuple):
    """Of one run.

    Attributes:
        operations: additions and multiplications in matrix products.
        bytes: what all operations read and write when each runs by itself. Compiled code fuses many and moves less.
    """

    operations: int
    bytes: int


class Ceilings(NamedTuple):
    """What the machine reaches at best.

    Attributes:
        operations: a second, in a large matrix product.
        bytes: a second, read and written by a large copy.
    """

    operations: float
    bytes: float


def count(work: Callable[[], Any]) -> Counts:
    """Runs something once, operation by operation, and counts."""
    with FlopCounterMode(display=False) as products, _Bytes() as moved:
        work()
    return Counts(products.get_total_flops(), moved.total)


class _Bytes(DispatchMode):
    """Adds up what operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        results = func(*args, **(kwargs or {}))
        read = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        written = [x for x in pytree.tree_leaves(results) if isinstance(x, Tensor)]
        inputs = {_memory(x) for x in read}
        made = [x for x in written if _memory(x) not in inputs]
        if made or not written or writes_in_place(func):  # a view moves nothing
            self.total += sum(x.nbytes for x in [*read, *made])
        return results


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Times a large matrix product and a large copy."""
    on_gpu = device.type == "cuda"
    side, length = (8192, 2**28) if on_gpu else (1024, 2**24)
    a = torch.ones(side, side, dtype=dtype, device=device)
    x = torch.ones(length, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    return Ceilings(2 * side**3 / _best(lambda: a @ a, device), 2 * x.nbytes / _best(lambda: y.copy_(x), device))


def _best(work: Callable[[], Any], device: torch.device) -> float:
    """The least seconds of several runs."""
    times = []
    for _ in range(8):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
