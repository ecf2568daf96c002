"""Ranks that compile the same code without tripping each other."""

import json
from collections.abc import Mapping

import torch.distributed as dist

from ddpkit.compile.layout import Layout
from ddpkit.ranks import phase
from ddpkit.ranks.agree import PATIENT_TIMEOUT
from ddpkit.ranks.group import store

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
