"""The conformance suite that any strategy can be put through."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpkit.testing.ranks import RankFailure, run_ranks


@dataclass(frozen=True)
class Outcome:
    """How a case of the conformance suite ended.

    Attributes:
        state: `"passed"`, `"failed"`, or `"cannot"` for what the strategy is known not to be able to do.
        why: the rank's message, how a rank died of the case, or what stands in the way.
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
        timeout: seconds for all of them. A case in which they run out has failed; those after it get ten seconds a start.
        tolerance: how far gradients may be from the mean over ranks, relative and absolute, for a strategy that rounds or
            compresses what it sends; by default no more than rounding in float64. Ranks must hold the same bits in any case.
        options: passed on to the strategy.

    Returns:
        One outcome for each case. After a failure, also one that kills the ranks, they are started afresh for the cases that
        are left.

    Raises:
        RankFailure: the ranks came to no case.
        InputError: there is no such strategy or case, or the strategy acts in the graph and the cases have none.
    """
    from ddpkit.sync import conformance

    left = list(cases or conformance.applicable(world_size, compiled=compile))
    conformance.refuse(strategy, left)
    deadline = time.monotonic() + timeout
    outcomes: list[Outcome] = []
    while left:
        reports = _reports(
            world_size,
            (strategy, left, comm, options, tolerance),
            launcher="mpirun" if comm == "mpi" else "torchrun",
            timeout=max(10.0, deadline - time.monotonic()),
        )
        outcomes += [Outcome(*report) for report in reports]
        left = left[len(reports) :]
    return outcomes


def _reports(world_size: int, arguments: tuple[Any, ...], **how: Any) -> list[tuple[str, str, str]]:
    """What `run_cases` tells of the first cases; where ranks did not live to tell it, the case that they were at has failed.

    Args:
        world_size: number of ranks.
        arguments: of `run_cases`, without the file for its notes.
        how: options of `run_ranks`.
    """
    from ddpkit.sync import conformance

    cases = arguments[1]
    with tempfile.TemporaryDirectory(prefix="ddpkit-conformance-") as folder:
        notes = Path(folder) / "notes"
        try:
            return list(run_ranks(conformance.run_cases, world_size, *arguments, str(notes), **how)[0])
        except RankFailure as failure:
            reports = conformance.noted(notes)
            if reports is None or len(reports) == len(cases):
                raise
            if not reports or reports[-1][1] != "failed":
                reports.append((cases[len(reports)], "failed", failure.why))
            return reports
