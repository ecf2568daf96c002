"""Lines of a model in messages: the innermost one that is neither torch's nor ours."""

import linecache
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType

import torch

_OURS = tuple(str(Path(__file__).parents[1] / folder) + "/" for folder in ("compile", "sync"))
_BETWEEN = tuple(
    str(Path(__file__).with_name(name)) for name in ("graph.py", "inductor.py", "public.py", "script.py", "lines.py")
)  # also inside a model's calls
_TORCH = str(Path(torch.__file__).parent) + "/"
_STANDARD = sysconfig.get_path("stdlib") + "/"
_PACKAGES = ("site-packages", "dist-packages")


def calling_line() -> str | None:
    """The line that is being run, as `FILE, line N: CODE`; None where only torch is between it and ours."""
    return _innermost((frame.f_code.co_filename, frame.f_lineno) for frame in _frames())


def model_line(file: str, number: int) -> str | None:
    """A line of a file likewise; None for torch's, ours and Python's."""
    return _innermost([(file, number)])


def last_line() -> str | None:
    """The same, or `torch's MODULE` where the model is made of torch's modules alone."""
    line = calling_line()
    if line is not None:
        return line
    for frame in _frames():
        module = frame.f_locals.get("self")
        if isinstance(module, torch.nn.Module) and frame.f_code.co_filename.startswith(_TORCH):
            return f"torch's {type(module).__name__}"
    return None


def failing_line(error: BaseException) -> str | None:
    """The line at which an error was raised, likewise."""
    places = []
    step = error.__traceback__
    while step is not None:
        places.append((step.tb_frame.f_code.co_filename, step.tb_lineno))
        step = step.tb_next
    return _innermost(reversed(places))


def _frames() -> Iterator[FrameType]:
    """The frames on the stack, innermost first."""
    frame: FrameType | None = sys._getframe()  # noqa: SLF001  (inspect's own way, without its copies)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _innermost(places: Iterable[tuple[str, int]]) -> str | None:
    for file, number in places:
        if file.startswith(("<", _TORCH)) or file in _BETWEEN or _is_standard(file):
            continue
        return None if file.startswith(_OURS) else f"{file}, line {number}: {linecache.getline(file, number).strip()}"
    return None


def _is_standard(file: str) -> bool:
    return file.startswith(_STANDARD) and not any(f"/{name}/" in file for name in _PACKAGES)
