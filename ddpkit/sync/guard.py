"""Keeping a bad update from being applied."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ddpkit.errors import InputError


class Guard:
    """Watches the optimizers that step some parameters.

    An optimizer made with `fused=True` (Adam, AdamW, SGD, Adagrad) takes a flag on the device, `found_inf`, by which it skips
    a step, as under `torch.amp.GradScaler`. Where all optimizers do, nobody has to wait for the device.

    Attributes:
        steps: how many steps they took; ranks must agree on it.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._known = {id(p) for p in parameters}
        self._flag: Tensor | None = None
        self._optimizers: dict[int, tuple[int, bool]] = {}  # parameters held, whether any is known
        self._fused: dict[int, bool] = {}
        self.steps = 0
        reference = weakref.ref(self)

        def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            del args, kwargs
            guard = reference()
            if guard is not None:
                guard._before_step(optimizer)  # noqa: SLF001  (its own hook)

        self._handle = register_optimizer_step_pre_hook(before_step)
        weakref.finalize(self, self._handle.remove)

    @property
    def device_decides(self) -> bool:
        """Whether every optimizer seen skips a step by the flag."""
        return bool(self._fused) and all(self._fused.values())

    def arm(self, flag: Tensor) -> None:
        """Sets the flag that optimizers obey: `[]` float32, 1 to skip."""
        self._flag = flag

    def close(self) -> None:
        """Lets the optimizers go."""
        self._handle.remove()

    def _before_step(self, optimizer: Optimizer) -> None:
        held = sum(len(group["params"]) for group in optimizer.param_groups)
        count, mine = self._optimizers.get(id(optimizer), (-1, False))
        if held != count:
            known = [id(p) in self._known for group in optimizer.param_groups for p in group["params"]]
            mine = any(known)
            self._optimizers[id(optimizer)] = held, mine
            if mine:
                self._fused[id(optimizer)] = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        if not mine:
            return
        self.steps += 1
        flagged = hasattr(optimizer, "found_inf") and optimizer.found_inf is not self._flag  # by a GradScaler, say
        if self._flag is not None and self._fused[id(optimizer)] and not flagged:
            optimizer.found_inf = self._flag  # type: ignore[attr-defined]


def parse_dtype(name: "str | torch.dtype | None") -> torch.dtype | None:
    """The dtype on the wire: None (that of the gradients), `"float32"` or `"bfloat16"`."""
    dtypes = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if name not in dtypes:
        raise InputError(f"reduce_dtype={name} is unknown: use float32 or bfloat16, or leave it out.")
    return dtypes[name]
