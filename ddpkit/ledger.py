"""What happened in the steps that ranks have not looked at together yet, and how they tell each other."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpkit.ranks.gather import Gather
from ddpkit.record import STEP_COLUMNS, finite
from ddpkit.step import Step

LOSS_COLUMNS = tuple(name for name in STEP_COLUMNS if name.startswith("loss"))
SPLIT_COLUMNS = ("compute", "sync", "optimizer")
Timing = Callable[[], dict[str, float | None]]


class Ledger:
    """Takes down, step by step, the norm of the gradient and whether eager code ran where compiled code was asked for.

    Nothing is waited for: the norms stay on the device until they are taken.

    Args:
        step: what is called; `note()` follows each call.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._eager_batches = step.eager_batches
        self._norms: list[Tensor] = []
        self._eager: list[float] = []

    def __len__(self) -> int:
        return len(self._norms)

    def note(self, *, keep: bool = True) -> None:
        """Takes down the step just made.

        Args:
            keep: copies the norm, which the next step may overwrite; not needed where `pack` follows before that.
        """
        norm = self._step.grad_norm.detach()
        self._norms.append(norm.clone() if keep else norm)
        self._eager.append(float(self._step.eager_batches > self._eager_batches))
        self._eager_batches = self._step.eager_batches

    def take(self) -> tuple[list[Tensor], list[float]]:
        """Of the steps since the last time: their norms `[]` on the device, and 1 for each that ran eager code. Forgets them."""
        taken = self._norms, self._eager
        self._norms, self._eager = [], []
        return taken


@dataclass(frozen=True)
class Report:
    """What all ranks have told of the steps since the report before; every array is `[ranks, ...]`.

    Attributes:
        step: number of the last of the steps.
        row: what this rank knew of its row of `steps.csv` when it was sent; None where the step makes none.
        row_steps: how many steps the row stands for.
        timing: tells where this rank's step spent its time (`Step.timing`), and waits for a device; None without a row.
        losses: `[ranks, losses]`, as sent.
        norms: `[ranks, steps]`, of the gradient in each step; NaN or infinite where the update was not applied.
        lr: `[ranks, 1]` where the device alone knew the learning rate, else `[ranks, 0]`.
        seconds: `[ranks, 1]`, walltime of a step.
        signals: `[ranks, 1]`, the number of a signal to stop by, or 0.
        out_of_time: `[ranks, 1]`, 1 where the time limit would be passed.
        eager: `[ranks, steps]`, 1 for each step that ran eager code.
    """

    step: int
    row: dict[str, Any] | None
    row_steps: int
    timing: Timing | None
    losses: np.ndarray
    norms: np.ndarray
    lr: np.ndarray
    seconds: np.ndarray
    signals: np.ndarray
    out_of_time: np.ndarray
    eager: np.ndarray

    @cached_property
    def skipped(self) -> int:
        """How many updates were not applied on some rank."""
        return count_bad(self.norms)

    def whole_row(self, rank: int, seconds: float, splits: Mapping[str, float | None]) -> dict[str, Any]:
        """The row of `steps.csv`; there must be one.

        Args:
            rank: this one.
            seconds: walltime of a step.
            splits: what `timing` returned.
        """
        assert self.row is not None
        row = self.row | {f"seconds_{name}": splits.get(name) for name in SPLIT_COLUMNS}
        row |= {"seconds": seconds, "grad_norm": float(self.norms[rank, -1])}
        if self.lr.size:
            row["lr"] = float(self.lr[rank, 0])
        means = self.losses.mean(axis=0)
        return row | {name: finite(float(value)) for name, value in zip(LOSS_COLUMNS, means, strict=True)}


@dataclass(frozen=True)
class _Sent:
    """What this rank remembers of a report: see `Report`, and the widths of its parts in the order in which they travel."""

    step: int
    row: dict[str, Any] | None
    row_steps: int
    timing: Timing | None
    widths: tuple[int, ...]


class Reports:
    """Sends what a ledger has taken down to all ranks, in one small gather, and reads it some steps later.

    Args:
        ledger: of this rank.
        gather: carries the reports.
    """

    def __init__(self, ledger: Ledger, gather: Gather) -> None:
        self._ledger, self._gather = ledger, gather

    def __len__(self) -> int:
        """How many have been sent and not been received."""
        return len(self._gather)

    @property
    def oldest(self) -> int:
        """The step of the report that `receive` gives next; there must be one."""
        return int(self._gather.oldest.step)

    def send(
        self,
        step: int,
        losses: Sequence[Tensor],
        lr: Sequence[Tensor],
        *,
        seconds: float,
        signal: int,
        out_of_time: bool,
        row: dict[str, Any] | None = None,
        row_steps: int = 0,
        timing: Timing | None = None,
    ) -> None:
        """Sends a report on the steps since the last one; the attributes of `Report` tell what is what.

        Args:
            step: number of the last of the steps.
            losses: `[]` each; as many on every rank.
            lr: `[]`, the learning rate where reading it would wait for the device; else none.
            seconds: walltime of a step.
            signal: to stop by, or 0.
            out_of_time: whether the time limit would be passed.
            row: what is known of the row.
            row_steps: how many steps it stands for.
            timing: of the row's last step.
        """
        norms, eager = self._ledger.take()
        numbers = [seconds, float(signal), float(out_of_time), *eager]
        values = pack((losses, norms, lr), numbers, self._gather.device)
        widths = (len(losses), len(norms), len(lr), 1, 1, 1, len(eager))
        self._gather.send(values, _Sent(step, row, row_steps, timing, widths))

    def receive(self) -> Report:
        """The oldest report that has been sent; there must be one.

        Raises:
            as `Gather.receive`.
        """
        received = self._gather.receive()
        assert received is not None
        everyone, sent = received
        parts = [everyone[:, begin:end] for begin, end in pairwise(accumulate(sent.widths, initial=0))]
        return Report(sent.step, sent.row, sent.row_steps, sent.timing, *parts)


def pack(groups: Iterable[Sequence[Tensor]], numbers: Sequence[float], device: torch.device) -> Tensor:
    """Groups of tensors `[]` of one device, then numbers of the host, as one tensor `[tensors + numbers]` float64 on `device`.

    A GPU is not waited for, and gets a launch for each group (for each tensor, where they are not float64) and one copy.
    """
    present = [group for group in groups if group]
    packed = torch.empty(
        sum(map(len, present)) + len(numbers), dtype=torch.float64, device=present[0][0].device if present else device
    )
    end = 0
    for group in present:
        begin, end = end, end + len(group)
        torch.stack(tuple(group), out=packed[begin:end])
    on_gpu = packed.device.type == "cuda"
    packed[end:].copy_(torch.tensor(numbers, dtype=torch.float64, pin_memory=on_gpu), non_blocking=on_gpu)
    return packed.to(device)


def count_bad(values: np.ndarray) -> int:
    """In how many steps some rank's value is not finite, of `[ranks, steps]`."""
    return int((~np.isfinite(values)).any(axis=0).sum())


def describe_lost(report: Report, later: Sequence[Report]) -> str:
    """A sentence without its end on updates that were lost and losses that are not finite.

    Args:
        report: the first that tells of some.
        later: those that were sent since.
    """
    norms = np.concatenate([report.norms, *(one.norms for one in later)], axis=1)
    kinds = [
        ("loss", report.losses[:, :1], report.step),
        ("gradient's norm", norms, later[-1].step if later else report.step),
    ]
    if not np.isfinite(report.norms[:, :-1]).all():  # what came first is the cause
        kinds.reverse()
    lost = count_bad(norms)
    applied = f"; {lost} update{'s were' if lost > 1 else ' was'} not applied" if lost else ""
    return next(filter(None, (name_bad(*kind) for kind in kinds))) + applied


def name_bad(what: str, values: np.ndarray, last: int) -> str:
    """A sentence without its end on values that are NaN or infinite; empty where all are finite.

    Args:
        what: what they are of.
        values: `[ranks, steps]`.
        last: number of the last of the steps.
    """
    bad = ~np.isfinite(values)
    if not bad.any():
        return ""
    ranks, steps = np.flatnonzero(bad.any(axis=1)), np.flatnonzero(bad.any(axis=0)) + last + 1 - values.shape[1]
    value = values[ranks[0], np.flatnonzero(bad[ranks[0]])[0]] if len(steps) == 1 else "NaN or infinite"
    where = f"rank {_some(ranks)}" if len(ranks) < len(values) or len(values) == 1 else "every rank"
    return f"The {what} was {value} at step{'s' * (len(steps) > 1)} {_some(steps)} on {where}"


def _some(numbers: np.ndarray) -> str:
    """The first few of ascending numbers."""
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown} and {len(numbers) - 8} more" if len(numbers) > 8 else shown
