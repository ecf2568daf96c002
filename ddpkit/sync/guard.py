"""Keeping a bad update from being applied, and one that ranks would make apart from each other."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ddpkit.errors import InputError
from ddpkit.sync.modules import Named
from ddpkit.torch_private import skips_by_flag


class Guard:
    """Watches the optimizers that step some parameters.

    An optimizer made with `fused=True` (Adam, AdamW, SGD, Adagrad) takes a flag on the device, `found_inf`, by which it skips
    a step, as under `torch.amp.GradScaler`. Where all optimizers do, nobody has to wait for the device.

    An optimizer that steps some of the parameters and others with a gradient that no guard of this process knows is refused:
    nobody averages those.

    Args:
        modules: what holds the parameters.
        averaged: whether they are averaged over several ranks, so that others must be too.
        look: raises what is known to be wrong with the gradients; called before an optimizer steps that obeys no flag. A
            method, held weakly.

    Attributes:
        steps: how many steps optimizers took; ranks must agree on it.
        flag: what optimizers obey.
    """

    def __init__(self, modules: Named, *, averaged: bool, look: Callable[[], None]) -> None:
        self.modules = modules
        self.known: set[Tensor] = {p for _, p in modules.named_parameters()}
        self.averaged = averaged
        self.look = weakref.WeakMethod(look)
        self.flag: Tensor | None = None
        self.steps = 0
        _guards.add(self)
        _forget()
        weakref.finalize(self, _forget)
        _watch_optimizers()

    @property
    def device_decides(self) -> bool:
        """Whether every optimizer seen skips a step by the flag."""
        seen = [skips_by_flag(optimizer) for optimizer, held in _held.items() if self in held.guards]
        return bool(seen) and all(seen)

    def arm(self, flag: Tensor | None) -> None:
        """Sets the flag that optimizers obey: `[]` float32, 1 to skip."""
        self.flag = flag

    def close(self) -> None:
        """Lets the optimizers go, and takes the flag away from them."""
        _guards.discard(self)
        _forget()


@dataclass(eq=False)
class _Held:
    """What an optimizer holds, as far as guards are concerned.

    Attributes:
        parameters: of each group, when it was looked at.
        guards: those that know one of them. Weak, since this lives as long as the optimizer.
        unknown: `group, place, parameter` of those that no guard knows, where they would have to be averaged.
        flag: what was put into `found_inf`.
        current: whether no guard has come or gone since.
    """

    parameters: list[list[Tensor]]
    guards: "weakref.WeakSet[Guard]"
    unknown: list[tuple[int, int, Tensor]]
    flag: Tensor | None = None
    current: bool = True

    def fits(self, optimizer: Optimizer) -> bool:
        """Whether it still holds the same."""
        groups = optimizer.param_groups
        return self.current and len(groups) == len(self.parameters) and all(map(_same, self.parameters, groups))


def _same(parameters: list[Tensor], group: dict[str, Any]) -> bool:
    now = group["params"]
    return len(now) == len(parameters) and all(map(is_, parameters, now))


_guards: "weakref.WeakSet[Guard]" = weakref.WeakSet()
_held: "weakref.WeakKeyDictionary[Optimizer, _Held]" = weakref.WeakKeyDictionary()
_hooks: list[Any] = []


def _watch_optimizers() -> None:
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(before_step))


def _forget() -> None:
    """Takes flags back and has all optimizers looked at anew: guards have come or gone."""
    for optimizer, held in list(_held.items()):
        _take_back(optimizer, held)
        held.current = False


def _take_back(optimizer: Optimizer, held: _Held) -> None:
    if held.flag is not None and getattr(optimizer, "found_inf", None) is held.flag:
        del optimizer.found_inf  # type: ignore[attr-defined]
    held.flag = None


def before_step(optimizer: Optimizer, *_: Any) -> None:
    """Called before any optimizer of this process steps."""
    if not _guards:
        return
    held = _held.get(optimizer)
    if held is None or not held.fits(optimizer):
        if held is not None:
            _take_back(optimizer, held)
        held = _held[optimizer] = _look_at(optimizer)
    if not held.guards:
        return
    for group, place, parameter in held.unknown:
        if parameter.requires_grad and parameter.grad is not None:
            _refuse(optimizer, held, group, place, parameter)
    guards = list(held.guards)
    for guard in guards:
        guard.steps += 1
    if skips_by_flag(optimizer):
        _hand_flag(optimizer, held, [guard.flag for guard in guards if guard.flag is not None])
        return
    _take_back(optimizer, held)
    for guard in guards:
        if (look := guard.look()) is not None:
            look()


def _look_at(optimizer: Optimizer) -> _Held:
    parameters = [list(group["params"]) for group in optimizer.param_groups]
    guards = [guard for guard in _guards if any(p in guard.known for group in parameters for p in group)]
    unknown = [
        (group, place, parameter)
        for group, held in enumerate(parameters)
        for place, parameter in enumerate(held)
        if any(guard.averaged for guard in guards) and not any(parameter in guard.known for guard in _guards)
    ]
    return _Held(parameters, weakref.WeakSet(guards), unknown)


def _refuse(optimizer: Optimizer, held: _Held, group: int, place: int, parameter: Tensor) -> None:
    """Names what an optimizer is about to step and nobody averages."""
    kind = type(optimizer).__name__
    for guard in held.guards:
        for name, now in guard.modules.named_parameters():
            if now is parameter:
                raise InputError(
                    f"Parameter {name!r}, which {kind} steps, was put into its module after make_sync(), so its gradient is not "
                    "averaged and ranks would drift apart: call make_sync() after whatever adds or replaces parameters."
                )
    raise InputError(
        f"{kind} steps a parameter of shape {tuple(parameter.shape)} (number {place} of parameter group {group}) that no "
        "strategy averages, so ranks would drift apart: hand its module to make_sync() too, make_sync(name, model, criterion)."
    )


def _hand_flag(optimizer: Optimizer, held: _Held, flags: list[Tensor]) -> None:
    """Makes the optimizer obey the flags, unless it obeys another's, such as a `GradScaler`'s."""
    current = getattr(optimizer, "found_inf", None)
    if current is not None and current is not held.flag:
        return
    if not flags:
        _take_back(optimizer, held)
        return
    first = flags[0]
    held.flag = first if len(flags) == 1 else torch.stack([flag.to(first.device) for flag in flags]).amax()
    optimizer.found_inf = held.flag  # type: ignore[attr-defined]


def parse_dtype(name: "str | torch.dtype | None") -> torch.dtype | None:
    """The dtype on the wire: None (that of the gradients), `"float32"` or `"bfloat16"`."""
    dtypes = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if name not in dtypes:
        raise InputError(f"reduce_dtype={name} is unknown: use float32 or bfloat16, or leave it out.")
    return dtypes[name]
