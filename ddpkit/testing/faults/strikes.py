"""How a fault is done to a job, from outside."""

import contextlib
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddpkit.testing.faults.inside import ACTIONS, SLOW
from ddpkit.testing.faults.job import Job

_SIGNALS = {
    "kill": signal.SIGKILL, "truncated": signal.SIGKILL, "garbage": signal.SIGKILL, "stop": signal.SIGSTOP,
    "term": signal.SIGTERM, "usr1": signal.SIGUSR1, **dict.fromkeys(ACTIONS, signal.SIGUSR2),
}  # fmt: skip
_DISK = 16 << 20  # bytes


def strike(fault: str, job: Job, rank: int, disk: Path | None) -> bool:
    """Does it, now.

    Returns:
        Whether it was done; a process that is about to end may no longer heed signals.

    Args:
        fault: a name of `plan.FAULTS`.
        job: the run.
        rank: who is struck.
        disk: the folder of `small_disk()` that the run writes to; None where its files must be limited instead.
    """
    number = job.ranks()[rank]
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        if fault.startswith("mpirun-"):
            job.mpirun.send_signal(signal.Signals[f"SIG{fault.removeprefix('mpirun-').upper()}"])
        elif fault in ACTIONS and not _catches(number, signal.SIGUSR2):
            return False
        elif fault in _SIGNALS:
            os.kill(number, _SIGNALS[fault])
        elif fault == "pause":
            os.kill(number, signal.SIGSTOP)
            time.sleep(SLOW)
            os.kill(number, signal.SIGCONT)
        elif fault == "limit":
            _limit(number, resource.RLIMIT_AS, _virtual_memory(number))
        elif disk is not None:
            _fill(disk)
        else:
            for each in job.ranks().values():
                _limit(each, resource.RLIMIT_FSIZE, 0)
        return True
    return False


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of its own at this folder, where that is permitted; else None."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "ddpkit-faults", str(folder)]
    try:
        mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:  # no such program
        mounted = False
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            unmount = ["umount", "--lazy", str(folder)]
            subprocess.run(unmount, capture_output=True, check=False)


def make_room(disk: Path) -> None:
    """Undoes a full disk."""
    (disk / "filler").unlink(missing_ok=True)


def damage(checkpoint: Path, fault: str, seed: int) -> None:
    """Cuts a checkpoint short, or puts random bytes in its place."""
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(
        content[: len(content) // 2] if fault == "truncated" else random.Random(seed).randbytes(len(content))
    )


def _fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 16)):
            pass


def _limit(number: int, what: int, most: int) -> None:
    _, hard = resource.prlimit(number, what)
    resource.prlimit(number, what, (most, hard))


def _catches(number: int, what: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{number}/status").read_text().splitlines())
    except OSError:
        return False
    return bool(int(lines["SigCgt"], 16) >> (what - 1) & 1)


def _virtual_memory(number: int) -> int:
    """Bytes of address space of a process."""
    try:
        pages = int(Path(f"/proc/{number}/statm").read_text().split()[0])
    except OSError as error:
        raise ProcessLookupError from error
    return pages * resource.getpagesize()
