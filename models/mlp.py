"""Multilayer perceptrons whose weights keep the variance of what flows through them."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpkit.errors import InputError
from ddpkit.models.graph import is_literal


class _SiLU(torch.autograd.Function):
    """x sigmoid(x) with its derivatives in closed form: fewer passes over memory than differentiating term by term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return _SiLUGradient.apply(grad, x)


class _SiLUGradient(torch.autograd.Function):
    """grad * silu'(x)."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(grad, x)
        return torch.ops.aten.silu_backward(grad, x)

    @staticmethod
    def backward(ctx: Any, grad_grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        grad, x = ctx.saved_tensors
        s = torch.sigmoid(x)
        # silu'' = s (1 - s) (2 + x (1 - 2 s)); the fused kernels save passes over memory
        factor = torch.addcmul(x.new_full((), 2), x, torch.rsub(s, 1, alpha=2))
        second = torch.ops.aten.sigmoid_backward(grad_grad * grad, s) * factor
        return torch.ops.aten.silu_backward(grad_grad, x), second


def silu(x: Tensor) -> Tensor:
    """X sigmoid(x)."""
    return x * torch.sigmoid(x) if is_literal() else _SiLU.apply(x)


def shifted_softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) - log 2."""
    return F.softplus(x) - math.log(2)


NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "ssp": shifted_softplus,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
}


def uniform(*shape: int, dtype: torch.dtype) -> torch.nn.Parameter:
    """Weights of variance one."""
    return torch.nn.Parameter(torch.empty(*shape, dtype=dtype).uniform_(-math.sqrt(3), math.sqrt(3)))


class MLP(torch.nn.Module):
    """Layers x @ (alpha W) with a nonlinearity between them; no biases.

    Weights start uniform with variance one; alpha = gain / sqrt(fan) keeps the variance of activations (forward) or of
    derivatives (backward), with gain sqrt(2) next to a nonlinearity.

    Args:
        dims: widths from input to output.
        nonlinearity: a key of `NONLINEARITIES`, or None for a product of matrices.
        forward_normalize: normalise by the fan-in; by the fan-out where False.
        dtype: of the weights.
    """

    def __init__(
        self, dims: Sequence[int], nonlinearity: str | None, *, forward_normalize: bool = True, dtype: torch.dtype
    ) -> None:
        super().__init__()
        if nonlinearity is not None and nonlinearity not in NONLINEARITIES:
            raise InputError(f"nonlinearity {nonlinearity!r} is unknown: choose one of {', '.join(NONLINEARITIES)}")
        self.nonlinearity = nonlinearity
        layers = len(dims) - 1
        self.weights = torch.nn.ParameterList([uniform(a, b, dtype=dtype) for a, b in pairwise(dims)])
        self.alphas = []
        for layer, (a, b) in enumerate(pairwise(dims)):
            outer = 0 if forward_normalize else layers - 1
            gain = 1 if nonlinearity is None or layer == outer else math.sqrt(2)
            self.alphas.append(gain / math.sqrt(a if forward_normalize else b))

    def matrices(self) -> list[Tensor]:
        """The scaled matrices, those of neighbouring layers multiplied where no nonlinearity stands between them."""
        scaled = [alpha * weight for alpha, weight in zip(self.alphas, self.weights, strict=True)]
        if self.nonlinearity is not None or len(scaled) == 1:
            return scaled
        return [torch.linalg.multi_dot(scaled)]

    def hidden(self, x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """What the last matrix is multiplied with: `x` `[rows, dims[0]]` if it is the only one, else `[rows, dims[-2]]`."""
        for matrix in matrices[:-1]:
            assert self.nonlinearity is not None
            x = NONLINEARITIES[self.nonlinearity](x @ matrix)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, dims[0]]` -> `[rows, dims[-1]]`."""
        matrices = self.matrices()
        return self.hidden(x, matrices) @ matrices[-1]
