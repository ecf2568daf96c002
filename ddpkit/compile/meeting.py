"""Ranks that do something together which one rank alone must not begin."""

import json
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ddpkit.errors import RankDisagreementError
from ddpkit.launch import store
from ddpkit.sync.agreement import name_ranks

_meetings = 0


def meet(what: str, value: Any, seconds: float, remedy: str) -> list[Any]:
    """Waits until all ranks have come, and tells what each has brought.

    Args:
        what: they do, for the message.
        value: of this rank, plain (what JSON holds).
        seconds: to wait for the others.
        remedy: for the message.

    Returns:
        The values by rank.

    Raises:
        RankDisagreementError: some rank has not come; it names them.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size == 1:
        return [value]
    global _meetings  # noqa: PLW0603  (ranks count alike, or a meeting fails)
    _meetings += 1
    shared, here = store(), f"meeting/{_meetings}"
    shared.set(f"{here}/{dist.get_rank()}", json.dumps(value))
    deadline = time.monotonic() + seconds
    missing = []
    for rank in range(size):
        left = max(1.0, deadline - time.monotonic())
        with suppress(RuntimeError):  # the store's timeout
            shared.wait([f"{here}/{rank}"], timedelta(seconds=left))
        if not shared.check([f"{here}/{rank}"]):
            missing.append(rank)
    if missing:
        raise RankDisagreementError(
            f"Rank {dist.get_rank()} has waited {seconds:.0f} s for {name_ranks(missing)} in order to {what}: {remedy}."
        )
    return [json.loads(shared.get(f"{here}/{rank}")) for rank in range(size)]
