"""The conformance suite that any strategy can be put through."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ddpkit.testing.ranks import run_ranks


@dataclass(frozen=True)
class Outcome:
    """How a case of the conformance suite ended.

    Attributes:
        state: `"passed"`, `"failed"`, or `"cannot"` for what the strategy is known not to be able to do.
        why: the rank's message, or what stands in the way.
    """

    case: str
    state: str
    why: str = ""


def run_conformance(
    strategy: Any,
    world_size: int,
    comm: str = "torch",
    *,
    compile: bool = False,  # noqa: A002  (the configuration's word)
    cases: Sequence[str] | None = None,
    timeout: float = 300.0,
    tolerance: float = 0.0,
    **options: Any,
) -> list[Outcome]:
    """Puts a strategy through the conformance suite, on ranks that are started once.

    Args:
        strategy: a name, an import path, or a class at the top level of its module.
        world_size: number of ranks.
        comm: `"torch"` (gloo, or NCCL with a GPU for each rank) or `"mpi"` (under `mpirun`).
        compile: go through a compiled `ddpkit.make_step` instead of the plain loop.
        cases: names from `ddpkit.sync.conformance.CASES`; by default all.
        timeout: seconds for all of them.
        tolerance: how far gradients may be from the mean over ranks, relative and absolute, for a strategy that rounds or
            compresses what it sends; by default no more than rounding in float64. Ranks must hold the same bits in any case.
        options: passed on to the strategy.

    Returns:
        One outcome for each case. After a failure the ranks are started afresh for the cases that are left.

    Raises:
        InputError: there is no such strategy or case, or the strategy acts in the graph and the cases have none.
    """
    from ddpkit.sync import conformance

    left = list(cases or conformance.applicable(world_size, compiled=compile))
    conformance.refuse(strategy, left)
    deadline = time.monotonic() + timeout
    outcomes: list[Outcome] = []
    while left:
        reports = run_ranks(
            conformance.run_cases,
            world_size,
            strategy,
            left,
            comm,
            options,
            tolerance,
            launcher="mpirun" if comm == "mpi" else "torchrun",
            timeout=max(10.0, deadline - time.monotonic()),
        )
        outcomes += [Outcome(*report) for report in reports[0]]
        left = left[len(reports[0]) :]
    return outcomes
