"""A run on several ranks, seen from outside: who is in which phase, and who is still there."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ddpkit.ranks import phase
from ddpkit.ranks.mpirun import MPIRUN_SETTINGS, mpirun
from ddpkit.testing.ranks import LAUNCHER_VARIABLES, RANK_VARIABLES

MARK = "DDPKIT_CAMPAIGN"
LOOK = 0.001  # seconds between looks at a rank's phase
LOOK_AT_START = 0.02  # the same while it starts: looks of many jobs side by side would take a whole core
REAPING = 5.0  # seconds that helpers of a rank get to notice its end


class Job:
    """A command under `mpirun`; every process that it starts carries a mark in its environment.

    Leaving the context kills whatever is left.

    Args:
        words: the command of a rank.
        ranks: how many.
        variables: further environment variables.
        output: a file for all that is printed.
        mark: unlike that of any other job.
    """

    def __init__(self, words: Sequence[str], ranks: int, variables: Mapping[str, str], output: Path, mark: str) -> None:
        head, base = mpirun(ranks)
        kept = {
            name: value
            for name, value in base.items()
            if name.startswith(MPIRUN_SETTINGS) or not (name.startswith(LAUNCHER_VARIABLES) or name in RANK_VARIABLES)
        }
        self._mark = mark
        with output.open("wb") as file:
            self.mpirun = subprocess.Popen(
                [*head, *words], env=kept | dict(variables) | {MARK: mark}, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._ranks: dict[int, int] = {}
        self._size = ranks

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """Ends everything that is left."""
        deadline = time.monotonic() + REAPING
        while (left := self.left()) and time.monotonic() < deadline:
            for number in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.mpirun.wait(0.1)

    def ranks(self) -> dict[int, int]:
        """The process number of each rank that has been started."""
        if len(self._ranks) < self._size:
            started = {
                _environment(number).get("OMPI_COMM_WORLD_RANK"): number for number in _children(self.mpirun.pid)
            }
            self._ranks = self._ranks | {int(rank): number for rank, number in started.items() if rank is not None}
        return self._ranks

    def phase(self, rank: int) -> str:
        """The phase of a rank; empty before the first, `gone` after its end."""
        number = self.ranks().get(rank)
        if number is None:
            return "" if self.mpirun.poll() is None else "gone"
        try:
            now = phase.of(number)
        except OSError:
            return "gone"
        return "gone" if _facts(number)[0] in "ZX" else now

    def left(self) -> dict[int, str]:
        """Number and command line of each process of the job that is still there."""
        commands = {}
        for number in _processes():
            if _environment(number).get(MARK) == self._mark:
                with contextlib.suppress(OSError):
                    commands[number] = Path(f"/proc/{number}/cmdline").read_text().replace("\0", " ").strip()
        return commands

    def wait(self, seconds: float) -> bool:
        """Waits until mpirun and every rank have ended; whether they did in time."""
        deadline = time.monotonic() + seconds
        while True:
            gone = [self.phase(rank) == "gone" for rank in self.ranks()]
            if self.mpirun.poll() is not None and all(gone):
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)

    def stragglers(self) -> dict[int, str]:
        """What is left once all helpers have had the time to notice the end."""
        deadline = time.monotonic() + REAPING
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left


def pause_in(phase: str) -> float:
    """Seconds until the next look at a rank that is in a phase."""
    return LOOK_AT_START if phase in ("", "import", "rendezvous") else LOOK


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _children(parent: int) -> list[int]:
    try:  # one file, where the kernel offers it
        return [int(number) for number in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    except OSError:
        return [number for number in _processes() if _facts(number)[1] == str(parent)]


def _facts(number: int) -> list[str]:
    """State and parent of a process."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return ["X", ""]


def _environment(number: int) -> dict[str, str]:
    """Empty for a process that has ended or belongs to somebody else."""
    try:
        words = Path(f"/proc/{number}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(word.split("=", 1) for word in words if "=" in word)
