"""All-reduces as nodes of the compiled step."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpkit.errors import InputError
from ddpkit.sync import agreement
from ddpkit.sync.base import GradientSync
from ddpkit.sync.buckets import Bucket, by_kind


class InGraphSync(GradientSync):
    """Averages gradients inside the compiled step, so that the compiler schedules communication together with computation.

    Gradients lie in flat buckets, those that the backward pass finishes first in the first bucket.
    `make_step(..., strategy="ingraph", compile=True)` traces the all-reduces of the buckets right after the gradients.

    Args:
        module: any module.
        others: further modules with trained parameters.
        buckets: how many buckets, for each device and dtype.
        optimizer_in_graph: trace the optimizer's update (Adam, AdamW or SGD) into the step as well. A batch that the compiled
            code does not hold for is then an error, since a rank that updated by other code would drift away from the others.
            `.grad` holds the average before clipping. Accumulated micro-batches are averaged and applied outside the graph.
        timeout: of ddpkit's own collectives; those in the graph wait as long as the process group says
            (`ddpkit.init_process_group(timeout=...)`).
        check_every: as in `GradientSync`.
    """

    plain_loop: ClassVar[bool] = False
    separable: ClassVar[bool] = False

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
        self._group = dist.group.WORLD.group_name if self.world_size > 1 else ""  # type: ignore[union-attr]

    def reduce(self) -> None:
        """Refuses the plain loop."""
        raise InputError(
            "strategy=ingraph averages inside the compiled step: use ddpkit.make_step(..., strategy='ingraph', compile=True)."
        )

    @property
    def flat(self) -> list[Tensor]:
        """The buckets."""
        return [bucket.body for bucket in self._buckets]

    @property
    def views(self) -> dict[str, Tensor]:
        """The slice of each trained parameter, by name."""
        found = {n: view for bucket in self._buckets for n, view in zip(bucket.numbers, bucket.views, strict=True)}
        return {name: found[n] for n, (name, _) in enumerate(self._named)}

    def slices(self, flat: Sequence[Tensor]) -> dict[str, Tensor]:
        """The slice of each trained parameter in tensors like the buckets, by operations that can be traced."""
        found = {}
        for bucket, body in zip(self._buckets, flat, strict=True):
            for n, view in zip(bucket.numbers, bucket.views, strict=True):
                start = int(view.storage_offset() - bucket.body.storage_offset())
                order = _by_memory(view)
                part = body[start : start + view.numel()].view([view.shape[d] for d in order])
                found[self._named[n][0]] = part.permute([order.index(d) for d in range(view.dim())])
        return found

    def reduce_in_graph(self, gradients: Mapping[str, Tensor | None], flat: Sequence[Tensor]) -> None:
        """Writes averaged gradients into the buckets, by operations that can be traced.

        Args:
            gradients: by the parameters' names; none counts as zero.
            flat: the buckets.
        """
        started = []
        for bucket, body in zip(self._buckets, flat, strict=True):
            packed = self._packed(bucket, gradients, body)
            if self.world_size > 1:
                averages = self.comm.averages(body.device)
                packed = packed if averages else packed * (1 / self.world_size)
                packed = torch.ops._c10d_functional.all_reduce(packed, "avg" if averages else "sum", self._group)  # noqa: SLF001
            started.append(packed)
        for packed, body in zip(started, flat, strict=True):
            body.copy_(torch.ops._c10d_functional.wait_tensor(packed) if self.world_size > 1 else packed)  # noqa: SLF001

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

    @torch.no_grad()
    def used_anywhere(self, used: Mapping[str, bool]) -> dict[str, bool]:
        """Which parameters have a gradient on any rank (one collective); warns of those that have none on this one.

        Args:
            used: by name, which have one here; the same names on every rank.
        """
        if self.world_size == 1:
            return dict(used)
        flags = torch.tensor(list(used.values()), dtype=torch.int32, device=self.flat[0].device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        anywhere = dict(zip(used, map(bool, flags.tolist()), strict=True))
        for name, elsewhere in anywhere.items():
            if elsewhere and not used[name]:
                warnings.warn(
                    f"Parameter {name!r} has no gradient on rank {self.rank} but has one elsewhere: it counts as zero here.",
                    stacklevel=4,
                )
        return anywhere

    @torch.no_grad()
    def average(self) -> None:
        """Averages what lies in the buckets by the same collectives outside of a graph."""
        for body in self.flat:
            self.all_reduce(body)

    @torch.no_grad()
    def averaged(self, gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Averages of other gradients by name, zero where there is none."""
        averages = {}
        for name, parameter in self._named:
            gradient = gradients.get(name)
            averages[name] = torch.zeros_like(parameter) if gradient is None else gradient.clone()
            self.all_reduce(averages[name])
        return averages

    @contextmanager
    def around_backward(self) -> Iterator[None]:
        """Around each compiled step: what `synchronize()` is for other strategies."""
        self._calls += 1
        with nullcontext() if self._watch is None else self._watch.waiting(self._calls, computes=True):
            yield
            if self._watch is not None and self._check_every and self._calls % self._check_every == 0:
                agreement.compare_parameters(self._modules, self._calls)
        if self.world_size > 1:
            self._sent = sum(body.nbytes for body in self.flat), len(self._buckets)


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
