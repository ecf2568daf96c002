"""Whether a model and a criterion leave out what fills a batch up."""

from collections.abc import Sequence

import torch
from torch import nn

from ddpkit.batch import Batch, select_frames
from ddpkit.compile.objective import Criterion, Objective, differentiable, loss_of
from ddpkit.compile.parity import Difference, differences, samples, tolerance_for
from ddpkit.errors import InputError
from ddpkit.padding import Capacity, own_sizes, pad

_ATOMS, _EDGES, _EMPTY = 7, 23, 2  # that fill them up


def compare_padding(model: nn.Module, criterion: Criterion, batch: Batch, r_max: float) -> list[Difference]:
    """Compares loss and gradients of a few frames as they are with those of the same frames in a batch that is filled up.

    Args:
        model: a model of the contract.
        criterion: see `ddpkit.make_step`.
        batch: frames to choose the smallest ones from.
        r_max: cutoff in Å.
    """
    real = torch.nonzero(batch.real_frames()).flatten().tolist()
    *_, few = samples(select_frames(batch.replace(mask=None), real))
    size = own_sizes(few)
    edges, most = size.edges + _EDGES, max(1, size.most)
    filled = pad(few, Capacity(size.atoms + _ATOMS + -(-_EDGES // most), edges, size.frames + _EMPTY, most + 1), r_max)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    as_they_are, filled_up = (_results(Objective(model, criterion), named, one) for one in (few, filled))
    tolerance = tolerance_for([*named.values()])
    return differences(filled_up, as_they_are, list(named), tolerance, f"{few.num_frames} frames")


def _results(objective: Objective, named: dict[str, nn.Parameter], batch: Batch) -> dict[str, torch.Tensor | None]:
    result, _ = objective(batch)
    gradients = torch.autograd.grad(differentiable(result), list(named.values()), allow_unused=True)
    return {"loss": loss_of(result).detach(), **dict(zip(named, gradients, strict=True))}


def require_padding(measured: Sequence[Difference]) -> None:
    """Raises where what fills a batch up changes something.

    Raises:
        InputError: names the worst tensor.
    """
    if sentence := taken_for_real(measured):
        raise InputError(
            f"cuda_graphs fills batches up to few sizes, and {sentence}. Leave atoms out where batch.mask is False, frames "
            "without other atoms, and edges longer than the cutoff; or use cuda_graphs=false."
        )


def taken_for_real(measured: Sequence[Difference]) -> str:
    """Which tensor changes most where a batch is filled up, as a part of a sentence; empty if none does."""
    bad = [d for d in measured if not d.is_fine]
    if not bad:
        return ""
    worst = max(bad, key=lambda d: d.error)
    return (
        f"this model or criterion does not leave that out: {worst.name!r} changes by {worst.error:.2g} relative (allowed "
        f"{worst.tolerance:.0e})"
    )
