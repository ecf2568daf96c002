"""The optimizer's step as part of a traced graph."""

import copy
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from ddpkit.compile.parity import Difference
from ddpkit.errors import InputError
from ddpkit.torch_private import note_step

_ADAM, _SGD = ("exp_avg", "exp_avg_sq", "step"), ("momentum_buffer",)
_LEFT_OUT = ("amsgrad", "maximize", "differentiable", "dampening")
_FLAGS = ("nesterov", "decoupled_weight_decay", "fused", "capturable")
_NUMBERS = {True: ("lr", "weight_decay", "beta1", "beta2", "eps"), False: ("lr", "weight_decay", "momentum")}


def form_of(optimizer: Optimizer) -> Hashable:
    """All that the graph of an update depends on: which parameters are in which group, and every setting that is no number.

    Raises:
        InputError: the optimizer is another one than Adam, AdamW and SGD, or has an option that is not served.
    """
    if type(optimizer) not in (Adam, AdamW, SGD):
        raise InputError(
            f"optimizer_in_graph serves Adam, AdamW and SGD, not {type(optimizer).__name__}: leave it out."
        )
    for group in optimizer.param_groups:
        for option in _LEFT_OUT:
            if group.get(option):
                raise InputError(f"optimizer_in_graph does not serve {option}={group[option]}: leave one of them out.")
    return tuple(
        (*map(group.get, _FLAGS), _has_momentum(group), *map(id, group["params"])) for group in optimizer.param_groups
    )


def _has_momentum(group: Mapping[str, Any]) -> bool:
    return bool(group.get("momentum"))


class GraphUpdate:
    """Adam, AdamW or SGD as operations that can be traced, with clipping, and without effect where the gradient is not finite.

    The state stays where the optimizer keeps it and in its form, so that checkpoints and schedulers work as ever. Learning
    rates, moments and all other numbers are read at every step. Formulas: Kingma and Ba, arXiv:1412.6980; Loshchilov and
    Hutter, arXiv:1711.05101.

    Args:
        optimizer: whose update is traced; its hooks are not called.
        clip_norm: upper bound of the norm of the global gradient.
        trained: what is trained, by name.

    Raises:
        InputError: as `form_of`; or the optimizer lacks a parameter, or has one that is not among them.
    """

    def __init__(self, optimizer: Optimizer, clip_norm: float | None, trained: Mapping[str, Tensor]) -> None:
        form_of(optimizer)
        self._optimizer, self._clip_norm = optimizer, clip_norm
        self._is_adam = not isinstance(optimizer, SGD)
        self._last: list[float] = []
        parameters = list(trained.values())
        group_of = {p: n for n, group in enumerate(optimizer.param_groups) for p in group["params"]}
        if missing := [name for name, p in trained.items() if p not in group_of]:
            raise InputError(
                f"The optimizer lacks {len(missing)} trained parameters ({missing[0]!r} ...), so optimizer_in_graph cannot "
                "update them: give them to the optimizer, freeze them, or leave that option out."
            )
        if others := {p for p in group_of if p.requires_grad} - set(parameters):
            raise InputError(
                f"The optimizer has {len(others)} parameters that are not the model's: leave optimizer_in_graph out."
            )
        self._parameters = parameters
        self._groups = [group_of[p] for p in parameters]
        for p, n in zip(parameters, self._groups, strict=True):
            settings = optimizer.param_groups[n]
            if self._is_adam and p.is_cuda and not (settings["fused"] or settings["capturable"]):
                raise InputError("optimizer_in_graph counts steps on the GPU: make the optimizer with fused=True.")
        count = len(_NUMBERS[self._is_adam]) * len(optimizer.param_groups)
        self._hyper = torch.zeros(count, dtype=torch.float64, device=parameters[0].device)

    def form(self) -> Hashable:
        """What the traced update depends on beside tensors, as plain values."""
        groups = self._optimizer.param_groups
        settings = tuple((*map(group.get, _FLAGS), _has_momentum(group)) for group in groups)
        return type(self._optimizer).__name__, self._clip_norm, settings, tuple(self._groups)

    def _keys(self, group: int) -> tuple[str, ...]:
        """What the optimizer keeps of a parameter."""
        if self._is_adam:
            return _ADAM
        return _SGD if _has_momentum(self._optimizer.param_groups[group]) else ()

    def _state(self, p: Tensor, group: int) -> list[Tensor]:
        """The optimizer's state of a parameter; what it would make at its first step where there is none."""
        keys = self._keys(group)
        state = self._optimizer.state[p] if keys else {}
        for key in keys:
            if state.get(key) is None:
                state[key] = (
                    torch.zeros((), dtype=torch.float32, device=p.device)
                    if key == "step"
                    else torch.zeros_like(p, requires_grad=False)
                )
        return [state[key] for key in keys]

    def _read_numbers(self) -> None:
        """Brings the numbers of all groups to where the graph reads them."""
        numbers: list[Any] = []
        for group in self._optimizer.param_groups:
            numbers += [group["lr"], group["weight_decay"]]
            numbers += [*group["betas"], group["eps"]] if self._is_adam else [group["momentum"]]
        on_device = {n: x for n, x in enumerate(numbers) if isinstance(x, Tensor) and x.is_cuda}
        plain = [0.0 if n in on_device else float(x) for n, x in enumerate(numbers)]
        if plain != self._last:
            self._last = plain
            self._hyper.copy_(torch.tensor(plain, dtype=torch.float64))
        for n, x in on_device.items():  # the host does not wait for them
            self._hyper[n].copy_(x.detach().reshape(()))

    def tensors(self, present: Tensor) -> list[Tensor]:
        """What the graph reads and writes besides parameters and gradients.

        Args:
            present: `[parameters]` bool, which parameters have a gradient on any rank.
        """
        self._read_numbers()
        pairs = zip(self._parameters, self._groups, strict=True)
        return [present, self._hyper, *(tensor for p, group in pairs for tensor in self._state(p, group))]

    def __call__(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        flat: Sequence[Tensor],
        tensors: Sequence[Tensor],
    ) -> Tensor:
        """Updates parameters and state in place.

        Args:
            parameters: what is trained.
            gradients: averaged, in the same order.
            flat: all averaged gradients, zeros between them; for the norm.
            tensors: as from `tensors()`.

        Returns:
            `[]`, the norm of the global gradient before clipping.
        """
        present, hyper, *state = tensors
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(body) for body in flat]))
        applied = torch.isfinite(norm) & present
        factor = None if self._clip_norm is None else (self._clip_norm / (norm + 1e-6)).clamp(max=1.0)
        many = len(_NUMBERS[self._is_adam])
        rest = iter(state)
        step: Callable[..., tuple[Tensor, ...]] = _adam if self._is_adam else _sgd
        for n, (p, g, group) in enumerate(zip(parameters, gradients, self._groups, strict=True)):
            kept = [next(rest) for _ in self._keys(group)]
            settings = self._optimizer.param_groups[group]
            numbers = [hyper[many * group + i] for i in range(many)]
            if factor is not None:
                g = g * factor.to(g.dtype)  # noqa: PLW2901
            new = step(settings, *numbers, p, g, *kept)
            for old, value in zip((p, *kept), new, strict=True):
                old.copy_(torch.where(applied[n], value.to(old.dtype), old))
        return norm

    @torch.no_grad()
    def differences(
        self,
        names: Sequence[str],
        updated: Sequence[Tensor],
        gradients: Sequence[Tensor],
        present: Tensor,
        tolerance: float,
        shape: str,
    ) -> list[Difference]:
        """How far the graph's update is from the optimizer's own, beyond the rounding of the parameters; nothing changes.

        Args:
            names: of the parameters, which are as before the update.
            updated: what the graph made of them.
            gradients: averaged.
            present: as in `tensors()`.
            tolerance: allowed.
            shape: the sizes of the batch, in words.
        """
        measured = []
        expected = self._expected(gradients, present)
        for name, before, one, two in zip(names, self._parameters, updated, expected, strict=True):
            rounding = 8 * torch.finfo(before.dtype).eps * float(before.double().norm()) / tolerance
            scale = float((two.double() - before.double()).norm()) + rounding
            gap = float((one.double() - two.double()).norm())
            measured.append(Difference(f"{name} after the update", gap / scale if scale else gap, tolerance, shape))
        return measured

    def _expected(self, gradients: Sequence[Tensor], present: Tensor) -> list[Tensor]:
        """What a copy of the optimizer makes of copies of the parameters."""
        twin = copy.deepcopy(self._optimizer)
        pairs = zip(self._optimizer.param_groups, twin.param_groups, strict=True)
        copies = {p: q for old, new in pairs for p, q in zip(old["params"], new["params"], strict=True)}
        parameters = [copies[p] for p in self._parameters]
        for q, gradient, is_present in zip(parameters, gradients, present.tolist(), strict=True):
            q.grad = gradient.clone() if is_present else None
        norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if self._clip_norm is None else self._clip_norm)
        if torch.isfinite(norm):
            twin.step()
        return parameters

    def note(self) -> None:
        """Lets schedulers know that a step was taken."""
        note_step(self._optimizer)


# torch.optim's functional forms would fix weight decay and momentum in the graph (docs/explanation/torch.md).
def _adam(
    settings: Mapping[str, Any],
    lr: Tensor,
    decay: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    eps: Tensor,
    p: Tensor,
    g: Tensor,
    mean: Tensor,
    square: Tensor,
    step: Tensor,
) -> tuple[Tensor, ...]:
    """Parameter and state after a step; the bias corrections are computed in float64."""
    kind = _precise(p)
    if settings["decoupled_weight_decay"]:
        p = p * (1 - lr * decay).to(kind)
    else:
        g = g + p * decay.to(kind)
    mean = mean + (g - mean) * (1 - beta1).to(kind)
    square = square * beta2.to(kind) + g * g * (1 - beta2).to(kind)
    step = step + 1
    rate = (lr / (1 - beta1 ** step.double())).to(kind)
    root = (1 - beta2 ** step.double()).sqrt().to(kind)
    return p - rate * (mean / (square.sqrt() / root + eps.to(kind))), mean, square, step


def _sgd(
    settings: Mapping[str, Any],
    lr: Tensor,
    decay: Tensor,
    momentum: Tensor,
    p: Tensor,
    g: Tensor,
    velocity: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Parameter and state after a step."""
    lr, decay, momentum = (number.to(_precise(p)) for number in (lr, decay, momentum))
    g = g + p * decay
    if velocity is None:
        return (p - lr * g,)
    velocity = velocity * momentum + g
    g = g + velocity * momentum if settings["nesterov"] else velocity
    return p - lr * g, velocity


def _precise(p: Tensor) -> torch.dtype:
    """The dtype for numbers that a parameter is computed with: no coarser than float32."""
    return torch.promote_types(p.dtype, torch.float32)
