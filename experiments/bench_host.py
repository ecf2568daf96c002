"""`ddpkit bench host`: processor time that the host spends on a step of a run, beside what the device does.

A whole run is made, as `ddpkit run` makes it with these overrides: batches, step, moving average, a row of `steps.csv` for every
step. On a GPU it is measured as it is. On a CPU, where device and host are one, recorded steps are not replayed but left out (all
around them is as it is), so that what remains is the host's work; `--whole` computes them.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from ddpkit.capture.recording import Pretended
from ddpkit.data import write_prepared
from ddpkit.data.makers import suggested
from ddpkit.errors import InputError
from ddpkit.experiments import run_data, setup
from ddpkit.experiments.bench_step import frames as made_up
from ddpkit.experiments.bench_sync import write_csv
from ddpkit.experiments.config import read
from ddpkit.ranks import group
from ddpkit.ranks.processes import clocks
from ddpkit.record import RunFolder
from ddpkit.train import Trainer

SIDES = ("main", "threads", "processes")
COLUMNS = (
    "model",
    "device",
    "frames",
    "workers",
    "steps",
    "captured",
    "seconds",
    *(f"seconds_{side}" for side in SIDES),
)
_WARM_UP = 4  # epochs, in which steps are recorded and neighbours found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("overrides", nargs="*", help="of the run, such as compile=false train.workers=0")
    parser.add_argument("--model", default="allegro_medium", help="a named model (see `ddpkit models`)")
    parser.add_argument("--frames", type=int, default=8, help="frames in a batch, molecules of about 35 atoms")
    parser.add_argument(
        "--epochs", type=int, default=40, help="epochs of 32 steps that are measured; the least of them is told"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU where there is one")
    parser.add_argument("--whole", action="store_true", help="on a CPU, compute recorded steps")
    parser.add_argument("--csv", type=Path, help="write the table here")


def main(args: argparse.Namespace) -> None:
    """Measures and prints.

    Raises:
        InputError: the numbers or overrides cannot be used.
    """
    if min(args.frames, args.epochs) < 1:
        raise InputError("--frames and --epochs must be at least 1.")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    here = group.init_process_group(device)
    try:
        with tempfile.TemporaryDirectory() as folder:
            row = _measure(args, here, Path(folder))
    finally:
        group.shutdown()
    print(
        f"{row['model']}, {row['frames']} frames a batch on {row['device']}, {row['captured']} of {row['steps']} steps replayed"
        f"{' and left out' * (device == 'cpu' and not args.whole)}, {row['workers']} processes for batches"
    )
    print(
        "processor µs a step: "
        + ", ".join(f"{name} {1e6 * row[f'seconds_{side}']:.0f}" for name, side in _NAMED)
        + f"; {1e6 * row['seconds']:.0f} µs pass"
    )
    if args.csv:
        write_csv(args.csv, [row], COLUMNS)


_NAMED = (("main thread", "main"), ("other threads", "threads"), ("processes for batches", "processes"))


def _measure(args: argparse.Namespace, here: group.Environment, folder: Path) -> dict[str, Any]:
    frames = [
        replace(frame, energy=0.0, forces=np.zeros_like(frame.forces))
        for frame in made_up("molecules", 32 * args.frames, 0)
    ]
    on_cpu = ["compiler=interpreted", "optimizer.fused=true"] if here.device.type == "cpu" else []
    config = read(
        [
            f"model={args.model}", "model.r_max=5.0", f"device={here.device.type}", "compile=true", "cuda_graphs=true", *on_cpu,
            "data=files", f"data.path={write_prepared(folder / 'set', frames, r_max=5.0).path}", "data.split=[1,0,0]",
            f"train.batch_size={args.frames}", f"train.max_epochs={_WARM_UP + args.epochs}", "train.validate=false",
            "train.checkpoint_every=never", f"run_dir={folder / 'run'}", *args.overrides,
        ]
    )  # fmt: skip
    marks: list[tuple[float, ...]] = []

    def mark(_: Trainer) -> int:
        marks.append(clocks())
        return 0

    leaves_out = here.device.type == "cpu" and not args.whole
    with setup.numerics(config), _without_replays() if leaves_out else nullcontext():
        run_folder = RunFolder(folder / "run")
        trainer = setup.build_trainer(config, here, run_data.open_data(config), run_folder, None)
        trainer.between_epochs = mark
        trainer.fit()
        run_folder.close()
    steps = trainer.train_loader.steps_per_epoch()
    passed, main, process, everything = _least(marks[_WARM_UP:], steps)
    return {
        "model": args.model,
        "device": torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else "cpu",
        "frames": args.frames,
        "workers": suggested(here.device.type, here.local_size)
        if config.train.workers is None
        else config.train.workers,
        "steps": trainer.progress.step,
        "captured": trainer.progress.captured_steps,
        "seconds": passed,
        "seconds_main": main,
        "seconds_threads": process - main,
        "seconds_processes": max(0.0, everything - process),
    }


def _least(marks: Sequence[tuple[float, ...]], steps: int) -> tuple[float, float, float, float]:
    """Of a step: the median time that passes; what the main thread, the process, and all processes compute in the best epochs."""
    epochs = np.diff(np.array(marks), axis=0) / steps
    main, threads = epochs[:, 1].min(), (epochs[:, 2] - epochs[:, 1]).min()
    process = float(main + threads)
    # that of other processes comes in hundredths of a second
    return float(np.median(epochs[:, 0])), float(main), process, process + float((epochs[:, 3] - epochs[:, 2]).mean())


class _LeftOut(Pretended):
    """A recording that does nothing when it is replayed."""

    def run(self) -> list[Tensor]:
        """Runs the body the first time."""
        return self._results if self._operations is not None else super().run()


@contextmanager
def _without_replays() -> Iterator[None]:
    def make(body: Callable[[], list[Tensor]], *_: Any) -> _LeftOut:
        return _LeftOut(body)

    with mock.patch("ddpkit.capture.steps.make", make):
        yield
