"""Things that are made by one process while the others wait."""

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from ddpkit.errors import InputError
from ddpkit.ranks import phase


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Has `target` made unless it exists, by one of the processes that ask for it.

    The others wait on a file lock, which also ends with a killed process; no collective is open meanwhile. Should the file system
    know no locks, several may make it, and the first to finish wins.

    Args:
        target: a file or folder.
        make: makes it under the temporary name it is given, which is then renamed.

    Raises:
        InputError: nothing can be written there.
    """
    if target.exists():
        return target
    lock = target.parent / f".{target.name}.lock"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise InputError(f"{target.parent} cannot be written ({error.strerror}): choose another folder") from error
    try:
        _wait_for(descriptor)
        if not target.exists():
            temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
            make(temporary)
            try:
                temporary.rename(target)
            except OSError:
                if not target.exists():
                    raise
    finally:
        os.close(descriptor)
    return target


def _wait_for(descriptor: int) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with phase.waiting("another process that makes the same data", patient=True):
                time.sleep(0.1)
        except OSError:
            return  # no locks here
        else:
            return
