"""The gate on the models of this project, at shapes unseen in the trace."""

import copy
import warnings

import pytest
import torch
from toy import random_batch

import ddpkit
from ddpkit.models import Allegro, NequIP

SPECIES = ("H", "C", "O")
COMMON = {"r_max": 3.5, "l_max": 1, "avg_num_neighbors": 5.0, "shifts": [-1.0, -2.0, -3.0], "zbl": True}
MODELS = {
    "allegro": lambda precision: Allegro(
        SPECIES, num_layers=1, num_scalar_features=8, num_tensor_features=4, precision=precision, **COMMON
    ),
    "nequip": lambda precision: NequIP(
        SPECIES, num_layers=2, num_features=[6, 4], radial_width=8, precision=precision, **COMMON
    ),
}


@pytest.mark.parametrize(
    ("name", "precision", "tolerance"),
    [
        ("nequip", "float64", 1e-10),
        pytest.param("allegro", "mixed", 1e-4, marks=pytest.mark.long),  # see test_padded_step.py
        pytest.param("allegro", "float64", 1e-10, marks=pytest.mark.long),
        pytest.param("nequip", "mixed", 1e-4, marks=pytest.mark.long),
    ],
)
def test_compiled_gradients(name, precision, tolerance):
    torch.manual_seed(0)
    model = MODELS[name](precision)
    criterion = ddpkit.EnergyForcesLoss(stress=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = ddpkit.make_step(model, criterion, optimizer, strategy="none", compile=True)
    step.prepare(random_batch([5, 4, 6], cell=True))
    for sizes in ([9], [2, 11, 3, 7]):
        batch = random_batch(sizes, seed=1, cell=True)
        reference = copy.deepcopy(model)
        expected = criterion(reference(batch), batch)
        expected["loss"].backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            output = step(batch)
        torch.testing.assert_close(output["loss"], expected["loss"].detach(), rtol=tolerance, atol=0.0)
        norm = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()])
        for (parameter, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            error = (p.grad - q.grad).norm() / (q.grad.norm() + 1e-2 * norm * (q.numel() / 1e4) ** 0.5)
            assert error < tolerance, parameter
