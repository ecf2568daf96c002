"""Training, validation and test parts."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ddpkit.errors import InputError

SPLIT = (0.9, 0.05, 0.05)
"""Shares of the parts, as in the paper."""


def split(
    frames: int,
    fractions: Sequence[float] = SPLIT,
    seed: int = 0,
    groups: NDArray[np.int64] | None = None,
) -> list[NDArray[np.int64]]:
    """Random parts of a set, the same for one seed.

    Args:
        frames: number of frames.
        fractions: of each part, of one in sum.
        seed: `data.seed`.
        groups: `[frames]` number of each frame's molecule or material; when given, a group is never divided, and the sizes of the
            parts are met as nearly as the groups allow.

    Returns:
        Sorted frame numbers of each part. Sizes are rounded to the nearest frame (or group); a part with a positive fraction gets
        at least one.

    Raises:
        InputError: fewer frames (or groups) than parts, or fractions that do not add up to one.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
        raise InputError(f"the fractions of a split must be positive and add up to 1, not {list(fractions)}")
    units = frames if groups is None else len(np.unique(groups))
    wanted = sum(fraction > 0 for fraction in fractions)
    if units < wanted:
        what = "frames" if groups is None else "groups"
        raise InputError(f"{units} {what} cannot be split into {wanted} parts: give more data or fewer parts")
    order = np.random.default_rng(seed).permutation(units)
    if groups is None:
        bounds = _bounds(np.ones(frames, dtype=np.int64), fractions)
        return [np.sort(part) for part in np.split(order, bounds)]
    _, unit_of_frame, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    bounds = _bounds(sizes[order], fractions)
    part_of_unit = np.empty(units, dtype=np.int64)
    for part, members in enumerate(np.split(order, bounds)):
        part_of_unit[members] = part
    part_of_frame = part_of_unit[unit_of_frame]
    return [np.flatnonzero(part_of_frame == part) for part in range(len(fractions))]


def _bounds(sizes: NDArray[np.int64], fractions: Sequence[float]) -> list[int]:
    """Where to cut a row of units of these sizes."""
    total = np.cumsum(sizes)
    targets = np.cumsum(fractions)[:-1] * total[-1]
    middle = np.concatenate([[0], total])
    bounds = [int(np.abs(middle - target).argmin()) for target in targets]
    last = len(sizes)
    for k in range(len(bounds)):
        needed_before = sum(fraction > 0 for fraction in fractions[: k + 1])
        needed_after = sum(fraction > 0 for fraction in fractions[k + 1 :])
        lower = (bounds[k - 1] if k else 0) + (fractions[k] > 0)
        bounds[k] = min(max(bounds[k], lower, needed_before), last - needed_after)
    return bounds
