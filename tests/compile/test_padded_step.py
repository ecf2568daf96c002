"""One compiled step for padded batches of several capacities."""

import copy
import warnings

import pytest
import torch
from test_models import MODELS
from toy import random_batch

import ddpkit
from ddpkit.data.capacities import padding_atoms
from ddpkit.padding import Capacity, own_sizes, pad

R_MAX = 3.5


def filled(sizes, extra, *, seed=0):
    batch = random_batch(sizes, seed=seed, cell=True)
    own = own_sizes(batch)
    if not extra:
        return batch, pad(batch, own, R_MAX)
    most = own.most + 1
    capacity = Capacity(own.atoms + padding_atoms(extra, most) + 2, own.edges + extra, own.frames + 1, most)
    return batch, pad(batch, capacity, R_MAX)


@pytest.mark.parametrize(
    ("name", "precision", "tolerance"),
    [
        ("allegro", "mixed", 1e-4),
        pytest.param("nequip", "float64", 1e-10, marks=pytest.mark.long),
        pytest.param("allegro", "float64", 1e-10, marks=pytest.mark.long),
        pytest.param("nequip", "mixed", 1e-4, marks=pytest.mark.long),
    ],
)
def test_one_code_serves_several_capacities(name, precision, tolerance):
    torch.manual_seed(0)
    model = MODELS[name](precision)
    criterion = ddpkit.EnergyForcesLoss(stress=1.0)
    step = ddpkit.make_step(
        model, criterion, torch.optim.SGD(model.parameters(), lr=0.0), strategy="none", compile=True
    )
    step.prepare(filled([5, 4, 6], 9)[1])
    seconds = step.seconds_compile
    shapes = {difference.shape for difference in step.differences}
    assert len(shapes) == 3
    assert all("1 frames" not in shape.split(", ") for shape in shapes), "the gate compares no frame of padding"
    for sizes, extra in (([9], 0), ([9], 1), ([2, 11, 3, 7], 30), ([1, 8], 200)):
        batch, other = filled(sizes, extra, seed=1)
        reference = copy.deepcopy(model)
        expected = criterion(reference(batch), batch)
        expected["loss"].backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            output = step(other)
        for key, value in expected.items():
            torch.testing.assert_close(output[key], value.detach(), rtol=tolerance, atol=0.0)
        norm = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()])
        for (parameter, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            error = (p.grad - q.grad).norm() / (q.grad.norm() + 1e-2 * norm * (q.numel() / 1e4) ** 0.5)
            assert error < tolerance, parameter
        # Other things in the padding: the same bits.
        changed = {key: x.clone() for key, x in other.tensors().items()}
        away, empty = ~other.mask, ~other.real_frames()
        changed["species"][away] = 2
        changed["positions"][away] = 7.0
        changed["edge_shift"][batch.edge_index.shape[1] :] = torch.tensor([0.0, R_MAX + 1e-9, 0.0])
        changed["forces"][away], changed["energy"][empty], changed["stress"][empty] = torch.nan, torch.inf, 1.0
        gradients = [p.grad.clone() for p in model.parameters()]
        again = step(other.replace(**changed))
        assert all(torch.equal(again[key], value) for key, value in output.items())
        for (parameter, p), gradient in zip(model.named_parameters(), gradients, strict=True):
            assert torch.equal(p.grad, gradient), parameter
    assert step.eager_batches == 0
    assert step.seconds_compile == seconds
