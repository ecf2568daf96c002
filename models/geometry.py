"""What a model sees of an edge: its length in a radial basis, and its direction in spherical harmonics."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from e3nn import o3
from torch import Tensor

from ddpkit.models.graph import is_literal


def wigner_3j(l1: int, l2: int, l3: int) -> Tensor:
    """e3nn's real Wigner 3j symbols `[2 l1 + 1, 2 l2 + 1, 2 l3 + 1]` in float64, always on the CPU."""
    with torch.device("cpu"):
        return o3.wigner_3j(l1, l2, l3, dtype=torch.float64)


class SphericalHarmonics(torch.nn.Module):
    """Real spherical harmonics of unit vectors up to `l_max`, in e3nn's order, with "component" normalisation.

    Degree l is the coupling of degree l - 1 with degree 1: Y_l = c_l sum_ab <l-1 a; 1 b | l m> Y_{l-1,a} Y_{1,b}, with
    c_l such that |Y_l|^2 = 2 l + 1. So they are homogeneous harmonic polynomials, whose gradients are of degree l - 1:
    dY_{l,m} / du_b = sum_a G_l[a, b, m] Y_{l-1,a}.
    """

    slopes: Tensor

    def __init__(self, l_max: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.l_max = l_max
        slopes = torch.zeros((l_max + 1) ** 2, 3, (l_max + 1) ** 2, dtype=torch.float64, device="cpu")
        with torch.device("cpu"):
            direction = torch.tensor([0.36, 0.48, 0.8], dtype=torch.float64)
            last = math.sqrt(3) * direction
            if l_max > 0:
                slopes[0, :, 1:4] = math.sqrt(3) * torch.eye(3, dtype=torch.float64)
            for l in range(2, l_max + 1):
                coupling = wigner_3j(l - 1, 1, l).reshape(-1, 2 * l + 1)
                value = (last[:, None] * direction).reshape(-1) @ coupling
                true = o3.spherical_harmonics(l, direction, normalize=False, normalization="component")
                factor = torch.dot(true, value) / torch.dot(value, value)
                last = factor * value
                self.register_buffer(f"coupling_{l}", (factor * coupling).to(dtype), persistent=False)
                # Euler's theorem: l Y_l = sum_b u_b dY_l / du_b, of which Y_l = sum_b u_b (factor coupling)_b is the only
                # equivariant form
                gradient = l * factor * coupling.reshape(2 * l - 1, 3, 2 * l + 1)
                slopes[(l - 1) ** 2 : l**2, :, l**2 : (l + 1) ** 2] = gradient
        # [lower degrees, 3, all]: of the highest degree there is no gradient
        self.register_buffer("slopes", slopes[: max(l_max, 1) ** 2].to(dtype), persistent=False)

    def forward(self, unit: Tensor) -> Tensor:
        """`[edges, 3]` -> `[edges, (l_max + 1)^2]`."""
        couplings = [getattr(self, f"coupling_{l}") for l in range(2, self.l_max + 1)]
        value: Tensor
        if is_literal():
            value = torch.cat(_degrees(unit, self.l_max, couplings), 1)
        else:
            value = _Harmonics.apply(unit, self.l_max, self.slopes, *couplings)
        return value


def _degrees(unit: Tensor, l_max: int, couplings: Sequence[Tensor]) -> list[Tensor]:
    """The harmonics of each degree."""
    degrees = [torch.ones_like(unit[:, :1])]
    if l_max > 0:
        degrees.append(math.sqrt(3) * unit)
    for coupling in couplings:
        outer = degrees[-1].unsqueeze(2) * unit.unsqueeze(1)
        degrees.append(outer.flatten(1) @ coupling)
    return degrees


class _Harmonics(torch.autograd.Function):
    """Spherical harmonics, with their gradient in closed form: fewer operations than differentiating step by step."""

    @staticmethod
    def forward(ctx: Any, unit: Tensor, l_max: int, slopes: Tensor, *couplings: Tensor) -> Tensor:  # type: ignore[override]
        value = torch.cat(_degrees(unit, l_max, couplings), 1)
        ctx.save_for_backward(value, slopes)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        value, slopes = ctx.saved_tensors
        every = (grad @ slopes.flatten(0, 1).t()).unflatten(1, slopes.shape[:2])
        lower = value[:, : slopes.shape[0]].unsqueeze(2)
        return (every * lower).sum(1), *[None] * (len(ctx.needs_input_grad) - 1)


class _Cutoff(torch.autograd.Function):
    """A derivative of `polynomial_cutoff`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, order: int) -> Tensor:  # type: ignore[override]
        ctx.p, ctx.order = p, order
        ctx.save_for_backward(x)
        return cutoff_derivative(x, p, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * _Cutoff.apply(x, ctx.p, ctx.order + 1), None, None


def cutoff_derivative(x: Tensor, p: float, order: int) -> Tensor:
    """The derivative of `polynomial_cutoff` of an order, at least 1 less than p; the function itself for order 0.

    Of the shape of `x`, like that.
    """
    # of x^q it is q (q - 1) ... x^(q - order)
    a, b, c = (math.prod(q - n for n in range(order)) for q in (p, p + 1, p + 2))
    a, b, c = a * (p + 1) * (p + 2) / 2, b * p * (p + 2), c * p * (p + 1) / 2
    value = x.pow(p - order) * (a - x * (b - c * x))
    return (-value if order else 1 - value) * (x < 1)


def polynomial_cutoff(x: Tensor, p: float) -> Tensor:
    """The envelope of J. Gasteiger et al. (arXiv 2003.03123, eq. 8): 1 at x = 0, 0 with two zero derivatives from x = 1
    on.

    Args:
        x: lengths over the cutoff, of any shape.
        p: exponent, at least 2.

    Returns:
        Of the shape of `x`.
    """
    value: Tensor = cutoff_derivative(x, p, 0) if is_literal() else _Cutoff.apply(x, p, 0)
    return value


class RadialBasis(torch.nn.Module):
    """Bessel functions sin(n pi x) / (pi x) of the length over the cutoff x (J. Gasteiger et al., arXiv 2003.03123)."""

    def __init__(self, num_bessels: int, trainable: bool, dtype: torch.dtype) -> None:
        super().__init__()
        roots = torch.arange(1, num_bessels + 1, dtype=dtype)
        if trainable:
            self.roots = torch.nn.Parameter(roots)
        else:
            self.register_buffer("roots", roots)

    def forward(self, x: Tensor) -> Tensor:
        """`[edges, 1]` -> `[edges, num_bessels]`."""
        angle = math.pi * x
        return torch.sin(angle * self.roots) / angle
