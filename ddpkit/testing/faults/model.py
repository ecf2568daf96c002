"""A small potential that compiles in seconds and whose energies can be made NaN while it runs."""

import functools
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddpkit.batch import Batch


@functools.cache
def _cell() -> Tensor:
    """0, or NaN once after `inside` was told so: the device looks there, so that a replayed step does too."""
    cell = torch.zeros((), dtype=torch.float64, pin_memory=True)
    inside = sys.modules.get("sitecustomize")
    cells = getattr(inside, "cells", None)
    if cells is not None:
        cells.append(cell)
        if getattr(inside, "poisoned", False):
            cell.fill_(torch.nan)
    return cell


@torch.library.custom_op("ddpkit_testing::as_told", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def as_told(energy: Tensor) -> Tensor:
    """The energies, or NaN once after `inside` was told so; also in compiled code."""
    if energy.is_cuda:
        cell = _cell()
        told = cell.to(energy.device, non_blocking=True)
        cell.copy_(torch.zeros_like(told), non_blocking=True)
        return energy + told
    inside = sys.modules.get("sitecustomize")
    if getattr(inside, "poisoned", False):
        inside.poisoned = False  # type: ignore[union-attr]
        return torch.full_like(energy, torch.nan)
    return energy.clone()


@as_told.register_fake
def _(energy: Tensor) -> Tensor:
    return torch.empty_like(energy)


as_told.register_autograd(lambda _, gradient: gradient)


class Pairs(nn.Module):
    """Atomic energies from a smooth function of pair distances and species.

    Args:
        species: chemical symbols; a batch's `species` are indices into this list.
        r_max: cutoff, Å.
        shifts: energy of an isolated atom of each species, eV.
        precision: `"float64"` or other; derivatives follow.
        width: of the hidden layers.
        facts: what else is known of the data; not used.
    """

    def __init__(
        self,
        species: Sequence[str],
        r_max: float,
        shifts: Sequence[float],
        precision: str,
        width: int = 16,
        **facts: object,
    ) -> None:
        super().__init__()
        del facts
        self.species, self.r_max = tuple(species), float(r_max)
        dtype = torch.float64 if precision == "float64" else torch.float32
        self.embedding = nn.Parameter(torch.randn(len(species), width, dtype=dtype))
        self.first = nn.Parameter(torch.randn(width, width, dtype=dtype) / width**0.5)
        self.second = nn.Parameter(torch.randn(width, 1, dtype=dtype) / width**0.5)
        self.shift = nn.Parameter(torch.tensor(shifts, dtype=torch.float64).to(dtype))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Energies `[frames]` in eV and forces `[atoms, 3]` in eV/Å."""
        with torch.enable_grad():
            positions = batch.positions.detach().requires_grad_()
            i, j = batch.edge_index
            vector = positions[j] + batch.edge_shift - positions[i]
            length = vector.square().sum(1, keepdim=True).sqrt()
            envelope = (1 - (length / self.r_max).square()).clamp(min=0).pow(3).to(self.first.dtype)
            x = (
                self.embedding[batch.species[i]]
                * self.embedding[batch.species[j]]
                * torch.exp(-length).to(envelope.dtype)
            )
            pair = (torch.nn.functional.silu(x @ self.first) @ self.second) * envelope
            atom = self.shift[batch.species].index_add(0, i, pair[:, 0])
            energy = as_told(atom.new_zeros(batch.num_frames).index_add(0, batch.frame, atom).double())
            (slope,) = torch.autograd.grad(energy.sum(), positions, create_graph=self.training)
        result = {"energy": energy, "forces": -slope}
        return result if self.training else {name: value.detach() for name, value in result.items()}
