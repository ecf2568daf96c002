"""The measured values as tables to read; the CSV files hold them in full."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ddpkit.analysis import published, speed
from ddpkit.analysis.arms import RERUN
from ddpkit.analysis.blocks import Study
from ddpkit.analysis.divergence import SATURATED, SPIKE, divergence
from ddpkit.analysis.endpoints import Evidence, evidence, spread, units
from ddpkit.analysis.numerics import CUT, same_code
from ddpkit.analysis.plan import DISTANCE, FEWEST, FORCE_ERROR, MARGINS, TIME, WINDOW
from ddpkit.analysis.runs import Run
from ddpkit.analysis.statistics import LEVEL, Estimate, mean_interval
from ddpkit.analysis.tables import Table, number, percent, span

MOST_ROWS = 24
"""A numerics study of more runs than this is shown by arm; its CSV still has a row for each run."""


def numerics_facts(study: Study) -> Table:
    """What was run and what it can tell apart, to be read before any verdict."""
    seeds = len(study.blocks)
    failed = {arm: study.failures(arm) for arm in ("baseline", *study.names)}
    said = [f"{len(runs)} of {arm} ({'; '.join(run.label for run, _ in runs)})" for arm, runs in failed.items() if runs]
    declared = ", ".join(f"{claim.arm} ({claim.endpoint.replace('_', ' ')})" for claim in study.plan.primary)
    rows = [
        ["ranks", f"{study.baseline.ranks}: {study.baseline.machine}"],
        ["seeds", f"{seeds} (a claim is tested from {FEWEST[DISTANCE]} on)"],
        ["length", f"{study.steps} steps"],
        ["parameters", f"{study.baseline.parameters:,}" if study.baseline.parameters else "not told"],
        ["runs", f"{len(study.runs)} in {1 + len(study.names)} arms; failed: {', '.join(said) or 'none'}"],
        ["declared claims", declared],
        ["declared by", "plan.json" if study.plan.declared else "ddpkit's defaults: the folder has no plan.json"],
        [
            "distance",
            "of projected parameters after the last step" if study.by_projection else "mean |loss difference|",
        ],
        *([f"resolution, {what}", text] for what, text in _resolution(study)),
    ]
    return Table("What was run, and what it can tell apart", ("", "value"), rows, words=2)


def _resolution(study: Study) -> list[tuple[str, str]]:
    """Half the 90 % interval of the widest declared claim of each kind: smaller differences cannot be told apart."""
    resolutions = []
    for endpoint, what in ((FORCE_ERROR, "force error"), (DISTANCE, "distance")):
        arms = [claim.arm for claim in study.plan.primary if claim.endpoint == endpoint]
        reaches = [mean_interval(evidence(study, endpoint, arm).values, 1 - 2 * LEVEL).reach for arm in arms]
        reaches = [reach for reach in reaches if np.isfinite(reach)]
        text = "none: too few seeds with an interval"
        if reaches and endpoint == FORCE_ERROR:
            text = f"±{100 * np.expm1(max(reaches)):.2g} % (margin ±{100 * MARGINS[endpoint]:g} %)"
        elif reaches:
            text = f"a factor of {np.exp(max(reaches)):.3g} (margin {1 + MARGINS[endpoint]:g})"
        resolutions.append((what, text))
    return resolutions


def numerics(values: pd.DataFrame, study: Study) -> list[Table]:
    """The paper's Table 3 with the published values beside, and the robust measures."""
    whole = list(study.notes)
    if len(values) > MOST_ROWS:
        values = by_arm(values)
        whole.append("Each row is the mean over the runs of an arm; numerics.csv has a row for each run.")
    paper, robust = [], []
    for _, row in values.iterrows():
        label = str(row["run"])
        differences = [_difference(row, column) for column in ("mae", "rmse", "max_abs", "median_abs", "mae_within")]
        beside = [number(row["published_mae"]), number(row["published_rmse"])]
        ended = {"complete": "", "failed": "FAILED"}.get(str(row["outcome"]), str(row["outcome"]))
        paper.append([label, str(row["seed"]), str(row["steps"]), *differences[:3], ended, *beside])
        others = [row["outside_mean_abs"], 100 * row["relative_mae"], row["mae_first_third"], row["mae_last_third"]]
        robust.append([label, *differences[3:], f"{row['outside']:.4g}", *map(number, others)])
    explained = (
        f"Median of |difference|; MAE of the points within ±{CUT:.3f}; number and mean size of those outside; MAE relative "
        "to the baseline's loss; MAE over the first and the last third of the steps."
    )
    return [
        Table(
            f"Loss differences from the baseline of the same seeds ({study.scope})",
            ("run", "seed", "steps", "MAE", "RMSE", "max", "ended", "paper MAE", "paper RMSE"),
            paper,
            [*whole, f"Paper: {published.source('numerics')}; 64 ranks, one seed."],
        ),
        Table(
            f"The same, robustly ({study.scope})",
            ("run", "median", f"MAE in ±{CUT:.3f}", "outside", "mean outside", "rel. MAE %", "1st third", "last third"),
            robust,
            [explained],
        ),
    ]


def by_arm(values: pd.DataFrame) -> pd.DataFrame:
    """Means over the runs of each arm; `bitwise` where all of them are."""
    rows = []
    for name, group in values.groupby("arm", sort=False):
        row = group.iloc[0].copy()
        for column in values.columns:
            if pd.api.types.is_float_dtype(values[column]) or column in {"outside", "nonfinite"}:
                row[column] = group[column].mean()
        row["steps"] = int(group["steps"].max())
        row["bitwise"] = bool(group["bitwise"].all())
        failed = int((group["outcome"] == "failed").sum())
        row["outcome"] = f"{failed} FAILED" if failed else "complete"
        seeds = group["seed"].nunique()
        row["seed"] = group["seed"].iloc[0] if seeds == 1 else f"{seeds} seeds"
        row["run"] = f"{name} ({len(group)} runs)" if len(group) > 1 else name
        rows.append(row)
    return pd.DataFrame(rows)


def endpoints(study: Study) -> Table:
    """Both endpoints of every arm: the declared ones and all others, which are estimates."""
    declared = {(claim.endpoint, claim.arm) for claim in study.plan.primary}
    rows = []
    for arm in study.names:
        error, far, sizes = evidence(study, FORCE_ERROR, arm), evidence(study, DISTANCE, arm), units(study, arm)
        ratio = [] if arm == RERUN else _ratio(far)
        rows.append(
            [
                arm,
                str(sum(1 for block in study.blocks if arm in block.arms)),
                str(len(study.failures(arm))),
                _mark(error.estimate.percent().value, (FORCE_ERROR, arm) in declared),
                _bounds(error.estimate.percent(), 2),
                *(ratio or ["1", "-"]),
                number(sizes.relative),
                number(sizes.roundings),
                number(sizes.of_new_seed),
            ]
        )
    what = "parameters" if study.by_projection else "loss"
    explained = (
        "Force error: final validation force RMSE over the baseline's, in per cent. Distance: that from the baseline over that "
        f"of a rerun. Relative: distance over the size of the {what}; in roundings of float32 (2^-24); over a new seed's. "
        "Intervals: 95 %, Student's t of logarithms over seeds. *: declared; all else are estimates without a verdict. A run "
        "that failed counts as infinitely far."
    )
    notes = [explained, *same_code(study)]
    if (several := spread(study)) is not None:
        block, distances = several
        low, high = distances.min(), distances.max()
        apart = "all are equal" if high == low else f"from {number(low)} to {number(high)}"
        notes.append(
            f"Within seed {block.seed}, the distances of {len(distances)} reruns from their baseline: {apart}."
        )
    return Table(
        f"Endpoints of every arm ({study.scope})",
        ("arm", "seeds", "failed", "force %", "95 %", "distance", "95 %", "relative", "roundings", "/new seed"),
        rows,
        notes,
    )


def _ratio(found: Evidence) -> list[str]:
    if found.exact:
        return ["equal" if found.identical else "reruns exact", "-"]
    estimate = found.estimate.map(np.exp)
    return [number(estimate.value), f"[{number(estimate.low)}, {number(estimate.high)}]" if estimate.low > 0 else "-"]


def _mark(value: float, declared: bool) -> str:
    if np.isnan(value):
        return "-"
    return ("failed" if np.isinf(value) else f"{value:+.2g}") + "*" * declared


def _bounds(estimate: Estimate, digits: int) -> str:
    if not np.isfinite(estimate.low):
        return "-"
    return f"[{estimate.low:+.{digits}g}, {estimate.high:+.{digits}g}]"


def divergences(study: Study) -> Table:
    """Growth along the runs, saturation, and single-step spikes."""
    rows = []
    for arm in study.names:
        arms_divergence = divergence(study, arm)
        grows = arms_divergence.growth
        rows.append(
            [
                arm,
                "-" if grows is None else f"{grows.value:.2f}",
                "-" if grows is None else _bounds(grows, 3),
                "-" if arms_divergence.saturates is None else f"step {arms_divergence.saturates:.0f}",
                percent(100 * arms_divergence.probe, 4)
                if np.isfinite(arms_divergence.probe) and arms_divergence.probe >= 1e-6
                else number(arms_divergence.probe),
                f"{arms_divergence.spikes.count} of {arms_divergence.spikes.steps}",
                number(arms_divergence.spikes.largest) if arms_divergence.spikes.count else "-",
                str(arms_divergence.spikes.runs),
            ]
        )
    explained = (
        f"Growth: exponent p of distance ~ step^p of the projected parameters, between {WINDOW[0]:.0%} and {WINDOW[1]:.0%} of "
        f"the run, 95 % interval over seeds. Saturates: where the distance is {SATURATED:.0%} of a new seed's. Probe: |relative "
        f"difference| of the loss on one fixed batch after the last step. Spikes: single loss differences of more than {SPIKE:g} "
        "times the median of the 50 steps around."
    )
    return Table(
        f"How trajectories part ({study.scope})",
        ("arm", "growth", "95 %", "saturates", "probe", "spikes", "largest", "in runs"),
        rows,
        [explained],
    )


def attribution(values: pd.DataFrame, scope: str) -> Table:
    """What each cause contributes when it alone differs."""
    projected = bool(values["distance"].notna().any())
    rows = []
    for _, row in values.iterrows():
        equal = row["bitwise_pairs"] == row["pairs"]
        sizes = ["0 (bitwise)" if equal else number(row[column]) for column in ("mae", "max_abs")]
        sizes += [number(row["distance"])] if projected else []
        counts = f"{row['pairs']} of {row['seeds']}"
        rows.append([row["source"], row["compared"], row["held"], counts, *sizes, row["outcome"]])
    explained = (
        "Pairs: of so many seeds. MAE: of losses, mean over the pairs. Distance: of the projected parameters, relative. Det.: "
        "under deterministic=true, which must make reruns agree to the last bit, and lossless strategies too on at most two "
        "ranks, where a sum of gradients has one order. Traced algorithms: eager code against the traced graph, interpreted; "
        "compiler: that graph, compiled; code generated anew: by other tuning, on another machine or by torch.compile."
    )
    return Table(
        f"Attribution: pairs of runs that differ in one thing alone ({scope})",
        ("source", "compared", "held", "pairs", "MAE", "max", *(["distance"] if projected else []), "outcome"),
        rows,
        [explained],
        words=3,
    )


def speed_facts(data: speed.Study) -> Table:
    """What was timed and what it can tell apart, to be read before any verdict."""
    run = next(iter(data.runs.values()))[0]
    launches = {cell.name: len(times) for cell, times in data.times.items()}
    counts: dict[int, list[str]] = {}
    for name, count in launches.items():
        counts.setdefault(count, []).append(name)
    rows = [
        ["ranks", f"{run.ranks}: {run.machine}"],
        ["launches", "; ".join(f"{count} of {', '.join(names)}" for count, names in sorted(counts.items(), reverse=True))],
        ["length", f"epochs of {data.steps} steps, {'in turns' if data.in_turns else 'one run after another'}"],
        ["pilot", f"launches {', '.join(map(str, data.plan.pilot))}, in no claim" if data.plan.pilot else "none"],
        ["declared claims", ", ".join(f"{c.arm} (time)" for c in data.plan.primary if c.endpoint == TIME) or "none: estimates"],
        ["declared by", "plan.json" if data.plan.declared else "ddpkit's defaults: the folder has no plan.json"],
    ]  # fmt: skip
    for cell in data.times:
        if cell.again:
            again = speed.relative(data, cell).estimate.percent()
            covers = (
                "-" if not np.isfinite(again.low) else "does NOT cover zero" if again.excludes_zero else "covers zero"
            )
            what = f"{percent(again.value)} {span(again.low, again.high)}: {covers}"
            rows.append([f"calibration, {cell.parameters:,}", f"standard against itself {what}"])
        elif cell.name in {claim.arm for claim in data.plan.primary}:
            found = speed.relative(data, cell).estimate
            told = f"±{100 * found.reach:.2g} %" if np.isfinite(found.reach) else "none: one launch has no interval"
            rows.append([f"resolution, {cell.parameters:,}", f"{cell.name} against standard {told}"])
    return Table("What was timed, and what it can tell apart", ("", "value"), rows, words=2)


def epochs(values: pd.DataFrame, data: speed.Study) -> list[Table]:
    """The paper's Table 4 with intervals and the published values beside, and the split of a step."""
    rows = [
        [
            f"{row['parameters']:,}",
            cell.name,
            number(row["seconds_per_epoch"], 4),
            percent(row["relative_percent"]) if cell != data.reference(cell) else "reference",
            span(row["relative_low"], row["relative_high"]),
            f"{number(row['between_percent'], 2)}/{number(row['within_percent'], 2)}",
            f"{row['launches']}/{row['epochs']}",
            _minutes(row["published_seconds"]),
            percent(row["published_relative_percent"]) if row["published_relative_percent"] != 0 else "reference",
        ]
        for cell, (_, row) in zip(data.times, values.iterrows(), strict=True)
    ]
    explained = (
        "Intervals: Student's t of logarithms over launches; one launch has none. Spread: of the ratio between launches / "
        "between epochs of one launch. Launches/their epochs. What is not declared is an estimate without a verdict."
    )
    first = Table(
        f"Time of an epoch relative to standard eager of the same size ({data.scope})",
        (
            "parameters",
            "strategy",
            "s/epoch",
            "relative",
            "95 %",
            "spread %",
            "launches",
            "paper",
            "paper rel.",
        ),
        rows,
        [
            *data.notes,
            explained,
            f"Paper: {published.source('speed')}; 8 ranks, one launch; 32.1 M (embedding 32) and 114 M (embedding 128), min:s.",
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
        f"A step, in ms, and its parts on rank 0 ({data.scope})",
        ("parameters", "strategy", "step", "data", "compute", "sync", "optimizer", "compile s", "gradients"),
        split,
        [
            "A part is empty where it cannot be told apart. Gradients: bytes that each rank puts into the sum of a step.",
            *told,
        ],
        words=2,
    )
    return [first, *_beside(data), second, *_effects(data)]


def _beside(data: speed.Study) -> list[Table]:
    """Ours beside nequip's own trainer, where that was run."""
    rows = [
        [
            f"{one.cell.parameters:,}",
            one.cell.name,
            one.peer.name,
            number(one.ratio.value, 4),
            "-" if np.isnan(one.ratio.low) else f"[{number(one.ratio.low, 4)}, {number(one.ratio.high, 4)}]",
            str(one.ratio.count),
            "in turns" if one.in_turns else "one after another",
        ]
        for one in speed.beside(data)
    ]
    if not rows:
        return []
    explained = (
        "nequip ddp: nequip-train with Lightning's DistributedDataParallel; nequip simple: with its SimpleDDPStrategy. The same "
        "weights, frames, batch of a GPU, loss, optimizer, average of the weights and TF32 as ours, and nequip's own layers and "
        "loader of batches. Below 1 ours is faster. Geometric means over launches, with Student's intervals; estimates without "
        "a verdict. In turns: an epoch at a time, in every launch."
    )
    return [
        Table(
            f"An epoch beside nequip's own trainer: time of ours over nequip's ({data.scope})",
            ("parameters", "ours", "nequip's", "ours/nequip's", "95 %", "launches", "how"),
            rows,
            [explained],
            words=3,
        )
    ]


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


def _effects(data: speed.Study) -> list[Table]:
    rows = [
        [f"exposed communication, {cell.name}", f"{cell.parameters:,}", *_estimate(found, "s")]
        for cell, found in speed.exposed_communication(data)
    ]
    rows += [
        [f"interaction of compile with {cell.strategy}", f"{cell.parameters:,}", *_estimate(found, "%")]
        for cell, found in speed.interaction(data)
    ]
    for entry in speed.growth(data):
        parts = {"growth": entry.total, "of it compute": entry.compute, "of it communication": entry.communication}
        rows += [[f"{entry.cell.name}: {part}", "small to large", *_estimate(e, "%")] for part, e in parts.items() if e]
    if not rows:
        return []
    explained = (
        "Exposed communication: epoch time beyond strategy none, which computes the same and sends nothing. Interaction: "
        "compiled over eager, divided by the same of standard, less one. Growth: in percent of the smaller model's epoch. All "
        "are estimates: one interval in twenty misses its value by chance."
    )
    return [
        Table(
            f"Effects: communication, interaction with compilation, growth with the number of parameters ({data.scope})",
            ("effect", "parameters", "value", "95 % interval", "launches"),
            rows,
            [explained],
        )
    ]


def _estimate(found: Estimate, unit: str) -> list[str]:
    digits = 1 if unit == "%" else 3
    return [f"{found.value:+.{digits}f} {unit}", span(found.low, found.high, digits), str(found.count)]


def _difference(row: "pd.Series[object]", column: str) -> str:
    return "0 (bitwise)" if row["bitwise"] else number(float(row[column]))  # type: ignore[arg-type]


def _minutes(seconds: float) -> str:
    return "-" if not np.isfinite(seconds) else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _bytes(count: float) -> str:
    if not np.isfinite(count):
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{number(count / size)} {unit}"
    return f"{count:.0f} B"
