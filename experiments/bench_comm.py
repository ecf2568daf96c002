"""`ddpkit bench comm`: time of an all-reduce against its size, through torch.distributed and through MPI.

The CSV feeds `ddpkit predict`.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ddpkit
from ddpkit.errors import InputError
from ddpkit.experiments.bench_sync import relaunch, write_csv
from ddpkit.ranks.group import DEFAULT_TIMEOUT, environment
from ddpkit.ranks.launchers import place
from ddpkit.ranks.lifeline import alive
from ddpkit.sync.comm import Comm, make_comm

COLUMNS = ("comm", "backend", "device", "ranks", "hosts", "bytes", "seconds", "seconds_min", "gigabytes_per_second")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--max-mib", type=float, default=512.0, help="largest message, MiB")
    parser.add_argument("--repeats", type=int, default=20, help="measurements of each size")
    parser.add_argument("--ranks", type=int, default=2, help="ranks to start where no launcher has started any")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU where there is one")
    parser.add_argument("--no-mpi", action="store_true", help="leave comm=mpi out")
    parser.add_argument("--csv", type=Path, help="write the table here")
    parser.add_argument("--plot", type=Path, help="draw it here")


def main(args: argparse.Namespace) -> None:
    """Measures and prints the table."""
    if args.repeats < 1 or args.ranks < 2 or args.max_mib <= 0:
        raise InputError("--repeats must be at least 1, --ranks at least 2 and --max-mib positive.")
    if place().launcher == "alone":
        relaunch(args.ranks)
        return
    here = ddpkit.init_process_group(device=args.device)
    if here.world_size < 2:
        raise InputError("An all-reduce needs two ranks: use mpirun -n 2 or more.")
    comms = {name: make_comm(name, DEFAULT_TIMEOUT) for name in (["torch"] if args.no_mpi else ["torch", "mpi"])}
    hosts = here.world_size // here.local_size
    rows: list[dict[str, Any]] = []
    with alive(here, doing="ddpkit bench comm"):
        size = 4.0
        if here.is_first:
            print(f"{here.world_size} ranks on {hosts} host(s), {here.device.type}, {here.backend}")
            print(f"{'bytes':>12}{'comm':>8}{'median µs':>14}{'least µs':>14}{'GB/s':>9}")
        while size <= args.max_mib * 2**20:
            tensor = torch.zeros(round(size) // 4, device=here.device)
            found = times(comms, tensor, args.repeats)
            for name, seconds in found.items():
                median = statistics.median(seconds)
                rows.append(
                    {
                        "comm": name,
                        "backend": here.backend if name == "torch" else "mpi",
                        "device": here.device.type,
                        "ranks": here.world_size,
                        "hosts": hosts,
                        "bytes": tensor.nbytes,
                        "seconds": median,
                        "seconds_min": min(seconds),
                        "gigabytes_per_second": tensor.nbytes / median / 1e9,
                    }
                )
                if here.is_first:
                    row = rows[-1]
                    print(
                        f"{row['bytes']:>12,}{name:>8}{median * 1e6:>14.1f}{min(seconds) * 1e6:>14.1f}"
                        f"{row['gigabytes_per_second']:>9.3f}",
                        flush=True,
                    )
            size *= 4
    if here.is_first:
        if args.csv:
            write_csv(args.csv, rows, COLUMNS)
        if args.plot:
            plot(args.plot, rows)


def times(comms: dict[str, Comm], tensor: torch.Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds of single all-reduces that all ranks begin together, of the slowest rank; the comms in turn."""
    here = environment()
    seconds_of: dict[str, list[float]] = {name: [] for name in comms}
    for repeat in range(repeats + 2):
        for name, comm in comms.items():
            dist.barrier()
            if here.device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            work = comm.all_reduce(tensor)
            if work is not None:
                work.wait()
            if here.device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 2:
                seconds_of[name].append(time.perf_counter() - start)
    for name, seconds in seconds_of.items():
        slowest = torch.tensor(seconds, dtype=torch.float64, device=here.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        seconds_of[name] = slowest.tolist()
    return seconds_of


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draws seconds against bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["comm"] for row in rows):
        mine = [row for row in rows if row["comm"] == name]
        axes.plot(
            [r["bytes"] for r in mine], [r["seconds"] for r in mine], marker="o", label=f"{name} ({mine[0]['backend']})"
        )
    axes.set(
        xscale="log", yscale="log", xlabel="bytes", ylabel="seconds", title=f"all-reduce, {rows[0]['ranks']} ranks"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")
