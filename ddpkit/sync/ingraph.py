"""All-reduces as nodes of the compiled step."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddpkit.errors import InputError
from ddpkit.sync.after import AfterGradients, AverageInGraph
from ddpkit.sync.base import GradientSync
from ddpkit.sync.buckets import Bucket, by_kind

if TYPE_CHECKING:
    from ddpkit.compile.parity import Difference
    from ddpkit.sync.graph_update import GraphUpdate


class InGraphSync(GradientSync):
    """Averages gradients inside the compiled step, so that the compiler schedules communication together with computation.

    Gradients are stored in flat buckets; the first bucket holds those that the backward pass finishes first.
    `make_step(..., strategy="ingraph", compile=True)` traces an all-reduce of each bucket after the gradients.

    Args:
        module: any module.
        others: further modules with trained parameters.
        buckets: how many buckets, for each device and dtype, of about the same number of bytes.
        optimizer_in_graph: trace the optimizer's update (Adam, AdamW or SGD) into the step as well. A batch that the compiled
            code does not serve is then an error: updated by other code, a rank's parameters would differ from the other ranks'.
            `.grad` holds the average before clipping. With several micro-batches, the average and the update are eager.
        comm: `"torch"`.
        timeout: of ddpkit's own collectives; those in the graph wait as long as the process group says
            (`ddpkit.init_process_group(timeout=...)`).
        check_every: as in `GradientSync`.
    """

    name = "ingraph"
    acts = "in graph"

    def __init__(
        self,
        module: nn.Module,
        *others: nn.Module,
        buckets: int = 1,
        optimizer_in_graph: bool = False,
        comm: str = "torch",
        timeout: float = 600.0,
        check_every: int = 0,
    ) -> None:
        if buckets < 1:
            raise InputError(f"buckets={buckets}: give at least one.")
        self._count = buckets
        self.optimizer_in_graph = optimizer_in_graph
        super().__init__(module, *others, comm=comm, timeout=timeout, check_every=check_every)

    @property
    def agreed_options(self) -> dict[str, object]:
        """What ranks must have chosen alike."""
        return super().agreed_options | {"buckets": self._count, "optimizer_in_graph": self.optimizer_in_graph}

    def attach(self) -> None:
        """Lays out the buckets."""
        self._named = list(self.parameters.items())
        parameters = [p for _, p in self._named]
        if any(p.is_complex() for p in parameters):
            raise InputError("strategy=ingraph does not serve complex parameters: use custom.")
        last_first = range(len(parameters) - 1, -1, -1)
        plan = [part for kind in by_kind(parameters, last_first) for part in _cut(parameters, kind, self._count)]
        self._buckets = [Bucket(parameters, numbers, 0, None) for numbers in plan]

    def after_gradients(
        self, trained: Mapping[str, nn.Parameter], *, optimizer: Optimizer, clip_norm: float | None
    ) -> AfterGradients:
        """The all-reduces of the buckets, and the update where that is asked for.

        Raises:
            InputError: a parameter has no place in the buckets, or the optimizer's step cannot be part of a graph.
        """
        views = self.views
        if unknown := [name for name in trained if name not in views]:
            raise InputError(
                f"Parameter {unknown[0]!r} was frozen when strategy=ingraph laid out its buckets: make the step again "
                "(ddpkit.make_step) once it is to be trained."
            )
        if not self.optimizer_in_graph:
            return _Buckets(self, trained)
        from ddpkit.sync.graph_update import GraphUpdate

        return _BucketsAndUpdate(self, trained, GraphUpdate(optimizer, clip_norm, trained))

    def graph_form(self, optimizer: Optimizer) -> Hashable:
        """All that the update depends on, where that is part of the graph."""
        if not self.optimizer_in_graph:
            return ()
        from ddpkit.sync.graph_update import form_of

        return form_of(optimizer)

    def traffic(self) -> tuple[int, int]:
        """Bytes and collectives of a step."""
        return sum(body.nbytes for body in self.flat), len(self._buckets)

    @property
    def flat(self) -> list[Tensor]:
        """The buckets."""
        return [bucket.body for bucket in self._buckets]

    @property
    def views(self) -> dict[str, Tensor]:
        """The slice of each trained parameter, by name."""
        views = {n: view for bucket in self._buckets for n, view in zip(bucket.numbers, bucket.views, strict=True)}
        return {name: views[n] for n, (name, _) in enumerate(self._named)}

    def slices(self, flat: Sequence[Tensor]) -> dict[str, Tensor]:
        """The slice of each trained parameter in tensors like the buckets, by operations that can be traced."""
        slices = {}
        for bucket, body in zip(self._buckets, flat, strict=True):
            for n, view in zip(bucket.numbers, bucket.views, strict=True):
                start = int(view.storage_offset() - bucket.body.storage_offset())
                order = _by_memory(view)
                part = body[start : start + view.numel()].view([view.shape[d] for d in order])
                slices[self._named[n][0]] = part.permute([order.index(d) for d in range(view.dim())])
        return slices

    def form_of_buckets(self) -> Hashable:
        """Which gradient lies where in the buckets, as plain values."""
        places = [
            (bucket, n, view) for bucket in self._buckets for n, view in zip(bucket.numbers, bucket.views, strict=True)
        ]
        return tuple(
            (self._named[n][0], view.storage_offset() - bucket.body.storage_offset(), view.stride())
            for bucket, n, view in places
        )

    def packed(self, gradients: Mapping[str, Tensor | None], flat: Sequence[Tensor]) -> Iterator[Tensor]:
        """The gradients as the buckets hold them, bucket by bucket, by operations that can be traced.

        Args:
            gradients: by the parameters' names; none counts as zero.
            flat: tensors like the buckets.
        """
        return (self._packed(bucket, gradients, body) for bucket, body in zip(self._buckets, flat, strict=True))

    def _packed(self, bucket: Bucket, gradients: Mapping[str, Tensor | None], body: Tensor) -> Tensor:
        """The gradients of a bucket one after another, in the order of memory, with zeros between the slices."""
        parts: list[Tensor] = []
        end = 0
        for n, view in zip(bucket.numbers, bucket.views, strict=True):
            start = int(view.storage_offset() - bucket.body.storage_offset())
            if start > end:
                parts.append(body.new_zeros(start - end))
            gradient = gradients.get(self._named[n][0])
            parts.append(
                body.new_zeros(view.numel()) if gradient is None else gradient.permute(_by_memory(view)).reshape(-1)
            )
            end = start + view.numel()
        if end < body.numel():
            parts.append(body.new_zeros(body.numel() - end))
        return torch.cat(parts)


class _Buckets(AverageInGraph):
    """Packs the gradients into the buckets and averages those."""

    sync: InGraphSync

    @cached_property
    def places(self) -> list[Tensor]:
        """The slices of the buckets."""
        views = self.sync.views
        return [views[name] for name in self.trained]

    def tensors(self) -> list[Tensor]:
        """The buckets."""
        return self.sync.flat

    def trace(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], tensors: Sequence[Tensor]
    ) -> Tensor | None:
        """Starts the average of each bucket as soon as that is packed, then brings it back."""
        del parameters
        buckets = self.sync.packed(dict(zip(self.trained, gradients, strict=True)), tensors)
        started = [self.start_average(bucket) for bucket in buckets]
        for body, average in zip(tensors, started, strict=True):
            body.copy_(self.wait(average))
        return None

    def form(self) -> Hashable | None:
        """What an average depends on, and where gradients lie in the buckets."""
        return self._form_of_buckets() if type(self) is _Buckets else None

    def _form_of_buckets(self) -> Hashable:
        return self._form_of_average(), self.sync.form_of_buckets()

    @torch.no_grad()
    def run(self, gradients: Sequence[Tensor | None]) -> None:
        """The same collectives on the buckets where they are."""
        by_name = dict(zip(self.trained, gradients, strict=True))
        for name, view in self.sync.views.items():
            gradient = by_name.get(name)
            if gradient is None:
                view.zero_()
            elif gradient is not view:
                view.copy_(gradient)
        for body in self.sync.flat:
            self.sync.all_reduce(body)


class _BucketsAndUpdate(_Buckets):
    """The same, and then the optimizer's step."""

    no_eager = "with optimizer_in_graph there is no eager code to fall back on: leave that option out."

    def __init__(self, sync: InGraphSync, trained: Mapping[str, nn.Parameter], update: "GraphUpdate") -> None:
        super().__init__(sync, trained)
        self._update = update
        self.updates = list(trained.values())
        self._present = torch.ones(len(trained), dtype=torch.bool, device=self.updates[0].device)

    def tensors(self) -> list[Tensor]:
        """The buckets, the numbers of the optimizer and its state."""
        return [*super().tensors(), *self._update.tensors(self._present)]

    def trace(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], tensors: Sequence[Tensor]
    ) -> Tensor | None:
        """Averages, clips and updates."""
        count = len(self.sync.flat)
        flat = tensors[:count]
        super().trace(parameters, gradients, flat)
        slices = self.sync.slices(flat)
        return self._update(parameters, [slices[name] for name in self.trained], flat, tensors[count:])

    def form(self) -> Hashable | None:
        """The same, and what the update depends on."""
        return self._form_of_buckets(), self._update.form()

    def finish(self) -> None:
        """Lets schedulers know of the step."""
        self._update.note()

    def note_used(self, used: Sequence[bool]) -> None:
        """Leaves alone what has a gradient on no rank."""
        super().note_used(used)
        self._present.copy_(torch.tensor(self.present(used)))

    def differences(
        self, updated: Sequence[Tensor], gradients: Sequence[Tensor], tolerance: float, shape: str
    ) -> "list[Difference]":
        """How far the update is from the optimizer's own."""
        return self._update.differences(list(self.trained), updated, gradients, self._present, tolerance, shape)


def _by_memory(view: Tensor) -> list[int]:
    """The dimensions in the order in which they lie in memory."""
    strides = view.stride()
    return sorted(range(view.dim()), key=lambda d: -strides[d])


def _cut(parameters: Sequence[Tensor], numbers: Sequence[int], parts: int) -> list[list[int]]:
    """Cuts a list into at most so many parts of about the same number of bytes."""
    whole = sum(parameters[n].nbytes for n in numbers)
    cut: dict[int, list[int]] = {}
    done = 0
    for n in numbers:
        middle = done + parameters[n].nbytes / 2
        cut.setdefault(min(parts - 1, int(parts * middle / max(1, whole))), []).append(n)
        done += parameters[n].nbytes
    return list(cut.values())
