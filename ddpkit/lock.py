"""One run at a time writes into a folder."""

import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from ddpkit.errors import InputError, writing

NAME = ".lock"
BEAT = 10.0  # seconds between signs of life
STALE = 60.0  # seconds without one, after which a holder on another host counts as dead

_held: set[Path] = set()


@dataclass(frozen=True)
class Holder:
    """A process, as others can recognise it.

    Attributes:
        host: its name.
        home: what is alike for processes that see each other's numbers: boot of the host, namespace of the numbers.
        process: its number.
        started: clock ticks from the boot to its start, since numbers are given out again.
        since: when it took the folder, in words.
    """

    host: str
    home: str
    process: int
    started: int
    since: str

    @classmethod
    def here(cls) -> Self:
        """This process."""
        return cls(socket.gethostname(), _home(), os.getpid(), started(os.getpid()), time.strftime("%Y-%m-%d %H:%M:%S"))

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """What a lock file says; None where it says nothing."""
        try:
            facts = json.loads(text)
            return cls(**{name: kind(facts[name]) for name, kind in cls.__annotations__.items()})
        except (ValueError, TypeError, KeyError):
            return None

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"


class FolderLock:
    """Held by the process that writes into a folder, for as long as it lives.

    Three things keep others out, since no single one works on every file system: a POSIX lock on a file in the folder (which
    ends with the process; on NFS where it has a lock service), the number of the process (on its own host), and the age of the
    file, which a thread renews.

    Args:
        folder: made where it is missing.

    Raises:
        InputError: another process holds it; or it cannot be written.

    Attributes:
        taken_by: who has taken the folder meanwhile, having taken this process for dead.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.taken_by: Holder | None = None
        self._ended = threading.Event()
        self._own = Holder.here()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder.resolve() / NAME
            # Looked at first: closing any descriptor of a file ends this process's POSIX locks on it.
            if self._path in _held:
                raise self._refusal(self._own)
            self._file = self._locked()
            try:
                self._take()
            except BaseException:
                os.close(self._file)
                raise
        _held.add(self._path)
        threading.Thread(target=self._beat, args=(BEAT,), name="folder-lock", daemon=True).start()

    def require(self) -> None:
        """Looks whether the folder is still this process's; costs nothing.

        Raises:
            InputError: it is not.
        """
        if self.taken_by is not None:
            raise InputError(
                f"{self.folder} was taken over by another run ({self.taken_by}), because this one gave no sign of life for "
                f"{STALE:.0f} s: it ends here, so that the two do not mix."
            )

    def release(self) -> None:
        """Lets others in."""
        if self._ended.is_set():
            return
        self._ended.set()
        with suppress(OSError):
            if self._read() == self._own:
                self._path.unlink()
        os.close(self._file)
        _held.discard(self._path)

    def _locked(self) -> int:
        """A descriptor of the lock file with the POSIX lock on it, where the file system has such locks."""
        while True:
            descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o666)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                holder = self._read(descriptor)
                os.close(descriptor)
                raise self._refusal(holder) from None
            except OSError:
                return descriptor  # no locks here: what the file says has to do
            with suppress(FileNotFoundError):
                if os.fstat(descriptor).st_ino == self._path.stat().st_ino:
                    return descriptor
            os.close(descriptor)  # of a file that its holder has just removed

    def _take(self) -> None:
        holder = self._read()
        if holder is not None and self._lives(holder):
            raise self._refusal(holder)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(asdict(self._own)).encode(), 0)
        os.fsync(self._file)
        if (holder := self._read()) != self._own:  # where there are no locks, two may have come this far
            raise self._refusal(holder)

    def _lives(self, holder: Holder) -> bool:
        if holder.home == self._own.home:
            return holder.started == started(holder.process)
        with tempfile.TemporaryFile(dir=self._path.parent) as now:  # by the clock of whoever keeps the files
            return os.fstat(now.fileno()).st_mtime - os.fstat(self._file).st_mtime < STALE

    def _refusal(self, holder: Holder | None) -> InputError:
        elsewhere = holder is not None and holder.home != self._own.home
        gone = f"; if {holder.host} is gone, try again in a minute" if elsewhere and holder is not None else ""
        return InputError(
            f"{self.folder} is being written by another run{f' ({holder})' if holder else ''}: wait until that has ended, or "
            f"choose another run_dir{gone}."
        )

    def _read(self, descriptor: int | None = None) -> Holder | None:
        text = os.pread(self._file if descriptor is None else descriptor, 4096, 0)
        return Holder.parse(text.decode(errors="replace"))

    def _beat(self, seconds: float) -> None:
        while not self._ended.wait(seconds):
            with suppress(OSError):  # a server that does not answer for a moment; the file was removed
                holder = self._read()
                if holder is not None and holder != self._own:
                    self.taken_by = holder
                    return
                os.utime(self._file)


def started(process: int) -> int:
    """Clock ticks from the boot to the start of a process; 0 where it has ended."""
    try:
        state, *facts = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if state in "ZX" else int(facts[18])


def _home() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()
