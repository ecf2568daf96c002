"""Runs that are ready side by side take turns, an epoch at a time, so that drift of the machine falls on all of them alike.

They speak through empty files in one folder. A run touches `LABEL.ready.N` when N of its epochs are done, and goes on when it
finds `LABEL.go.N`. The first epoch warms up. A run that waits leaves the GPU what memory it does not hold tensors in.
"""

import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Protocol, Self

import torch

from ddpkit.errors import InputError
from ddpkit.progress import Progress
from ddpkit.ranks import phase
from ddpkit.ranks.agree import agree, share

_POLL = 0.003
_GONE_AFTER = 60.0
_ALIVE = "alive"


class Runner(Protocol):
    """What trains by turns.

    Attributes:
        progress: how far training has come.
        stop_signal: the number of a signal to stop that has come; None: none has.
    """

    progress: Progress
    stop_signal: int | None


def wait_for(folder: Path, label: str) -> Callable[[Runner], int]:
    """What a trainer does before the first epoch and after each: says that it is ready and waits for its turn.

    Args:
        folder: where the files are.
        label: the run's.

    Returns:
        A function for all ranks to call, which returns the number of a signal to stop that came meanwhile, or 0.

    Raises:
        InputError: nobody gives turns there.
    """
    _require_giver(folder)

    def wait(trainer: Runner) -> int:
        with agree("giving way to other runs"):  # all ranks have, before anybody else has a turn
            cached = _give_back()
        number = int(share(lambda: _wait(folder, label, trainer), "waiting for its turn"))
        _take_again(cached)
        return number

    return wait


def _give_back() -> int:
    """Leaves the GPU to others but for what tensors occupy; the bytes that were given back."""
    if not torch.cuda.is_initialized():
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    return before - torch.cuda.memory_reserved()


def _take_again(count: int) -> None:
    """Takes so many bytes for the tensors of the next epoch, so that its steps need not ask for them."""
    if count:
        with suppress(torch.OutOfMemoryError):  # in one piece; smaller ones may be there
            torch.empty(count, dtype=torch.uint8, device="cuda")


@phase.waiting("its turn among the runs of a study", patient=True)
def _wait(folder: Path, label: str, trainer: Runner) -> int:
    epoch = trainer.progress.epoch
    (folder / f"{label}.ready.{epoch}").touch()
    go = folder / f"{label}.go.{epoch}"
    while not go.exists():
        if trainer.stop_signal:
            return trainer.stop_signal
        _require_giver(folder)
        time.sleep(_POLL)
    return 0


def _require_giver(folder: Path) -> None:
    last = 0.0
    with suppress(FileNotFoundError):
        last = (folder / _ALIVE).stat().st_mtime
    if time.time() - last > _GONE_AFTER:
        raise InputError(
            f"Nobody gives turns in {folder} any more: start the study again, or go on with this run alone by train.turns=null."
        )


class Turns:
    """Gives the turns; used as a context, it removes the folder in the end.

    Args:
        folder: where the files are; made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / _ALIVE).touch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def await_ready(self, label: str, epoch: int, process: "subprocess.Popen[bytes]") -> None:
        """Waits until a run has done so many epochs, or its process has ended."""
        checked = 0.0
        while not (self.folder / f"{label}.ready.{epoch}").exists():
            if time.monotonic() - checked > 0.5:
                checked = time.monotonic()
                (self.folder / _ALIVE).touch()
                if process.poll() is not None:
                    return
            time.sleep(_POLL)

    def give(self, label: str, epoch: int) -> None:
        """Lets a run go on that has done so many epochs."""
        (self.folder / f"{label}.go.{epoch}").touch()


def order(labels: Sequence[str], round_: int) -> list[str]:
    """The order of a round: another one each time, so that no run always follows the same one."""
    shuffled = list(labels)
    Random(round_).shuffle(shuffled)
    return shuffled
