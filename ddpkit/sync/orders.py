"""In which order a sum over ranks is taken: what collectives do, on one process.

Each function takes what every rank holds, `[ranks, floats]`, and returns the sum `[floats]`, added in the order in which the
collective of that name adds. Floating-point sums depend on it, so this is what makes the numerics of many ranks.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Order = Callable[[Tensor], Tensor]

_GLOO_SEGMENT = 2**20  # bytes of the longest piece that gloo sends at once


def ring(parts: Tensor) -> Tensor:
    """As gloo's all-reduce: one chunk for each rank; chunk c starts at rank c - 1 and goes down the ranks to rank c."""
    ranks, count = parts.shape
    chunk = _gloo_chunk(count, ranks, parts.element_size())
    starts = [min(n * chunk, count) for n in range(ranks + 1)]
    return _chunked(parts, starts, lambda c: [(c - 1 - step) % ranks for step in range(ranks)])


def ring_up(parts: Tensor) -> Tensor:
    """As Open MPI's ring: one chunk for each rank, the first ones longer by one; chunk c starts at rank c and goes up.

    Fewer floats than ranks are summed by `halving_doubling`, as Open MPI does.
    """
    ranks, count = parts.shape
    if count < ranks:
        return halving_doubling(parts)
    short, longer = divmod(count, ranks)
    starts = [n * short + min(n, longer) for n in range(ranks + 1)]
    return _chunked(parts, starts, lambda c: [(c + step) % ranks for step in range(ranks)])


def halving_doubling(parts: Tensor) -> Tensor:
    """As Open MPI's recursive doubling: pairs at distance 1, pairs of pairs at distance 2, and so on.

    Where the number of ranks is no power of two, the first ones add up in pairs beforehand.
    """
    sums = list(parts)
    extra = len(sums) - 2 ** (len(sums).bit_length() - 1)
    sums = [sums[2 * n] + sums[2 * n + 1] for n in range(extra)] + sums[2 * extra :]
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
    return sums[0]


def tree(parts: Tensor) -> Tensor:
    """A binary tree as NCCL's between hosts: rank 0 above all; a second, mirrored one for the other half of the floats."""
    half = parts.shape[1] // 2
    return torch.cat([_up(parts[:, :half], 0), _up(parts.flip(0)[:, half:], 0)])


def linear(parts: Tensor) -> Tensor:
    """One rank after another, from rank 0 on."""
    return _chain(parts, range(len(parts)))


ORDERS: dict[str, Order] = {
    "ring": ring,
    "ring_up": ring_up,
    "halving_doubling": halving_doubling,
    "tree": tree,
    "linear": linear,
}


def _chain(parts: Tensor, ranks: Sequence[int]) -> Tensor:
    total = parts[ranks[0]].clone()
    for rank in ranks[1:]:
        total += parts[rank]
    return total


def _chunked(parts: Tensor, starts: Sequence[int], order: Callable[[int], Sequence[int]]) -> Tensor:
    chunks = [_chain(parts[:, starts[c] : starts[c + 1]], order(c)) for c in range(len(starts) - 1)]
    return torch.cat(chunks)


def _gloo_chunk(count: int, ranks: int, width: int) -> int:
    """Floats of a chunk, of which gloo sends at least two segments of equal length."""
    total, longest = count * width, _GLOO_SEGMENT // width * width
    segments = _up_to(max(_ceil(total, longest), 2 * ranks), ranks)
    return segments // ranks * _ceil(_ceil(total, segments), width)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _up_to(a: int, multiple: int) -> int:
    return _ceil(a, multiple) * multiple


def _up(parts: Tensor, rank: int) -> Tensor:
    """What a rank sends up the tree: its own, then what its children sent."""
    total = parts[rank].clone()
    for child in _children(rank, len(parts)):
        total += _up(parts, child)
    return total


def _children(rank: int, ranks: int) -> list[int]:
    """The ranks below one in a tree that alternates leaves and nodes: 1, 3, 5 ... are leaves."""
    if rank == 0:
        return [2 ** ((ranks - 1).bit_length() - 1)] if ranks > 1 else []
    bit = rank & -rank  # its lowest one
    below, step = [], bit // 2
    if step:
        below.append(rank - step)
        while step and rank + step >= ranks:
            step //= 2
        if step:
            below.append(rank + step)
    return below
