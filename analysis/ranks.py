"""How differences from the baseline depend on the number of ranks: studies of numerics at several, in one table and figure."""

import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from ddpkit.analysis.blocks import Study
from ddpkit.analysis.figures import CYCLE, GREY, STYLE
from ddpkit.analysis.statistics import Estimate, mean_interval
from ddpkit.analysis.tables import Table, number
from ddpkit.errors import InputError

_FEWEST = 3
"""Seeds, or numbers of ranks, from which an interval or an exponent is told."""
_ALIKE = (
    (re.compile(r"^emulated compiled$"), "compiled"),
    (re.compile(r"^emulated, bucket_mb=[\d.e-]+$"), "standard"),
    (re.compile(r"^overlap, bucket_mb=[\d.e-]+$"), "overlap"),
)
"""What emulated ranks do, by the name that real ones have for it."""


def distances(studies: Sequence[Study]) -> pd.DataFrame:
    """The distance of each arm from its baseline, for each number of ranks and each seed.

    Columns: `ranks`, `emulated` (on one process), `arm` (by the name that real ranks have for it: sums of emulated ranks that are
    taken in buckets are `standard`), `seed`, `relative` (of the parameters where all runs recorded projections of them, otherwise
    of the loss; mean over the arm's runs of that seed), `by` (which of both).

    Raises:
        InputError: a study does not tell its number of ranks.
    """
    rows = []
    for study in studies:
        ranks = study.baseline.world_size
        if ranks is None:
            raise InputError(
                f"the runs beside {study.baseline.label} do not tell how many ranks they had: leave them out"
            )
        for arm in study.names:
            for block in study.blocks:
                runs = [run for run in block.arms.get(arm, ()) if study.outcomes[run.label].kind == "complete"]
                apart = [study.distance(block.baseline, run) / study.size(block.baseline) for run in runs]
                if apart:
                    rows.append((ranks, study.baseline.strategy == "emulated", _plain(arm), block.seed, np.mean(apart),
                                 "parameters" if study.by_projection else "loss"))  # fmt: skip
    return pd.DataFrame(rows, columns=["ranks", "emulated", "arm", "seed", "relative", "by"]).sort_values(
        ["emulated", "arm", "ranks", "seed"], kind="stable", ignore_index=True
    )


def _plain(arm: str) -> str:
    return next((name for pattern, name in _ALIKE if pattern.match(arm)), arm)


def intervals(values: pd.DataFrame) -> pd.DataFrame:
    """The geometric mean over seeds of `distances`, with Student's 95 % interval of the logarithms.

    Columns: `ranks`, `emulated`, `arm`, `seeds`, `identical` (seeds at distance 0, which the mean leaves out), `mean`, `low` and
    `high` (NaN for fewer than three seeds, or where some are identical and some are not).
    """
    rows = []
    for (emulated, arm, ranks), own in values.groupby(["emulated", "arm", "ranks"], sort=True):
        apart = own["relative"].to_numpy(float)
        told = _mean(apart)
        rows.append((ranks, emulated, arm, len(apart), int((apart == 0).sum()), told.value, told.low, told.high))
    return pd.DataFrame(rows, columns=["ranks", "emulated", "arm", "seeds", "identical", "mean", "low", "high"])


def _mean(apart: np.ndarray) -> Estimate:
    seen = apart[apart > 0]
    if not len(seen):
        return Estimate(0.0, np.nan, np.nan, len(apart))
    told = mean_interval(np.log(seen)).map(np.exp)
    whole = len(seen) == len(apart) >= _FEWEST
    return told if whole else Estimate(told.value, np.nan, np.nan, len(seen))


def exponents(values: pd.DataFrame) -> dict[str, Estimate]:
    """The exponent p of distance ~ ranks^p of emulated ranks, a fit for each seed and their mean with its 95 % interval, by arm.

    Only of arms that differ from the baseline at three numbers of ranks or more, for three seeds or more.
    """
    found = {}
    for arm, own in values[values["emulated"] & (values["relative"] > 0)].groupby("arm", sort=True):
        fits = [
            np.polyfit(np.log(one["ranks"].to_numpy(float)), np.log(one["relative"].to_numpy(float)), 1)[0]
            for _, one in own.groupby("seed")
            if one["ranks"].nunique() >= _FEWEST
        ]
        if len(fits) >= _FEWEST:
            found[str(arm)] = mean_interval(np.array(fits))
    return found


def table(values: pd.DataFrame) -> Table:
    """`distances` to be read: an arm in a row, a number of ranks in a column."""
    sizes = sorted(
        {(int(ranks), bool(emulated)) for ranks, emulated in zip(values["ranks"], values["emulated"], strict=True)}
    )
    rows = []
    for arm in dict.fromkeys(values["arm"]):
        cells = []
        for ranks, emulated in sizes:
            own = values[(values["arm"] == arm) & (values["ranks"] == ranks) & (values["emulated"] == emulated)][
                "relative"
            ]
            cells.append(_cell(own.to_numpy(float)))
        rows.append([arm, *cells])
    header = ["arm", *(f"{ranks}{' emulated' * emulated}" for ranks, emulated in sizes)]
    by = " and ".join(sorted(set(values["by"])))
    explained = (
        "Geometric mean over seeds, in square brackets its 95 % interval (Student's t of logarithms); where there is none, from "
        "which to which in round ones; 0: identical to the baseline."
    )
    grows = [
        f"{arm}: the distance of emulated ranks goes as ranks^{told.value:.2f} [{told.low:.2f}, {told.high:.2f}], "
        f"{told.count} seeds."
        for arm, told in exponents(values).items()
    ]
    notes = [explained, *grows]
    return Table(f"Distance from the baseline by number of ranks, relative to the {by}", header, rows, notes)


def _cell(apart: np.ndarray) -> str:
    if not len(apart):
        return ""
    if not apart.any():
        return "0"
    seen = apart[apart > 0]
    told = _mean(apart)
    if np.isfinite(told.low):
        return f"{number(told.value)} [{number(told.low)}, {number(told.high)}]"
    zeros = f", {len(apart) - len(seen)} × 0" if len(seen) < len(apart) else ""
    spread = f" ({number(seen.min())} to {number(seen.max())}{zeros})" if len(apart) > 1 else ""
    return f"{number(told.value)}{spread}"


def figure(values: pd.DataFrame) -> Figure:
    """Distance from the baseline against the number of ranks: a line an arm with its 95 % interval, a dot a seed; open for
    emulated ranks.
    """
    with mpl.rc_context(dict(STYLE)):
        drawing = Figure(figsize=(6.4, 3.8), layout="constrained")
        axis: Any = drawing.subplots()
        identical: list[str] = []
        arms = list(dict.fromkeys(values["arm"]))
        for place, arm in enumerate(arms):
            colour = CYCLE[place % len(CYCLE)]
            for emulated, line in ((False, "-"), (True, "--")):
                own = values[(values["arm"] == arm) & (values["emulated"] == emulated)]
                if equal := sorted(set(own.loc[own["relative"] == 0, "ranks"])):
                    identical.append(f"{arm} at {', '.join(map(str, equal))}{' emulated' * emulated}")
                own = own[own["relative"] > 0]
                if own.empty:
                    continue
                told = intervals(own)
                label = f"{arm}, emulated" if emulated and "emulated" not in arm else arm
                reach = np.abs(told[["low", "high"]].to_numpy(float).T - told["mean"].to_numpy(float))
                look = {"color": colour, "lw": 1.4, "ls": line, "label": label}
                beside = 1.0 if emulated else 1.06
                axis.errorbar(
                    beside * told["ranks"], told["mean"], np.nan_to_num(reach), capsize=3, elinewidth=1.0, **look
                )
                axis.plot(
                    beside * own["ranks"],
                    own["relative"],
                    "o",
                    color=colour,
                    ms=4,
                    alpha=0.8,
                    mew=1,
                    mfc="white" if emulated else colour,
                )
        axis.set_xscale("log", base=2)
        sizes = sorted(set(values["ranks"]))
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.xaxis.set_minor_formatter(NullFormatter())
        if (values["relative"] > 0).any():
            axis.set_yscale("log")
            axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        axis.set_xlabel("ranks")
        axis.set_ylabel(f"relative distance of {' and '.join(sorted(set(values['by'])))}")
        axis.grid(alpha=0.25, lw=0.5)
        if identical:
            axis.set_title(
                "identical to the baseline: " + "; ".join(identical), fontsize=8, color=GREY, loc="left", wrap=True
            )
    return drawing
