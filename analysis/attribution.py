"""What each cause of difference contributes: pairs of runs that differ in one thing alone.

Which pairs these are is read from the runs' configurations, never from their labels. Runs share the seeds of weights and data but
where these are the cause.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ddpkit.analysis.arms import Settings, settings
from ddpkit.analysis.blocks import Study
from ddpkit.analysis.runs import NDArray, Run, common

COLUMNS = (
    "source", "compared", "held", "ranks", "seeds", "pairs", "runs", "steps", "mae", "mae_low", "mae_high", "rmse", "max_abs",
    "distance", "bitwise_pairs", "expected_zero", "outcome",
)  # fmt: skip

SCATTER, NOTHING, ANEW = "scatter order", "none (rerun)", "code generated anew"
_ORDER_OF_SUMS, _OTHER_GRAPH = "reduction order", "reduction order and compiled code"
_SOURCES = {
    "strategy": _ORDER_OF_SUMS,
    "options": _ORDER_OF_SUMS,
    "comm": _ORDER_OF_SUMS,
    "nccl_algo": _ORDER_OF_SUMS,
    "graphs": "capture",
    "tf32": "TF32",
    "deterministic": "determinism",
}
_MODES = {
    frozenset({"eager", "interpreted"}): "traced algorithms",
    frozenset({"interpreted", "compiled"}): "compiler",
    frozenset({"interpreted", "torch.compile"}): "compiler",
    frozenset({"compiled", "torch.compile"}): ANEW,
    frozenset({"eager", "compiled"}): "tracing and compiler",
    frozenset({"eager", "torch.compile"}): "tracing and compiler",
}
_MODE_ORDER = ("eager", "interpreted", "compiled", "torch.compile")
_NEW_SEED, _NEW_ORDER = "new seed", "order of data"
_ROWS = (
    NOTHING, SCATTER, _ORDER_OF_SUMS, "traced algorithms", "compiler", ANEW, "tracing and compiler", _OTHER_GRAPH, "capture",
    "TF32", "determinism", _NEW_SEED, _NEW_ORDER,
)  # fmt: skip
_LOSSLESS = frozenset({"standard", "custom", "overlap"})
# These act during the backward pass: compiled, they run a graph of the forces, the others one of the whole step.
_DURING_BACKWARD = frozenset({"standard", "overlap", "emulated"})

Key = tuple[str, str, str, bool]  # source, compared, held, whether zero is due


def table(study: Study) -> pd.DataFrame:
    """One row for each cause and each pair of settings that differ in it alone, columns `COLUMNS`.

    `mae`, `rmse` and `max_abs` are of losses, over all pairs and their common steps (`mae` the mean over pairs); `mae_low` and
    `mae_high` are the smallest and largest MAE of a pair; `distance` is that of the final projections, relative to the
    parameters. `expected_zero` tells that the pairs must agree to the last bit: reruns under deterministic kernels, and lossless
    strategies under deterministic kernels on at most two ranks, where a sum has only one order.
    """
    groups: dict[Key, list[tuple[Run, Run]]] = {}
    chosen = {run.label: settings(run) for run in study.runs}
    for one, other in itertools.combinations(study.runs, 2):
        if (key := _key(one, other, chosen[one.label], chosen[other.label])) is not None:
            groups.setdefault(key, []).append((one, other))
    rows = [row for key, pairs in groups.items() if (row := _row(study, key, pairs)) is not None]
    rows.sort(key=lambda row: (_ROWS.index(row["source"]), row["held"]))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _key(one: Run, other: Run, first: Settings, second: Settings) -> Key | None:
    """What alone sets two runs apart; None where it is more than one thing."""
    seeds, order = one.seed != other.seed, one.data_seed != other.data_seed
    differing = first.differing(second)
    if seeds + order + len(differing) > 1:
        return None
    if seeds or order:
        return (_NEW_SEED if seeds else _NEW_ORDER), "two seeds", _held(first, ""), False
    if not differing:
        zero = first.deterministic
        if one.code != other.code and None not in (one.code, other.code):
            return ANEW, "two codes", _held(first, ""), False
        return (NOTHING if zero else SCATTER), "reruns", _held(first, ""), zero
    (name,) = differing
    if name == "mode":
        source = _MODES.get(frozenset({first.mode, second.mode}))
        compared = ", ".join(sorted((first.mode, second.mode), key=_MODE_ORDER.index)) if source else ""
        return (source, compared, _held(first, name), False) if source else None
    source = _SOURCES[name]
    if name == "strategy" and first.mode != "eager" and _runs_another_graph(first.strategy, second.strategy):
        source = _OTHER_GRAPH
    zero = (
        source == _ORDER_OF_SUMS
        and first.deterministic
        and 0 < (one.world_size or 0) <= 2
        and {first.strategy, second.strategy} <= _LOSSLESS  # `none` averages nothing, so its ranks part ways
    )
    compared = ", ".join(sorted(_shown(which, name) for which in (first, second)))
    return source, compared, _held(first, name), zero


def _runs_another_graph(one: str, other: str) -> bool:
    return "ingraph" in (one, other) or (one in _DURING_BACKWARD) != (other in _DURING_BACKWARD)


def _shown(chosen: Settings, name: str) -> str:
    value: Any = getattr(chosen, name)
    if name == "options":
        return " ".join(f"{k}={v}" for k, v in value) or "default"
    return ("on" if value else "off") if isinstance(value, bool) else str(value or "any")


def _held(chosen: Settings, differing: str) -> str:
    parts = [] if differing == "strategy" else [chosen.strategy]
    parts += [] if differing == "mode" else [chosen.mode]
    parts += [chosen.comm] if differing != "comm" and chosen.comm != "torch" else []
    parts += [chosen.nccl_algo] if differing != "nccl_algo" and chosen.nccl_algo else []
    parts += ["TF32"] if differing != "tf32" and chosen.tf32 else []
    return " ".join([*parts, *(["det."] if chosen.deterministic and differing != "deterministic" else [])])


def _row(study: Study, key: Key, pairs: Sequence[tuple[Run, Run]]) -> dict[str, Any] | None:
    source, compared, held, zero = key
    measured = _measure(pairs, steps=source != _NEW_ORDER)
    apart = [study.distance(*pair) / study.size(pair[0]) for pair in pairs] if study.by_projection else []
    if not measured["steps"] and not np.isfinite(apart).any():
        return None
    equal = measured["bitwise_pairs"] == len(pairs)
    return {
        "source": source,
        "compared": compared,
        "held": held,
        "ranks": pairs[0][0].world_size,
        "seeds": len({(one.seed, one.data_seed) for one, _ in pairs}),
        "pairs": len(pairs),
        "runs": len({run.label for pair in pairs for run in pair}),
        **measured,
        "distance": float(np.nanmean(apart)) if np.isfinite(apart).any() else np.nan,
        "expected_zero": zero,
        "outcome": ("zero, as due" if zero else "zero") if equal else ("NOT ZERO" if zero else "differs"),
    }


def _measure(pairs: Sequence[tuple[Run, Run]], *, steps: bool) -> dict[str, float]:
    maes, squares, count, largest, bitwise = [], 0.0, 0, 0.0, 0
    for one, other in pairs if steps else ():
        _, mine, its = common(one, other)
        difference: NDArray = its - mine
        size = np.abs(difference[np.isfinite(difference)])
        if len(size):
            maes.append(float(size.mean()))
            squares += float((size**2).sum())
            count += len(size)
            largest = max(largest, float(size.max()))
            bitwise += len(size) == len(difference) and not size.any()
    return {
        "steps": count,
        "mae": float(np.mean(maes)) if maes else np.nan,
        "mae_low": min(maes, default=np.nan),
        "mae_high": max(maes, default=np.nan),
        "rmse": float(np.sqrt(squares / count)) if count else np.nan,
        "max_abs": largest if count else np.nan,
        "bitwise_pairs": bitwise,
    }
