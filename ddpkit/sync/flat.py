"""One flat gradient, one all-reduce."""

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddpkit.capture.recording import as_one
from ddpkit.errors import InputError, RankDisagreementError
from ddpkit.ranks.device import wait_for_event
from ddpkit.sync import agreement, flags
from ddpkit.sync.after import AfterGradients
from ddpkit.sync.base import GradientSync, SyncStats
from ddpkit.sync.buckets import Bucket, by_kind
from ddpkit.sync.comm import TorchComm, Work
from ddpkit.sync.guard import parse_dtype
from ddpkit.torch_private import norms_of

LATE = 8  # steps after which the host looks at what a GPU has told, so that it need not wait for the device


class FlatSync(GradientSync):
    """No wrapper: after the backward pass, one all-reduce of all gradients in one persistent flat buffer.

    The buffer's slices are the `.grad`s (one buffer for each device and dtype). Where `optimizer.zero_grad()` dropped them,
    autograd has put fresh tensors in their place; those are gathered in one pass, and the slices put back. With
    `zero_grad(set_to_none=False)` gradients add up in the slices and nothing is copied at all.

    A parameter without a gradient on this rank counts as zero; one without on every rank keeps None. Which ones have one, and
    whether a gradient is NaN or infinite, rides in the buffer's tail. Ranks that took another number of optimizer steps, or
    that train other parameters, show up in the same place.

    On the CPU a bad gradient is an error at once. On a GPU the host would have to wait for that; with fused optimizers the device
    itself skips the update, and the error comes a few steps later, at the same one on all ranks, or from `stats`.

    Args:
        module: any module.
        others: further modules with trained parameters.
        comm: `"torch"` or `"mpi"`.
        timeout: seconds to wait for other ranks.
        check_every: compare checksums of the parameters every so many calls.
        reduce_dtype: None, `"float32"` or `"bfloat16"`: what travels; the average is as coarse as that.
        check_finite: look for NaN and inf. Turn it off where they are expected, as under `torch.amp.GradScaler`.
    """

    name = "custom"
    comms = ("torch", "mpi")
    # One kind for all launches, since MPI matches blocking collectives with blocking ones alone.
    overlapped: ClassVar[bool] = False

    def __init__(
        self,
        module: nn.Module,
        *others: nn.Module,
        comm: str = "torch",
        timeout: float = 600.0,
        check_every: int = 0,
        reduce_dtype: str | torch.dtype | None = None,
        check_finite: bool = True,
    ) -> None:
        self._wire_dtype = parse_dtype(reduce_dtype)
        self._check_finite = check_finite
        super().__init__(module, *others, comm=comm, timeout=timeout, check_every=check_every)

    @property
    def agreed_options(self) -> dict[str, object]:
        """What ranks must have chosen alike."""
        return super().agreed_options | {"reduce_dtype": self._wire_dtype, "check_finite": self._check_finite}

    def attach(self) -> None:
        """Lays out the flat buffers."""
        named = self._chosen()
        self._names = [name for name, _ in named]
        self._all = [parameter for _, parameter in named]
        self._warned: set[str] = set()
        self._is_recorded = False
        self._lay_out()

    def _chosen(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that may be trained, by name."""
        return list(self._modules.named_parameters())

    @property
    def flat(self) -> list[Tensor]:
        """The flat gradients, one for each device and dtype (for `overlap`: each bucket), without their tails."""
        return [bucket.body for bucket in self._buckets]

    @property
    def views(self) -> dict[str, Tensor]:
        """The slice of each trainable parameter, by name. A compiled step may write gradients there."""
        return {self._names[n]: view for n, view in self._slices.items()}

    def after_gradients(self, trained: Mapping[str, nn.Parameter], **_: Any) -> AfterGradients:
        """Gradients are written into the slices."""
        return _InSlices(self, trained)

    # --- layout ---------------------------------------------------------------------------------------------------

    @property
    def _is_late(self) -> bool:
        """Whether flags are looked at later than in the step itself."""
        return self._on_device or self._is_recorded

    def _plan(self, numbers: Sequence[int]) -> list[list[int]]:
        """Which parameters share a bucket."""
        return by_kind(self._all, numbers)

    def _lay_out(self) -> None:
        """Makes the buffers for the parameters that are trained now."""
        self._trained = [p.requires_grad for p in self._all]
        numbers = [n for n, trained in enumerate(self._trained) if trained]
        self._unseen: deque[tuple[torch.cuda.Event | None, int, Tensor, list[int]]] = deque()
        plan = self._plan(numbers) or ([[]] if self._all else [])  # an empty one carries the flags
        tail = flags.length(len(numbers), self.world_size)
        homes = [self._all[part[0]] if part else _home(self._all) for part in plan]
        self._on_device = bool(plan) and homes[-1].is_cuda
        self._keep = LATE if self._on_device else 0
        self._buckets = [
            Bucket(
                self._all,
                part,
                tail if i == len(plan) - 1 else 0,
                self._wire_dtype,
                home=homes[i],
                scale=1.0 if self.comm.averages(homes[i].device) else 1 / self.world_size,
                check_finite=self._check_finite and not self._on_device,
            )
            for i, part in enumerate(plan)
        ]
        self._slices = {n: view for b in self._buckets for n, view in zip(b.numbers, b.views, strict=True)}
        self._works: list[Work | None] = []
        self._order = [n for bucket in self._buckets for n in bucket.numbers]
        self._guard.arm(None)
        if not self._buckets:
            return
        last = self._buckets[-1].wire
        # One row more than are waited for: a step whose recording failed has a number, and tells nothing.
        self._told = torch.empty((LATE + 2, tail), dtype=last.dtype, device="cpu", pin_memory=last.is_cuda)
        self._steps = torch.zeros((), dtype=last.dtype, device=last.device)
        self._template = torch.ones(tail, dtype=last.dtype, device=last.device)
        self._template[len(numbers) :] = 0
        self._missing: list[int] = []  # places in `_order` of those without a gradient on this rank
        self._absent: list[int] = []  # on every rank, as last known
        self._replaced: list[str] = []
        self._bad = torch.zeros((), dtype=torch.float32, device=last.device)
        self._norms: dict[int, Tensor] = {}  # of each bucket
        self._guard.arm(self._bad)

    # --- a step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reduce(self) -> None:
        """Gathers, all-reduces, and puts the slices in place."""
        self._look_back(self._keep)
        if not self._buckets:
            return None
        stale = self._stale()
        gradients = self._gradients(self._order)
        for number, bucket in enumerate(self._buckets):
            if not bucket.launched:
                self._launch(number, gradients, stale=stale)
        stale = self._told_stale  # what the others know of this rank: a change that came later waits for the next call
        self._hand_over(gradients)
        del gradients
        for work in self._works:
            if work is not None:
                work.wait()
        self._works = []
        for bucket in self._buckets:
            bucket.unpack()
            bucket.begin()
        self._deliver(stale=stale)
        if not stale:
            return None
        self._lay_out_anew()
        return self.reduce()  # what is an average by now stays as it is

    def _stale(self) -> bool:
        """Whether other parameters are trained than at the last layout."""
        return any(p.requires_grad is not trained for p, trained in zip(self._all, self._trained, strict=True))

    def _lay_out_anew(self) -> None:
        """Makes new buffers, once all ranks have said that they will."""
        self._look_back()
        if self.world_size > 1:
            agreement.verify(agreement.describe(self._modules))
        self._lay_out()

    def _gradients(self, numbers: Sequence[int]) -> dict[int, Tensor | None]:
        """The gradients that this rank has, by the parameters' numbers."""
        gradients: dict[int, Tensor | None] = {}
        for n in numbers:
            gradient = gradients[n] = self._all[n].grad
            if gradient is not None and gradient.is_sparse:
                self._refuse_sparse(n)
        return gradients

    def _refuse_sparse(self, n: int) -> None:
        raise InputError(f"Parameter {self._names[n]!r} has a sparse gradient: make its embedding with sparse=False.")

    def _launch(self, number: int, gradients: dict[int, Tensor | None], *, stale: bool = False) -> None:
        """Fills a bucket and starts its all-reduce."""
        if number == len(self._buckets) - 1:
            self._count_steps()
        bucket = self._buckets[number]
        self._fill(number, gradients, stale=stale)
        bucket.launched = True
        self._works.append(self.comm.all_reduce(bucket.wire, overlapped=self.overlapped))

    def _fill(self, number: int, gradients: dict[int, Tensor | None], *, stale: bool) -> None:
        """Brings into a bucket what it sends."""
        bucket = self._buckets[number]
        bucket.fill([gradients[n] for n in bucket.numbers])
        if self._check_finite and self._is_late:
            self._note_norms(number, bucket)
        if number == len(self._buckets) - 1:
            self._fill_tail(gradients, stale=stale)

    def _count_steps(self) -> None:
        """Brings the number of optimizer steps so far to where it is sent from."""
        self._steps.fill_(self._guard.steps % flags.STEPS_FROM * self._buckets[-1].scale)

    def _note_norms(self, number: int, bucket: Bucket) -> None:
        """Takes a sum for each parameter that is not finite if its gradient is not.

        On the CPU the host looks right after the collective and finds the parameter in the average, so any sums do, such as the
        buckets' own. On a GPU it looks when the average may be gone.
        """
        norms = norms_of(bucket.wire_views, 1) if bucket.numbers else []
        self._norms[number] = torch.stack(list(norms)) if norms else bucket.tail[:0]

    def _fill_tail(self, gradients: dict[int, Tensor | None], *, stale: bool) -> None:
        """Writes which parameters have a gradient here, and what this rank says of itself."""
        tail, scale = self._buckets[-1].tail, self._buckets[-1].scale
        count = len(self._order)
        missing = [i for i, n in enumerate(self._order) if gradients[n] is None]
        if missing != self._missing:
            self._template[:count] = 1
            self._template[missing] = 0
            self._missing = missing
            self._replaced = self._modules.changes() if missing and self.world_size > 1 else []
        torch.mul(self._template, scale, out=tail)
        row = count + flags.ROW * self.rank
        tail[row + flags.STEPS].copy_(self._steps)
        self._told_stale = stale
        if stale:
            tail[row + flags.STALE].fill_(scale)
        if self._replaced:
            tail[row + flags.REPLACED].fill_(scale)
        added, fresh = self._added_or_fresh(gradients)
        if added is not fresh:
            tail[row + (flags.ADDED if added else flags.FRESH)].fill_(scale)
        if self._check_finite:
            self._fill_bad(tail, row + flags.BAD)

    def _fill_bad(self, tail: Tensor, place: int) -> None:
        """Writes NaN where a gradient is not finite: any number times 0 is 0 or NaN."""
        device = tail.device
        if self._is_late:
            norms = [self._norms[number].to(device, torch.float32) for number in range(len(self._buckets))]
            bad = torch.cat(norms).mul_(0)
            tail[: len(self._order)].add_(bad)
            tail[place].copy_(bad.sum())
        else:
            sums = [x.to(device, torch.float32) for bucket in self._buckets for x in bucket.sums]
            if sums:
                tail[place].copy_(torch.stack(sums).sum().mul_(0))

    def _added_or_fresh(self, gradients: dict[int, Tensor | None]) -> tuple[bool, bool]:
        """Whether there are gradients in the slices, where they lay after the last step, and whether there are others."""
        inside = [gradients[n] is view for n, view in self._slices.items() if gradients[n] is not None]
        return any(inside), not all(inside)

    def _hand_over(self, gradients: dict[int, Tensor | None]) -> None:
        """Puts the slices in place while they travel."""
        missing = {self._order[i] for i in self._missing}
        for n, view in self._slices.items():
            if gradients[n] is not view and n not in missing:
                self._all[n].grad = view

    def _deliver(self, *, stale: bool) -> None:
        """Looks at the flags, now where that is free or needed, else later; puts in place what only other ranks have."""
        tail = self._buckets[-1].tail
        if self._is_late and self._guard.device_decides and not self._missing and not stale:
            self._absent = []
            self._flag_on_device(tail)
            self._tell_host(tail)
        else:
            self._bad.zero_()
            present = self._judge(tail.tolist(), self._calls, stale=stale).present
            if present and not any(present) and not stale:
                self._refuse_empty()
            self._absent = [i for i in self._missing if not present[i]]
            if self._missing:
                self._warn(present)
            for i in self._missing:
                n = self._order[i]
                self._all[n].grad = self._slices[n] if present[i] else None

    def _refuse_empty(self) -> None:
        raise InputError(
            "No parameter has a gradient on any rank: call backward() before synchronize(), and make_sync() after "
            "whatever replaces the module's parameters."
        )

    def _warn(self, present: list[bool]) -> None:
        """Tells once of each parameter that has a gradient on other ranks only."""
        for i in self._missing:
            name = self._names[self._order[i]]
            if present[i] and name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"Parameter {name!r} has no gradient on rank {self.rank} but has one elsewhere: it counts as zero here.",
                    stacklevel=5,
                )

    # --- recorded steps -------------------------------------------------------------------------------------------

    def recordable_average(self) -> Callable[[], None] | None:
        """The same on the slices, where nothing but the device decides: every parameter with a gradient anywhere has one here,
        the optimizer skips a step by a flag, and torch.distributed communicates.
        """
        if not self._has_one_average or not isinstance(self.comm, TorchComm) or not self._buckets:
            return None
        if self._stale() or self._missing != self._absent or not self._guard.device_decides:
            return None
        self._is_recorded = True
        return self._average_on_device

    @property
    def _has_one_average(self) -> bool:
        """Whether `synchronize()`, given all gradients, does what is recorded; not where a class of the user's has another."""
        return type(self).reduce is FlatSync.reduce and self.acts == "after backward"

    @torch.no_grad()
    def _average_on_device(self) -> None:
        gradients = self._gradients(self._order)
        for number, bucket in enumerate(self._buckets):
            self._fill(number, gradients, stale=False)
            as_one(self._communicate, [bucket.wire])
        self._hand_over(gradients)
        for bucket in self._buckets:
            bucket.unpack()
            bucket.begin()
        self._flag_on_device(self._buckets[-1].tail)

    @contextmanager
    def around_recorded(self) -> Iterator[None]:
        """Looks at the flags of earlier steps, and sends those of this one."""
        self._look_back(self._keep)
        self._count_steps()
        with super().around_recorded():
            yield
        if self.world_size > 1:
            self._sent = sum(bucket.wire.nbytes for bucket in self._buckets), len(self._buckets)
        self._tell_host(self._buckets[-1].tail)

    # --- flags ----------------------------------------------------------------------------------------------------

    def _flag_on_device(self, tail: Tensor) -> None:
        """Sets the flag by which optimizers skip a step."""
        fine = flags.is_fine(tail, len(self._order), self.world_size)
        torch.logical_not(fine, out=self._bad)
        # Whoever looks at the gradient (clipping, another optimizer) sees that it is not to be used.
        first = self._buckets[0].body[:1]
        first.add_(torch.where(fine, 0.0, torch.nan).to(first))

    def _tell_host(self, tail: Tensor) -> None:
        """Sends the tail to the host without waiting."""
        row = self._told[self._calls % len(self._told)]
        row.copy_(tail, non_blocking=True)
        event = torch.cuda.Event() if tail.is_cuda else None  # type: ignore[no-untyped-call]
        if event is not None:
            event.record()
        self._unseen.append((event, self._calls, row, self._absent))

    def _look_back(self, keep: int = 0) -> None:
        """Raises what the flags of earlier steps say that nobody has looked at yet.

        Args:
            keep: so many of the last steps are left for later. The same number on all ranks: they stop at the same step.
        """
        while len(self._unseen) > keep:
            event, call, row, absent = self._unseen.popleft()
            if event is not None:
                wait_for_event(event, time.monotonic(), self.timeout, "The all-reduce of an earlier step")
            self._refuse_present(self._judge(row.tolist(), call, stale=False), call, absent)

    def _refuse_present(self, told: flags.Told, call: int, absent: Sequence[int]) -> None:
        """Raises where a parameter has a gradient somewhere that the recording takes to have one nowhere."""
        if came := [self._names[self._order[i]] for i in absent if told.shares[i] > 0]:
            raise RankDisagreementError(
                f"At synchronize() number {call} parameter {came[0]!r} had a gradient on other ranks, but had none on any when "
                "the step was recorded: leave cuda_graphs out."
            )

    def _judge(self, tail: list[float], call: int, *, stale: bool) -> flags.Told:
        """Reads the tail of the all-reduced buffer, and raises what is wrong."""
        told = flags.read(tail, len(self._order))
        changed = self._changed() if told.stale else []
        flags.require_alike(told, call, stale_here=stale, changed=changed, replaced=self._replaced)
        if told.bad:
            flags.refuse_non_finite(told, call, self._not_finite(told))
        return told

    def _changed(self) -> list[str]:
        """Names of the parameters whose `requires_grad` is not as it was laid out for."""
        known = zip(self._names, self._all, self._trained, strict=True)
        return [name for name, p, trained in known if p.requires_grad is not trained]

    def _not_finite(self, told: flags.Told) -> list[str]:
        """Names of the parameters whose average is not finite."""
        if self._is_late:  # the average may be gone
            return [self._names[n] for n, is_bad in zip(self._order, told.not_finite, strict=True) if is_bad]
        return [name for name, view in self.views.items() if not torch.isfinite(view).all()]

    @property
    def stats(self) -> SyncStats:
        """What the last `synchronize()` did. On a GPU, reading waits for it, and raises what its flags say."""
        self._look_back()
        return super().stats


class _InSlices(AfterGradients):
    """Copies each gradient to its slice of the flat buffer, so that nothing is left to gather."""

    def __init__(self, sync: FlatSync, trained: Mapping[str, nn.Parameter]) -> None:
        super().__init__(trained)
        self._sync = sync
        self._layout: object = None
        self._places: list[Tensor] = []

    @property
    def places(self) -> list[Tensor]:  # type: ignore[override]
        """The slices; tensors made for the purpose until the next `synchronize()` has laid them out for these parameters."""
        layout = self._sync._slices  # noqa: SLF001  (one dict for each layout)
        if self._layout is not layout:
            views = self._sync.views
            fit = set(self.trained) == set(views)
            self._places = [views[name] if fit else torch.empty_like(p) for name, p in self.trained.items()]
            self._layout = layout
        return self._places


def _home(parameters: Sequence[Tensor]) -> Tensor:
    """A tensor of the device and dtype in which flags travel where no parameter is trained."""
    first = parameters[0]
    return first if first.dtype.is_floating_point else torch.empty(0, device=first.device)
