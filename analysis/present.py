"""The measured values as tables to read; the CSV files hold them in full."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ddpkit.analysis import published, speed
from ddpkit.analysis.claims import Comparison
from ddpkit.analysis.equivalence import MARGIN, RatioTest
from ddpkit.analysis.numerics import CUT
from ddpkit.analysis.runs import Run
from ddpkit.analysis.tables import Table, number, percent, span

MOST_ROWS = 24
"""A numerics study of more runs than this is shown by arm; its CSV still has a row for each run."""


def numerics(values: pd.DataFrame, notes: Sequence[str], baseline: str) -> list[Table]:
    """The paper's Table 3 with the published values beside, and the robust measures."""
    whole = list(notes)
    if len(values) > MOST_ROWS:
        values = by_arm(values)
        whole.append("Each row is the mean over the runs of an arm; numerics.csv has a row for each run.")
    paper, robust = [], []
    for _, row in values.iterrows():
        label = str(row["run"])
        differences = [_difference(row, column) for column in ("mae", "rmse", "max_abs", "median_abs", "mae_within")]
        beside = [number(row["published_mae"]), number(row["published_rmse"])]
        paper.append([label, str(row["steps"]), *differences[:3], *beside])
        others = [row["outside_mean_abs"], 100 * row["relative_mae"], row["mae_first_third"], row["mae_last_third"]]
        robust.append([label, *differences[3:], f"{row['outside']:g}", *map(number, others)])
    explained = (
        f"Median of |difference|; MAE of the points within ±{CUT:.3f}; number and mean size of those outside; MAE relative "
        "to the baseline's loss; MAE over the first and the last third of the steps."
    )
    return [
        Table(
            f"Loss differences from {baseline} over the logged steps",
            ("run", "steps", "MAE", "RMSE", "max", "paper MAE", "paper RMSE"),
            paper,
            [*whole, f"Paper: {published.source('numerics')}."],
        ),
        Table(
            "The same, robustly",
            ("run", "median", f"MAE in ±{CUT:.3f}", "outside", "mean outside", "rel. MAE %", "1st third", "last third"),
            robust,
            [explained],
        ),
    ]


def by_arm(values: pd.DataFrame) -> pd.DataFrame:
    """Means over the runs of each arm; `bitwise` where all of them are."""
    arm = values["run"].str.replace(r"_\d+$", "", regex=True)
    rows = []
    for name in dict.fromkeys(arm):
        group = values[arm == name]
        row = group.iloc[0].copy()
        for column in values.columns:
            if pd.api.types.is_float_dtype(values[column]) or column in {"outside", "nonfinite"}:
                row[column] = group[column].mean()
        row["steps"] = int(group["steps"].max())
        row["bitwise"] = bool(group["bitwise"].all())
        row["run"] = f"{name} ({len(group)} runs)" if len(group) > 1 else name
        rows.append(row)
    return pd.DataFrame(rows)


def tests(comparisons: Sequence[Comparison], steps: int) -> Table:
    """Ratio tests on runs: distances over the given number of shared steps, ratio, interval and power."""
    rows = []
    for entry in comparisons:
        test = entry.test
        power = test.power() if entry.margin == MARGIN else np.nan
        rows.append(
            [
                entry.name,
                "/".join(str(n) for n in test.runs),
                number(test.numerator),
                number(test.denominator),
                *_ratio(test, "identical"),
                "-" if not np.isfinite(power) else f"{power:.2f}",
                *_ratio(entry.by_median, "0/0"),
            ]
        )
    explained = (
        f"Distance: mean |loss difference| over the {steps} logged steps that all these runs share, averaged over pairs of runs. "
        "Interval: jackknife by run, Student's t. Arms count as equal where it ends below "
        f"{MARGIN:g}, declared beforehand, at 5 %; new seed / standard is held against 1. Power: probability that as many "
        "runs with this spread show equality if the true ratio is 1. Median: the same ratio with the median over the steps, "
        "which single spikes do not move."
    )
    return Table(
        "Tests on runs: mean pairwise distances and their ratio",
        ("arms", "runs", "distance", "over", "ratio", "90 % interval", "power", "median", "90 % interval"),
        rows,
        [explained],
    )


def attribution(values: pd.DataFrame) -> Table:
    """What each source contributes when it alone differs."""
    rows = []
    for _, row in values.iterrows():
        equal = row["bitwise_pairs"] == row["pairs"]
        sizes = ["0 (bitwise)" if equal else number(row[column]) for column in ("mae", "max_abs")]
        rows.append([row["source"], row["compared"], row["held"], str(row["pairs"]), *sizes, row["outcome"]])
    explained = (
        "MAE: mean over the pairs. Det.: under deterministic=true, which must make reruns agree to the last bit, and "
        "lossless strategies too on at most two ranks, where a sum of gradients has one order. Compiled, strategies that act "
        "during the backward pass (standard, overlap), after it, or within the graph (ingraph) run different code."
    )
    return Table(
        "Attribution: pairs of runs that differ in one thing alone",
        ("source", "compared", "held", "pairs", "MAE", "max", "outcome"),
        rows,
        [explained],
        words=3,
    )


def epochs(values: pd.DataFrame, data: speed.Study) -> list[Table]:
    """The paper's Table 4 with intervals and the published values beside, and the split of a step."""
    rows = [
        [
            f"{row['parameters']:,}",
            cell.name,
            number(row["seconds_per_epoch"], 4),
            percent(row["relative_percent"]) if cell != data.reference(cell) else "reference",
            span(row["relative_low"], row["relative_high"]),
            f"{row['runs']}/{row['epochs']}",
            _minutes(row["published_seconds"]),
            percent(row["published_relative_percent"]) if row["published_relative_percent"] != 0 else "reference",
        ]
        for cell, (_, row) in zip(data.times, values.iterrows(), strict=True)
    ]
    first = Table(
        f"Time of an epoch of {data.steps} steps, relative to standard eager of the same size",
        ("parameters", "strategy", "s/epoch", "relative", "95 % interval", "runs/epochs", "paper", "paper rel."),
        rows,
        [
            *data.notes,
            _intervals(data),
            f"Paper: {published.source('speed')}; at 32.1 M (embedding 32) and 114 M (embedding 128), min:s.",
        ],
        words=2,
    )
    logging = 1e3 * values["logging_per_row"].max()
    told = [
        f"Compilation and validation are not in these times; a row of steps.csv costs {number(logging)} ms at most."
    ]
    if not np.isfinite(logging):
        told = ["Compilation and validation are not in these times."]
    split = [
        [
            f"{row['parameters']:,}",
            cell.name,
            *(number(1e3 * row[name]) for name in ("seconds_per_step", *(f"{s}_per_step" for s in speed.SPLITS))),
            number(row["seconds_compile"]),
            _bytes(row["gradient_bytes_per_step"]),
        ]
        for cell, (_, row) in zip(data.times, values.iterrows(), strict=True)
    ]
    second = Table(
        "A step, in ms, and its parts on rank 0",
        ("parameters", "strategy", "step", "data", "compute", "sync", "optimizer", "compile s", "gradients"),
        split,
        [
            "A part is empty where it cannot be told apart. Gradients: bytes that each rank puts into the sum of a step.",
            *told,
        ],
        words=2,
    )
    return [first, second, *_effects(data)]


def environment(runs: Sequence[Run]) -> Table:
    """What the runs ran on: a row for each fact, its values where they differ."""
    facts: dict[str, dict[str, int]] = {}
    for run in runs:
        versions = run.environment.get("versions")
        flat = {k: v for k, v in run.environment.items() if k not in {"versions", "command", "seeds"}}
        flat |= {f"version of {k}": v for k, v in versions.items()} if isinstance(versions, dict) else {}
        for key, value in flat.items():
            if value is not None and not isinstance(value, dict):
                shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
                counts = facts.setdefault(key, {})
                counts[shown] = counts.get(shown, 0) + 1
    rows = []
    for key, counts in facts.items():
        several = len(counts) > 1 or sum(counts.values()) < len(runs)
        text = "; ".join(f"{value} ({count} runs)" if several else value for value, count in counts.items())
        rows.append([key.replace("_", " "), text])
    return Table(f"Environment of the {len(runs)} runs", ("", "value"), rows, words=2)


def _intervals(data: speed.Study) -> str:
    if data.unit == "repeat":
        return "Intervals are over paired repeats."
    if data.in_turns:
        return "Intervals are over epochs that took turns: the variation from one launch to the next is not in them."
    return (
        "Intervals are over epochs of runs that followed one another: drift of the machine is not told from the differences, and "
        "nothing is concluded from them."
    )


def _effects(data: speed.Study) -> list[Table]:
    paired = data.is_paired
    rows = [
        [f"exposed communication, {cell.name}", f"{cell.parameters:,}", *_estimate(found, "s", paired)]
        for cell, found in speed.exposed_communication(data)
    ]
    rows += [
        [f"interaction of compile with {cell.strategy}", f"{cell.parameters:,}", *_estimate(found, "%", paired)]
        for cell, found in speed.interaction(data)
    ]
    for entry in speed.growth(data):
        parts = {"growth": entry.total, "of it compute": entry.compute, "of it communication": entry.communication}
        rows += [
            [f"{entry.cell.name}: {part}", "small to large", *_estimate(e, "%", paired)]
            for part, e in parts.items()
            if e
        ]
    if not rows:
        return []
    explained = (
        "Exposed communication: epoch time beyond strategy none, which computes the same and sends nothing. Interaction: "
        "compiled over eager, divided by the same of standard, less one. Growth: in percent of the smaller model's epoch. "
        "Not resolved: the interval covers zero, so this hardware and these runs cannot tell. One interval in twenty misses its "
        "value by chance: among many, a single yes proves little."
    )
    return [
        Table(
            "Effects: communication, interaction with compilation, growth with the number of parameters",
            ("effect", "parameters", "value", "95 % interval", "resolved"),
            rows,
            [explained],
        )
    ]


def _estimate(found: speed.Estimate, unit: str, paired: bool) -> list[str]:
    digits = 1 if unit == "%" else 3
    resolved = "-" if not (paired and np.isfinite(found.low)) else "yes" if found.resolved else "no"
    return [f"{found.value:+.{digits}f} {unit}", span(found.low, found.high, digits), resolved]


def _difference(row: "pd.Series[object]", column: str) -> str:
    return "0 (bitwise)" if row["bitwise"] else number(float(row[column]))  # type: ignore[arg-type]


def _ratio(test: RatioTest, identical: str) -> list[str]:
    if test.identical and test.numerator == 0:
        return [identical, "-"]
    bounds = f"[{number(test.lower)}, {number(test.upper)}]" if np.isfinite(test.lower) else "-"
    return [number(test.ratio) if np.isfinite(test.ratio) else "-", bounds]


def _minutes(seconds: float) -> str:
    return "-" if not np.isfinite(seconds) else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _bytes(count: float) -> str:
    if not np.isfinite(count):
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{number(count / size)} {unit}"
    return f"{count:.0f} B"
