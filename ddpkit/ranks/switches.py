"""What is set for the whole process, as one of several ranks or for its numbers: each is undone at the end of its context."""

import atexit
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

import torch


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Has torch compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def tf32(*, allowed: bool) -> Iterator[None]:
    """Allows products of float32 matrices and convolutions to be taken in TF32, or forbids it."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = allowed
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


@contextmanager
def deterministic_algorithms(*, wanted: bool) -> Iterator[None]:
    """Has torch take kernels that repeat to the bit and refuse operations that have none, or whatever is fastest."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(mode=wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode=before, warn_only=warns)


@contextmanager
def at_exit(work: Callable[[], None]) -> Iterator[None]:
    """Has something done where the process ends inside."""
    atexit.register(work)
    try:
        yield
    finally:
        atexit.unregister(work)


@contextmanager
def signals(handlers: Mapping[signal.Signals, Callable[[int, FrameType | None], None]], wakeup: int) -> Iterator[None]:
    """Handles signals, whose numbers are written to a file descriptor as they come, even while the main thread computes.

    Args:
        handlers: what to call, from the main thread.
        wakeup: the file descriptor.
    """
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    descriptor = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
