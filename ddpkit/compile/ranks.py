"""Ranks that compile the same code without tripping each other."""

import json
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch.distributed as dist

from ddpkit import phase
from ddpkit.compile.layout import Layout
from ddpkit.launch import PATIENT_TIMEOUT, agree, first_rank_first, store

T = TypeVar("T")
U = TypeVar("U")


def in_turn(trace: Callable[[], T], lower: Callable[[T], U]) -> U:
    """Traces on all ranks at once, then compiles on one rank of each host, then on the others, which find the code on disk.

    Nobody waits in a collective meanwhile: ranks wait for one another through the store. An error on one rank is raised on all.

    Args:
        trace: makes a graph.
        lower: compiles it.
    """
    result: U | None = None
    with agree("tracing the model"):
        graph = trace()
    with first_rank_first("compiling the model", per_host=True) as goes_first:
        if goes_first:
            result = lower(graph)
    with agree("compiling the model"):
        if not goes_first:
            result = lower(graph)
    return result  # type: ignore[return-value]


_shared = 0


def of_first_rank(layout: Layout, sizes: Mapping[str, int]) -> dict[str, int]:
    """Rank 0's sizes: ranks that tune code for the same sizes generate the same code.

    Args:
        layout: of this rank's batches, whose names for sizes may differ from rank 0's.
        sizes: by name.

    Returns:
        Rank 0's by this rank's names, or `sizes` where its batches have another form.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return dict(sizes)
    global _shared  # noqa: PLW0603  (ranks count alike)
    _shared += 1
    key, shared = f"compile/{_shared}/sizes", store()
    names, form = layout.names, layout.form()
    if dist.get_rank() == 0:
        shared.set(key, json.dumps([form, [sizes[name] for name in names]]))
    with phase.waiting("rank 0's sizes"):
        shared.wait([key], PATIENT_TIMEOUT)
    their_form, theirs = json.loads(shared.get(key))
    return dict(zip(names, theirs, strict=True)) if their_form == form else dict(sizes)


@phase.waiting("the other ranks' counts")
def most_on_ranks(count: int) -> int:
    """The largest of the ranks' counts (one collective)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return count
    counts = [0] * dist.get_world_size()
    dist.all_gather_object(counts, count)
    return max(counts)
