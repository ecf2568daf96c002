"""What ranks say of themselves beside their gradients: the tail of the flat gradient, which the all-reduce averages too.

The tail holds a number for each parameter, 1 on ranks that have a gradient of it, and then a row of `ROW` numbers for each rank.
A rank writes into its own row alone, so that after the average each row is what that rank wrote, divided by the number of ranks.
NaN stands for a gradient that is not finite.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ddpkit.errors import NonFiniteGradientError, RankDisagreementError
from ddpkit.ranks.agree import name_ranks
from ddpkit.sync import agreement

# Places in a rank's row: number of optimizer steps; other parameters are trained than at the last layout; parameters were
# replaced; NaN where a gradient is not finite; gradients were added to those of the last step; all gradients are new.
STEPS, STALE, REPLACED, BAD, ADDED, FRESH = range(6)
ROW = 6
STEPS_FROM = 128  # steps are counted modulo this, which bfloat16 can tell apart


def length(parameters: int, world_size: int) -> int:
    """The length of the tail."""
    return parameters + ROW * world_size


class Told(NamedTuple):
    """What all ranks said at one `synchronize()`.

    Attributes:
        shares: of each parameter, the share of ranks that have a gradient of it; NaN where that is not finite.
        steps: of each rank, its number of optimizer steps.
        stale: ranks that train other parameters than at the last layout.
        replaced: ranks whose parameters were replaced by others.
        bad: ranks with a gradient that is not finite.
        added: ranks with gradients that were added to those of the last step.
        fresh: ranks whose gradients are all new.
    """

    shares: Sequence[float]
    steps: list[int]
    stale: list[int]
    replaced: list[int]
    bad: list[int]
    added: list[int]
    fresh: list[int]

    @property
    def present(self) -> list[bool]:
        """Of each parameter, whether some rank has a gradient of it."""
        return [share > 0 for share in self.shares]

    @property
    def not_finite(self) -> list[bool]:
        """Of each parameter, whether NaN stands for its gradient."""
        return [math.isnan(share) for share in self.shares]


def read(tail: Sequence[float], parameters: int) -> Told:
    """Reads an averaged tail.

    Args:
        tail: `[parameters + ROW * ranks]`.
        parameters: how many.
    """
    rows = [tail[start : start + ROW] for start in range(parameters, len(tail), ROW)]

    def ranks_with(flag: int) -> list[int]:
        return [rank for rank, row in enumerate(rows) if row[flag] > 0]

    return Told(
        shares=tail[:parameters],
        steps=[round(row[STEPS] * len(rows)) for row in rows],
        stale=ranks_with(STALE),
        replaced=ranks_with(REPLACED),
        bad=[rank for rank, row in enumerate(rows) if math.isnan(row[BAD])],
        added=ranks_with(ADDED),
        fresh=ranks_with(FRESH),
    )


def is_fine(tail: Tensor, parameters: int, world_size: int) -> Tensor:
    """Whether an averaged tail tells of nothing that a step must not be taken with, without the host: `[]` bool.

    Args:
        tail: `[parameters + ROW * world_size]`.
        parameters: how many.
        world_size: number of ranks.
    """
    rows = tail[parameters:].view(world_size, ROW).float()
    high = rows.amax(0) * world_size
    spread = (high - rows.amin(0) * world_size)[:BAD].amax()
    return (spread < 0.5) & (high[ADDED:].sum() < 1.5) & (rows[:, BAD].sum() == 0)


def require_alike(told: Told, call: int, *, stale_here: bool, changed: Sequence[str], replaced: Sequence[str]) -> None:
    """Refuses ranks that do different things.

    Args:
        told: what ranks said.
        call: the number of the `synchronize()`.
        stale_here: whether this rank trains other parameters, and lays them out anew with all others.
        changed: names of parameters whose `requires_grad` has changed on this rank.
        replaced: names of parameters that were replaced on this rank.

    Raises:
        RankDisagreementError: they do.
    """
    where, ranks = f"At synchronize() number {call}", range(len(told.steps))
    if told.stale and not (stale_here and len(told.stale) == len(ranks)):
        same = [rank for rank in ranks if rank not in told.stale]
        raise RankDisagreementError(
            f"{where} requires_grad of parameters had changed on {name_ranks(told.stale)} but not on {name_ranks(same)}"
            f"{_named(changed)}: freeze and unfreeze the same parameters on every rank."
        )
    if told.replaced:
        raise agreement.of_replaced(call, told.replaced, replaced)
    odd = [rank for rank in ranks if told.steps[rank] != told.steps[0]]
    if odd:
        raise RankDisagreementError(
            f"{where} {name_ranks(odd)} had taken another number of optimizer steps than rank 0: every rank must call "
            "synchronize() and optimizer.step() equally often."
        )
    if told.added and told.fresh:
        raise RankDisagreementError(
            f"{where} gradients had been added to those of the last step on {name_ranks(told.added)} but not on "
            f"{name_ranks(told.fresh)}: call zero_grad() once a step, and alike on every rank."
        )


def refuse_non_finite(told: Told, call: int, names: Sequence[str]) -> None:
    """Refuses gradients that are not finite.

    Args:
        told: what ranks said.
        call: the number of the `synchronize()`.
        names: of the parameters; none where the sum overflowed that was to tell, and no gradient did.

    Raises:
        NonFiniteGradientError: there are some.
    """
    if not names:
        return
    others = f" (and of {len(names) - 1} more)" if len(names) > 1 else ""
    raise NonFiniteGradientError(
        f"At synchronize() number {call} the gradient of {names[0]!r}{others} is NaN or infinite on {name_ranks(told.bad)}; the "
        "update was not applied: look at the batch and the loss there, or lower the learning rate."
    )


def _named(names: Sequence[str]) -> str:
    """Names in parentheses, the first of them in full."""
    return f" ({names[0]!r} and {len(names) - 1} more here)" if len(names) > 1 else f" ({names[0]!r})" if names else ""
