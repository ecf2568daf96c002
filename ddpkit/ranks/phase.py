"""Which phase of its life a run is in and whether it waits for others, for messages and for whoever watches the process.

The phase is the name of the process as `ps` and `top` show it (`ddpkit:data`), so that it can be seen from outside, also before
the ranks have met.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

PHASES = ("import", "rendezvous", "data", "model", "compile", "step", "checkpoint", "validation", "end")

_NAME = 15  # characters that Linux keeps of a process's name
_NAMES = {f"ddpkit:{phase}"[:_NAME]: phase for phase in PHASES}


class Wait(NamedTuple):
    """What a process waits for.

    Attributes:
        what: in words that follow "waits for".
        since: `time.monotonic()` at its start.
        patient: whether it may last for any time, since no rank of this run is to blame (another run's lock).
    """

    what: str
    since: float
    patient: bool


_now, _number = ("", time.monotonic()), 0
_waits: list[Wait] = []
listeners: list[Callable[[], None]] = []
"""Called after each change, by the thread that made it: by whoever watches this process."""


def enter(phase: str) -> None:
    """Begins a phase."""
    global _now, _number
    assert phase in PHASES
    if phase == _now[0]:
        return
    _now, _number = (phase, time.monotonic()), PHASES.index(phase)
    with suppress(OSError):  # no /proc here
        Path("/proc/self/comm").write_text(f"ddpkit:{phase}"[:_NAME])
    _tell()


def of(process: int) -> str:
    """The phase of a process of this host; empty before the first.

    Raises:
        OSError: there is no such process.
    """
    return _NAMES.get(Path(f"/proc/{process}/comm").read_text().strip(), "")


def number() -> int:
    """The phase's place in `PHASES`; 0 before the first."""
    return _number


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


class waiting(ContextDecorator):  # noqa: N801  (used as a function; a generator would cost a step more)
    """Around what does nothing but wait for other ranks, or with `patient` for another run: no lack of progress then.

    Also a decorator of a function that waits.

    Args:
        what: in words that follow "waits for".
        patient: whether it may last for any time.
    """

    def __init__(self, what: str, *, patient: bool = False) -> None:
        self._what, self._patient = what, patient

    def __enter__(self) -> None:
        _waits.append(Wait(self._what, time.monotonic(), self._patient))
        _tell()

    def __exit__(self, *_: object) -> None:
        _waits.pop()
        _tell()


def wait_from_now(what: str) -> None:
    """As `waiting`, for the rest of this process's life."""
    _waits.append(Wait(what, time.monotonic(), False))
    _tell()


def waits() -> Wait | None:
    """What this process waits for: the innermost, since the outermost began; None while it works."""
    try:
        first, last = _waits[0], _waits[-1]
    except IndexError:
        return None
    return Wait(last.what, first.since, any(wait.patient for wait in _waits[:]))


def patience() -> int:
    """0 while this process works, 1 while it waits, 2 while it waits patiently."""
    return 2 if any(wait.patient for wait in _waits) else 1 if _waits else 0


def _tell() -> None:
    for listener in listeners:
        listener()
