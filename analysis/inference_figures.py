"""Figures of molecular dynamics: small molecules, water, scaling over ranks, calls in Python."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from ddpkit.analysis.figures import BLUE, CYCLE, GREEN, GREY, ORANGE, SKY, STYLE, VERMILION
from ddpkit.analysis.inference import SECTIONS

_MARKERS = ("o", "s", "^", "D", "v", "P")
_SECTION_COLOUR = dict(zip(SECTIONS, (BLUE, ORANGE, VERMILION, SKY, GREEN, "#BBBBBB"), strict=True))
_ENGINE = {"package": ("exported", "-"), "eager": ("eager", ":"), "nequip": ("nequip-compile", "--")}
_ACROSS = 3


def panels(values: pd.DataFrame, machine: str) -> Figure:
    """A panel for each part that was measured, two for scaling.

    Args:
        values: of `ddpkit.analysis.inference.table`.
        machine: named above.
    """
    drawn: list[tuple[Callable[[Any, pd.DataFrame], None], pd.DataFrame]] = []
    for part, drawings in _DRAWINGS.items():
        rows = values[values["part"] == part]
        drawn += [(draw, rows) for draw in drawings if len(rows)]
    across = min(_ACROSS, len(drawn))
    down = -(-len(drawn) // across)
    with mpl.rc_context(dict(STYLE)):
        figure = Figure(figsize=(4.4 * across, 3.5 * down + 0.3), layout="constrained")
        figure.suptitle(machine, fontsize=9, color=GREY)
        axes = figure.subplots(down, across, squeeze=False)
        for axis in axes.flat[len(drawn) :]:
            axis.set_visible(False)
        for axis, (draw, rows) in zip(axes.flat, drawn, strict=False):
            draw(axis, rows)
    return figure


def _names(values: pd.Series) -> list[str]:
    return list(dict.fromkeys(values))


def _molecules(axis: Any, rows: pd.DataFrame) -> None:
    systems, models = _names(rows["system"]), _names(rows["model"])
    width = 0.8 / len(models)
    for m, model in enumerate(models):
        own = rows[rows["model"] == model].set_index("system").reindex(systems)
        places = np.arange(len(systems)) + (m - (len(models) - 1) / 2) * width
        spread = 1000 * own["spread_seconds_per_step"].fillna(0)
        bars = axis.bar(
            places, 1000 * own["seconds_per_step"], 0.92 * width, yerr=spread if spread.any() else None, color=CYCLE[m % 7],
            label=model, error_kw={"lw": 1},
        )  # fmt: skip
        axis.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
    atoms = rows.drop_duplicates("system").set_index("system")["atoms"]
    axis.set_xticks(range(len(systems)), [f"{name}\n{atoms[name]} atoms" for name in systems])
    axis.set_ylabel("ms per step")
    axis.margins(y=0.15)
    axis.set_xlim(-max(0.5, 1.5 - len(systems) / 2), len(systems) - 1 + max(0.5, 1.5 - len(systems) / 2))
    axis.set_title("Small molecules, NVE", loc="left")
    axis.legend()


def _water(axis: Any, rows: pd.DataFrame) -> None:
    _against_atoms(axis, rows, "atom_steps_per_second")
    _log(axis, rows["atoms"].unique())
    axis.set_xlabel("atoms")
    axis.set_ylabel("atom-steps per second")
    axis.set_title("Water, one rank", loc="left")
    axis.legend()


def _lammps(axis: Any, rows: pd.DataFrame) -> None:
    _against_atoms(axis, rows, "lammps_percent")
    axis.set_xscale("log")
    _plain_ticks(axis.xaxis, rows["atoms"].unique())
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25, lw=0.5)
    axis.set_xlabel("atoms")
    axis.set_ylabel("share of LAMMPS itself, %")
    axis.set_title("Water: what is not the pair style", loc="left")


def _against_atoms(axis: Any, rows: pd.DataFrame, column: str) -> None:
    """A line a model."""
    for m, model in enumerate(_names(rows["model"])):
        own = rows[rows["model"] == model].sort_values("atoms")
        style = {"color": CYCLE[m % 7], "marker": _MARKERS[m % 6], "ms": 4, "lw": 1.4}
        axis.plot(own["atoms"], own[column], label=model, **style)


def _scaling(axis: Any, rows: pd.DataFrame) -> None:
    ordered = rows.sort_values("ranks", kind="stable")
    for number, ((system, model), own) in enumerate(ordered.groupby(["system", "model"], sort=False)):
        rate = 1 / own["seconds_per_step"].to_numpy()
        ranks = own["ranks"].to_numpy()
        colour = CYCLE[number % 7]
        axis.plot(ranks, rate, color=colour, marker=_MARKERS[number % 6], ms=4, lw=1.4, label=f"{model}, {system}")
        axis.plot(ranks, rate[0] * ranks / ranks[0], color=colour, lw=0.8, ls=":")
    _log(axis, rows["ranks"].unique())
    axis.set_xlabel("ranks")
    axis.set_ylabel("steps per second")
    axis.set_title("Strong scaling (dotted: ideal)", loc="left")
    axis.legend(fontsize=7)


def _breakdown(axis: Any, rows: pd.DataFrame) -> None:
    places, left = np.arange(len(rows)), np.zeros(len(rows))
    for section in SECTIONS:
        shares = rows[f"{section}_percent"].fillna(0).to_numpy(float)
        axis.barh(places, shares, 0.85, left=left, color=_SECTION_COLOUR[section], label=section.capitalize())
        left += shares
    systems = len(set(rows["system"])) > 1
    names = [
        f"{row['model']}{', ' + row['system'] if systems else ''}, {row['ranks']} rank{'s' * (row['ranks'] > 1)}"
        for _, row in rows.iterrows()
    ]
    axis.set_yticks(places, names, fontsize=max(4.5, min(8.0, 120 / len(rows))))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(0, 100)
    axis.set_xlabel("share of a step, %")
    axis.set_title("Where LAMMPS' time goes", loc="left")
    axis.legend(loc="upper center", bbox_to_anchor=(0.4, -0.18), ncols=6, handlelength=1, columnspacing=1, fontsize=7)


def _calls(axis: Any, rows: pd.DataFrame) -> None:
    boxes = rows[rows["system"].str.startswith("water")]  # whose atoms have equally many neighbours
    rows = boxes if len(boxes) else rows
    for m, model in enumerate(_names(rows["model"])):
        axis.plot([], [], color=CYCLE[m % 7], marker=_MARKERS[m % 6], ms=4, lw=1.4, label=model)
        for engine, (_, line) in _ENGINE.items():
            own = rows[(rows["model"] == model) & (rows["engine"] == engine)].sort_values("atoms")
            if len(own):
                axis.plot(
                    own["atoms"],
                    1000 * own["seconds_per_step"],
                    color=CYCLE[m % 7],
                    ls=line,
                    marker=_MARKERS[m % 6],
                    ms=4,
                    lw=1.4,
                )
    for engine in _names(rows["engine"]):
        name, line = _ENGINE[engine]
        axis.plot([], [], color=GREY, ls=line, lw=1.4, label=name)
    _log(axis, rows["atoms"].unique())
    axis.set_xlabel("atoms")
    axis.set_ylabel("ms per call")
    axis.set_title("Calls in Python" + (", boxes of water" if len(boxes) else ""), loc="left")
    axis.legend(fontsize=7)


def _log(axis: Any, places: Sequence[int]) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    _plain_ticks(axis.xaxis, places)
    low, high = axis.get_ylim()
    subs = (1.0,) if high > 300 * low else (1.0, 2.0, 5.0) if high > 8 * low else tuple(map(float, range(1, 10)))
    axis.yaxis.set_major_locator(LogLocator(subs=subs))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.25, lw=0.5, which="both")


def _plain_ticks(axis: Any, places: Sequence[int]) -> None:
    """Ticks where something was measured; of places that crowd, the ones with room."""
    shown: list[int] = []
    for place in sorted(places):
        if not shown or place >= 2 * shown[-1]:
            shown.append(int(place))
    axis.set_major_locator(FixedLocator(shown))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


_DRAWINGS: dict[str, tuple[Callable[[Any, pd.DataFrame], None], ...]] = {
    "molecules": (_molecules,),
    "water": (_water, _lammps),
    "scaling": (_scaling, _breakdown),
    "calls": (_calls,),
}
