"""Published files and anything ASE reads, turned into prepared sets: streaming, on all cores, resumable, atomic."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from ddpkit.data.neighbours import check_cutoff
from ddpkit.data.parallel import cores, ordered_map
from ddpkit.data.prepared import Block, Filters, PreparedSet, Writer
from ddpkit.errors import InputError

_MOST_PROCESSES = 12  # keeps all of them together below 2 GiB
_SECONDS_BETWEEN_CHECKPOINTS = 10.0


class Source(Protocol):
    """An input that comes in pieces."""

    unit: str  # what progress counts

    @property
    def files(self) -> Sequence[Path]:
        """Where it lies."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the frames depend on, plain JSON."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """More for the manifest."""

    @property
    def total(self) -> int | None:
        """How much progress there is to make, where that is known."""

    def pieces(self, position: Any) -> Iterator[tuple[Any, Any, int]]:
        """Tasks from a position (None: the start) on, each with the position after it and how much progress it is."""

    def blocks(self, r_max: float, filters: Filters) -> Callable[[Any], Block]:
        """A picklable function from task to frames."""

    def done(self, position: Any) -> int:
        """Progress at a position."""


def prepare(
    source: Source,
    path: str | os.PathLike[str],
    *,
    r_max: float,
    filters: Filters,
    processes: int | None = None,
    progress: bool = True,
    resumable: bool = True,
) -> PreparedSet:
    """Turns an input into a prepared set.

    Memory depends on the number of processes (below 2 GiB in all), not on the input. A run that was interrupted is gone on with
    when it is started again.

    Args:
        source: the input.
        path: the folder to be; it appears when it is complete.
        r_max: cutoff in Å, for the counts of edges and the filter of isolated atoms.
        filters: which frames to leave out.
        processes: worker processes; 0 works in this one; as many as there are cores where None.
        progress: whether to show a bar.
        resumable: whether what was done is kept for another start where this one is interrupted.

    Raises:
        InputError: the folder exists, the input cannot be read, no frame is left, or none has an edge.
    """
    from tqdm import tqdm

    check_cutoff(r_max)
    if processes is None:
        processes = min(cores(), _MOST_PROCESSES)
    description = {
        "files": [{"name": file.name, "bytes": file.stat().st_size} for file in source.files],
        **source.settings,
        "filters": asdict(filters),
    }
    name = f"{source.files[0]}" + (f" and {len(source.files) - 1} more" if len(source.files) > 1 else "")
    with Writer(path, description, r_max, name) as writer:
        pieces = _Positions(source.pieces(writer.position))
        bar = tqdm(
            total=source.total, initial=source.done(writer.position), unit=source.unit, desc="preparing", disable=not progress,
            mininterval=1.0, unit_scale=source.unit == "B",
        )  # fmt: skip
        last = time.monotonic()
        with bar:
            for block in ordered_map(source.blocks(r_max, filters), pieces, processes):
                writer.append(block)
                position, progressed = pieces.next()
                bar.update(progressed)
                if resumable and time.monotonic() - last > _SECONDS_BETWEEN_CHECKPOINTS:
                    writer.checkpoint(position)
                    last = time.monotonic()
        if writer.frames and not writer.edges:
            raise InputError(f"no frame of {name} has two atoms within r_max={r_max:g} Å: raise the cutoff")
        return writer.finish(**source.facts)


class _Positions:
    """Hands out tasks and remembers, in order, where each ends."""

    def __init__(self, pieces: Iterator[tuple[Any, Any, int]]) -> None:
        self._pieces = pieces
        self._ends: list[tuple[Any, int]] = []

    def __iter__(self) -> Iterator[Any]:
        for task, end, progressed in self._pieces:
            self._ends.append((end, progressed))
            yield task

    def next(self) -> tuple[Any, int]:
        return self._ends.pop(0)
