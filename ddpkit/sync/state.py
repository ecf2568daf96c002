"""What strategies keep from step to step, in checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ddpkit.checkpoint import snapshot
from ddpkit.errors import InputError
from ddpkit.ranks.agree import agree
from ddpkit.sync.base import GradientSync

_PLAIN = (bool, int, float, str, type(None))


def keeps_state(sync: GradientSync) -> bool:
    """Whether a strategy has something to keep from step to step."""
    return type(sync).state_dict is not GradientSync.state_dict


def collect(sync: GradientSync, gather: Callable[[Any], list[Any]]) -> list[dict[str, Any]]:
    """What the strategy keeps, on the CPU, of all ranks that `gather` brings together. All ranks must call it.

    Args:
        sync: the strategy; one that keeps nothing costs nothing.
        gather: returns every rank's object, in the order of ranks, where that is wanted.

    Raises:
        InputError: on all ranks, where one of them keeps what checkpoints cannot hold.
    """
    if not keeps_state(sync):
        return []
    with agree("saving what the strategy keeps"):
        state = sync.state_dict()
        _require_plain(sync, state, "state_dict()")
    return gather(snapshot(state))


def restore(sync: GradientSync, states: Sequence[Mapping[str, Any]]) -> None:
    """Has a strategy go on from what `collect` returned; from the start where that is nothing.

    Raises:
        InputError: another number of ranks saved it and the strategy cannot tell what to do, or it is another strategy's.
    """
    if not states:
        return
    same = len(states) == sync.world_size
    sync.load_state_dict(states[sync.rank] if same else sync.reshard_state(states))


def _require_plain(sync: GradientSync, value: Any, where: str) -> None:
    """Refuses what would be written but could not be read again."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _require_plain(sync, key, f"a key of {where}")
            _require_plain(sync, inner, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for number, inner in enumerate(value):
            _require_plain(sync, inner, f"{where}[{number}]")
    elif not isinstance(value, Tensor) and type(value) not in _PLAIN:
        raise InputError(
            f"strategy={sync.name} keeps a {type(value).__name__} in {where}, which checkpoints do not hold: use tensors, "
            "numbers, strings and None, in dicts, lists and tuples."
        )
