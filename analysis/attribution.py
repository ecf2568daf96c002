"""What each source of difference contributes: pairs of runs that differ in one thing alone.

Which pairs these are is read from the runs' configurations, never from their labels.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ddpkit.analysis.numerics import Study
from ddpkit.analysis.runs import NDArray, Run

COLUMNS = (
    "source", "compared", "held", "deterministic", "pairs", "runs", "steps", "mae", "mae_low", "mae_high", "rmse", "max_abs",
    "bitwise_pairs", "expected_zero", "outcome",
)  # fmt: skip

_SOURCES = {
    (): "rerun",
    ("strategy",): "reduction order",
    ("compiled",): "compiler",
    ("deterministic",): "determinism",
    ("comm",): "reduction order",
}
_OTHER_GRAPH = "reduction order and compiler"
_ORDER = ("none (rerun)", "scatter order", "reduction order", _OTHER_GRAPH, "compiler", "determinism", "new seed")
_LOSSLESS = frozenset({"standard", "custom", "overlap"})
# These act during the backward pass: compiled, they run a graph of the forces, the others one of the whole step.
_DURING_BACKWARD = frozenset({"standard", "overlap"})


@dataclass(frozen=True)
class _Settings:
    strategy: str
    compiled: bool
    deterministic: bool
    comm: str


def table(study: Study) -> pd.DataFrame:
    """One row for each source and each pair of settings that differ in it alone, columns `COLUMNS`.

    `mae`, `rmse` and `max_abs` are over all pairs and their common steps (`mae` the mean over pairs); `mae_low` and
    `mae_high` are the smallest and largest MAE of a pair. `expected_zero` tells that the pairs must agree to the last
    bit: reruns under deterministic kernels, and lossless strategies under deterministic kernels on at most two ranks,
    where a sum has only one order.
    """
    groups: dict[_Settings, list[int]] = {}
    for number, run in enumerate(study.runs):
        settings = _Settings(run.strategy, run.compiled, run.deterministic, run.comm)
        groups.setdefault(settings, []).append(number)
    rows = []
    for one, other in itertools.combinations_with_replacement(groups, 2):
        differing = tuple(name for name in _Settings.__dataclass_fields__ if getattr(one, name) != getattr(other, name))
        if differing not in _SOURCES:
            continue
        pairs = (
            itertools.combinations(groups[one], 2) if one is other else itertools.product(groups[one], groups[other])
        )
        same_seed: list[tuple[int, int]] = []
        new_seed: list[tuple[int, int]] = []
        for pair in pairs:
            (same_seed if study.runs[pair[0]].seed == study.runs[pair[1]].seed else new_seed).append(pair)
        rows.append(_row(study, _source(differing, one, other), differing, one, other, same_seed))
        if one is other:
            rows.append(_row(study, "new seed", ("seed",), one, other, new_seed))
    found = sorted((row for row in rows if row), key=_order)
    return pd.DataFrame(found, columns=list(COLUMNS))


def _source(differing: tuple[str, ...], one: _Settings, other: _Settings) -> str:
    if differing == ("strategy",) and one.compiled:
        during = {one.strategy in _DURING_BACKWARD, other.strategy in _DURING_BACKWARD}
        if len(during) > 1 or "ingraph" in (one.strategy, other.strategy):
            return _OTHER_GRAPH
    return _SOURCES[differing]


def _order(row: dict[str, Any]) -> tuple[int, bool]:
    return _ORDER.index(row["source"]), not row["deterministic"]


def _row(
    study: Study,
    source: str,
    differing: Sequence[str],
    one: _Settings,
    other: _Settings,
    pairs: Sequence[tuple[int, int]],
) -> dict[str, Any] | None:
    measured = _measure(study, pairs)
    if measured is None:
        return None
    zero = _expected_zero(source, one, other, study.baseline)
    return {
        "source": _named(source, one),
        "compared": _compared(differing, one, other),
        "held": _held(differing, one),
        "deterministic": one.deterministic and other.deterministic,
        "pairs": len(pairs),
        "runs": len({number for pair in pairs for number in pair}),
        **measured,
        "expected_zero": zero,
        "outcome": _outcome(zero, all_equal=measured["bitwise_pairs"] == len(pairs)),
    }


def _measure(study: Study, pairs: Sequence[tuple[int, int]]) -> dict[str, float] | None:
    maes, squares, steps, largest, bitwise = [], 0.0, 0, 0.0, 0
    for one, other in pairs:
        common = study.present[one] & study.present[other]
        difference: NDArray = study.losses[other, common] - study.losses[one, common]
        size = np.abs(difference[np.isfinite(difference)])
        if not len(size):
            continue
        maes.append(float(size.mean()))
        squares += float((size**2).sum())
        steps += len(size)
        largest = max(largest, float(size.max()))
        bitwise += len(size) == len(difference) and not size.any()
    if not maes:
        return None
    return {
        "steps": steps,
        "mae": float(np.mean(maes)),
        "mae_low": min(maes),
        "mae_high": max(maes),
        "rmse": float(np.sqrt(squares / steps)),
        "max_abs": largest,
        "bitwise_pairs": bitwise,
    }


def _expected_zero(source: str, one: _Settings, other: _Settings, run: Run) -> bool:
    if not (one.deterministic and other.deterministic):
        return False
    if source == "rerun":
        return True
    # `none` averages nothing, so its ranks part ways.
    lossless = {one.strategy, other.strategy} <= _LOSSLESS
    two_ranks = run.world_size is not None and run.world_size <= 2
    return source == "reduction order" and two_ranks and lossless


def _outcome(zero: bool, *, all_equal: bool) -> str:
    if all_equal:
        return "zero, as due" if zero else "zero"
    return "NOT ZERO" if zero else "differs"


def _named(source: str, one: _Settings) -> str:
    if source == "rerun":
        return "none (rerun)" if one.deterministic else "scatter order"
    return source


def _compared(differing: Sequence[str], one: _Settings, other: _Settings) -> str:
    if not differing:
        return "reruns"
    name = differing[0]
    if name in ("compiled", "deterministic", "seed"):
        return {"compiled": "eager, compiled", "deterministic": "on, off", "seed": "two seeds"}[name]
    return f"{getattr(one, name)}, {getattr(other, name)}"


def _held(differing: Sequence[str], one: _Settings) -> str:
    parts = [] if "strategy" in differing else [one.strategy]
    if "compiled" not in differing:
        parts.append("compiled" if one.compiled else "eager")
    if "comm" not in differing and one.comm != "torch":
        parts.append(one.comm)
    if one.deterministic and "deterministic" not in differing:
        parts.append("det.")
    return " ".join(parts)
