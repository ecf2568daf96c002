"""What happened in the steps that ranks have not looked at together yet."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ddpkit.step import Step


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
