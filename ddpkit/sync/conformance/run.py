"""Runs cases of the conformance suite on this rank."""

import itertools
import json
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ddpkit.errors import InputError
from ddpkit.ranks.group import environment, store
from ddpkit.sync import acts_of, name_of
from ddpkit.sync.conformance.setting import CASES, COMPILED, UNUSED, Setting

# What torch's DistributedDataParallel cannot do, and which of its options a case needs.
CANNOT = {
    "standard": {
        "unfrozen": "DistributedDataParallel never synchronises parameters that were frozen when it was built",
        "unfrozen_on_one_rank": "DistributedDataParallel never looks again at what is trained",
        "unfrozen_on_one_rank_from_nothing": "DistributedDataParallel never looks again at what is trained",
        "frozen_after_backward": "DistributedDataParallel never looks again at what is trained",
        "no_backward_on_some": "DistributedDataParallel communicates in backward(), so that every rank needs one",
        "not_finite": "DistributedDataParallel averages NaN into all ranks without a word",
        "calls": "synchronize() is a no-op: DistributedDataParallel communicates in backward()",
        "zero_grad_on_some": "DistributedDataParallel compares nothing",
        "no_gradient": "synchronize() is a no-op: DistributedDataParallel communicates in backward()",
    },
}
Report = tuple[str, str, str]
"""A case, its state and why; see `ddpkit.testing.Outcome`."""
NEEDS = {"standard": {"unused": UNUSED, "partly_used": UNUSED, "changing_use": UNUSED}}


def refuse(strategy: Any, names: Sequence[str]) -> None:
    """Refuses cases that cannot tell anything of a strategy.

    Args:
        strategy: a name, an import path, or a class.
        names: of the cases.

    Raises:
        InputError: there is no such strategy or case, or the strategy acts in the graph and a case has none.
    """
    if unknown := [name for name in names if name not in CASES]:
        raise InputError(f"There is no case {unknown[0]!r}: use some of {', '.join(CASES)}.")
    if acts_of(strategy) == "in graph" and not COMPILED.issuperset(names):
        raise InputError(
            f"strategy={name_of(strategy)} acts in the compiled step: put it through the cases that have one, with --compile "
            "(run_conformance(compile=True))."
        )


def run_cases(
    strategy: Any,
    names: Sequence[str],
    comm: str,
    options: dict[str, Any],
    tolerance: float = 0.0,
    notes: str | None = None,
) -> list[Report]:
    """Runs cases on this rank, up to the first that fails on any rank.

    Args:
        strategy: a name, an import path, or a class.
        names: of the cases.
        comm: `"torch"` or `"mpi"`.
        options: the strategy's own.
        tolerance: see `Setting`.
        notes: a file in which rank 0 writes down each outcome at once, for the case that kills the ranks; see `noted`.

    Returns:
        `(case, state, why)` of each, the same on all ranks.
    """
    here = environment()
    reports = Notes(notes if here.rank == 0 else None)
    known = strategy if isinstance(strategy, str) else ""
    for name in names:
        if name in CANNOT.get(known, {}):
            reports.add(name, "cannot", CANNOT[known][name])
            continue
        needed = NEEDS.get(known, {}).get(name, {})
        setting = Setting(strategy, comm, options | needed, here.rank, here.world_size, tolerance)
        torch.manual_seed(here.rank)
        failure = ""
        try:
            with torch.device(here.device):
                CASES[name](setting)
        except Exception as error:  # noqa: BLE001  (reported)
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{where.name}, {Path(where.filename).name}, line {where.lineno}"
            failure = f"rank {here.rank}: {type(error).__name__}: {error} ({place})"
        for made in setting.made:
            made.close()
        everyone = _exchange(name, failure, here.rank, here.world_size)
        if any(everyone):
            reports.add(name, "failed", "; ".join(filter(None, everyone)))
            break
        reports.add(name, "passed", ", ".join(f"{k}={v}" for k, v in needed.items()))
    return reports.all


class Notes:
    """Outcomes in the order of their cases, kept in a file as well.

    Args:
        path: of the file, a line of JSON for each outcome; None for none.
    """

    def __init__(self, path: str | None) -> None:
        self.all: list[Report] = []
        self._path = None if path is None else Path(path)
        if self._path is not None:
            self._path.touch()

    def add(self, case: str, state: str, why: str) -> None:
        """Adds one."""
        self.all.append((case, state, why))
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.all[-1]) + "\n")


def noted(path: Path) -> list[Report] | None:
    """The outcomes that `Notes` wrote down; None where ranks did not come to their first case."""
    if not path.exists():
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(case, state, why) for case, state, why in map(json.loads, lines)]


_exchanges = itertools.count()


def _exchange(name: str, failure: str, rank: int, size: int) -> list[str]:
    """What each rank has to say, through the store: after a failure, collectives may be out of step."""
    shared, here = store(), f"conformance/{next(_exchanges)}/{name}"
    shared.set(f"{here}/{rank}", failure or " ")
    keys = [f"{here}/{other}" for other in range(size)]
    shared.wait(keys, timedelta(seconds=60))
    return [shared.get(key).decode().strip() for key in keys]
