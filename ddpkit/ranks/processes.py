"""What the system tells of processes of this host."""

import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

BUSY = 0.01  # share of a core that counts as progress
BYTES = 1 << 16  # bytes read or written that count as progress
WATCHER = "ddpkit:beat"  # name of the threads that run in a stuck process too, as torch's own do
_WATCHERS = ("pt_", WATCHER)
_HERTZ = os.sysconf("SC_CLK_TCK")


class Meter:
    """Tells whether a process, or one that it started, makes progress: uses the processor, reads or writes.

    Attributes:
        below: the processes that it has started and when each was, as last looked.
    """

    def __init__(self, process: int) -> None:
        self._process = process
        self.below: dict[int, str] = {}
        self._seconds, self._bytes, self._since = 0.0, 0, 0.0

    def progressed(self, passed: float) -> bool:
        """Whether it has, since this was last so.

        Args:
            passed: seconds since the last call.
        """
        self._since += passed
        self.below = {}
        for process in below(self._process):
            with suppress(OSError, IndexError):  # it has ended
                self.below[process] = born(process)
        seconds, size = used(self._process, self.below)
        if seconds - self._seconds < max(0.02, BUSY * self._since) and abs(size - self._bytes) < BYTES:
            return False
        self._seconds, self._bytes, self._since = seconds, size, 0.0
        return True


def clocks() -> tuple[float, float, float, float]:
    """Seconds that have passed, and processor seconds of this thread, of this process, and of it and all below it."""
    return time.perf_counter(), time.thread_time(), time.process_time(), used(os.getpid())[0]


def used(process: int, started: Iterable[int] | None = None) -> tuple[float, int]:
    """Processor time [s] and bytes read and written by a process and all below it, but for the threads that watch.

    Args:
        process: its number.
        started: those below it, where they are known.
    """
    seconds, size = _used(Path(f"/proc/{process}"), children=True)
    for thread in Path(f"/proc/{process}/task").iterdir():
        with suppress(OSError):
            if (thread / "comm").read_text().startswith(_WATCHERS):
                theirs = _used(thread, children=False)
                seconds, size = seconds - theirs[0], size - theirs[1]
    for other in below(process) if started is None else started:
        with suppress(OSError):
            theirs = _used(Path(f"/proc/{other}"), children=True)
            seconds, size = seconds + theirs[0], size + theirs[1]
    return seconds, size


def _used(path: Path, *, children: bool) -> tuple[float, int]:
    fields = stat(path)
    ticks = sum(map(int, fields[11 : 15 if children else 13]))
    size = 0
    with suppress(OSError):  # some containers do not show it
        size = sum(int(line.split()[1]) for line in (path / "io").read_text().splitlines()[:2])
    return ticks / _HERTZ, size


def stat(path: Path) -> list[str]:
    """The fields of `/proc/PID/stat` from the state on."""
    return (path / "stat").read_text().rpartition(")")[2].split()


def state(process: int) -> str:
    """The state of a process as `ps` shows it: T is stopped, Z has ended.

    Raises:
        OSError: there is none.
    """
    return stat(Path(f"/proc/{process}"))[0]


def born(process: int) -> str:
    """When a process was started, by the system's clock: tells it from a later one of the same number.

    Raises:
        OSError: there is none.
    """
    return stat(Path(f"/proc/{process}"))[19]


def below(process: int) -> Iterator[int]:
    """All processes that a process started, and those that they started, but for this one."""
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, children.read_text().split()):
                if child != os.getpid():
                    yield child
                    yield from below(child)


def name_thread(name: str) -> None:
    """Gives the thread that calls this the name by which `top` shows it."""
    with suppress(OSError):
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name[:15])
