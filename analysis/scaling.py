"""Predicted step times against the number of ranks, drawn."""

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from ddpkit.analysis.figures import BLUE, GREEN, GREY, ORANGE, SKY, STYLE

_LOOK = {
    "none": (SKY, "."),
    "standard": (GREY, "o"),
    "custom": (BLUE, "s"),
    "overlap": (ORANGE, "x"),
    "ingraph": (GREEN, "+"),
}


def predictions(values: pd.DataFrame) -> Figure:
    """Seconds a step and efficiency against the number of ranks; dashed: compiled.

    Args:
        values: columns `ranks`, `strategy`, `compile`, `seconds_per_step`, `efficiency`.
    """
    with mpl.rc_context(dict(STYLE)):
        figure = Figure(figsize=(7.4, 3.2), layout="constrained")
        time, efficiency = figure.subplots(1, 2)
        for (strategy, compiled), group in values.groupby(["strategy", "compile"], sort=False):
            colour, marker = _LOOK[str(strategy)]
            look = {"color": colour, "marker": marker, "ls": "--" if compiled else "-", "lw": 1.2, "ms": 5}
            label = f"{strategy} compiled" if compiled else str(strategy)
            time.plot(group["ranks"], 1e3 * group["seconds_per_step"], label=label, **look)
            efficiency.plot(group["ranks"], 100 * group["efficiency"], **look)
        ranks = sorted(values["ranks"].unique())
        for axis, name in ((time, "ms a step"), (efficiency, "efficiency, %")):
            axis.set_xscale("log", base=2)
            axis.set_xticks(ranks, [str(n) for n in ranks])
            axis.set_xlabel("ranks")
            axis.set_ylabel(name)
            axis.grid(alpha=0.25, lw=0.5)
        figure.legend(loc="outside right center")
    return figure
