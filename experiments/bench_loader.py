"""`ddpkit bench loader`: batches that a loader serves from a prepared set, and what each part of making one costs."""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpkit.data import Loader, PreparedSet, Sampler, choose_capacities, neighbour_list, write_prepared
from ddpkit.data.assembly import Assembler
from ddpkit.errors import InputError
from ddpkit.experiments.bench_step import frames as made_up
from ddpkit.experiments.bench_sync import write_csv
from ddpkit.packing import unpack
from ddpkit.ranks.processes import clocks

PARTS = ("find_lists", "make", "unpack")
SIDES = ("main", "thread", "workers")
COLUMNS = (
    "frames", "atoms", "edges", "r_max", "workers", *(f"seconds_{part}" for part in PARTS),
    "first_epoch_per_second", "per_second", "first_epoch_per_core_second", "per_core_second",
    *(f"seconds_{side}" for side in SIDES),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("set", nargs="?", type=Path, help="a prepared set; default: one that is made up")
    parser.add_argument("--kind", choices=["molecules", "crystals"], default="molecules", help="what is made up")
    parser.add_argument("--frames", type=int, default=8, help="frames in a batch")
    parser.add_argument("--r-max", type=float, default=5.0, help="cutoff, Å")
    parser.add_argument("--epochs", type=int, default=20, help="epochs to draw, the first of which finds neighbours")
    parser.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="processes that make batches (train.workers), a row each",
    )
    parser.add_argument("--csv", type=Path, help="write the table here")


def main(args: argparse.Namespace) -> None:
    """Measures and prints."""
    if args.frames < 1 or args.epochs < 2 or min(args.workers) < 0:
        raise InputError("--frames must be at least 1, --epochs at least 2 and --workers 0 or more.")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = args.set or _made(Path(folder) / "set", args)
        parts = _parts(path, args.frames, args.r_max)
        print(
            f"{args.frames} frames a batch, {parts['atoms']:.0f} atoms and {parts['edges']:.0f} edges a frame within "
            f"{args.r_max:g} Å"
        )
        print("processor µs a batch: " + ", ".join(f"{part} {1e6 * parts[f'seconds_{part}']:.0f}" for part in PARTS))
        print(
            "workers  batches a second: first epoch, later  a processor second: first epoch, later  processor µs a batch"
        )
        rows = []
        for workers in args.workers:
            row = parts | {"workers": workers} | _draw(path, args.frames, args.r_max, args.epochs, workers)
            print(
                f"{workers:7d}  {row['first_epoch_per_second']:30.0f}, {row['per_second']:5.0f}  "
                f"{row['first_epoch_per_core_second']:32.0f}, {row['per_core_second']:5.0f}  "
                + ", ".join(f"{side} {1e6 * row[f'seconds_{side}']:.0f}" for side in SIDES)
            )
            rows.append(row)
    if args.csv:
        write_csv(args.csv, rows, COLUMNS)


def _made(path: Path, args: argparse.Namespace) -> Path:
    """A set of 512 made-up frames of about 35 atoms with labels that are 0."""
    frames = [replace(f, energy=0.0, forces=np.zeros_like(f.forces)) for f in made_up(args.kind, 512, 0)]
    return write_prepared(path, frames, r_max=args.r_max).path


def _parts(path: Path, size: int, r_max: float) -> dict[str, Any]:
    """What the parts of making a batch cost, in processor seconds."""
    frames = PreparedSet(path)
    if len(frames) < size:
        raise InputError(f"{path} holds {len(frames)} frames, fewer than a batch of {size}: lower --frames.")
    plan = _plan(frames, size, r_max)
    step = next(plan.epoch(0))
    numbers = step.indices.tolist()
    chosen, assembler = [frames.frame(n) for n in numbers], Assembler(frames, frames.species, r_max)
    memory = np.empty(assembler.make(step, numbers, lambda size: np.empty(size, dtype=np.uint8)).size, dtype=np.uint8)
    layout, tensor = assembler.make(step, numbers, lambda _: memory), torch.from_numpy(memory)
    calls: dict[str, Callable[[], Any]] = {
        "find_lists": lambda: [neighbour_list(frame, r_max) for frame in chosen],
        "make": lambda: assembler.make(step, numbers, lambda _: memory),
        "unpack": lambda: unpack(tensor, layout),
    }
    return {
        "frames": size,
        "r_max": r_max,
        "atoms": float(frames.atoms.mean()),
        "edges": float(frames.edges(r_max).mean()),
        **{f"seconds_{part}": _processor_seconds(calls[part]) for part in PARTS},
    }


def _plan(frames: PreparedSet, size: int, r_max: float) -> Sampler:
    """Batches that are filled up."""
    plan = partial(
        Sampler, np.arange(len(frames)), frames.atoms, frames.edges(r_max), size,
        most_neighbours=frames.most_neighbours(r_max),
    )  # fmt: skip
    return plan(capacities=choose_capacities(plan()).levels)


def _processor_seconds(call: Callable[[], Any], repeats: int = 50, turns: int = 5) -> float:
    """Of one call, in the best of some turns."""
    seconds = []
    for _ in range(turns):
        began = time.process_time()
        for _ in range(repeats):
            call()
        seconds.append(time.process_time() - began)
    return min(seconds) / repeats


def _draw(path: Path, size: int, r_max: float, epochs: int, workers: int) -> dict[str, float]:
    """Batches per second and per processor second of all processes, and who computes for how long for each."""
    frames = PreparedSet(path)
    loader = Loader(frames, _plan(frames, size, r_max), frames.species, r_max, epochs=epochs, workers=workers)
    loader.begin(0)
    first = loader.epoch(0)
    next(first)  # until processes have started
    cold, _ = _timed(first)
    warm, sides = _timed(batch for epoch in range(1, epochs) for batch in loader.epoch(epoch))
    return {
        "first_epoch_per_second": cold[0],
        "per_second": warm[0],
        "first_epoch_per_core_second": cold[1],
        "per_core_second": warm[1],
        **{f"seconds_{side}": seconds for side, seconds in zip(SIDES, sides, strict=True)},
    }


def _timed(batches: Iterable[Any]) -> tuple[tuple[float, float], tuple[float, ...]]:
    """Batches per second and per processor second, and the processor seconds of each side for one."""
    before = clocks()
    count = sum(1 for _ in batches)
    passed, main, process, everything = (b - a for a, b in zip(before, clocks(), strict=True))
    everything = max(everything, process)  # it comes in hundredths of a second
    sides = main, process - main, everything - process
    return (count / passed, count / everything), tuple(side / max(1, count) for side in sides)
