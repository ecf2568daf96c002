"""Processes that make batches, so that the one that trains only reads them.

Each gets a copy of the plan and makes every so many steps of it; bytes come through a pipe, which holds a process up when it is
far enough ahead. They load no torch, leave signals to the process that started them, and end with it, however that ends.
"""

import fcntl
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

import numpy as np

from ddpkit.data.assembly import Assembler, Layout, Memory
from ddpkit.data.parallel import ONE_THREAD
from ddpkit.data.prepared import PreparedSet
from ddpkit.data.sampler import GlobalStep
from ddpkit.errors import InputError
from ddpkit.ranks.cores import of_job, take_all_of_job

_PIPE = 1 << 20  # bytes; as many as a user may ask of Linux without more rights
_LENGTH = 8  # bytes that tell the length of what follows
_LOOK = 1.0  # seconds between looks whether the starter is there


class Steps(Protocol):
    """What batches are made of: `Sampler` or `Sweep`."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps in each epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[GlobalStep]:
        """The steps of an epoch."""


@dataclass(frozen=True)
class Work:
    """The batches to be made.

    Attributes:
        path: of the prepared set.
        species: the model's chemical symbols.
        r_max: cutoff in Å.
        steps: which frames make up each step.
        epoch, start: where to begin.
        epochs: of the run; `epoch` alone where it is no smaller.
    """

    path: Path
    species: Sequence[str]
    r_max: float
    steps: Steps
    epoch: int
    start: int
    epochs: int

    def numbered(self) -> Iterator[tuple[int, int]]:
        """Each epoch, and the step that it begins with."""
        for epoch in range(self.epoch, max(self.epoch + 1, self.epochs)):
            yield epoch, self.start if epoch == self.epoch else 0


def suggested(device: str, local_size: int) -> int:
    """How many processes should make a rank's batches: on a GPU, whose steps the host only launches, two where there are cores.

    Args:
        device: where the batches go, `cpu` or `cuda`.
        local_size: ranks on this host.
    """
    return 0 if device == "cpu" else max(0, min(2, len(of_job()) // local_size - 1))


class Makers:
    """Some processes, and what they have made.

    Args:
        work: the batches.
        count: how many processes.
    """

    def __init__(self, work: Work, count: int) -> None:
        self._turn = 0
        self._processes: list[subprocess.Popen[bytes]] = []
        weakref.finalize(self, _kill, self._processes)  # also where Python ends
        for place in range(count):
            self._processes.append(_start(pickle.dumps((work, place, count))))

    def receive(self, allocate: Callable[[int], Memory]) -> tuple[GlobalStep, list[Layout]]:
        """The next step, and how its batches lie in memory.

        Args:
            allocate: gives memory for so many bytes; called once for each batch.

        Raises:
            InputError: a process was killed.
            whatever a process met.
        """
        process = self._processes[self._turn]
        self._turn = (self._turn + 1) % len(self._processes)
        length = int.from_bytes(self._read(process, bytearray(_LENGTH)), "little")
        made = pickle.loads(self._read(process, bytearray(length)))  # noqa: S301  (of a process of our own)
        if isinstance(made, BaseException):
            raise made
        for layout in made[1]:
            self._read(process, allocate(layout.size).data)
        return made  # type: ignore[no-any-return]

    def _read(self, process: "subprocess.Popen[bytes]", into: Any) -> Any:
        assert process.stdout is not None
        rest = memoryview(into)
        while rest:
            count = process.stdout.readinto(rest)  # type: ignore[attr-defined]
            if not count:
                _tell_end(process)
            rest = rest[count:]
        return into

    def kill(self) -> None:
        """Ends the processes; whoever waits for them gets an error."""
        _kill(self._processes)

    def wait(self) -> None:
        """Waits for processes that have been ended, and closes their pipes; nobody may read any longer."""
        for process in self._processes:
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _kill(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    for process in processes:
        process.kill()


def _tell_end(process: "subprocess.Popen[bytes]") -> NoReturn:
    code = process.wait()
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    if code == -signal.SIGKILL:
        how += ", as systems do where memory runs out: give the job more memory, or"
    else:
        how += ":"
    raise InputError(
        f"A process that makes batches (number {process.pid}) {how} make batches in the process that trains (train.workers=0)."
    )


def _start(work: bytes) -> "subprocess.Popen[bytes]":
    """Starts a process. Its work comes as a file, because a pipe would hold this one up until the other has been started."""
    with tempfile.TemporaryFile() as file, _blocked(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        file.write(work)
        file.seek(0)
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import sys; sys.path[:] = {sys.path!r}; from ddpkit.data import makers; makers.main()",
            ],
            stdin=file,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=os.environ | dict.fromkeys(ONE_THREAD, "1"),
        )
    assert process.stdout is not None
    with suppress(OSError, AttributeError):  # of other systems than Linux
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, _PIPE)
    return process


@contextmanager
def _blocked(*numbers: signal.Signals) -> Iterator[None]:
    """While this is open, signals wait for this thread, and never reach processes that it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- in such a process --------------------------------------------------------------------------------------------------------


def main() -> None:
    """What such a process does."""
    starter = os.getppid()
    threading.Thread(target=_follow, args=(starter,), daemon=True).start()
    take_all_of_job()
    out = open(os.dup(1), "wb")  # noqa: PTH123, SIM115  (a descriptor, open until the process ends)
    os.dup2(2, 1)  # what a library prints is no batch
    try:
        work, place, count = pickle.load(sys.stdin.buffer)  # noqa: S301  (of the process that started this one)
        _make_all(work, place, count, out)
    except BrokenPipeError:  # nobody reads any longer
        os._exit(0)
    except Exception as error:  # noqa: BLE001  (raised where the batch is asked for)
        with suppress(BrokenPipeError):
            _send(out, _portable(error))
        os._exit(1)


def _follow(starter: int) -> None:
    """Ends this process with the one that started it: a pipe may be held by others that it started."""
    while os.getppid() == starter:
        time.sleep(_LOOK)
    os._exit(1)


def _make_all(work: Work, place: int, count: int, out: IO[bytes]) -> None:
    """Makes and sends every `count`-th step of the work, from the one at `place` on."""
    _leave_torch_out()
    assembler = Assembler(PreparedSet(work.path), work.species, work.r_max, (512 << 20) // count)
    steps = (step for epoch, start in work.numbered() for step in work.steps.epoch(epoch, start))
    for step in islice(steps, place, None, count):
        memories: list[Memory] = []

        def allocate(size: int, memories: list[Memory] = memories) -> Memory:
            memories.append(np.empty(size, dtype=np.uint8))
            return memories[-1]

        layouts = [assembler.make(step, part.tolist(), allocate) for part in step.micro_batches]
        _send(out, (step, layouts), memories)


def _send(out: IO[bytes], what: Any, memories: Sequence[Memory] = ()) -> None:
    packed = pickle.dumps(what)
    out.write(len(packed).to_bytes(_LENGTH, "little") + packed)
    for memory in memories:
        out.write(memory.data)
    out.flush()


def _leave_torch_out() -> None:
    """Has the package for neighbour lists do without torch, which it would load, in seconds, in order to accept its tensors."""
    if "torch" in sys.modules:
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import vesin  # noqa: F401
    finally:
        del sys.modules["torch"]


def _portable(error: Exception) -> Exception:
    """An error that another process can raise too."""
    if not isinstance(error, InputError):
        traceback.print_exc()
    try:
        return pickle.loads(pickle.dumps(error))  # type: ignore[no-any-return]  # noqa: S301
    except Exception:  # noqa: BLE001  (whatever its class makes of that)
        return RuntimeError(f"{type(error).__name__}: {error}")
