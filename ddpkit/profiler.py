"""`profile=N`: a profiler's trace of N training steps, and a table of where their time went."""

import csv
import json
from pathlib import Path
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from tqdm import tqdm

from ddpkit.breakdown import Breakdown, break_down
from ddpkit.errors import writing

WARM_UP = 9  # steps before those that count: first calls compile and allocate
COLUMNS = ("part", "ms_per_step", "percent", "busy_ms_per_step", "launches_per_step")
KERNEL_COLUMNS = ("part", "name", "ms_per_step", "launches_per_step")
_WIDTHS = (26, 14, 9, 10, 10)
_SHOWN = 48  # characters of a kernel's name


class StepProfiler:
    """Traces steps of this rank and writes `trace.json`, `table.csv` and `kernels.csv`. Rank 0 alone holds one.

    A GPU is waited for before the first step and after the last, so that what it does in between belongs to them. Writing takes
    seconds, which the next row and the epoch count as theirs.

    Args:
        folder: where to write; made when there is something to write.
        steps: how many to trace.
        device: that trains.
    """

    def __init__(self, folder: Path, steps: int, device: torch.device) -> None:
        self._folder, self._steps, self._device = folder, steps, device
        self._profile: profile | None = None
        self._before, self._done = 0, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.stop()
        elif self._profile is not None:
            self._profile.stop()

    def start(self, steps_left: int) -> None:
        """Begins, ahead of the first step.

        Args:
            steps_left: that training will make at most; where they are few, fewer come before those that count.
        """
        self._before = max(0, min(WARM_UP, steps_left - self._steps))
        on_gpu = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
        warm_up = min(1, self._before)
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *on_gpu],
            schedule=schedule(wait=self._before - warm_up, warmup=warm_up, active=self._steps, repeat=1),
        )
        self._profile.start()

    def step(self) -> None:
        """Ends a step, and the trace after the last."""
        if self._profile is None:
            return
        self._done += 1
        if self._device.type == "cuda" and self._done in (self._before, self._before + self._steps):
            torch.cuda.synchronize(self._device)
        self._profile.step()
        if self._done == self._before + self._steps:
            self.stop()

    def stop(self) -> None:
        """Ends the trace, if there is one, and writes and prints what is in it."""
        if self._profile is None:
            return
        profiled, self._profile = self._profile, None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        profiled.stop()
        if self._done <= self._before:
            tqdm.write(f"profile={self._steps}: training ended before a step could be profiled")
            return
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            trace = self._folder / "trace.json"
            profiled.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text())["traceEvents"]
            broken_down = break_down(
                events, self._done - self._before
            )  # the trace shows one more, begun after the last
            write(broken_down, self._folder)
        tqdm.write(f"{table(broken_down)}\n{trace} opens in https://ui.perfetto.dev")


def write(broken_down: Breakdown, folder: Path) -> None:
    """Writes `table.csv`, the parts of a step, and `kernels.csv`, what they consist of."""
    for name, columns, rows in (
        ("table.csv", COLUMNS, _parts(broken_down)),
        (
            "kernels.csv",
            KERNEL_COLUMNS,
            [(k.part, k.name, 1e3 * k.busy, k.launches) for k in broken_down.kernels],
        ),
    ):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([columns, *rows])


def table(broken_down: Breakdown) -> str:
    """The parts of a step, as text; the kernels of a convolution are named."""
    b = broken_down
    lines = [
        f"{b.steps} step{'s' * (b.steps > 1)} profiled, {1e3 * b.seconds:.3f} ms each (the profiler's own time is in it):"
    ]
    lines.append(_line("", "ms per step", "share", "busy", "launches"))
    for part, ms, percent, busy, launches in _parts(b):
        lines.append(_line(part, f"{ms:.3f}", f"{percent:.1f} %", f"{busy:.3f}", f"{launches:.0f}"))
        if part == "convolution":
            lines += [
                _line(f"  {k.name[:_SHOWN]}", "", "", f"{1e3 * k.busy:.3f}", f"{k.launches:.0f}")
                for k in b.kernels
                if k.part == part
            ]
    return "\n".join(lines)


def _parts(b: Breakdown) -> list[tuple[str, float, float, float, float]]:
    return [(p.name, 1e3 * p.seconds, 100 * p.seconds / b.seconds, 1e3 * p.busy, p.launches) for p in b.parts]


def _line(name: str, *cells: str) -> str:
    return name.ljust(_WIDTHS[0]) + "".join(cell.rjust(width) for cell, width in zip(cells, _WIDTHS[1:], strict=True))
