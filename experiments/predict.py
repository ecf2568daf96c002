"""`ddpkit predict`: step time of each strategy on N ranks, from measured constants.

The batch of a rank stays the same (weak scaling). A step on p > 1 ranks takes

    (compute of the slowest rank) + (communication that nothing hides)

with the compute time of one rank, `imbalance` times that for the slowest of several, and T(n, p) seconds for an all-reduce of n
bytes (`Link.all_reduce`). What is not hidden, of gradients of n bytes:

- `none`: nothing is sent;
- `custom`, `ingraph`: one all-reduce after the backward pass, T(n, p);
- `standard`, `overlap`: K buckets of equal size, all-reduced one after another as soon as they are full (S. Li et al., "PyTorch
  Distributed: Experiences on Accelerating Data Parallel Training", VLDB 13 (2020) 3005). They fill evenly over the last w seconds
  of the compute time, bucket k being full w (1 - k/K) seconds before its end. What ends last is the train that the first bucket
  begins, or the last bucket: max(T(n/K, p), K T(n/K, p) - w (1 - 1/K)). Compiled, all gradients arrive at the end: w = 0.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from ddpkit.analysis import figures, scaling
from ddpkit.analysis.runs import Run, read_run
from ddpkit.analysis.tables import Table, number, percent, write_csv
from ddpkit.errors import InputError
from ddpkit.experiments.bench_sync import parse_count

MIB = 2**20
STRATEGIES = ("none", "standard", "custom", "overlap")
COMPILED = (*STRATEGIES, "ingraph")
_BUCKETED = ("standard", "overlap")


@dataclass(frozen=True)
class Link:
    """What connects the ranks.

    Attributes:
        latency: seconds before the first byte of a message arrives.
        bandwidth: bytes a second between neighbours; may be infinite.
    """

    latency: float
    bandwidth: float

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds of a ring all-reduce: 2 (p - 1) steps, each of which sends 1/p of the data.

        T(n, p) = 2 (p - 1) latency + 2 (p - 1) / p n / bandwidth; see R. Thakur, R. Rabenseifner, W. Gropp, Int. J. High Perform.
        Comput. Appl. 19 (2005) 49, and P. Patarasuk, X. Yuan, J. Parallel Distrib. Comput. 69 (2009) 117. The time of adding up
        is part of what the measured bandwidth stands for.

        Args:
            size: bytes that each rank puts in.
            ranks: how many.
        """
        return 2 * (ranks - 1) * (self.latency + size / ranks / self.bandwidth)


@dataclass(frozen=True)
class Step:
    """What a rank does in a step.

    Attributes:
        compute: seconds of everything but communication, on the mean rank.
        gradients: bytes of the gradients.
        overlap: share of the compute time, at its end, over which gradients arrive.
        bucket: bytes of a bucket.
        imbalance: compute time of the slowest rank over the mean.
    """

    compute: float
    gradients: int
    overlap: float = 0.0
    bucket: float = 25 * MIB
    imbalance: float = 1.0

    def slowest(self, ranks: int) -> float:
        """Compute time of the slowest rank, seconds."""
        return self.compute * (self.imbalance if ranks > 1 else 1.0)

    def communication(self, strategy: str, ranks: int, link: Link) -> tuple[float, float]:
        """Seconds of all-reduces in a step: all of them, and what of it is not hidden behind the compute time."""
        if strategy == "none" or ranks == 1:
            return 0.0, 0.0
        if strategy not in _BUCKETED:
            whole = link.all_reduce(self.gradients, ranks)
            return whole, whole
        buckets = math.ceil(self.gradients / self.bucket)
        one = link.all_reduce(self.gradients / buckets, ranks)
        window = self.overlap * self.slowest(ranks) * (1 - 1 / buckets)
        return buckets * one, max(one, buckets * one - window)


def fit(ranks: Sequence[int], sizes: Sequence[float], seconds: Sequence[float]) -> tuple[Link, float]:
    """The link that explains measured all-reduces best.

    Latency and inverse bandwidth are those, not negative, with the least sum of squared relative errors.

    Args:
        ranks: `[measurements]` ranks of each.
        sizes: `[measurements]` bytes.
        seconds: `[measurements]` time.

    Returns:
        The link, and the median relative error.
    """
    p, n, measured = (np.asarray(values, dtype=np.float64) for values in (ranks, sizes, seconds))
    terms = np.stack([2 * (p - 1), 2 * (p - 1) / p * n], axis=1) / measured[:, None]
    (latency, inverse_bandwidth), _ = nnls(terms, np.ones(len(p)))
    error = np.abs(terms @ [latency, inverse_bandwidth] - 1)
    bandwidth = 1 / inverse_bandwidth if inverse_bandwidth > 0 else math.inf
    return Link(float(latency), float(bandwidth)), float(np.median(error))


def table(ranks: Sequence[int], link: Link, eager: Step | None, compiled: Step | None) -> pd.DataFrame:
    """Every strategy, eager and compiled as far as their steps are known, on every number of ranks.

    `efficiency` is the compute time of one rank over the step time. `relative_percent` is the step time beyond `standard` of the
    eager step on as many ranks, as in the paper's Table 4.
    """
    rows = []
    for count in ranks:
        reference = None if eager is None else eager.slowest(count) + eager.communication("standard", count, link)[1]
        for step, strategies, is_compiled in ((eager, STRATEGIES, False), (compiled, COMPILED, True)):
            for strategy in strategies if step else ():
                assert step is not None
                whole, exposed = step.communication(strategy, count, link)
                seconds = step.slowest(count) + exposed
                rows.append(
                    {
                        "ranks": count,
                        "strategy": strategy,
                        "compile": is_compiled,
                        "seconds_per_step": seconds,
                        "seconds_compute": step.slowest(count),
                        "seconds_communication": whole,
                        "seconds_exposed": exposed,
                        "efficiency": step.compute / seconds,
                        "relative_percent": math.nan if reference is None else 100 * (seconds / reference - 1),
                    }
                )
    return pd.DataFrame(rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Step time and efficiency of each strategy on N ranks, a rank's batch staying the same: an all-reduce in a ring costs "
        "latency and bytes over bandwidth; buckets hide behind the end of the compute time."
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2**k for k in range(7)], help="default: 1 2 4 ... 64")
    parser.add_argument(
        "--run", type=Path, nargs="+", default=[], metavar="DIR",
        help="run folders to take compute times and parameters from: an eager one, a compiled one, or both",
    )  # fmt: skip
    parser.add_argument("--compute", type=float, metavar="SECONDS", help="eager compute time of a step on one rank")
    parser.add_argument("--compute-compiled", type=float, metavar="SECONDS", help="the same, compiled")
    parser.add_argument("--parameters", metavar="COUNT", help="such as 400000, 0.4M or 114M")
    parser.add_argument(
        "--bytes-per-parameter", type=int, choices=(2, 4, 8), help="on the wire (default: 4, or 8 for a run in float64)"
    )
    parser.add_argument("--comm-csv", type=Path, metavar="FILE", help="what `ddpkit bench comm --csv` wrote")
    parser.add_argument("--comm", choices=("torch", "mpi"), default="torch", help="rows of it (default: %(default)s)")
    parser.add_argument("--latency", type=float, metavar="SECONDS", help="of a message between neighbours")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="between neighbours")
    parser.add_argument(
        "--overlap", type=float, default=0.5,
        help="share of the eager compute time, at its end, over which gradients arrive (default: %(default)s, an assumption)",
    )  # fmt: skip
    parser.add_argument(
        "--bucket-mb", type=float, default=25.0, help="of standard and overlap, MiB (default: %(default)s)"
    )
    parser.add_argument(
        "--imbalance", type=float, default=1.0,
        help="compute time of the slowest rank over the mean, see `ddpkit data info` (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it here")


def main(args: argparse.Namespace) -> None:
    """Predicts and prints the table.

    Raises:
        InputError: a constant is missing or impossible.
    """
    _check(args)
    link, told = _link(args)
    eager, compiled = _steps(args)
    values = table(sorted(set(args.ranks)), link, eager, compiled)
    known = eager or compiled
    assert known is not None
    share = f"{100 * args.overlap:g} %"
    notes = [
        f"{known.gradients:,} bytes of gradients; {told}; the same link between all ranks is assumed.",
        f"Buckets of {args.bucket_mb:g} MiB hide behind the last {share} of the eager compute time, and behind nothing compiled.",
        f"The slowest rank computes {args.imbalance:g} times as long as the mean.",
        "Efficiency: compute time of one rank over the step time. Relative: to standard, eager, on as many ranks.",
    ]
    print(_readable(values, notes).text())
    if args.csv:
        write_csv(args.csv, values)
    if args.plot:
        figures.save(scaling.predictions(values), args.plot)


def _check(args: argparse.Namespace) -> None:
    for name, good, what in (
        ("ranks", min(args.ranks) >= 1, "at least 1"),
        ("compute", args.compute is None or args.compute > 0, "positive"),
        ("compute-compiled", args.compute_compiled is None or args.compute_compiled > 0, "positive"),
        ("latency", args.latency is None or args.latency >= 0, "at least 0"),
        ("bandwidth", args.bandwidth is None or args.bandwidth > 0, "positive"),
        ("overlap", 0 <= args.overlap <= 1, "between 0 and 1"),
        ("bucket-mb", args.bucket_mb > 0, "positive"),
        ("imbalance", args.imbalance >= 1, "at least 1"),
    ):
        if not good:
            raise InputError(f"--{name} must be {what}, not {getattr(args, name.replace('-', '_'))}.")


def _link(args: argparse.Namespace) -> tuple[Link, str]:
    """The link, and in words where it is from."""
    if args.comm_csv is None:
        if args.latency is None or args.bandwidth is None:
            raise InputError("The link is not known: give --comm-csv, or --latency and --bandwidth.")
        return Link(args.latency, 1e9 * args.bandwidth), "latency and bandwidth as given"
    if args.latency is not None or args.bandwidth is not None:
        raise InputError("--comm-csv tells latency and bandwidth: leave --latency and --bandwidth out.")
    try:
        measured = pd.read_csv(args.comm_csv)
        measured = measured[measured["comm"] == args.comm]
        columns = [measured[name].to_numpy(np.float64) for name in ("ranks", "bytes", "seconds")]
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{args.comm_csv} is not what `ddpkit bench comm --csv` writes ({error}): make it again."
        ) from error
    ranks, sizes, seconds = columns
    usable = (ranks > 1) & (seconds > 0) & (sizes > 0)
    if usable.sum() < 2 or len(np.unique(sizes[usable])) < 2:
        raise InputError(
            f"{args.comm_csv} has fewer than two sizes measured with comm={args.comm}: choose another --comm."
        )
    link, misfit = fit(ranks[usable].astype(int).tolist(), sizes[usable].tolist(), seconds[usable].tolist())
    told = (
        f"latency {1e6 * link.latency:.3g} µs and bandwidth {link.bandwidth / 1e9:.3g} GB/s with comm={args.comm}, fitted to "
        f"{usable.sum()} all-reduces of up to {int(ranks[usable].max())} ranks with a median error of {100 * misfit:.0f} %"
    )
    return link, told


def _steps(args: argparse.Namespace) -> tuple[Step | None, Step | None]:
    """The eager and the compiled step, as far as they are known."""
    compute = {False: args.compute, True: args.compute_compiled}
    parameters = None if args.parameters is None else parse_count(args.parameters)
    width = args.bytes_per_parameter or 4
    for folder in args.run:
        run = read_run(folder)
        option = "--compute-compiled" if run.compiled else "--compute"
        if compute[run.compiled] is not None:
            raise InputError(
                f"The compute time is told twice, by {folder} and by another run or {option}: leave one out."
            )
        compute[run.compiled] = _compute(run, folder, option)
        if args.bytes_per_parameter is None and run.config.get("precision") == "float64":
            width = 8
        if args.parameters is None and run.parameters is not None:
            if parameters not in (None, run.parameters):
                raise InputError(
                    f"The runs have {parameters:,} and {run.parameters:,} parameters: give runs of one model, or --parameters."
                )
            parameters = run.parameters
    if compute[False] is None and compute[True] is None:
        raise InputError("The compute time is not known: give --run, --compute or --compute-compiled.")
    if parameters is None:
        raise InputError("The number of parameters is not known: give --parameters, or a --run whose summary tells it.")
    gradients, bucket = parameters * width, args.bucket_mb * MIB

    def step(seconds: float | None, overlap: float) -> Step | None:
        return None if seconds is None else Step(seconds, gradients, overlap, bucket, args.imbalance)

    return step(compute[False], args.overlap), step(compute[True], 0.0)


def _compute(run: Run, folder: Path, option: str) -> float:
    """Median seconds of a step but for communication, on rank 0."""
    parts = run.steps.reindex(columns=["seconds_data", "seconds_compute", "seconds_optimizer"])
    sums = parts.sum(axis=1, min_count=3).dropna() if parts["seconds_compute"].notna().any() else parts.iloc[:0, 0]
    if sums.empty and run.world_size == 1 and "seconds" in run.steps:
        sums = run.steps["seconds"].dropna()
    if sums.empty:
        raise InputError(
            f"The steps.csv of {folder} does not tell compute apart from communication: give a run with strategy custom or none, "
            f"or {option}."
        )
    return float(sums.median())


def _readable(values: pd.DataFrame, notes: Sequence[str]) -> Table:
    columns = ("seconds_per_step", "seconds_compute", "seconds_communication", "seconds_exposed")
    rows = [
        [
            f"{row['strategy']}{' compiled' * bool(row['compile'])}",
            str(row["ranks"]),
            *(number(1e3 * row[name]) for name in columns),
            f"{100 * row['efficiency']:.1f} %",
            percent(row["relative_percent"]),
        ]
        for _, row in values.iterrows()
    ]
    header = ("strategy", "ranks", "step", "compute", "all-reduce", "exposed", "efficiency", "relative")
    return Table("Predicted step times in ms", header, rows, notes)
