"""A small model of the contract that can be exported: embedded atoms, which ask for their neighbours' density."""

import torch
from torch import nn

from ddpkit.inference.exchange import from_owners


class EmbeddedAtom(nn.Module):
    """Pairs, and a density that is passed on to the neighbours once.

    As a model of the contract it is written down in positions and a strain, and differentiated by both; for inference in edge
    vectors. The two share only `_pairs`.
    """

    def __init__(self, species=("H", "O"), r_max=4.0, strength=1.0):
        super().__init__()
        self.species, self.r_max = tuple(species), float(r_max)
        self.strength = nn.Parameter(strength * torch.linspace(0.5, 1.0, len(self.species), dtype=torch.float64))

    def _pairs(self, vectors, species, centre, neighbour):
        """Repulsion and density of each edge, zero from the cutoff on."""
        length = vectors.square().sum(1).sqrt()
        envelope = torch.relu(1 - length / self.r_max) ** 3
        strength = self.strength[species[centre]] * self.strength[species[neighbour]]
        return strength * envelope * torch.exp(-length), envelope * self.strength[species[neighbour]]

    def forward(self, batch):
        with torch.enable_grad():
            positions = batch.positions.detach().requires_grad_()
            strain = positions.new_zeros(batch.num_frames, 3, 3).requires_grad_()
            i, j = batch.edge_index
            vectors = positions[j] + batch.edge_shift - positions[i]
            symmetric = (strain + strain.transpose(1, 2)) / 2
            vectors = vectors + (symmetric[batch.frame[i]] @ vectors[:, :, None])[:, :, 0]
            pair, near = self._pairs(vectors, batch.species, i, j)
            density = positions.new_zeros(len(positions)).index_add(0, i, near)
            second = positions.new_zeros(len(positions)).index_add(0, i, near * (density + density**2)[j])
            atomic = second + positions.new_zeros(len(positions)).index_add(0, i, pair)
            energy = positions.new_zeros(batch.num_frames).index_add(0, batch.frame, atomic)
            by_positions, by_strain = torch.autograd.grad(energy.sum(), (positions, strain), allow_unused=True)
        result = {"energy": energy.detach(), "forces": -by_positions}
        if batch.cell is not None:
            result["stress"] = by_strain / torch.linalg.det(batch.cell).abs()[:, None, None]
        return result

    def for_inference(self):
        return _Local(self)


class _Local(nn.Module):
    message_passing, exchange_width = True, 2

    def __init__(self, model):
        super().__init__()
        self.model = model.requires_grad_(requires_grad=False)

    def forward(self, vectors, species, centre, neighbour, outgoing, incoming):
        del incoming
        with torch.enable_grad():
            vectors = vectors.detach().requires_grad_()
            pair, near = self.model._pairs(vectors, species, centre, neighbour)
            density = vectors.new_zeros(outgoing.shape[0]).index_add(0, centre, near)
            every = from_owners(torch.stack((density, density**2), 1), species.shape[0])
            atomic = vectors.new_zeros(outgoing.shape[0]).index_add(0, centre, pair + near * every[neighbour].sum(1))
            (slopes,) = torch.autograd.grad(atomic.sum(), vectors)
        return atomic.detach(), slopes
