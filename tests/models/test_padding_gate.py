"""What does not leave padding out is refused before steps are recorded on padded batches."""

import pytest
import torch

import ddpkit
from ddpkit.capture.padding import compare_padding, require_padding
from ddpkit.data import collate
from ddpkit.errors import InputError
from ddpkit.experiments.bench_step import frames
from ddpkit.experiments.models_table import CRYSTAL_SPECIES, build, model_spec
from ddpkit.padding import own_sizes, pad


def batch_of(spec, *, padded):
    batch = collate(frames("crystals", 4, 1), CRYSTAL_SPECIES, spec["r_max"], labels=False)
    batch = batch.replace(
        energy=torch.randn(4, dtype=torch.float64), forces=torch.randn(batch.positions.shape, dtype=torch.float64)
    )
    return pad(batch, own_sizes(batch), spec["r_max"]) if padded else batch


def unmasked(output, batch):
    return (output["energy"] - batch.energy).square().sum() + (output["forces"] - batch.forces).square().sum()


def counts_atoms(output, batch):
    return ddpkit.EnergyForcesLoss()(output, batch)["loss"] * len(batch.species)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["allegro_tiny", "nequip_tiny"])
def test_our_models_and_loss_pass(name, padded):
    spec = model_spec(name, [])
    model, batch = build(spec, CRYSTAL_SPECIES, precision="float64"), batch_of(spec, padded=padded)
    measured = compare_padding(model, ddpkit.EnergyForcesLoss(), batch, spec["r_max"])
    assert {d.name for d in measured} == {"loss", *(n for n, p in model.named_parameters() if p.requires_grad)}
    require_padding(measured)


@pytest.mark.parametrize("criterion", [unmasked, counts_atoms])
def test_a_criterion_that_takes_padding_for_atoms_is_refused(criterion):
    spec = model_spec("allegro_tiny", [])
    model = build(spec, CRYSTAL_SPECIES, precision="float64")
    model.shifts.fill_(1.0)  # without, atoms that have no neighbour have no energy
    with pytest.raises(InputError, match=r"batch\.mask is False"):
        require_padding(compare_padding(model, criterion, batch_of(spec, padded=True), spec["r_max"]))
