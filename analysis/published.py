"""The published values of the paper's tables, to stand beside what was measured."""

from functools import cache
from importlib.resources import files
from typing import Any

import pandas as pd

from ddpkit.analysis.runs import Run


@cache
def _table(name: str) -> pd.DataFrame:
    with files("ddpkit.analysis").joinpath(name).open() as file:
        return pd.read_csv(file)


def published() -> pd.DataFrame:
    """The table `published.csv`: one row a published value of the studies, with its source."""
    return _table("published.csv")


def published_accuracy(model: str) -> pd.DataFrame:
    """Published errors on SPICE 2 of a model (`allegro_small`, `allegro_medium`, `allegro_large`), with their source.

    In the columns of `accuracy.by_subset`; `subset` is what the names of the subset's parts in SPICE 2 begin with.
    """
    table = _table("published_accuracy.csv")
    return table[table["model"] == model]


def published_barriers() -> pd.DataFrame:
    """Published errors of the torsion barriers of TorsionNet500's 500 fragments, by model, with their source."""
    return _table("published_torsion.csv")


def source(study: str) -> str:
    """Where the published values of a study (`numerics`, `speed`) stand."""
    table = published()
    return str(table.loc[table["study"] == study, "source"].iloc[0])


def published_numerics(run: Run, baseline: Run) -> tuple[float, float] | None:
    """Published MAE and RMSE of the comparison that `run` repeats, or None where the paper has none."""
    if run.deterministic or baseline.strategy != "custom" or baseline.compiled:
        return None
    comparison = {("standard", False): "standard", ("custom", True): "compiled", ("custom", False): "rerun"}.get(
        (run.strategy, run.compiled)
    )
    if run.seed != baseline.seed:
        comparison = "new_seed" if comparison == "rerun" else None
    table = published()
    row = table[(table["study"] == "numerics") & (table["comparison"] == comparison)]
    return None if row.empty else (float(row["mae"].iloc[0]), float(row["rmse"].iloc[0]))


def published_speed(parameters: int, width: int | None, strategy: str, compiled: bool) -> dict[str, Any] | None:
    """Published row for this strategy at this embedding width, or None where the paper has none.

    Smaller models than the paper's stand beside the row of the same embedding width: the inflation is the same.
    """
    table = published()
    table = table[(table["study"] == "speed") & (table["strategy"] == strategy) & (table["compile"] == compiled)]
    near = table[(table["parameters"] / parameters - 1).abs() < 0.02]
    row = near if len(near) else table[table["type_embedding_dim"] == width]
    return None if row.empty else dict(row.iloc[0])
