"""That all ranks hold the same model, and the same values in it."""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpkit.errors import InputError, RankDisagreementError
from ddpkit.ranks import phase
from ddpkit.ranks.agree import name_ranks
from ddpkit.sync.modules import Modules, Named
from ddpkit.torch_private import backends

PIECE = 2**20  # elements that are summed up at once
MIXING = 0x9E3779B97F4A7C15 - 2**64  # odd, 2^64 by the golden ratio (Knuth)

Description = list[tuple[str, str, dict[str, object]]]  # kind, name, what must be the same


def describe(module: Named) -> Description:
    """What every rank must hold alike: names, shapes, dtypes, devices and what is trained."""
    described: Description = []
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise InputError(f"Parameter {name!r} is lazy: run one forward pass before gradients are synchronised.")
        described.append(("parameter", name, {**_form(parameter), "requires_grad": parameter.requires_grad}))
    described += [("buffer", name, _form(buffer)) for name, buffer in module.named_buffers()]
    return described


def _form(tensor: Tensor) -> dict[str, object]:
    return {"shape": tuple(tensor.shape), "dtype": str(tensor.dtype), "device": tensor.device.type}


@phase.waiting("the other ranks")
def barrier(timeout: float) -> None:
    """Waits for the other ranks, no longer than `timeout` seconds; other collectives here wait as long as the group does."""
    options = dist.AllreduceOptions()
    options.timeout = timedelta(seconds=timeout)
    on_host = "cpu" in backends()
    knock = torch.zeros(1, device="cpu" if on_host else torch.device("cuda", torch.cuda.current_device()))
    dist.group.WORLD.allreduce([knock], options).wait()  # type: ignore[union-attr]


@phase.waiting("the other ranks' models")
def verify(described: Description) -> None:
    """Compares what this rank describes with what the others do (one collective).

    Raises:
        RankDisagreementError: on all ranks, naming rank and parameter.
    """
    everyone: list[Description] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, described)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise RankDisagreementError(
                f"{_difference(rank, theirs, everyone[0])}: give the same model and the same strategy on every rank."
            )


def _difference(rank: int, theirs: Description, first: Description) -> str:
    """The first difference between two ranks, in words."""
    of_first = {(kind, name): form for kind, name, form in first}
    others = {(kind, name): form for kind, name, form in theirs}
    for kind, name in of_first:
        if (kind, name) not in others:
            return f"Rank {rank} has no {kind} {name!r}, which rank 0 has"
    for (kind, name), form in others.items():
        if (kind, name) not in of_first:
            return f"Rank {rank} has a {kind} {name!r}, which rank 0 lacks"
        for what, value in form.items():
            if value != of_first[kind, name][what]:
                return f"The {what} of {kind} {name!r} is {value} on rank {rank} but {of_first[kind, name][what]} on rank 0"
    at = next(i for i, (a, b) in enumerate(zip(theirs, first, strict=True)) if a != b)
    return (
        f"{theirs[at][0].capitalize()} number {at} is {theirs[at][1]!r} on rank {rank} but {first[at][1]!r} on rank 0"
    )


@phase.waiting("rank 0's parameters")
@torch.no_grad()
def broadcast(module: Named) -> None:
    """Copies parameters and buffers of rank 0 to all ranks."""
    named = (*module.named_parameters(), *module.named_buffers())
    tensors = [tensor.detach() for _, tensor in named if tensor.numel()]
    for tensor in tensors:
        if tensor.is_contiguous():
            dist.broadcast(tensor, 0)
        else:
            packed = tensor.contiguous()
            dist.broadcast(packed, 0)
            tensor.copy_(packed)


@torch.no_grad()
def checksums(tensors: Sequence[Tensor], last: int) -> Tensor:
    """`[tensors + 1]` int64: the sum of the bit patterns of each, each times a number of its place, and `last`.

    Without those numbers, what is added to a number and taken from its neighbour would leave the sum as it was.
    """
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    device = tensors[0].device
    longest = min(PIECE, max(tensor.numel() * (2 if tensor.is_complex() else 1) for tensor in tensors))
    factors = (2 * torch.arange(longest, device=device) + 1) * MIXING  # odd, so that no bit is lost

    def total(tensor: Tensor) -> Tensor:
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        bits = real.contiguous().view(words[real.element_size()]).flatten()
        sum_ = torch.zeros((), dtype=torch.int64, device=device)
        for piece in bits.split(PIECE):
            sum_ = sum_ * MIXING + (piece.to(device, torch.int64) * factors[: len(piece)]).sum()
        return sum_

    sums = [total(tensor.detach()) for tensor in tensors]
    return torch.stack([*sums, torch.tensor(last, device=device)])


def compare_parameters(modules: Modules, calls: int) -> None:
    """Compares checksums of all parameters over the ranks (one collective, and the host waits).

    Raises:
        RankDisagreementError: on all ranks, naming ranks and parameter.
    """
    names = [name for name, _ in modules.given]
    changes = modules.changes()
    own = checksums([parameter for _, parameter in modules.given], len(changes))
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    table = torch.stack(everyone).cpu()
    if table[:, -1].any():
        raise of_replaced(calls, table[:, -1].nonzero().flatten().tolist(), changes)
    unlike = (table != table[0]).any(0)
    if not unlike.any():
        return
    first = int(unlike.nonzero()[0])
    ranks = (table[:, first] != table[0, first]).nonzero().flatten().tolist()
    others = f" (and {int(unlike.sum()) - 1} more)" if unlike.sum() > 1 else ""
    raise RankDisagreementError(
        f"At synchronize() number {calls} parameter {names[first]!r}{others} on {name_ranks(ranks)} differs from rank 0: the "
        "ranks have drifted apart; look for updates outside the optimizer, or for a rank that does not synchronise."
    )


def of_replaced(calls: int, ranks: Sequence[int], here: Sequence[str]) -> RankDisagreementError:
    """What to raise where modules hold other parameters than at first.

    Args:
        calls: number of the `synchronize()`.
        ranks: on which they do.
        here: names, on this rank.
    """
    names = f" (here {here[0]!r})" if here else ""
    return RankDisagreementError(
        f"At synchronize() number {calls} the modules on {name_ranks(ranks)} held other parameters than make_sync() was given"
        f"{names}, whose gradients are not averaged: call make_sync() after whatever adds, replaces or removes parameters."
    )
