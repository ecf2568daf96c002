"""Clipping and the optimizer's step, without effect where the gradient is not finite."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ddpkit.torch_private import skips_by_flag
from ddpkit.trained import Trained


class Update:
    """Applies the gradients that lie in `.grad`.

    Args:
        trained: the parameters.
        optimizer: steps them.
        clip_norm: upper bound of the norm of the global gradient.

    Attributes:
        grad_norm: `[]`, norm of the global gradient before clipping, of the last step.
        skipped: `[]` int64, how many updates were not applied.
    """

    def __init__(self, trained: Trained, optimizer: Optimizer, clip_norm: float | None) -> None:
        self._trained, self._optimizer, self._clip_norm = trained, optimizer, clip_norm
        device = trained.parameters[0].device
        self.grad_norm = torch.zeros((), device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self) -> None:
        """Clips and steps. Waits for the device where the optimizer cannot decide there whether to skip."""
        skip = self._clip()
        if skip.device.type != "cpu" and self.decides_on_device:
            self._step_by_flag(skip)
        elif not skip:
            self._optimizer.step()

    def on_device(self) -> None:
        """The same where the optimizer can (`decides_on_device`), as device work alone."""
        skip = self._clip()
        with _said_to_be_capturable(self._optimizer):
            self._step_by_flag(skip)

    @property
    def decides_on_device(self) -> bool:
        """Whether the optimizer skips a step by a flag on the device, as those made with `fused=True` do."""
        return skips_by_flag(self._optimizer)

    def note(self, norm: Tensor) -> Tensor:
        """Takes down the norm of the global gradient; returns whether it is not finite."""
        self.grad_norm = norm
        not_finite = ~torch.isfinite(norm)
        self.skipped += not_finite
        return not_finite

    def warn_if_skipped(self) -> None:
        """Tells of an update that was not applied where the host need not wait to know it: on a CPU."""
        if self.grad_norm.device.type == "cpu" and not torch.isfinite(self.grad_norm):
            self._warn_of_skipped()

    def _clip(self) -> Tensor:
        trained = [p for p in self._trained.parameters if p.requires_grad and p.grad is not None]
        gradients = [p.grad for p in trained if p.grad is not None]
        not_finite = self.note(torch.nn.utils.get_total_norm(gradients))
        if self._clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(trained, self._clip_norm, self.grad_norm)
        return not_finite

    def _step_by_flag(self, skip: Tensor) -> None:
        """Has the optimizer step, or leave all as it is if `skip` (a 0-d bool) holds, without a look at it."""
        optimizer: Any = self._optimizer
        optimizer.grad_scale, optimizer.found_inf = None, skip.to(torch.float32)
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf

    def _warn_of_skipped(self) -> None:
        bad = [
            name
            for name, p in zip(self._trained.names, self._trained.parameters, strict=True)
            if p.requires_grad and p.grad is not None and not torch.isfinite(p.grad).all()
        ]
        others = f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
        what = f"The gradient of {bad[0]!r}{others}" if bad else "The norm of the gradient"
        warnings.warn(f"{what} is NaN or infinite: the update was not applied.", stacklevel=4)


@contextmanager
def _said_to_be_capturable(optimizer: Optimizer) -> Iterator[None]:
    """While a CUDA graph is captured, torch refuses to step an optimizer whose groups do not have this option.

    Fused optimizers, which alone come here, keep all that they need on the device with and without it, and compute the same.
    """
    groups = [group for group in optimizer.param_groups if not group.get("capturable", True)]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False
