"""The loss against torch's own functions."""

import pytest
import torch

import ddpkit
from ddpkit.batch import Batch


@pytest.mark.parametrize(
    ("delta", "per_atom"), [(None, True), (0.05, True), (1.0, False), (100.0, True), (None, False)]
)
def test_errors_beyond_delta_cost_in_proportion(delta, per_atom):
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
    found = ddpkit.EnergyForcesLoss(energy=2.0, forces=3.0, stress=4.0, huber_delta=delta, per_atom=per_atom)(
        output, batch
    )

    def expected(a, b):
        if delta is None:
            return torch.nn.functional.mse_loss(a, b)
        return 2 * torch.nn.functional.huber_loss(a, b, delta=delta)

    atoms = torch.tensor([3.0, 2.0] if per_atom else [1.0, 1.0], dtype=torch.float64)
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


def test_stress_that_some_frames_lack_is_averaged_over_the_others():
    torch.manual_seed(0)
    stress = torch.randn(5, 3, 3, dtype=torch.float64)
    labelled = torch.tensor([True, False, True, False, False])
    stress[~labelled] = torch.nan
    predicted = torch.randn(5, 3, 3, dtype=torch.float64, requires_grad=True)
    criterion = ddpkit.EnergyForcesLoss(energy=0.0, forces=0.0, stress=1.0)

    def batch(frames):
        count = len(frames)
        given = stress[frames] if labelled[frames].any() else None
        whole = {} if count == 5 else {"frames_total": 5.0, "atoms_total": 5.0, "stress_total": 2.0}
        return Batch(
            positions=torch.zeros(count, 3, dtype=torch.float64),
            species=torch.zeros(count, dtype=torch.int64),
            frame=torch.arange(count),
            edge_index=torch.zeros(2, 0, dtype=torch.int64),
            edge_shift=torch.zeros(0, 3, dtype=torch.float64),
            num_frames=count,
            energy=torch.zeros(count, dtype=torch.float64),
            forces=torch.zeros(count, 3, dtype=torch.float64),
            stress=given,
            **{name: torch.tensor(value, dtype=torch.float64) for name, value in whole.items()},
        )

    def loss(frames):
        zeros = torch.zeros(len(frames), dtype=torch.float64)
        output = {"energy": zeros, "forces": zeros[:, None].expand(-1, 3), "stress": predicted[frames]}
        return criterion(output, batch(frames))

    expected = torch.nn.functional.mse_loss(predicted[labelled], stress[labelled])
    torch.testing.assert_close(loss([0, 1, 2, 3, 4])["loss"], expected)
    parts = [loss(part) for part in ([0, 1], [2, 3], [4])]  # as ranks or micro-batches divide them
    assert all("loss_stress" in part for part in parts)
    together = sum(part["loss"] for part in parts)
    torch.testing.assert_close(together, expected)
    mine, theirs = (torch.autograd.grad(value, predicted, retain_graph=True)[0] for value in (together, expected))
    torch.testing.assert_close(mine, theirs)


def test_a_stress_that_the_model_does_not_give_is_refused():
    batch = Batch(
        positions=torch.zeros(1, 3, dtype=torch.float64), species=torch.zeros(1, dtype=torch.int64),
        frame=torch.zeros(1, dtype=torch.int64),
        edge_index=torch.zeros(2, 0, dtype=torch.int64), edge_shift=torch.zeros(0, 3, dtype=torch.float64), num_frames=1,
        energy=torch.zeros(1), forces=torch.zeros(1, 3), stress=torch.zeros(1, 3, 3),
    )  # fmt: skip
    with pytest.raises(ddpkit.InputError, match="the model's output has no stress"):
        ddpkit.EnergyForcesLoss(stress=1.0)({"energy": torch.zeros(1), "forces": torch.zeros(1, 3)}, batch)
