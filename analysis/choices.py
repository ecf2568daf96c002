"""Errors on test frames of a study's arms, paired by seed: what each choice in training is worth, whether arms are equally
accurate, and how errors fall with the number of frames that were trained on.

`ddpkit eval` of each run has left them in `evaluation/test/accuracy.csv` of its folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ddpkit.analysis.accuracy import read_beside
from ddpkit.analysis.figures import BLUE, CYCLE, GREY, STYLE
from ddpkit.analysis.outcomes import ended
from ddpkit.analysis.plan import FORCE_ERROR, MARGINS
from ddpkit.analysis.runs import NDArray, Run, flatten, read_runs
from ddpkit.analysis.statistics import LEVEL, Test, equivalence
from ddpkit.analysis.tables import Table, number, percent, span
from ddpkit.errors import InputError

FORCES, ENERGY = "forces_rmse_mev_per_angstrom", "total_energy_rmse_mev"
ERRORS = {FORCES: "force RMSE, meV/Å", ENERGY: "energy RMSE, meV a frame"}
MARGIN = MARGINS[FORCE_ERROR]
_OF_NO_CHOICE = ("seed", "data.seed", "data.cache", "run_dir", "resume", "strategy._target_", "scheduler._target_")
_WHERE = Path("evaluation") / "test" / "accuracy.csv"


@dataclass(frozen=True)
class Study:
    """The evaluated runs of a folder.

    Attributes:
        rows: one for each run and subset of the test frames: `run`, `arm`, `pair` (number of its seed), `train_frames` (NaN:
            all), `seconds` (of training), `steps`, `subset`, `frames`, and the errors. Errors of a run that failed are infinite.
        changes: what sets each arm apart from the baseline, in words; the baseline comes first.
        baseline: the arm that others are compared with.
        notes: what was left out, and why.
    """

    rows: pd.DataFrame
    changes: dict[str, str]
    baseline: str
    notes: Sequence[str]

    def errors(self, arm: str, column: str, subset: str = "all") -> "pd.Series[float]":
        """Of an arm on a subset, by the number of the seed."""
        rows = self.rows[(self.rows["arm"] == arm) & (self.rows["subset"] == subset)]
        return rows.set_index("pair")[column].sort_index()

    def ratio(self, arm: str, column: str) -> tuple[NDArray, Test]:
        """Logarithms of an arm's errors over the baseline's, seed by seed, and whether they are within the margin."""
        own, base = self.errors(arm, column), self.errors(self.baseline, column)
        both = own.index.intersection(base[np.isfinite(base)].index)
        logs = np.log(own[both].to_numpy(float) / base[both].to_numpy(float))
        return logs, equivalence(logs, float(np.log1p(MARGIN)), two_sided=True)

    @property
    def is_curve(self) -> bool:
        """Whether arms differ in how many frames they were trained on."""
        return len(set(self.rows["train_frames"].dropna())) > 1


def read(folder: Path, baseline: str = "baseline") -> Study:
    """The runs of a folder with their errors.

    Raises:
        InputError: there are none, no baseline is among them, or runs of one seed were tested on other frames.
    """
    runs, skipped = read_runs(folder)
    notes = [f"{note}." for note in skipped]
    rows: list[dict[str, Any]] = []
    kept: list[Run] = []
    for run in runs:
        how, path = ended(run.summary), folder / run.label / _WHERE
        if how.kind == "interrupted":
            notes.append(f"{run.label} is left out: it has not ended ({how.why}).")
            continue
        if how.kind == "complete" and not path.is_file():
            notes.append(
                f"{run.label} is left out: it has no {_WHERE}; make it with `ddpkit eval {folder / run.label}`."
            )
            continue
        kept.append(run)
        facts = {
            "run": run.label,
            "arm": run.stem,
            "pair": run.repeat,
            "train_frames": flatten(run.config).get("data.train_frames"),
            "seconds": float(run.epochs["seconds"].sum()) if "seconds" in run.epochs else np.nan,
            "steps": run.summary.get("steps"),
        }
        if how.kind == "failed":
            notes.append(f"{run.label} {how.why}: its errors count as infinite.")
            rows.append(facts | {"subset": "all", "frames": 0, FORCES: np.inf, ENERGY: np.inf})
        else:
            rows += [facts | row for row in read_beside(path).to_dict("records")]  # type: ignore[misc]
    _require_same_frames(kept)
    stems = dict.fromkeys(run.stem for run in kept)
    if baseline not in stems and len({row["train_frames"] for row in rows}) > 1:
        baseline = next(iter(stems))  # a curve compares with none
    if baseline not in stems:
        reason = f" {' '.join(notes)}" if notes else ""
        raise InputError(
            f"{folder} has no evaluated run called {baseline}, which the others are compared with: name one of "
            f"{', '.join(stems) or 'its runs'} with --baseline.{reason}"
        )
    first = {stem: next(run for run in kept if run.stem == stem) for stem in (baseline, *stems)}
    changes = {stem: _changes(run, first[baseline]) for stem, run in first.items()}
    values = pd.DataFrame(rows)
    values["train_frames"] = values["train_frames"].astype(float)
    return Study(values, changes, baseline, notes)


def _require_same_frames(runs: Sequence[Run]) -> None:
    """Refuses pairs of runs that do not have their data and the division of them in common."""
    for one in runs:
        other = next(run for run in runs if run.repeat == one.repeat)
        seen = [_fingerprint(run) for run in (other, one)]
        if seen[0] != seen[1]:
            raise InputError(
                f"Runs {other.label} and {one.label} cannot be compared: their frames or the division of them into parts differ; "
                "keep such runs in folders of their own."
            )


def _fingerprint(run: Run) -> tuple[Any, ...]:
    """What the test frames of a run depend on."""
    flat = flatten(run.config)
    found = run.summary.get("data_fingerprint") or {}
    return found.get("frames"), str(flat.get("data.split")), flat.get("data.split_by"), flat.get("data.seed")


def _changes(run: Run, baseline: Run) -> str:
    own, base = flatten(run.config), flatten(baseline.config)
    names = [str(flat.get("scheduler._target_") or "plateau").rpartition(".")[2] for flat in (own, base)]
    told = [f"scheduler={names[0]}"] if names[0] != names[1] else []
    keys = sorted(k for k in {*own, *base} if own.get(k) != base.get(k) and k not in _OF_NO_CHOICE)
    told += [f"{key}={own.get(key)}" for key in keys if not (told and key.startswith("scheduler."))]
    return ", ".join(told)


def table(study: Study) -> Table:
    """An arm in a row: mean and standard deviation over seeds of each error, and its ratio to the baseline's."""
    rows = []
    for arm, change in study.changes.items():
        cells = [arm, change or "-", str(len(study.errors(arm, FORCES)))]
        for column in ERRORS:
            cells.append(_spread(study.errors(arm, column).to_numpy(float)))
            if arm == study.baseline:
                cells.append("-")
            else:
                change_of = study.ratio(arm, column)[1].estimate.percent()
                cells.append(f"{percent(change_of.value)} {span(change_of.low, change_of.high)}")
        cells.append("-" if arm == study.baseline else _verdict(study.ratio(arm, FORCES)[1]))
        rows.append(cells)
    header = (
        "arm",
        "what differs",
        "seeds",
        "force RMSE, meV/Å",
        "change",
        "energy RMSE, meV",
        "change",
        "equal forces",
    )
    tested = (
        "Errors on the test frames, which neither early stop nor the learning rate has seen: mean ± standard deviation over "
        "seeds; energies are those of whole frames."
    )
    changed = f"Change: geometric mean of the ratio to {study.baseline} of the same seed, with its 90 % interval."
    equal = (
        f"Equal forces: yes where two one-sided t-tests on the logarithm of the ratio put it within ±{100 * MARGIN:g} % at the "
        "5 % level, no where they put it outside, open otherwise. That all arms are equal is shown where all say yes."
    )
    notes = [tested, changed, equal, *study.notes]
    return Table(f"What each choice is worth, compared with {study.baseline}", header, rows, notes, words=2)


def _spread(values: NDArray) -> str:
    if len(values) > 1 and np.isfinite(values).all():
        return f"{number(float(values.mean()))} ± {number(float(values.std(ddof=1)), 2)}"
    return ", ".join("failed" if np.isinf(value) else number(float(value)) for value in values)


def _verdict(test: Test) -> str:
    if test.inside < LEVEL:
        return "yes"
    return "no" if test.outside < LEVEL else "open"


def figure(study: Study) -> Figure:
    """The ratio of each arm's errors to the baseline's: a dot a seed, the mean with its 90 % interval, the margin in grey."""
    arms = [arm for arm in study.changes if arm != study.baseline]
    with mpl.rc_context(dict(STYLE)):
        drawing = Figure(figsize=(8.0, 1.3 + 0.4 * len(arms)), layout="constrained")
        axes = drawing.subplots(1, 2, sharey=True)
        for axis, column in zip(axes, ERRORS, strict=True):
            axis.axvspan(100 * (1 / (1 + MARGIN) - 1), 100 * MARGIN, color=GREY, alpha=0.15, lw=0)
            axis.axvline(0, color=GREY, lw=0.8)
            for place, arm in enumerate(arms):
                logs, test = study.ratio(arm, column)
                shown = 100 * np.expm1(logs[np.isfinite(logs)])
                axis.plot(shown, np.full(len(shown), place), "o", color=BLUE, ms=3.5, alpha=0.5, mew=0)
                estimate = test.estimate.percent()
                if np.isfinite(estimate.low):
                    axis.plot([estimate.low, estimate.high], [place + 0.2] * 2, color=BLUE, lw=1.4, marker="|", ms=6)
                if np.isfinite(estimate.value):
                    axis.plot(estimate.value, place + 0.2, "s", color=BLUE, ms=4)
            axis.set_xlabel(f"change of {ERRORS[column].partition(',')[0]}, %")
            axis.grid(axis="x", alpha=0.25, lw=0.5)
        axes[0].set_yticks(range(len(arms)), arms)
        axes[0].set_ylim(len(arms) - 0.4, -0.6)
        drawing.suptitle(f"compared with {study.baseline} of the same seed", fontsize=9, color=GREY)
    return drawing


def curve(study: Study) -> pd.DataFrame:
    """Errors against the number of frames trained on.

    Columns: `subset`, `train_frames`, `seeds`, the geometric mean over seeds of each error, and `FORCES + "_slope"`: the exponent
    of the power of the number of frames that the subset's force errors follow (least squares of the logarithms).
    """
    known = study.rows[study.rows["train_frames"].notna() & np.isfinite(study.rows[FORCES])]
    rows = []
    for subset in sorted(set(known["subset"]), key=lambda name: (name != "all", name)):
        own = known[known["subset"] == subset]
        slope = np.nan
        if len(set(own["train_frames"])) > 1:
            slope = float(np.polyfit(np.log(own["train_frames"]), np.log(own[FORCES]), 1)[0])
        for frames, some in own.groupby("train_frames"):
            means = {column: float(np.exp(np.log(some[column]).mean())) for column in ERRORS}
            rows.append({"subset": subset, "train_frames": int(frames), "seeds": len(some), **means, f"{FORCES}_slope": slope})  # type: ignore[arg-type]  # fmt: skip
    return pd.DataFrame(rows)


def curve_table(values: pd.DataFrame, notes: Sequence[str] = ()) -> Table:
    """`curve` to be read: a subset in a row, a number of frames in a column."""
    sizes = sorted(set(values["train_frames"]))
    rows = []
    for subset, own in values.groupby("subset", sort=False):
        at = own.set_index("train_frames")
        cells = [f"{number(at.loc[n, FORCES])}, {number(at.loc[n, ENERGY])}" if n in at.index else "-" for n in sizes]
        rows.append([str(subset), *cells, number(float(own[f"{FORCES}_slope"].iloc[0]), 2)])
    said = "Geometric means over seeds; exponent: of the number of frames, in a power law through the force errors."
    header = ("test frames", *(f"{n:,}" for n in sizes), "exponent")
    return Table(
        "Force RMSE in meV/Å, energy RMSE in meV a frame, by number of frames trained on", header, rows, [said, *notes]
    )


def curve_figure(study: Study) -> Figure:
    """Errors against the number of frames trained on, both logarithmic: a line a subset, a dot a run."""
    values = curve(study)
    with mpl.rc_context(dict(STYLE)):
        drawing = Figure(figsize=(8.6, 3.8), layout="constrained")
        axes = drawing.subplots(1, 2)
        for axis, column in zip(axes, ERRORS, strict=True):
            for place, (subset, own) in enumerate(values.groupby("subset", sort=False)):
                colour = "black" if subset == "all" else CYCLE[(place - 1) % (len(CYCLE) - 1)]
                axis.plot(
                    own["train_frames"], own[column], color=colour, lw=2 if subset == "all" else 1.2, label=subset
                )
                dots = study.rows[(study.rows["subset"] == subset) & np.isfinite(study.rows[column])]
                axis.plot(dots["train_frames"], dots[column], "o", color=colour, ms=3, alpha=0.6, mew=0)
            axis.set(xscale="log", yscale="log", xlabel="frames trained on", ylabel=ERRORS[column])
            sizes = sorted(set(values["train_frames"]))
            axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.25, lw=0.5)
        axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawing
