"""Padded batches against unpadded ones, and what may stand in the padding."""

import pytest
import torch
from cases import R_MAX, SPECIES, make_frame, make_model

import ddpkit
from ddpkit.data import collate
from ddpkit.data.capacities import padding_atoms
from ddpkit.models.graph import TRACED, computing_by
from ddpkit.padding import Capacity, own_sizes, pad

TOLERANCE = {"float64": 1e-11, "mixed": 2e-4}
CRITERION = ddpkit.EnergyForcesLoss(1.0, 2.0, 3.0, huber_delta=2.0)


def labelled(*, periodic, seed=0):
    """Frames with labels, one of them without a neighbour."""
    frames = [make_frame(n, periodic=periodic, seed=seed + n) for n in (7, 1, 4)]
    batch = collate(frames, SPECIES, R_MAX)
    draw = torch.Generator().manual_seed(seed)
    energy = torch.randn(3, generator=draw, dtype=torch.float64)
    forces = torch.randn(batch.positions.shape, generator=draw, dtype=torch.float64)
    stress = torch.randn(3, 3, 3, generator=draw, dtype=torch.float64) if periodic else None
    return batch.replace(energy=energy, forces=forces, stress=stress)


def larger(batch, extra, *, frames=2, atoms=3, most=2):
    own = own_sizes(batch)
    most += own.most
    return Capacity(own.atoms + padding_atoms(extra, most) + atoms, own.edges + extra, own.frames + frames, most)


def run(model, batch):
    """Outputs, terms of the loss, and the gradient by every parameter."""
    model.train()
    output = model(batch)
    terms = CRITERION(output, batch)
    gradients = torch.autograd.grad(terms["loss"], [p for p in model.parameters() if p.requires_grad])
    return output, terms, gradients


def close(value, expected, tolerance):
    value, expected = value.detach().double(), expected.detach().double()
    assert (value - expected).norm() <= tolerance * expected.norm() + 1e-9 * tolerance


def on_padding(filled, real, draw):
    """The same batch with other things in its padding."""
    edges = real.edge_index.shape[1]
    other = {name: x.clone() for name, x in filled.tensors().items()}
    away = ~filled.mask
    other["species"][away] = torch.randint(len(SPECIES), (int(away.sum()),), generator=draw)
    other["positions"][away] = torch.randn(int(away.sum()), 3, generator=draw, dtype=torch.float64) * 9
    shift = torch.randn(filled.edge_index.shape[1] - edges, 3, generator=draw, dtype=torch.float64)
    other["edge_shift"][edges:] = (
        shift * (1.0 + torch.rand(1, generator=draw)) * R_MAX / shift.norm(dim=1, keepdim=True)
    )
    other["energy"][real.num_frames :] = torch.inf
    other["forces"][away] = torch.nan
    if filled.stress is not None:
        other["stress"][real.num_frames :] = 3.0
        other["cell"][real.num_frames :] *= 5.0
    return filled.replace(**other)


CASES = [
    (name, precision, periodic, zbl)
    for name in ("allegro", "nequip")
    for precision in ("mixed", "float64")
    for periodic, zbl in ((False, False), (True, True))
]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(("name", "precision", "periodic", "zbl"), CASES)
def test_a_padded_batch_gives_what_the_batch_gives(name, precision, periodic, zbl, traced):
    model = make_model(name, precision, zbl=zbl)
    batch = labelled(periodic=periodic)
    tolerance = TOLERANCE[precision]
    with computing_by(TRACED) if traced else torch.enable_grad():
        output, terms, gradients = run(model, batch)
        norm = torch.stack([g.double().norm() for g in gradients]).norm()
        for extra in (0, 1, 33):
            capacity = larger(batch, extra) if extra else own_sizes(batch)
            filled = pad(batch, capacity, R_MAX)
            found, found_terms, found_gradients = run(model, filled)
            atoms, frames = len(batch.positions), batch.num_frames
            for key, rows in (("energy", frames), ("forces", atoms), ("stress", frames)):
                if key in output:
                    close(found[key][:rows], output[key], tolerance)
            assert (found["forces"][atoms:] == 0).all()
            for key, value in terms.items():
                close(found_terms[key], value, tolerance)
            for value, expected in zip(found_gradients, gradients, strict=True):
                assert (value - expected).double().norm() <= tolerance * max(expected.double().norm(), 1e-2 * norm)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(("name", "precision", "periodic", "zbl"), CASES)
def test_what_stands_in_the_padding_changes_no_bit(name, precision, periodic, zbl, traced):
    model = make_model(name, precision, zbl=zbl)
    batch = labelled(periodic=periodic)
    filled = pad(batch, larger(batch, 33), R_MAX)
    draw = torch.Generator().manual_seed(3)
    with computing_by(TRACED) if traced else torch.enable_grad():
        output, terms, gradients = run(model, filled)
        for _ in range(3):
            other = on_padding(filled, batch, draw)
            found, found_terms, found_gradients = run(model, other)
            assert torch.equal(found["energy"][: batch.num_frames], output["energy"][: batch.num_frames])
            assert torch.equal(found["forces"], output["forces"])
            for key, value in terms.items():
                assert torch.equal(found_terms[key], value), key
            for (parameter, _), value, expected in zip(
                model.named_parameters(), found_gradients, gradients, strict=True
            ):
                assert torch.equal(value, expected), parameter
