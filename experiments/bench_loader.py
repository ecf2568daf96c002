"""`ddpkit bench loader`: batches that a loader serves from a prepared set, and what each part of making one costs."""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpkit.data import Loader, PreparedSet, Sampler, choose_capacities, collate, neighbour_list, write_prepared
from ddpkit.data.neighbours import KeptLists
from ddpkit.data.parallel import ordered_map
from ddpkit.errors import InputError
from ddpkit.experiments.bench_step import frames as made_up
from ddpkit.experiments.bench_sync import write_csv
from ddpkit.packing import pack
from ddpkit.padding import own_sizes, pad

PARTS = ("read", "find_lists", "kept_lists", "collate", "pad", "pack")
COLUMNS = (
    "frames", "atoms", "edges", "r_max", "workers", *(f"seconds_{part}" for part in PARTS),
    "first_epoch_per_core_second", "per_core_second", "per_second",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("set", nargs="?", type=Path, help="a prepared set; default: one that is made up")
    parser.add_argument("--kind", choices=["molecules", "crystals"], default="molecules", help="what is made up")
    parser.add_argument("--frames", type=int, default=8, help="frames in a batch")
    parser.add_argument("--r-max", type=float, default=5.0, help="cutoff, Å")
    parser.add_argument("--epochs", type=int, default=10, help="epochs to draw, the first of which finds neighbours")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes with a loader each, as ranks of one host have"
    )
    parser.add_argument("--csv", type=Path, help="write the table here")


def main(args: argparse.Namespace) -> None:
    """Measures and prints."""
    if min(args.frames, args.workers) < 1 or args.epochs < 2:
        raise InputError("--frames and --workers must be at least 1 and --epochs at least 2.")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = args.set or _made(Path(folder) / "set", args)
        row = {"workers": args.workers, **_parts(path, args.frames, args.r_max)}
        task = str(path), args.frames, args.r_max, args.epochs
        found = list(ordered_map(_draw, [task] * args.workers, args.workers if args.workers > 1 else 0))
        row["first_epoch_per_core_second"], row["per_core_second"] = np.mean(found, axis=0)[:2].tolist()
        row["per_second"] = float(np.sum([per_second for _, _, per_second in found]))
    print(
        f"{args.frames} frames a batch, {row['atoms']:.0f} atoms and {row['edges']:.0f} edges a frame within {args.r_max:g} Å"
    )
    print("processor ms a batch: " + ", ".join(f"{part} {1e3 * row[f'seconds_{part}']:.3f}" for part in PARTS))
    print(
        f"batches per processor second: {row['first_epoch_per_core_second']:.0f} in the first epoch, "
        f"{row['per_core_second']:.0f} later; "
        f"{row['per_second']:.0f} a second from {args.workers} process{'es' if args.workers > 1 else ''}"
    )
    if args.csv:
        write_csv(args.csv, [row], COLUMNS)


def _made(path: Path, args: argparse.Namespace) -> Path:
    """A set of 512 made-up frames of about 35 atoms with labels that are 0."""
    frames = [replace(f, energy=0.0, forces=np.zeros_like(f.forces)) for f in made_up(args.kind, 512, 0)]
    return write_prepared(path, frames, r_max=args.r_max).path


def _parts(path: Path, size: int, r_max: float) -> dict[str, Any]:
    """What the parts of making a batch cost, in processor seconds."""
    frames = PreparedSet(path)
    if len(frames) < size:
        raise InputError(f"{path} holds {len(frames)} frames, fewer than a batch of {size}: lower --frames.")
    numbers = np.random.default_rng(0).permutation(len(frames))[:size].tolist()
    chosen, kept = [frames.frame(n) for n in numbers], KeptLists(r_max)
    lists = [kept.of(n, frame) for n, frame in zip(numbers, chosen, strict=True)]
    batch = collate(chosen, frames.species, r_max)
    own = own_sizes(batch)
    larger = own._replace(atoms=own.atoms * 11 // 10 + 1, edges=own.edges * 11 // 10, most=max(1, own.most))
    filled = pad(batch, larger, r_max)
    calls: dict[str, Callable[[], Any]] = {
        "read": lambda: [frames.frame(n) for n in numbers],
        "find_lists": lambda: [neighbour_list(frame, r_max) for frame in chosen],
        "kept_lists": lambda: [kept.of(n, frame) for n, frame in zip(numbers, chosen, strict=True)],
        "collate": partial(collate, chosen, frames.species, r_max, lists=lists.__getitem__),
        "pad": partial(pad, batch, larger, r_max),
        "pack": partial(pack, filled),
    }
    return {
        "frames": size,
        "r_max": r_max,
        "atoms": float(frames.atoms.mean()),
        "edges": float(frames.edges(r_max).mean()),
        **{f"seconds_{part}": _processor_seconds(calls[part]) for part in PARTS},
    }


def _processor_seconds(call: Callable[[], Any], repeats: int = 50, turns: int = 5) -> float:
    """Of one call, in the best of some turns."""
    seconds = []
    for _ in range(turns):
        began = time.process_time()
        for _ in range(repeats):
            call()
        seconds.append(time.process_time() - began)
    return min(seconds) / repeats


def _draw(task: tuple[str, int, float, int]) -> tuple[float, float, float]:
    """Padded batches per processor second in the first epoch and later, and later ones per second."""
    path, size, r_max, epochs = task
    torch.set_num_threads(1)
    frames = PreparedSet(path)
    plan = partial(
        Sampler, np.arange(len(frames)), frames.atoms, frames.edges(r_max), size,
        most_neighbours=frames.most_neighbours(r_max),
    )  # fmt: skip
    loader = Loader(frames, plan(capacities=choose_capacities(plan()).levels), frames.species, r_max)
    rates = []
    for some in (range(1), range(1, epochs)):
        began, processor = time.perf_counter(), time.process_time()
        count = sum(1 for epoch in some for _ in loader.epoch(epoch))
        rates.append((count / (time.process_time() - processor), count / (time.perf_counter() - began)))
    return rates[0][0], rates[1][0], rates[1][1]
