"""What is set for the whole process so that it can be one of several ranks: each is undone at the end of its context."""

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
