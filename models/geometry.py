"""What a model sees of an edge: its length in a radial basis, and its direction in spherical harmonics."""

import math

import torch
from e3nn import o3
from torch import Tensor

from ddpkit.errors import InputError


def wigner_3j(l1: int, l2: int, l3: int) -> Tensor:
    """e3nn's real Wigner 3j symbols `[2 l1 + 1, 2 l2 + 1, 2 l3 + 1]` in float64, always on the CPU."""
    with torch.device("cpu"):
        return o3.wigner_3j(l1, l2, l3, dtype=torch.float64)


class SphericalHarmonics(torch.nn.Module):
    """Real spherical harmonics of unit vectors up to `l_max`, in e3nn's order, with "component" normalisation.

    Degree l is the coupling of degree l - 1 with degree 1: Y_l = c_l sum_ab <l-1 a; 1 b | l m> Y_{l-1,a} Y_{1,b}, with
    c_l such that |Y_l|^2 = 2 l + 1.
    """

    def __init__(self, l_max: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.l_max = l_max
        with torch.device("cpu"):
            direction = torch.tensor([0.36, 0.48, 0.8], dtype=torch.float64)
            last = math.sqrt(3) * direction
            for l in range(2, l_max + 1):
                coupling = wigner_3j(l - 1, 1, l).reshape(-1, 2 * l + 1)
                value = (last[:, None] * direction).reshape(-1) @ coupling
                true = o3.spherical_harmonics(l, direction, normalize=False, normalization="component")
                factor = torch.dot(true, value) / torch.dot(value, value)
                last = factor * value
                self.register_buffer(f"coupling_{l}", (factor * coupling).to(dtype), persistent=False)

    def forward(self, unit: Tensor) -> Tensor:
        """`[edges, 3]` -> `[edges, (l_max + 1)^2]`."""
        degrees = [torch.ones_like(unit[:, :1])]
        if self.l_max > 0:
            degrees.append(math.sqrt(3) * unit)
        for l in range(2, self.l_max + 1):
            outer = degrees[-1].unsqueeze(2) * unit.unsqueeze(1)
            degrees.append(outer.flatten(1) @ getattr(self, f"coupling_{l}"))
        return torch.cat(degrees, 1)


def polynomial_cutoff(x: Tensor, p: float) -> Tensor:
    """The envelope of J. Gasteiger et al. (arXiv 2003.03123, eq. 8): 1 at x = 0, 0 with two zero derivatives from x = 1
    on.

    Args:
        x: lengths over the cutoff.
        p: exponent, at least 2.
    """
    a, b, c = (p + 1) * (p + 2) / 2, p * (p + 2), p * (p + 1) / 2
    return (1 - x.pow(p) * (a - x * (b - c * x))) * (x < 1)


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


def check_cutoffs(cutoffs: Tensor | None, r_max: float, species: int) -> None:
    """Raises InputError unless `r_max` and the cutoffs of pairs of species can be used."""
    if r_max <= 0:
        raise InputError(f"r_max is {r_max}: give a cutoff in Å greater than zero")
    if cutoffs is None:
        return
    if cutoffs.shape != (species, species):
        raise InputError(
            f"cutoffs has the shape {tuple(cutoffs.shape)}: give one cutoff for each pair of {species} species"
        )
    if not bool(((cutoffs > 0) & (cutoffs <= r_max)).all()):
        raise InputError(f"cutoffs of pairs must lie between 0 and r_max ({r_max} Å)")
