"""The loss against torch's own functions."""

import pytest
import torch

import ddpkit
from ddpkit.batch import Batch


@pytest.mark.parametrize("delta", [None, 0.05, 1.0, 100.0])
def test_errors_beyond_delta_cost_in_proportion(delta):
    torch.manual_seed(0)
    frame = torch.tensor([0, 0, 0, 1, 1])
    batch = Batch(
        positions=torch.randn(5, 3, dtype=torch.float64),
        species=torch.zeros(5, dtype=torch.int64),
        frame=frame,
        edge_index=torch.zeros(2, 0, dtype=torch.int64),
        edge_shift=torch.zeros(0, 3, dtype=torch.float64),
        num_frames=2,
        energy=torch.randn(2, dtype=torch.float64),
        forces=torch.randn(5, 3, dtype=torch.float64),
        stress=torch.randn(2, 3, 3, dtype=torch.float64),
    )
    output = {
        "energy": torch.randn(2, dtype=torch.float64),
        "forces": 5 * torch.randn(5, 3, dtype=torch.float64, requires_grad=True),
        "stress": torch.randn(2, 3, 3, dtype=torch.float64),
    }
    found = ddpkit.EnergyForcesLoss(energy=2.0, forces=3.0, stress=4.0, huber_delta=delta)(output, batch)

    def expected(a, b):
        if delta is None:
            return torch.nn.functional.mse_loss(a, b)
        return 2 * torch.nn.functional.huber_loss(a, b, delta=delta)

    atoms = torch.tensor([3.0, 2.0], dtype=torch.float64)
    energy = expected(output["energy"] / atoms, batch.energy / atoms)
    forces = expected(output["forces"], batch.forces)
    stress = expected(output["stress"], batch.stress)
    torch.testing.assert_close(found["loss_energy"], energy)
    torch.testing.assert_close(found["loss_forces"], forces)
    torch.testing.assert_close(found["loss_stress"], stress)
    torch.testing.assert_close(found["loss"], 2 * energy + 3 * forces + 4 * stress)
    mine, theirs = (
        torch.autograd.grad(loss, output["forces"], retain_graph=True)[0] for loss in (found["loss_forces"], forces)
    )
    torch.testing.assert_close(mine, theirs)
