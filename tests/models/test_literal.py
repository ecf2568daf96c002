"""The fast models are those of the papers: energies, forces and all that trains them."""

import literal
import pytest
import torch
from cases import make_batch, make_frame, make_model, relative

from ddpkit.models.allegro import layer_irreps


def energies(name, model, batch):
    if name == "nequip":
        return literal.nequip(model, batch)
    l_max, parities = model.spherical_harmonics.l_max, (1, -1)
    edge = [(l, (-1) ** l) for l in range(l_max + 1)]
    track = [(l, p) for l in range(l_max + 1) for p in parities]
    return literal.allegro(model, batch, layer_irreps(edge, track, len(model.products)))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("allegro", {"l_max": 2, "num_layers": 2}),
        ("allegro", {"l_max": 3, "num_layers": 2, "readout_nonlinearity": "silu"}),
        ("nequip", {"l_max": 2, "num_layers": 3}),
        ("nequip", {"l_max": 3, "num_layers": 2, "parity": True, "num_features": 4}),
    ],
)
def test_fast_models_are_the_literal_ones(name, settings):
    model = make_model(name, **settings)
    batch = make_batch([make_frame(4, seed=3), make_frame(1, periodic=True, seed=4, box=3.2)])
    positions = batch.positions.requires_grad_()
    expected = energies(name, model, batch)
    forces = -torch.autograd.grad(expected.sum(), positions, create_graph=True)[0]
    out = model(batch.replace(positions=positions.detach()))
    assert relative(out["energy"], expected) < 1e-12
    assert relative(out["forces"], forces) < 1e-10
    weights = torch.linspace(0.5, 1.5, forces.numel(), dtype=torch.float64).reshape(forces.shape)
    named = dict(model.named_parameters())
    fast, slow = (
        torch.autograd.grad(energy.square().sum() + (weights * force**2).sum(), list(named.values()), allow_unused=True)
        for energy, force in ((out["energy"], out["forces"]), (expected, forces))
    )
    for parameter, a, b in zip(named, fast, slow, strict=True):
        assert (a is None) == (b is None), parameter
        assert a is None or relative(a, b) < 1e-9, parameter
