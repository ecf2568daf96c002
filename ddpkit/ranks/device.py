"""Waiting for a GPU no longer than other ranks may take."""

import time

import torch
import torch.distributed as dist

from ddpkit.ranks import phase

POLL = 5e-5  # seconds between looks
_FIRST = 0.9  # share of the timeout after which this speaks, before NCCL's own watchdog ends the process without a word


def wait_for_event(event: torch.cuda.Event, since: float, timeout: float, what: str) -> None:
    """Waits until the device has come to an event.

    Args:
        event: recorded behind what is waited for.
        since: `time.monotonic()` when that was started.
        timeout: seconds that it may take.
        what: is waited for, as the subject of a sentence.

    Raises:
        torch.distributed.DistError: it has not ended by then.
    """
    if event.query():  # type: ignore[no-untyped-call]
        return
    with phase.waiting("the device and the other ranks"):
        while not event.query():  # type: ignore[no-untyped-call]
            if (waited := time.monotonic() - since) > _FIRST * timeout:
                raise dist.DistError(  # type: ignore[attr-defined]
                    f"{what} has not ended after {waited:.0f} s (timeout {timeout:g} s): another rank has stopped, or the "
                    "device has."
                )
            time.sleep(POLL)
