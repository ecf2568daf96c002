"""Which phase of its life a run is in, for messages and for whoever watches the process.

The phase is the name of the process as `ps` and `top` show it (`ddpkit:data`), so that it can be seen from outside, also before
the ranks have met.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PHASES = ("import", "rendezvous", "data", "model", "compile", "step", "checkpoint", "validation", "end")

_now = ("", time.monotonic())


def enter(phase: str) -> None:
    """Begins a phase."""
    global _now  # noqa: PLW0603  (a process is in one phase)
    assert phase in PHASES
    if phase == _now[0]:
        return
    _now = phase, time.monotonic()
    with suppress(OSError):  # no /proc here
        Path("/proc/self/comm").write_text(f"ddpkit:{phase}"[:15])


def current() -> tuple[str, float]:
    """The phase, empty before the first, and for how many seconds it has lasted."""
    phase, began = _now
    return phase, time.monotonic() - began


@contextmanager
def during(phase: str) -> Iterator[None]:
    """Inside, the phase is another one."""
    before = _now[0]
    enter(phase)
    try:
        yield
    finally:
        if before:
            enter(before)
