class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence that names the thing and the remedy. Commands print it and end with exit code 2 on every
    rank. `everywhere` is set once all ranks are known to raise it.
    """

    everywhere = False


def unusable_path(error: BaseException) -> InputError | None:
    """What to tell of a file or folder that cannot be read or written; None for other errors."""
    if not isinstance(error, OSError) or error.filename is None:
        return None
    return InputError(
        f"{error.filename} cannot be used ({error.strerror}): check the path, its permissions and the disk."
    )


class RankDisagreementError(RuntimeError):
    """Ranks hold or do different things where they must agree. The message names rank and parameter."""


class NonFiniteGradientError(FloatingPointError):
    """A gradient is NaN or infinite. The message names rank and parameter."""


class ParityError(RuntimeError):
    """Compiled code computes something else than eager code. The message names the parameter."""


class RankLostError(RuntimeError):
    """A rank failed, died or hangs, so that the others cannot go on. The message names rank, step and cause."""
