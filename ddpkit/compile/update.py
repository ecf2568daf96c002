"""The optimizer's step as part of a traced graph."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from ddpkit.compile.parity import Difference
from ddpkit.errors import InputError

_ADAM, _SGD = ("exp_avg", "exp_avg_sq", "step"), ("momentum_buffer",)
_LEFT_OUT = ("amsgrad", "maximize", "differentiable", "dampening")


class GraphUpdate:
    """Adam, AdamW or SGD as operations that can be traced, with clipping, and without effect where the gradient is not finite.

    The state stays where the optimizer keeps it and in its form, so that checkpoints and schedulers work as ever. Formulas:
    Kingma and Ba, arXiv:1412.6980; Loshchilov and Hutter, arXiv:1711.05101.

    Args:
        optimizer: whose update is traced; its hooks are not called.
        clip_norm: upper bound of the norm of the global gradient.

    Raises:
        InputError: the optimizer is another one, or has an option that is not served.
    """

    def __init__(self, optimizer: Optimizer, clip_norm: float | None) -> None:
        if type(optimizer) not in (Adam, AdamW, SGD):
            raise InputError(
                f"optimizer_in_graph serves Adam, AdamW and SGD, not {type(optimizer).__name__}: leave it out."
            )
        for group in optimizer.param_groups:
            for option in _LEFT_OUT:
                if group.get(option):
                    raise InputError(
                        f"optimizer_in_graph does not serve {option}={group[option]}: leave one of them out."
                    )
        self._optimizer, self._clip_norm = optimizer, clip_norm
        self._is_adam = not isinstance(optimizer, SGD)
        momentum = any(group.get("momentum") for group in optimizer.param_groups)
        self._keys: tuple[str, ...] = _ADAM if self._is_adam else _SGD if momentum else ()
        self._numbers: tuple[float, ...] = ()
        self._hyper = torch.empty(0)

    def adopt(self, parameters: Sequence[Tensor]) -> None:
        """Takes over what is trained."""
        group_of = {p: n for n, group in enumerate(self._optimizer.param_groups) for p in group["params"]}
        if missing := sum(p not in group_of for p in parameters):
            raise InputError(
                f"The optimizer lacks {missing} trained parameters, so optimizer_in_graph cannot update them."
            )
        if others := {p for p in group_of if p.requires_grad} - set(parameters):
            raise InputError(
                f"The optimizer has {len(others)} parameters that are not the model's: leave optimizer_in_graph out."
            )
        self._parameters = list(parameters)
        self._groups = [group_of[p] for p in parameters]
        if self._is_adam:
            for p in parameters:
                settings = self._optimizer.param_groups[group_of[p]]
                if p.is_cuda and not (settings["fused"] or settings["capturable"]):
                    raise InputError("optimizer_in_graph counts steps on the GPU: make the optimizer with fused=True.")

    def _state(self, p: Tensor) -> list[Tensor]:
        """The optimizer's state of a parameter; what it would make at its first step where there is none."""
        state = self._optimizer.state[p]
        for key in self._keys:
            if state.get(key) is None:
                is_count = key == "step"
                state[key] = torch.zeros((), device=p.device) if is_count else torch.zeros_like(p, requires_grad=False)
        return [state[key] for key in self._keys]

    def tensors(self, present: Tensor) -> list[Tensor]:
        """What the graph reads and writes besides parameters and gradients.

        Args:
            present: `[parameters]` bool, which parameters have a gradient on any rank.
        """
        groups = self._optimizer.param_groups
        numbers = tuple(float(group[key]) for group in groups for key in ("lr", "weight_decay"))
        if numbers != self._numbers:
            self._numbers = numbers
            self._hyper = torch.tensor(numbers, dtype=torch.float64, device=present.device)
        return [present, self._hyper, *(tensor for p in self._parameters for tensor in self._state(p))]

    def __call__(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        flat: Sequence[Tensor],
        tensors: Sequence[Tensor],
    ) -> Tensor:
        """Updates parameters and state in place.

        Args:
            parameters: those adopted.
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
        many = len(self._keys)
        for n, (p, g, group) in enumerate(zip(parameters, gradients, self._groups, strict=True)):
            kept = state[many * n : many * (n + 1)]
            settings = self._optimizer.param_groups[group]
            step = _adam if self._is_adam else _sgd
            if factor is not None:
                g = g * factor.to(g.dtype)  # noqa: PLW2901
            new = step(settings, hyper[2 * group], hyper[2 * group + 1], p, g, *kept)
            for old, value in zip((p, *kept), new, strict=True):
                old.copy_(torch.where(applied[n], value, old))
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
            names: of the parameters adopted, which are as before the update.
            updated: what the graph made of them.
            gradients: averaged.
            present: as in `tensors()`.
            tolerance: allowed.
            shape: the sizes of the batch, in words.
        """
        found = []
        theirs = self._expected(gradients, present)
        for name, before, one, two in zip(names, self._parameters, updated, theirs, strict=True):
            rounding = 8 * torch.finfo(before.dtype).eps * float(before.double().norm()) / tolerance
            scale = float((two.double() - before.double()).norm()) + rounding
            gap = float((one.double() - two.double()).norm())
            found.append(Difference(f"{name} after the update", gap / scale if scale else gap, tolerance, shape))
        return found

    def _expected(self, gradients: Sequence[Tensor], present: Tensor) -> list[Tensor]:
        """What a copy of the optimizer makes of copies of the parameters."""
        twin = copy.deepcopy(self._optimizer)
        pairs = zip(self._optimizer.param_groups, twin.param_groups, strict=True)
        copies = {p: q for old, new in pairs for p, q in zip(old["params"], new["params"], strict=True)}
        mine = [copies[p] for p in self._parameters]
        for q, gradient, there in zip(mine, gradients, present.tolist(), strict=True):
            q.grad = gradient.clone() if there else None
        if self._clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(mine, self._clip_norm)
        twin.step()
        return mine

    def note(self) -> None:
        """Lets schedulers know that a step was taken."""
        self._optimizer._opt_called = True  # type: ignore[attr-defined]  # noqa: SLF001  (torch's own mark)


def _adam(
    settings: dict[str, Any],
    lr: Tensor,
    decay: Tensor,
    p: Tensor,
    g: Tensor,
    mean: Tensor,
    square: Tensor,
    step: Tensor,
) -> tuple[Tensor, ...]:
    """Parameter and state after a step; the bias corrections are computed in float64."""
    (beta1, beta2), eps = settings["betas"], settings["eps"]
    if settings["decoupled_weight_decay"]:
        p = p * (1 - lr * decay).to(p.dtype)
    else:
        g = g + p * decay.to(p.dtype)
    mean = mean + (g - mean) * (1 - beta1)
    square = square * beta2 + g * g * (1 - beta2)
    step = step + 1
    rate = (lr / (1 - beta1 ** step.double())).to(p.dtype)
    root = (1 - beta2 ** step.double()).sqrt().to(p.dtype)
    return p - rate * (mean / (square.sqrt() / root + eps)), mean, square, step


def _sgd(
    settings: dict[str, Any], lr: Tensor, decay: Tensor, p: Tensor, g: Tensor, momentum: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Parameter and state after a step."""
    g = g + p * decay.to(p.dtype)
    if momentum is None:
        return (p - lr.to(p.dtype) * g,)
    momentum = momentum * settings["momentum"] + g
    g = g + momentum * settings["momentum"] if settings["nesterov"] else momentum
    return p - lr.to(p.dtype) * g, momentum
