"""Buckets that travel while the backward pass goes on."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpkit.errors import InputError, RankDisagreementError
from ddpkit.sync.buckets import Bucket, by_size
from ddpkit.sync.flat import FlatSync
from ddpkit.torch_private import count_gradient_hooks, version_of

MIB = 2**20


class OverlapSync(FlatSync):
    """All-reduces each bucket during the backward pass, as soon as its gradients are complete. Needs no wrapper.

    Buckets are persistent flat buffers as in `FlatSync`, with the same flags. They are filled in the order in which gradients
    became complete in the first step on rank 0, and all ranks start them in that order. Buckets with unused parameters are
    started by `synchronize()`.

    Do not modify a `.grad` between `backward()` and `synchronize()`: its all-reduce may be running already.

    Args:
        module: any module.
        others: further modules with trained parameters.
        bucket_mb: size of a bucket, MiB; by default 25, on a GPU 64. Starting a collective takes the host about as long as
            sending that many bytes, and with small batches the device waits for the host.
        first_bucket_mb: size of the first bucket, MiB; a small one starts early. If all gradients fit into one bucket,
            `synchronize()` averages them with one all-reduce, as in `FlatSync`: a second one would cost more than it saves.
        comm: `"torch"` or `"mpi"`.
        timeout: as in `GradientSync`.
        check_every: as in `GradientSync`.
        reduce_dtype: as in `FlatSync`.
        check_finite: as in `FlatSync`.
    """

    name = "overlap"
    acts = "during backward"
    overlapped: ClassVar[bool] = True

    def __init__(
        self,
        module: nn.Module,
        *others: nn.Module,
        bucket_mb: float | None = None,
        first_bucket_mb: float = 1.0,
        comm: str = "torch",
        timeout: float = 600.0,
        check_every: int = 0,
        reduce_dtype: str | torch.dtype | None = None,
        check_finite: bool = True,
    ) -> None:
        if bucket_mb is None:
            bucket_mb = 64.0 if any(p.is_cuda for p in module.parameters()) else 25.0
        if not min(bucket_mb, first_bucket_mb) > 0:
            raise InputError(f"bucket_mb={bucket_mb} and first_bucket_mb={first_bucket_mb} must be positive.")
        self._bytes = round(first_bucket_mb * MIB), round(bucket_mb * MIB)
        self._arrivals: list[int] | None = None  # the agreed order
        self._arrived: list[int] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        super().__init__(
            module,
            *others,
            comm=comm,
            timeout=timeout,
            check_every=check_every,
            reduce_dtype=reduce_dtype,
            check_finite=check_finite,
        )

    @property
    def agreed_options(self) -> dict[str, object]:
        """What ranks must have chosen alike."""
        return super().agreed_options | {"first_bucket_bytes": self._bytes[0], "bucket_bytes": self._bytes[1]}

    def close(self) -> None:
        """Lets go of the module: removes its hooks."""
        super().close()
        for hook in self._hooks:
            hook.remove()

    def reduce(self) -> None:
        """Launches what has not been launched, waits, and puts the slices in place."""
        layout = self._buckets
        try:
            self._refuse_changed()
            super().reduce()
            if self._arrivals is None and len(layout) > 1 and self._buckets is layout:
                self._agree_on_order()
        finally:
            self._begin()

    def _plan(self, numbers: Sequence[int]) -> list[list[int]]:
        known = {n: i for i, n in enumerate(self._arrivals or [])}
        order = sorted(numbers, key=lambda n: (n not in known, known.get(n, -n)))  # until known: the last comes first
        first, others = self._bytes
        whole = sum(self._all[n].nbytes for n in order)
        return by_size(self._all, order, others if whole <= others else first, others)

    def _lay_out(self) -> None:
        super()._lay_out()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if len(self._buckets) > 1:  # one bucket may as well leave in synchronize()
            for bucket in self._buckets:
                for slot in self._watched(bucket):
                    n = bucket.numbers[slot]
                    hook = self._all[n].register_post_accumulate_grad_hook(self._hook(n, bucket, slot))  # type: ignore[no-untyped-call]
                    self._hooks.append(hook)
        self._begin()

    def _added_or_fresh(self, gradients: dict[int, Tensor | None]) -> tuple[bool, bool]:
        added, fresh = super()._added_or_fresh(gradients)
        return (False, True) if self._fresh_came else (added, fresh)

    def _watched(self, bucket: Bucket) -> list[int]:
        """Slots whose gradients are told of when they arrive. Each costs the backward pass time that a GPU would wait for."""
        if self._arrivals is None or bucket.one_by_one or self.comm.wants_calls:
            return list(range(len(bucket.numbers)))
        last = len(bucket.numbers) - 1
        return [0, last] if bucket is self._buckets[0] and last else [last]

    def _begin(self) -> None:
        """Expects the gradients of a step."""
        self._next = 0
        self._held: bool | None = None
        self._fresh_came = False  # where each gradient is handed over as it comes
        self._at_first: dict[int, tuple[Tensor | None, int]] = {}
        self._travelling: dict[int, tuple[Tensor | None, int]] = {}

    def _state(self, n: int) -> tuple[Tensor | None, int]:
        """Changes when a parameter receives a gradient."""
        gradient = self._all[n].grad
        return gradient, 0 if gradient is None else version_of(gradient)

    def _hook(self, n: int, bucket: Bucket, slot: int) -> Callable[[Tensor], None]:
        closes = slot == len(bucket.numbers) - 1 and not bucket.one_by_one

        def arrived(parameter: Tensor) -> None:
            if self._paused:
                return
            if self._held is None:
                # A layout that no longer fits is replaced in synchronize(), which needs the gradients of this rank alone.
                self._held = self._stale()
                self._at_first = {n: self._state(n) for b in self._buckets if not b.one_by_one for n in b.numbers}
            if self._held:
                return
            if bucket.one_by_one:
                if slot not in bucket.awaited:
                    self._refuse_second(n)
                gradient = parameter.grad  # None where compiled code has none for an unused parameter
                if gradient is not None and gradient.is_sparse:
                    self._refuse_sparse(n)
                bucket.place(slot, gradient)
                self._fresh_came = self._fresh_came or (gradient is not None and gradient is not bucket.views[slot])
                if gradient is not None and not bucket.compressed:
                    parameter.grad = bucket.views[slot]  # the next gradient takes the memory of this one
            bucket.awaited.discard(slot)
            if self._arrivals is None:
                self._arrived.append(n)
            if closes or not bucket.awaited:
                self._launch_ready()
            self.comm.progress()

        return arrived

    def _launch_ready(self) -> None:
        """Launches complete buckets in order; a complete one behind an incomplete one waits, as on the other ranks."""
        while self._next < len(self._buckets) and self._is_complete(self._buckets[self._next]):
            bucket = self._buckets[self._next]
            last = self._next == len(self._buckets) - 1
            self._launch(self._next, self._gradients(self._order if last else bucket.numbers))
            if not bucket.one_by_one:
                self._travelling.update((n, self._state(n)) for n in bucket.numbers)
            self._next += 1

    def _is_complete(self, bucket: Bucket) -> bool:
        if not bucket.one_by_one:
            bucket.awaited = {slot for slot in bucket.awaited if self._is_as_before(bucket.numbers[slot])}
        return not bucket.awaited

    def _is_as_before(self, n: int) -> bool:
        (gradient, version), (known, known_version) = self._state(n), self._at_first[n]
        return gradient is known and version == known_version

    def _refuse_changed(self) -> None:
        """What has been sent must be what is there: a gradient that came later would be lost."""
        for n, (gradient, version) in self._travelling.items():
            now, now_version = self._state(n)
            if now is not gradient or now_version != version:
                self._refuse_second(n)

    def _refuse_second(self, n: int) -> None:
        raise RankDisagreementError(
            f"Parameter {self._names[n]!r} received a second gradient before synchronize(), or its gradient was changed: do all "
            "backward passes but the last inside no_sync(), and clip after synchronize()."
        )

    @property
    def _has_one_average(self) -> bool:
        """The same buckets in the same order, once ranks have agreed on that, unless others have hooks too, which would not be
        called.
        """
        if type(self).reduce is not OverlapSync.reduce or (self._arrivals is None and len(self._buckets) > 1):
            return False
        return count_gradient_hooks(self._all) == len(self._hooks)

    @torch.no_grad()
    def _agree_on_order(self) -> None:
        """Cuts the buckets anew, in the order in which gradients arrived on rank 0."""
        self._look_back()  # the new buckets know nothing of this step's flags
        box: list[list[int]] = [list(dict.fromkeys(self._arrived))]
        if self.world_size > 1:
            dist.broadcast_object_list(box, 0)
        self._arrived = []
        if not box[0]:  # rank 0 has seen none: the next step tells
            return
        self._arrivals = box[0]
        kept = [p.grad for p in self._all]
        self._lay_out()
        for bucket in self._buckets:
            for n, view in zip(bucket.numbers, bucket.views, strict=True):
                gradient = kept[n]
                if gradient is not None:
                    self._all[n].grad = view.copy_(gradient)
