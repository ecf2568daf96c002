"""Messages between embedded species: the gradient of `nn.Embedding` sums what other sums have put together."""

import copy
import warnings

import pytest
import torch
from torch import nn
from toy import random_batch

import ddpkit

SHAPES = [[6, 5, 4], [7], [2, 9, 3, 5, 4]]


class SchNet(nn.Module):
    """Continuous filters, as in SchNet."""

    def __init__(self, width=8, layers=2):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(3, width)
        self.filters = nn.ModuleList(self.mlp(4, width) for _ in range(layers))
        self.updates = nn.ModuleList(self.mlp(width, width) for _ in range(layers))
        self.energy = nn.Linear(width, 1)
        self.register_buffer("centres", torch.linspace(0.5, 3.5, 4))
        self.double()

    @staticmethod
    def mlp(inputs, width):
        return nn.Sequential(nn.Linear(inputs, width), nn.Softplus(), nn.Linear(width, width))

    def forward(self, batch):
        i, j = batch.edge_index
        with torch.enable_grad():
            positions = batch.positions.detach().requires_grad_()
            length = (positions[j] - positions[i]).square().sum(1, keepdim=True).sqrt()
            radial = torch.exp(-(length - self.centres).square())
            x = self.embedding(batch.species)
            for filters, update in zip(self.filters, self.updates, strict=True):
                x = x + update(torch.zeros_like(x).index_add(0, i, x[j] * filters(radial)))
            energy = length.new_zeros(batch.num_frames).index_add(0, batch.frame, self.energy(x)[:, 0])
            (slope,) = torch.autograd.grad(energy.sum(), positions, create_graph=self.training)
        return {"energy": energy, "forces": -slope}


def criterion(output, batch):
    return (output["energy"] - batch.energy).square().mean() + 10 * (output["forces"] - batch.forces).square().mean()


def assert_as_eager(model, step):
    """Runs `step(batch)` at several shapes, none of which may fall back to eager code."""
    for number, sizes in enumerate(SHAPES):
        batch = random_batch(sizes, seed=number)
        reference = copy.deepcopy(model)
        reference.zero_grad()
        loss = criterion(reference(batch), batch)
        loss.backward()
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(step(batch), loss.detach(), rtol=1e-10, atol=1e-10)
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert float((p.grad - q.grad).norm() / q.grad.norm()) < 1e-10, name


@pytest.mark.parametrize("strategy", ["custom", "none"])
def test_a_compiled_step_is_right(strategy):
    model = SchNet()
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    assert_as_eager(model, ddpkit.make_step(model, criterion, still, strategy=strategy, compile=True))


def test_compiled_forces_are_right():
    model = SchNet()
    compiled = ddpkit.compile_forces(model, random_batch(SHAPES[0]))

    def step(batch):
        loss = criterion(compiled(batch), batch)
        loss.backward()
        return loss.detach()

    assert_as_eager(model, step)
