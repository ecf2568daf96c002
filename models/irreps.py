"""Irreps of O(3) and features made of them."""

from torch import Tensor

Irrep = tuple[int, int]  # degree, parity
Irreps = dict[Irrep, int]  # channels of each
Features = dict[Irrep, Tensor]  # [atoms, 2 l + 1, channels] of each
Paths = tuple[tuple[int, Irrep], ...]  # degree of the harmonics, and irrep that the product goes to


def product_irreps(a: Irrep, b: Irrep) -> list[Irrep]:
    """What the product of two irreps decomposes into."""
    return [(l, a[1] * b[1]) for l in range(abs(a[0] - b[0]), a[0] + b[0] + 1)]
