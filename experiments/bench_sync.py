"""`ddpkit bench sync`: what each strategy needs to average gradients, beside torch DDP and the scheme of cat and copy.

Two measurements, each with all schemes in the same processes, block by block in turn:

- `seconds_sync`: `synchronize()` alone, on gradients as `zero_grad()` and `backward()` leave them. Strategies that communicate
  during the backward pass have none.
- `seconds_step`: forward, backward and synchronisation of a chain of square layers; `seconds_exposed` is what that takes beyond
  the same step without communication.
"""

import argparse
import csv
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ddpkit
from ddpkit.errors import InputError
from ddpkit.ranks.group import environment
from ddpkit.ranks.launchers import place
from ddpkit.ranks.lifeline import alive
from ddpkit.ranks.mpirun import mpirun

COLUMNS = (
    "parameters", "scheme", "comm", "bucket_mb", "ranks", "seconds_sync", "gigabytes_per_second", "seconds_step",
    "seconds_exposed", "sync_relative_to_cat", "step_relative_to_standard",
)  # fmt: skip

MILLISECONDS = ("seconds_sync", "seconds_step", "seconds_exposed")
RATIOS = ("gigabytes_per_second", "sync_relative_to_cat", "step_relative_to_standard")


class CatCopySync(ddpkit.GradientSync):
    """The usual unbucketed scheme, as in nequip 0.19's SimpleDDPStrategy: concatenate, all-reduce, copy back."""

    def reduce(self) -> None:
        """Averages whatever has a gradient."""
        gradients = [p.grad for p in self._module.parameters() if p.requires_grad and p.grad is not None]
        flat = torch.cat([g.view(-1) for g in gradients])
        if self.comm.averages(flat.device):
            dist.all_reduce(flat, op=dist.ReduceOp.AVG)
        else:
            dist.all_reduce(flat)
            flat /= self.world_size
        self.comm.bytes, self.comm.collectives = flat.nbytes, 1
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()


@dataclass(frozen=True)
class Scheme:
    """One row of the table."""

    name: str
    strategy: Any
    comm: str = "torch"
    bucket_mb: float | None = None
    in_place: bool = False  # zero_grad(set_to_none=False)
    options: tuple[tuple[str, Any], ...] = ()

    def attach(self, module: nn.Module) -> ddpkit.GradientSync:
        """Attaches the strategy."""
        return ddpkit.make_sync(self.strategy, module, comm=self.comm, **dict(self.options))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--sizes", nargs="+", default=["0.4M", "3.1M", "32.1M", "114M"], help="numbers of parameters")
    parser.add_argument(
        "--buckets",
        nargs="+",
        type=float,
        default=[],
        help="bucket sizes in MiB for standard and overlap, besides their own",
    )
    parser.add_argument("--tensors", type=int, default=64, help="number of layers that the parameters are spread over")
    parser.add_argument("--batch", type=int, default=16, help="rows of a rank's batch in the backward pass")
    parser.add_argument("--blocks", type=int, default=9, help="how many times each scheme gets its turn")
    parser.add_argument("--repeats", type=int, default=5, help="measurements in a turn, more for small sizes")
    parser.add_argument("--ranks", type=int, default=2, help="ranks to start where no launcher has started any")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU where there is one")
    parser.add_argument("--mpi", action="store_true", help="add comm=mpi for custom and overlap")
    parser.add_argument("--csv", type=Path, help="write the table here")
    parser.add_argument("--plot", type=Path, help="draw it here")


def main(args: argparse.Namespace) -> None:
    """Measures and prints the table."""
    sizes = [parse_count(text) for text in args.sizes]
    if min(args.tensors, args.batch, args.blocks, args.repeats, args.ranks) < 1 or min(args.buckets, default=1) <= 0:
        raise InputError("--tensors, --batch, --blocks, --repeats, --ranks and --buckets must be positive.")
    if place().launcher == "alone" and args.ranks > 1:
        relaunch(args.ranks)
        return
    here = ddpkit.init_process_group(device=args.device)
    rows: list[dict[str, Any]] = []
    chosen = schemes(args.buckets, mpi=args.mpi)
    with alive(here, doing="ddpkit bench sync"):
        for size in sizes:
            rows += measure(size, chosen, args)
            if here.is_first:
                print_table(rows[-len(chosen) :], header=len(rows) == len(chosen))
    if here.is_first:
        if args.csv:
            write_csv(args.csv, rows, COLUMNS)
        if args.plot:
            plot(args.plot, rows)


def schemes(buckets: list[float], *, mpi: bool) -> list[Scheme]:
    """All that is compared."""

    def bucketed(strategy: str, option: str, comm: str = "torch") -> list[Scheme]:
        return [
            Scheme(strategy, strategy, comm),
            *(Scheme(strategy, strategy, comm, b, options=((option, b),)) for b in buckets),
        ]

    chosen = [
        Scheme("none", "none"),
        Scheme("cat-copy", CatCopySync),
        *bucketed("standard", "bucket_cap_mb"),
        Scheme("custom", "custom"),
        Scheme("custom in place", "custom", in_place=True),
        Scheme("custom bfloat16", "custom", options=(("reduce_dtype", "bfloat16"),)),
        Scheme("custom unchecked", "custom", options=(("check_finite", False),)),
        *bucketed("overlap", "bucket_mb"),
    ]
    if mpi:
        chosen += [Scheme("custom", "custom", comm="mpi")]
        chosen += bucketed("overlap", "bucket_mb", "mpi")
    return chosen


def measure(size: int, chosen: list[Scheme], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times every scheme for one number of parameters."""
    here = environment()
    width = max(1, round((size / args.tensors) ** 0.5))
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(args.tensors))).to(here.device)
    batch = torch.randn(args.batch, width, device=here.device)
    parameters = sum(p.numel() for p in model.parameters())
    syncs: dict[Scheme, list[list[float]]] = {scheme: [] for scheme in chosen}
    steps: dict[Scheme, list[list[float]]] = {scheme: [] for scheme in chosen}
    bytes_sent: dict[Scheme, int] = {}
    repeats = args.repeats * max(1, min(10, round(4e6 / size)))  # short ones scatter more
    for block in range(args.blocks):
        for scheme in chosen[block % len(chosen) :] + chosen[: block % len(chosen)]:
            sync = scheme.attach(model)
            step = _step(model, sync, batch, in_place=scheme.in_place)
            for _ in range(2):  # buckets are rebuilt after the first
                step()
            steps[scheme].append([_timed(step) for _ in range(repeats)])
            bytes_sent[scheme] = sync.stats.bytes
            if sync.separable and scheme.name != "none":
                prepare = _gradients(model, in_place=scheme.in_place)
                syncs[scheme].append([_timed(sync.synchronize, prepare) for _ in range(repeats)])
            sync.close()
            del sync, step
            model.zero_grad()
            gc.collect()
    own = {scheme: _medians(times) for scheme, times in syncs.items() if times}
    whole = {scheme: _medians(times) for scheme, times in steps.items()}
    # Differences and ratios are taken within a block, whose members saw the same neighbours on the machine.
    exposed = {s: [a - b for a, b in zip(whole[s], whole[chosen[0]], strict=True)] for s in chosen}
    standard = next(s for s in chosen if s.name == "standard")
    table = []
    for scheme in chosen:
        sync_alone = own.get(scheme)
        table.append(
            {
                "parameters": parameters,
                "scheme": scheme.name,
                "comm": scheme.comm,
                "bucket_mb": scheme.bucket_mb,
                "ranks": here.world_size,
                "seconds_sync": statistics.median(sync_alone) if sync_alone else None,
                "gigabytes_per_second": bytes_sent[scheme] / statistics.median(sync_alone) / 1e9
                if sync_alone
                else None,
                "seconds_step": statistics.median(whole[scheme]),
                "seconds_exposed": statistics.median(exposed[scheme]) if scheme is not chosen[0] else None,
                "sync_relative_to_cat": _ratio(sync_alone, own[chosen[1]]) if sync_alone else None,
                "step_relative_to_standard": _ratio(whole[scheme], whole[standard]),
            }
        )
    return table


def _ratio(times: list[float], of: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, of, strict=True))


def _step(model: nn.Module, sync: ddpkit.GradientSync, batch: Tensor, *, in_place: bool) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad(set_to_none=not in_place)
        sync.module(batch).square().mean().backward()
        sync.synchronize()

    return step


def _gradients(model: nn.Module, *, in_place: bool) -> Callable[[], None]:
    """What a backward pass leaves: fresh tensors, or new values in the old ones."""

    def prepare() -> None:
        for p in model.parameters():
            if in_place and p.grad is not None:
                p.grad.copy_(p.detach())
            else:
                p.grad = p.detach().clone()

    return prepare


def _timed(action: Callable[[], None], before: Callable[[], None] | None = None) -> float:
    """Seconds of one call that all ranks begin together, the device's work included."""
    if before is not None:
        before()
    here = environment()
    if here.world_size > 1:
        dist.barrier()
    if here.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if here.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _medians(blocks: list[list[float]]) -> list[float]:
    """Of each block, the median of the slowest rank's times."""
    here = environment()
    each = torch.tensor(blocks, dtype=torch.float64, device=here.device)
    if here.world_size > 1:
        dist.all_reduce(each, op=dist.ReduceOp.MAX)
    return [statistics.median(block) for block in each.tolist()]


def parse_count(text: str) -> int:
    """A number such as `400000`, `0.4M` or `114M`."""
    scale = {"K": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:].upper(), 1.0)
    try:
        count = round(float(text.rstrip("kKmMgG")) * scale)
    except ValueError:
        count = 0
    if count < 1:
        raise InputError(f"{text!r} is no number of parameters: write 400000, 0.4M or 114M.")
    return count


def relaunch(ranks: int) -> None:
    """Starts this very command under mpirun."""
    head, variables = mpirun(ranks)
    done = subprocess.run(
        [*head, sys.executable, "-m", "ddpkit.experiments", *sys.argv[1:]], env=variables, check=False
    )
    if done.returncode:
        raise InputError(f"The benchmark ended with exit code {done.returncode}: see what it said above.")


def _cells(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    for row in rows:
        yield [
            f"{row['parameters']:,}",
            row["scheme"],
            row["comm"],
            "" if row["bucket_mb"] is None else f"{row['bucket_mb']:g}",
            *("" if row[name] is None else f"{row[name] * 1e3:.3f}" for name in MILLISECONDS),
            *("" if row[name] is None else f"{row[name]:.2f}" for name in RATIOS),
        ]  # fmt: skip


def print_table(rows: list[dict[str, Any]], *, header: bool) -> None:
    """Prints rows as they come."""
    if header:
        threads = torch.get_num_threads()
        print(
            f"{rows[0]['ranks']} ranks, {environment().device.type}, {threads} threads a rank, torch {torch.__version__}"
        )
        titles = [
            "parameters",
            "scheme",
            "comm",
            "MiB",
            "sync ms",
            "step ms",
            "exposed ms",
            "GB/s",
            "/ cat",
            "/ standard",
        ]
        print("".join(f"{title:>{width}}" for title, width in zip(titles, WIDTHS, strict=True)))
    for cells in _cells(rows):
        print("".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True)), flush=True)


WIDTHS = (13, 17, 7, 6, 10, 10, 12, 8, 8, 12)


def write_csv(path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """Writes rows with a header; missing values stay empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {os.fspath(path)}")


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draws seconds against parameters: `synchronize()` alone, and what a backward pass leaves exposed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, column, title in zip(
        figure.subplots(1, 2),
        ("seconds_sync", "seconds_exposed"),
        ("synchronize() alone", "exposed behind a backward pass"),
        strict=True,
    ):
        # One colour for a scheme in both, also where it has no points in one of them.
        for number, key in enumerate(dict.fromkeys((r["scheme"], r["comm"], r["bucket_mb"]) for r in rows)):
            points = [
                (r["parameters"], r[column] * 1e3)
                for r in rows
                if (r["scheme"], r["comm"], r["bucket_mb"]) == key and r[column] is not None
            ]
            if points:
                bucket = "" if key[2] is None else f", {key[2]:g} MiB"
                label = f"{key[0]} ({key[1]}{bucket})"
                axes.plot(*zip(*points, strict=True), marker="o", color=f"C{number}", label=label)
        axes.set(
            xscale="log",
            yscale="symlog" if column == "seconds_exposed" else "log",
            xlabel="parameters",
            ylabel="ms",
            title=title,
        )
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"wrote {os.fspath(path)}")
