"""Figures, drawn without a display and in colours that colour-blind readers can tell apart (Okabe and Ito)."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ddpkit.analysis import speed
from ddpkit.analysis.blocks import Study
from ddpkit.analysis.divergence import curve
from ddpkit.analysis.numerics import CUT, differences, pooled
from ddpkit.analysis.runs import NDArray
from ddpkit.analysis.tables import number, percent

BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"
GREY = "#595959"
CYCLE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, "#000000")
_LINES = ("-", "--", "-.", ":")
_STRATEGY_COLOUR = {"standard": GREY, "custom": BLUE, "overlap": ORANGE, "ingraph": GREEN, "none": SKY}
_COLUMNS_A_ROW = 4
_DOTS = 200
STYLE: Mapping[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "font.family": "DejaVu Sans",
}


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DOTS, facecolor="white")
    return path


def trajectories(study: Study) -> Figure:
    """The paper's Figure 1: a column for each comparison, losses above, histogram of the differences below.

    Runs of an arm share a column; their differences are pooled.
    """
    across = min(len(study.names), _COLUMNS_A_ROW)
    rows = math.ceil(len(study.names) / _COLUMNS_A_ROW)
    with mpl.rc_context(dict(STYLE)):
        figure = Figure(figsize=(max(3.4, 2.75 * across), 5.0 * rows + 0.3), layout="constrained")
        figure.suptitle(study.scope, fontsize=9, color=GREY)
        axes = np.atleast_2d(figure.subplots(2 * rows, across, squeeze=False))
        for axis in axes.flat:
            axis.set_visible(False)
        for place, name in enumerate(study.names):
            row, column = divmod(place, _COLUMNS_A_ROW)
            _losses(axes[2 * row, column], study, name, first=column == 0)
            _histogram(axes[2 * row + 1, column], pooled(study, name), first=column == 0)
    return figure


def divergences(study: Study) -> Figure:
    """Distance from the baseline against the step, one line an arm; identical arms are named aside."""
    with mpl.rc_context(dict(STYLE)):
        figure = Figure(figsize=(7.0, 3.8), layout="constrained")
        figure.suptitle(study.scope, fontsize=9, color=GREY)
        axis = figure.subplots()
        identical, drawn = [], 0
        for name in study.names:
            steps, size = _projected(study, name) if study.by_projection else _stretches(study, name)
            shown = size > 0
            if not shown.any():
                identical += [name] if len(steps) else []
                continue
            axis.plot(
                steps[shown], size[shown], label=name, color=CYCLE[drawn % len(CYCLE)], lw=1.4,
                ls=_LINES[drawn % len(_LINES)], marker="o" if shown.sum() < 4 else None, ms=3,
            )  # fmt: skip
            drawn += 1
        if drawn:
            axis.set_yscale("log")
            axis.legend(ncols=1 if drawn < 9 else 2, loc="center left", bbox_to_anchor=(1.0, 0.5))
        if study.by_projection and drawn:
            axis.set_xscale("log")
        axis.set_xlabel("step")
        axis.set_ylabel("relative distance of parameters" if study.by_projection else "mean |loss difference|")
        axis.grid(alpha=0.25, lw=0.5)
        if identical:
            text = "identical to the baseline: " + ", ".join(identical)
            axis.set_title(textwrap.fill(text, 80), fontsize=8, color=GREY, loc="left")
    return figure


def _projected(study: Study, arm: str) -> tuple[NDArray, NDArray]:
    """Recorded steps and the geometric mean over runs of the relative distances there; zero where all are."""
    apart: dict[float, list[float]] = {}
    for block, run in study.members(arm):
        for step, distance in zip(*curve(block.baseline, run), strict=True):
            apart.setdefault(step, []).append(distance / study.size(block.baseline))
    steps = np.array(sorted(step for step in apart if step > 0))
    means = [_geometric([d for d in apart[step] if d > 0]) for step in steps]
    return steps, np.array(means)


def _geometric(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values)))) if len(values) else 0.0


def _stretches(study: Study, arm: str, points: int = 30) -> tuple[NDArray, NDArray]:
    """Middles of equal stretches of steps, and the mean |loss difference| over them and over an arm's runs."""
    found = [differences(arm, block, run) for block, run in study.members(arm)]
    steps = np.concatenate([s for s, _, _ in found])
    size = np.abs(np.concatenate([mine - its for _, mine, its in found]))
    steps, size = steps[np.isfinite(size)], size[np.isfinite(size)]
    if not len(steps):
        return np.empty(0), np.empty(0)
    edges = np.linspace(steps.min(), steps.max() + 1, min(points, len(np.unique(steps))) + 1)
    where = np.clip(np.digitize(steps, edges) - 1, 0, len(edges) - 2)
    count = np.bincount(where, minlength=len(edges) - 1)
    filled = count > 0
    means = [np.bincount(where, x, minlength=len(count))[filled] / count[filled] for x in (steps, size)]
    return means[0], means[1]


def epochs(data: speed.Study) -> Figure:
    """Time of an epoch relative to standard eager, one panel a model size, with 95 % intervals and published values."""
    sizes = sorted({cell.parameters for cell in data.times})
    rows = max(sum(cell.parameters == size for cell in data.times) for size in sizes)
    with mpl.rc_context(dict(STYLE)):
        figure = Figure(figsize=(5.2 * len(sizes), 1.5 + 0.42 * rows), layout="constrained")
        panels = figure.subplots(1, len(sizes), squeeze=False)[0]
        for axis, size in zip(panels, sizes, strict=True):
            _relative(axis, data, [cell for cell in data.times if cell.parameters == size])
            axis.set_title(f"{size:,} parameters", loc="left")
        figure.suptitle(data.scope, fontsize=9, color=GREY)
        note = "filled: eager, open: compiled; bars: 95 % intervals over launches; ×: published"
        figure.supxlabel(note, fontsize=8, color=GREY)
    return figure


def _relative(axis: Any, data: speed.Study, cells: Sequence[speed.Cell]) -> None:
    for place, cell in enumerate(cells):
        estimate = speed.relative(data, cell).estimate.percent()
        colour = _STRATEGY_COLOUR.get(cell.strategy, PURPLE)
        if np.isfinite(estimate.low):
            axis.plot(
                [estimate.low, estimate.high],
                [place, place],
                color=colour,
                lw=1.4,
                marker="|",
                ms=6,
                solid_capstyle="butt",
            )
        axis.plot(
            estimate.value,
            place,
            "s" if cell.compiled else "o",
            color=colour,
            ms=5,
            mfc="white" if cell.compiled else colour,
        )
        known = speed.published_percent(data, cell)
        if known is not None and cell != data.reference(cell):
            axis.plot(known, place - 0.28, "x", color="black", ms=5, mew=1.2)
        seconds = f"{number(float(np.mean([s for epochs in data.times[cell].values() for s in epochs.values()])))} s"
        text = seconds if cell == data.reference(cell) else f"{percent(estimate.value)}  ({seconds})"
        axis.annotate(text, (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axis.axvline(0, color=GREY, lw=0.8, zorder=0)
    axis.set_yticks(range(len(cells)), [cell.name for cell in cells])
    axis.set_ylim(len(cells) - 0.4, -0.6)
    axis.margins(x=0.12)
    axis.grid(axis="x", alpha=0.25, lw=0.5)
    axis.set_xlabel("epoch time relative to standard eager, %")


def _losses(axis: Any, study: Study, name: str, *, first: bool) -> None:
    axis.set_visible(True)
    members = list(study.members(name))
    baselines = {block.baseline.label: block.baseline for block, _ in members}
    several = {"alpha": 0.6} if len(members) > 1 else {}
    for _, run in members:
        axis.plot(run.steps["step"], run.steps["loss"], color=ORANGE, lw=1.6, **several)
    for run in baselines.values():
        axis.plot(run.steps["step"], run.steps["loss"], color=BLUE, lw=0.8, ls=(0, (4, 2)))
    axis.plot([], [], color=ORANGE, lw=1.6, label=textwrap.fill(name, 26))
    axis.plot([], [], color=BLUE, lw=0.8, ls=(0, (4, 2)), label=study.baseline.stem)
    losses = np.concatenate(
        [run.steps["loss"].to_numpy(float) for run in (*baselines.values(), *(r for _, r in members))]
    )
    positive = losses[np.isfinite(losses)]
    if len(positive) and positive.min() > 0:
        axis.set_yscale("log")
        decades = math.log10(positive.max() / positive.min())
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    counted = f" ({len(members)} runs, {len(baselines)} seed{'s' * (len(baselines) > 1)})" if len(members) > 1 else ""
    axis.set_title(textwrap.fill(f"{name}{counted}", 34))
    axis.legend(loc="upper right", handlelength=2.2)
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if first:
        axis.set_ylabel("loss")


def _histogram(axis: Any, difference: NDArray, *, first: bool) -> None:
    axis.set_visible(True)
    inside = difference[np.abs(difference) <= CUT]
    excluded = len(difference) - len(inside)
    axis.hist(inside, bins=np.linspace(-CUT, CUT, 42), color=ORANGE, edgecolor="white", lw=0.3)
    axis.set_xlim(-CUT * 1.05, CUT * 1.05)
    axis.set_xticks([-CUT, -CUT / 2, 0, CUT / 2, CUT])
    axis.set_xticklabels(["−0.02", "−0.01", "0", "0.01", "0.02"])
    axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.set_ylim(0, max(1.0, axis.get_ylim()[1]) * 1.42)
    axis.set_xlabel("loss difference")
    if first:
        axis.set_ylabel("logged steps")
    text = f"{excluded} of {len(difference)} points\noutside ±0.020"
    if len(difference) and not difference.any():
        text = f"{text}\nidentical (bitwise)"
    axis.annotate(text, (0.03, 0.97), xycoords="axes fraction", va="top", fontsize=7.5)
    _zoom(axis, difference, inside)


def _zoom(axis: Any, difference: NDArray, inside: NDArray) -> None:
    """An inset with the central 99 % on their own scale, where the fixed cut shows a few bars or few of the points."""
    if not len(difference) or not difference.any():
        return
    reach = float(np.quantile(np.abs(difference), 0.99)) or float(np.abs(difference).max())
    if reach >= CUT / 5 and len(inside) >= len(difference) / 2:
        return
    axis.set_ylim(0, axis.get_ylim()[1] * 1.45)
    inset = axis.inset_axes((0.60, 0.54, 0.38, 0.30))
    scale = 10.0 ** math.floor(math.log10(reach))
    shown = difference[np.abs(difference) <= reach] / scale
    inset.hist(shown, bins=np.linspace(-reach / scale, reach / scale, 22), color=GREEN)
    inset.set_yticks([])
    inset.spines["left"].set_visible(False)
    inset.tick_params(labelsize=6.5, length=2, pad=1)
    inset.xaxis.set_major_locator(MaxNLocator(3))
    inset.set_title(f"own scale, 1e{math.log10(scale):.0f}", fontsize=6.5, pad=2)
