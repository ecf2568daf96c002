"""`reference/api.md`: public names, from their docstrings."""

import importlib

import ddpkit
from ddpkit.step import Step
from ddpkit.sync.base import SyncStats
from making.docstrings import described

_ELSEWHERE = ("Sync", "Error")  # strategies: configuration.md; errors: errors.md


def library() -> str:
    """The names of `ddpkit`, and what they return."""
    names = [name for name in ddpkit.__all__ if name != "__version__" and not name.endswith(_ELSEWHERE)]
    things = {
        **{name: getattr(ddpkit, name) for name in [*names, "GradientSync"]},
        "Step": Step,
        "SyncStats": SyncStats,
    }
    return "\n\n".join(part for name, thing in sorted(things.items(), key=_lower) for part in described(name, thing))


def _lower(item: tuple[str, object]) -> str:
    return item[0].lower()


def of(module: str, *names: str) -> str:
    """Some names of a module."""
    home = importlib.import_module(module)
    return "\n\n".join(part for name in names for part in described(name, getattr(home, name), with_members=False))


BLOCKS = {
    "ddpkit": library,
    "ddpkit.padding": lambda: of("ddpkit.padding", "Capacity", "own_sizes", "pad"),
    "ddpkit.models": lambda: of("ddpkit.models", "from_nequip", "to_nequip", "save_nequip"),
    "ddpkit.testing": lambda: of("ddpkit.testing", "run_conformance", "validate_model", "run_ranks"),
    "ddpkit.lightning": lambda: of("ddpkit.lightning", "SyncStrategy"),
}
