"""Small potentials, written as users write theirs, and batches for them."""

import numpy as np
import torch
from torch import nn

from ddpkit.batch import Batch


def random_batch(sizes, *, seed=0, r_max=3.5, species=3, cell=False, totals=None):
    """A `Batch` of frames with these numbers of atoms, and random labels."""
    random = np.random.default_rng(seed)
    positions, frame, edges, first = [], [], [], 0
    for f, n in enumerate(sizes):
        p = random.uniform(0, (12.0 * n) ** (1 / 3), (n, 3))
        i, j = np.nonzero((np.linalg.norm(p[:, None] - p, axis=-1) < r_max) & ~np.eye(n, dtype=bool))
        positions.append(p)
        frame += [f] * n
        edges.append(np.stack([i, j]) + first)
        first += n
    edge_index = torch.from_numpy(np.concatenate(edges, 1))
    counts = (
        {}
        if totals is None
        else {
            "frames_total": torch.tensor(float(totals[0]), dtype=torch.float64),
            "atoms_total": torch.tensor(float(totals[1]), dtype=torch.float64),
        }
    )
    return Batch(
        positions=torch.from_numpy(np.concatenate(positions)),
        species=torch.from_numpy(random.integers(0, species, first)),
        frame=torch.tensor(frame),
        edge_index=edge_index,
        edge_shift=torch.zeros(edge_index.shape[1], 3, dtype=torch.float64),
        num_frames=len(sizes),
        cell=torch.eye(3, dtype=torch.float64).mul(30).repeat(len(sizes), 1, 1) if cell else None,
        energy=torch.from_numpy(random.normal(size=len(sizes))),
        forces=torch.from_numpy(random.normal(size=(first, 3))),
        stress=torch.from_numpy(random.normal(size=(len(sizes), 3, 3))) if cell else None,
        **counts,
    ).with_neighbours()  # fmt: skip


class Toy(nn.Module):
    """Pair energies from a smooth function of distance and species, with forces; a trained, a frozen and an unused parameter."""

    def __init__(self, width=8, dtype=torch.float64, *, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: nn.Parameter(torch.randn(*shape, generator=generator, dtype=dtype) / shape[0] ** 0.5)  # noqa: E731
        self.embedding, self.first, self.second = draw(3, width), draw(width, width), draw(width, 1)
        self.shift = draw(3)
        self.unused = draw(5)
        self.frozen = draw(width).requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def energies(self, positions, edge_index, species, frame, frames):
        i, j = edge_index
        length = (positions[j] - positions[i]).square().sum(1, keepdim=True).add(1e-3).sqrt().to(self.first.dtype)
        x = (self.embedding[species[i]] * self.embedding[species[j]] + self.frozen) * torch.exp(-length)
        pair = torch.nn.functional.silu(x @ self.first) @ self.second
        atom = self.shift[species].index_add(0, i, pair[:, 0])
        return atom.new_zeros(frames).index_add(0, frame, atom).double()

    def forward(self, batch):
        if self.training:
            self.calls += 1
        with torch.enable_grad():
            positions = batch.positions.detach().requires_grad_()
            energy = self.energies(positions, batch.edge_index, batch.species, batch.frame, batch.num_frames)
            (slope,) = torch.autograd.grad(energy.sum(), positions, create_graph=self.training)
        return {"energy": energy, "forces": -slope}


class Molecules(nn.Module):
    """The same, called with a dict, as models of other projects are."""

    def __init__(self, **options):
        super().__init__()
        self.inner = Toy(**options)

    def forward(self, data):
        with torch.enable_grad():
            positions = data["pos"].detach().requires_grad_()
            energy = self.inner.energies(positions, data["edge_index"], data["z"], data["batch"], data["y"].shape[0])
            (slope,) = torch.autograd.grad(energy.sum(), positions, create_graph=self.training)
        return {"y": energy, "neg_dy": -slope, "pos": data["pos"], "name": "toy"}


def as_dict(batch):
    """What `Molecules` is called with."""
    return {
        "pos": batch.positions, "z": batch.species, "batch": batch.frame, "edge_index": batch.edge_index, "y": batch.energy,
        "dy": batch.forces,
    }  # fmt: skip
