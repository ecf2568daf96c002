"""What can go wrong, and how it is told."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

_EXHAUSTED = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)  # memory, or descriptors of files
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FILE_IN_THE_WAY = (errno.ENOTDIR, errno.EEXIST)


class InputError(ValueError):
    """An input that cannot be used: an argument, a configuration key, a file or an environment.

    The message is one sentence that names the input and the remedy. Commands print it and end with exit code 2 on every
    rank. `everywhere` is True if all ranks are known to raise it.
    """

    everywhere = False


def unusable_path(error: BaseException) -> InputError | None:
    """What to tell of a file or folder that cannot be read or written; None for other errors."""
    if not isinstance(error, OSError) or error.filename is None or error.errno in _EXHAUSTED:
        return None
    return InputError(
        f"{error.filename} cannot be used ({error.strerror}): check the path, its permissions and the disk."
    )


def exhausted(error: BaseException | None) -> BaseException | None:
    """The lack of memory or descriptors that an error stems from, which no other input mends; None for other errors."""
    while error is not None:
        # The second is torch's, which need not be loaded.
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return error
        if isinstance(error, OSError) and error.errno in _EXHAUSTED:
            return error
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Has a file or folder of a run that cannot be written be an input error that names it and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in _EXHAUSTED:
            raise
        if error.errno in _FULL:
            remedy = "free some space or choose another run_dir"
        elif error.errno in _FILE_IN_THE_WAY and _is_below_a_file(path):
            remedy = "it is a file or lies below one: choose another run_dir"
        else:
            remedy = "check its permissions and the disk, or choose another run_dir"
        raise InputError(
            f"{path} could not be written ({error.strerror or error}): {remedy}; what was written before is kept."
        ) from error


def _is_below_a_file(path: Path) -> bool:
    return any(place.is_file() for place in (path, *path.parents))


E = TypeVar("E", bound=BaseException)


def own(error: E) -> E:
    """Marks an error of this rank alone, which it has to print."""
    error.own = True  # type: ignore[attr-defined]
    return error


def everywhere(error: E) -> E:
    """Marks an error that every rank raises, and rank 0 prints."""
    error.everywhere = True  # type: ignore[attr-defined]
    return error


class RankDisagreementError(RuntimeError):
    """Ranks hold or do different things where they must agree. The message names rank and parameter."""


class NonFiniteGradientError(FloatingPointError):
    """A gradient is NaN or infinite. The message names rank and parameter."""


class NonFiniteLossError(FloatingPointError):
    """A loss or gradient was NaN or infinite; the update was not applied. The message names rank and step."""


class ParityError(RuntimeError):
    """Compiled code computes something else than eager code. The message names the parameter."""


class RecordingError(RuntimeError):
    """A step does what cannot be recorded and replayed."""


class RankLostError(RuntimeError):
    """A rank failed, died or hangs, so that the others cannot go on. The message names rank, step and cause."""
