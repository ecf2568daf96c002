"""The numerics of many ranks on one process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ddpkit.data.sampler import Indices, Sampler
from ddpkit.errors import InputError
from ddpkit.sync import flags
from ddpkit.sync.base import GradientSync
from ddpkit.sync.buckets import Bucket, by_kind, by_size
from ddpkit.sync.orders import ORDERS

MIB = 2**20


class EmulatedSync(GradientSync):
    """Emulates many ranks in one process: computes their gradients in turn and adds them in the order of a collective.

    A step takes one micro-batch for each emulated rank (from `EveryRank`). The gradient of each is stored when its `no_sync()`
    ends; that of the last by `synchronize()`. The buffer has the layout of `custom`, flags included, because the order in which a
    ring adds depends on an element's position. The gradients of all emulated ranks are held in memory at once.

    Results equal those of real ranks bit for bit if their number is a power of two. Otherwise real ranks multiply by 1 / ranks,
    which rounds.

    Args:
        module: any module.
        others: further modules with trained parameters.
        ranks: how many to emulate.
        order: `"ring"` (gloo's), `"ring_up"` and `"halving_doubling"` (Open MPI's), `"tree"` (NCCL's between hosts) or
            `"linear"`: see `ddpkit.sync.orders`.
        bucket_mb: add in buckets of so many MiB, cut from the last parameter backwards as `overlap` and `standard` do; None: in
            one.
        options: those of `GradientSync`.
    """

    name = "emulated"
    acts = "during backward"

    def __init__(
        self,
        module: nn.Module,
        *others: nn.Module,
        ranks: int = 64,
        order: str = "ring",
        bucket_mb: float | None = None,
        **options: Any,
    ) -> None:
        if order not in ORDERS:
            raise InputError(f"strategy.order={order} is unknown: use one of {', '.join(ORDERS)}.")
        if ranks < 1 or (bucket_mb is not None and not bucket_mb > 0):
            raise InputError(f"strategy.ranks={ranks} must be at least 1 and strategy.bucket_mb={bucket_mb} positive.")
        self.emulated = ranks
        self._add, self._bucket_mb = ORDERS[order], bucket_mb
        super().__init__(module, *others, **options)

    def attach(self) -> None:
        """Allocates the buffers for the gradients of all emulated ranks.

        Raises:
            InputError: there are other ranks.
        """
        if self.world_size > 1:
            raise InputError(
                f"strategy=emulated stands for many ranks on one process, not on {self.world_size}: start a single one."
            )
        self._trained = list(self.parameters.values())
        numbers = list(range(len(self._trained)))
        if self._bucket_mb is None:
            plan = by_kind(self._trained, numbers)
        else:
            size = round(self._bucket_mb * MIB)
            plan = by_size(self._trained, numbers[::-1], size, size)
        tail = flags.length(len(numbers), self.emulated)
        self._buckets = [
            Bucket(self._trained, part, tail if n == len(plan) - 1 else 0, None) for n, part in enumerate(plan)
        ]
        self._shards = [bucket.wire.new_zeros((self.emulated, len(bucket.wire))) for bucket in self._buckets]
        self._taken, self._present = 0, [False] * len(numbers)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Around the forward and backward pass of one emulated rank; stores its gradient at the end."""
        with super().no_sync():
            yield
        self._take()

    @torch.no_grad()
    def reduce(self) -> None:
        """Adds the gradients of all emulated ranks.

        Raises:
            InputError: there were more or fewer shards than emulated ranks.
        """
        self._take()
        taken, self._taken = self._taken, 0
        if taken != self.emulated:
            raise InputError(
                f"strategy=emulated adds {self.emulated} shards a step and got {taken}: give it a list of micro-batches, one "
                "for each rank."
            )
        for bucket, shards in zip(self._buckets, self._shards, strict=True):
            bucket.wire.copy_(self._add(shards))
            self.comm.bytes += bucket.wire.nbytes
            self.comm.collectives += 1
            for n, view in zip(bucket.numbers, bucket.views, strict=True):
                self._trained[n].grad = view if self._present[n] else None
        self._present = [False] * len(self._trained)

    @torch.no_grad()
    def _take(self) -> None:
        """Sets the gradients at hand aside as those of the next shard."""
        if self._trained != list(self.parameters.values()):
            raise InputError("Parameters were frozen or unfrozen under strategy=emulated: make it again.")
        gradients: list[Tensor | None] = [p.grad for p in self._trained]
        for bucket, shards in zip(self._buckets, self._shards, strict=True):
            bucket.fill([gradients[n] for n in bucket.numbers])
            bucket.begin()
            if self._taken < self.emulated:
                shards[self._taken].copy_(bucket.wire)
        self._present = [a or b is not None for a, b in zip(self._present, gradients, strict=True)]
        self._taken += 1
        for parameter in self._trained:
            parameter.grad = None


class EveryRank(Sampler):
    """Gives the micro-batches of all ranks, rank by rank, to one process. Takes the arguments of `Sampler`."""

    def _shares(self, chosen: Indices) -> list[list[Indices]]:
        shares = super()._shares(chosen)
        return [[part for share in shares for part in share]]
