"""Flat storage whose slices are gradients."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ddpkit.errors import InputError
from ddpkit.torch_private import copy_all

LARGE = 2**14  # elements of a tensor from which on memory counts more than calls, on a CPU
ALIGNMENT = 64  # bytes; fused optimizers read aligned slices faster


class Bucket:
    """Gradients of one device and dtype that travel in one collective, and the flags in its tail.

    Attributes:
        numbers: the parameters' numbers, in the order of their slices.
        views: the slices, shaped and strided as the parameters.
        body: all slices, `[floats]`.
        wire: what is all-reduced: body and tail, `[floats + tail]`, in the dtype on the wire.
        tail: the end of `wire`.
        scale: what gradients are multiplied by on their way to the wire.
        one_by_one: whether each gradient is best brought there as it comes, while it is in the processor's cache.
        awaited: places in `numbers` of gradients that have not arrived.
        sums: of gradients on the wire that together are finite only if each of them is; where asked for.
        launched: whether it travels.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        numbers: Sequence[int],
        tail: int,
        wire_dtype: torch.dtype | None,
        *,
        home: Tensor | None = None,
        scale: float = 1.0,
        check_finite: bool = False,
    ) -> None:
        own = [parameters[n] for n in numbers]
        first = own[0] if home is None else home
        dtype = first.dtype.to_real()
        if wire_dtype is not None and any(p.is_complex() for p in own):
            raise InputError("reduce_dtype does not serve complex parameters: leave it out.")
        step = max(1, ALIGNMENT // dtype.itemsize)
        sizes = [-(-p.numel() * (2 if p.is_complex() else 1) // step) * step for p in own]
        starts = [0, *accumulate(sizes)]
        self.numbers = list(numbers)
        flat = torch.zeros(starts[-1] + tail, dtype=dtype, device=first.device)
        self.body = flat[: starts[-1]]
        self.wire = flat
        self.views = [_slice(flat, start, p) for start, p in zip(starts, own, strict=False)]
        self.wire_views = self.views
        if wire_dtype not in (None, dtype):
            self.wire = torch.zeros_like(flat, dtype=wire_dtype)
            self.wire_views = [_slice(self.wire, start, p) for start, p in zip(starts, own, strict=False)]
        self.wire_body = self.wire[: starts[-1]]
        self.tail = self.wire[starts[-1] :]
        self.compressed = self.wire is not flat
        self.scale = scale
        self._factor = torch.tensor(scale, dtype=torch.float64, device="cpu")
        self._check_finite = check_finite
        self._sum_dtype = torch.float32 if self.wire.element_size() < 4 else None
        self.one_by_one = not self.wire.is_cuda and starts[-1] > LARGE * len(own)
        self.begin()

    def begin(self) -> None:
        """Expects the gradients of a step."""
        self.launched = False
        self.awaited = set(range(len(self.numbers)))
        self.sums: list[Tensor] = []

    def place(self, slot: int, gradient: Tensor | None) -> None:
        """Brings one gradient, times `scale`, into `wire`; None counts as zero."""
        wire = self.wire_views[slot]
        self.awaited.discard(slot)
        if gradient is None:
            wire.zero_()
            return
        if gradient is not wire or self.scale != 1:
            # one pass over memory where copying and scaling would be two
            torch.mul(gradient.detach(), self._factor, out=wire)
        if self._check_finite:
            self._add_up(wire)

    @torch.no_grad()
    def fill(self, gradients: Sequence[Tensor | None]) -> None:
        """Brings this rank's gradients, times `scale`, into `wire`, but for those that are there.

        Args:
            gradients: of the parameters `numbers`; None counts as zero.
        """
        if self.one_by_one:
            for slot in sorted(self.awaited):
                self.place(slot, gradients[slot])
            return
        from_elsewhere: list[Tensor] = []
        targets: list[Tensor] = []
        for gradient, wire in zip(gradients, self.wire_views, strict=True):
            if gradient is None:
                wire.zero_()
            elif gradient is not wire:
                from_elsewhere.append(gradient)
                targets.append(wire)
        if targets:
            copy_all(targets, from_elsewhere)
        if self.scale != 1:
            self.wire_body.mul_(self.scale)
        if self._check_finite:
            self._add_up(self.wire_body)

    def _add_up(self, numbers: Tensor) -> None:
        real = torch.view_as_real(numbers) if numbers.is_complex() else numbers
        self.sums.append(real.sum(dtype=self._sum_dtype))

    @torch.no_grad()
    def unpack(self) -> None:
        """Brings the average from the wire to the slices."""
        if self.compressed:
            self.body.copy_(self.wire_body)


def _slice(flat: Tensor, start: int, parameter: Tensor) -> Tensor:
    """The part of `flat` with the shape and memory layout of a parameter's gradient."""
    # `.data`: changes of this slice alone are counted in its version, not those of the whole buffer
    if parameter.is_complex():
        return torch.view_as_complex(flat[start : start + 2 * parameter.numel()].view(*parameter.shape, 2)).data
    strides = torch.empty_like(parameter, device="meta").stride()  # by the rule that autograd allocates gradients by
    return flat.as_strided(parameter.shape, strides, flat.storage_offset() + start).data


def by_kind(parameters: Sequence[Tensor], numbers: Sequence[int]) -> list[list[int]]:
    """The numbers grouped by device and dtype of their parameters, in order of first appearance."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for n in numbers:
        groups.setdefault((parameters[n].device, parameters[n].dtype.to_real()), []).append(n)
    return list(groups.values())


def by_size(parameters: Sequence[Tensor], numbers: Sequence[int], first_bytes: int, bytes_: int) -> list[list[int]]:
    """The numbers cut, in order, into buckets of one device and dtype: a small one first, so that sending begins early."""
    buckets: list[list[int]] = []
    full: dict[tuple[torch.device, torch.dtype], tuple[list[int], int]] = {}
    limit = first_bytes
    for n in numbers:
        kind = parameters[n].device, parameters[n].dtype.to_real()
        open_, size = full.pop(kind, ([], 0))
        open_.append(n)
        size += parameters[n].nbytes
        if size >= limit:
            buckets.append(open_)
            limit = bytes_
        else:
            full[kind] = open_, size
    return buckets + [open_ for open_, _ in full.values()]
