"""What a fault does inside a rank: Python imports this file as `sitecustomize` in every process of a struck run.

Knows the standard library alone. The driver decides on the moment and sends SIGUSR2; `DDPKIT_FAULT` says what happens then.
"""

import ctypes
import os
import signal
import sys
import time
from typing import Any

SLOW = 3.0  # seconds
poisoned = False
"""Whether the model's next energies are NaN."""
cells: list[Any] = []
"""Tensors in the host's memory that the model on a GPU adds to its energies, in a replayed step too, and then sets to 0."""


def _stick() -> None:
    while True:
        time.sleep(3600)


def _freeze() -> None:
    """As a library that waits for ever: heeds no signal, and no other thread of this interpreter runs."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    ctypes.PyDLL(None).sleep(10**6)


def _exhaust() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    raise MemoryError("no room")


def _poison() -> None:
    global poisoned  # noqa: PLW0603  (read by the model)
    poisoned = True
    for cell in cells:
        cell.fill_(float("nan"))


ACTIONS = {"stuck": _stick, "frozen": _freeze, "memory": _exhaust, "slow": lambda: time.sleep(SLOW), "nan": _poison}

if __name__ == "sitecustomize" and os.environ.get("DDPKIT_FAULT") in ACTIONS:
    signal.signal(signal.SIGUSR2, lambda *_: ACTIONS[os.environ["DDPKIT_FAULT"]]())
