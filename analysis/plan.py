"""What a study declares before its first run: `plan.json` in its folder.

`ddpkit experiment` writes it; whoever wants other claims writes one before the first run. A folder without one is analysed by the
defaults below, which the report says.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ddpkit.errors import InputError

NAME = "plan.json"
FORCE_ERROR, DISTANCE, TIME = "force_error", "distance", "time"
MARGINS = {FORCE_ERROR: 0.05, DISTANCE: 0.5}
"""A final validation force error within 5 % of the baseline's counts as equal; a distance up to 1.5 times a rerun's too."""
FEWEST = {FORCE_ERROR: 6, DISTANCE: 6, TIME: 8}
"""Seeds, or pairs of launches, below which a claim is not tested."""
WINDOW = (0.1, 1.0)
"""Where along a run the growth of distances is measured, as shares of its steps."""


@dataclass(frozen=True)
class Declared:
    """A primary claim.

    Attributes:
        endpoint: `force_error`, `distance` or `time`.
        arm: the arm that it is about, as tables call it.
    """

    endpoint: str
    arm: str


@dataclass(frozen=True)
class Plan:
    """What was declared.

    Attributes:
        primary: the claims that get a verdict; all else are estimates.
        runs: labels of all planned runs, so that one that is missing is missed.
        pilot: numbers of the launches that told how many pairs are needed, and that no claim about time uses.
        pairs: number of pairs of launches after the pilot, once it is known.
        declared: whether there was a plan, or these are the defaults.
    """

    primary: Sequence[Declared]
    runs: Sequence[str] = ()
    pilot: Sequence[int] = ()
    pairs: int | None = None
    declared: bool = field(default=True, compare=False)


SPREAD = "spread"
"""What labels of further reruns of the first seed begin with."""

NUMERICS = (Declared(FORCE_ERROR, "compiled"), Declared(FORCE_ERROR, "standard"), Declared(DISTANCE, "standard"))
SPEED = (Declared(TIME, "custom"),)


def read(folder: Path, default: Sequence[Declared]) -> Plan:
    """The plan of the study in a folder, or the default claims.

    Raises:
        InputError: there is a plan that cannot be read.
    """
    path = folder / NAME
    if not path.is_file():
        return Plan(default, declared=False)
    try:
        facts = json.loads(path.read_text())
        primary = tuple(Declared(str(claim["endpoint"]), str(claim["arm"])) for claim in facts["primary"])
        numbers = tuple(int(n) for n in facts.get("pilot", ()))
        pairs = facts.get("pairs")
        plan = Plan(primary, tuple(map(str, facts.get("runs", ()))), numbers, None if pairs is None else int(pairs))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no plan of a study ({error}): repair it or remove it.") from None
    for claim in primary:
        if claim.endpoint not in FEWEST:
            raise InputError(f"{path}: endpoint {claim.endpoint!r} is unknown: use {', '.join(FEWEST)}.")
    return plan


def write(folder: Path, plan: Plan, **more: Any) -> None:
    """Writes a plan, with what a reader wants to know besides, such as margins, seeds and the number of ranks."""
    facts = {k: v for k, v in asdict(plan).items() if k != "declared"}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = (folder / NAME).with_suffix(".part")
    temporary.write_text(json.dumps(facts | more, indent=2) + "\n")
    temporary.replace(folder / NAME)
