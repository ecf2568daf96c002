"""How runs ended. A run that failed of itself is evidence against its arm; one that was interrupted tells nothing of it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddpkit.analysis.runs import Run, common

FAR = 10.0
"""A run has diverged whose last losses are this many times its own first ones, or the baseline's last ones."""
_NOT_FINITE = re.compile(r"\b(nan|inf|infinite|infinity|not finite|non-?finite)\b", re.IGNORECASE)
_OUTSIDE = re.compile(
    r"\bSIG[A-Z]+\d?\b|(?i:\b(stopped by|killed|interrupted|time limit|did not arrive|no space left|disk|connection|refused)\b)"
)
_OWN_KINDS = frozenset({"NonFiniteLossError", "NonFiniteGradientError", "ParityError"})
_OUTSIDE_KINDS = frozenset({"KeyboardInterrupt", "RankLostError", "InputError"})


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        kind: `complete`, `failed` (of itself), or `interrupted` (from outside, or still running).
        why: in words.
    """

    kind: str
    why: str = ""


def ended(summary: Mapping[str, Any]) -> Outcome:
    """How a run ended, as far as its `summary.json` tells: `failed` of itself, `interrupted` (or not ended), or `complete`."""
    status, error, kind = (str(summary.get(key) or "") for key in ("status", "error", "error_kind"))
    if status == "finished":
        return Outcome("complete")
    if status == "stopped":
        return Outcome("interrupted", f"interrupted ({error})")
    if status != "failed":
        return Outcome("interrupted", status or "unknown")
    if _NOT_FINITE.search(error):
        return Outcome("failed", f"met NaN or infinity ({error})")
    outside = kind in _OUTSIDE_KINDS or _OUTSIDE.search(error) or not (error or kind)
    if outside and kind not in _OWN_KINDS:
        return Outcome("interrupted", f"interrupted{f' ({error})' if error else ''}")
    return Outcome("failed", f"failed ({error or kind})")


def outcome(run: Run, baseline: Run, steps: int) -> Outcome:
    """How a run ended, by its logs too.

    Args:
        run: the run.
        baseline: that of its block, perhaps itself.
        steps: how many were to be made.
    """
    told = ended(run.summary)
    bad = int((~np.isfinite(run.steps["loss"].to_numpy(float))).sum())
    skipped = int(run.summary.get("skipped") or 0)
    if told.kind == "failed":
        return Outcome("failed", f"{told.why} at step {run.last}")
    if bad:
        return Outcome("failed", f"logged {bad} losses that are not finite")
    if skipped:
        return Outcome("failed", f"skipped {skipped} updates whose gradient was not finite")
    if (ratio := _risen(run, baseline)) > FAR:
        return Outcome("failed", f"diverged (its last losses are {ratio:.2g} times what they were to be compared with)")
    if told.kind == "interrupted" and (run.status in ("failed", "stopped") or run.last < steps):
        return Outcome("interrupted", f"{told.why} at step {run.last} of {steps}")
    return Outcome("complete")


def _risen(run: Run, baseline: Run) -> float:
    """The median of the last tenth of the losses over that of the first tenth, or over the baseline's last, if that is more."""
    losses = run.steps["loss"].to_numpy(float)
    if not len(losses):
        return 0.0
    tenth = max(1, len(losses) // 10)
    first, last = np.median(np.abs(losses[:tenth])), np.median(np.abs(losses[-tenth:]))
    _, mine, its = common(run, baseline)
    its_last = np.median(np.abs(its[-tenth:])) if len(mine) else np.inf
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.array([last / first, last / its_last])
    return float(np.nanmax(ratios, initial=0.0))
