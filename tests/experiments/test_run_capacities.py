"""What a run's batches are filled up to, on two ranks, and training on them."""

import warnings

import numpy as np
import pytest
import torch

import ddpkit
from ddpkit.data import Frame, Loader, write_prepared
from ddpkit.experiments import setup
from ddpkit.experiments.config import read
from ddpkit.experiments.run_data import open_data
from ddpkit.ranks.group import environment
from ddpkit.testing import run_ranks


def write_set(path):
    rng = np.random.default_rng(0)
    frames = []
    for n in rng.integers(3, 9, size=60):
        grid = np.stack(np.meshgrid(*[np.arange(3.0)] * 3), axis=-1).reshape(-1, 3)
        places = 1.4 * grid[rng.permutation(27)[:n]] + 0.1 * rng.normal(size=(n, 3))
        frames.append(Frame(rng.choice([1, 6], size=n), places, rng.normal(), rng.normal(size=(n, 3))))
    write_prepared(path, frames, r_max=4.0)


def train(path, accumulate):
    config = read(
        [
            "model=allegro_tiny", "model.r_max=4.0", "data=files", f"data.path={path}", "device=cpu", "precision=float64",
            "train.batch_size=8", f"train.accumulate={accumulate}", "data.split=[0.8,0.1,0.1]",
        ]
    )  # fmt: skip
    data, here = open_data(config), environment()
    choice = setup.capacities(config, data, here)
    spec = setup.model_spec(config, data)
    losses, steps = [], []
    for levels in (None, choice.levels, ()):
        loader = Loader(data.frames, setup.train_sampler(config, data, here, levels), spec["species"], 4.0, epochs=2)
        model = setup.build_model(spec, 0)
        step = ddpkit.make_step(
            model, ddpkit.EnergyForcesLoss(), torch.optim.SGD(model.parameters(), lr=1e-3), strategy="custom"
        )
        drawn = [item for epoch in range(2) for item in loader.epoch(epoch)]
        losses.append([float(step(batches)["loss"]) for _, batches in drawn])
        steps.append(
            [(item.capacity, item.is_padded, [b.mask is not None for b in batches]) for item, batches in drawn]
        )
    return choice, losses, steps


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_fill_up_to_the_same_sizes_and_train_as_without(tmp_path, accumulate):
    write_set(tmp_path / "set")
    (choice, losses, steps), (other, _, others) = run_ranks(train, 2, str(tmp_path / "set"), accumulate)
    assert choice == other
    assert 1 <= len(choice.levels) <= 8
    assert [[item[0] for item in plan] for plan in steps] == [[item[0] for item in plan] for plan in others]
    plain, padded, own = steps
    assert len(plain) == 12
    assert all(item == (None, False, [False] * accumulate) for item in plain)
    assert all(item[1:] == (True, [True] * accumulate) for item in padded + own)
    assert sum(item[0] is None for item in padded) <= 2
    assert all(item[0] is None for item in own)
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-10)


def unmasked(output, batch):
    return (
        (output["forces"] - batch.forces).square().sum()
        + output["energy"].square().sum()
        + batch.positions.square().sum()
    )


def decides(path, cuda_graphs):
    """Whether each rank records, with a criterion on rank 1 that takes what fills up for atoms, and what it was told."""
    config = read(
        [
            "model=allegro_tiny", "model.r_max=4.0", "data=files", f"data.path={path}", "device=cpu", "precision=float64",
            "train.batch_size=8", "data.split=[0.8,0.1,0.1]", "compile=true", f"cuda_graphs={cuda_graphs}",
        ]
    )  # fmt: skip
    data, here = open_data(config), environment()
    spec = setup.model_spec(config, data)
    model = setup.build_model(spec, 0)
    answers = []
    for criterion in (ddpkit.EnergyForcesLoss(), unmasked if here.rank == 1 else ddpkit.EnergyForcesLoss()):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            answer = setup.leaves_padding_out(config, here, data, model, criterion, spec["species"])
        answers.append((answer, [str(one.message) for one in told]))
    return answers


def test_nobody_records_where_one_rank_takes_what_fills_up_for_atoms(tmp_path):
    write_set(tmp_path / "set")
    first, second = run_ranks(decides, 2, str(tmp_path / "set"), "auto")
    assert first == [(True, []), (False, [])]
    assert second[0] == (True, [])
    assert second[1][0] is False
    assert "does not leave that out: 'loss' changes by" in " ".join(second[1][1])
    with pytest.raises(
        Exception, match=r"rank 0: (.*\n)+.*InputError: cuda_graphs fills batches up .* use cuda_graphs=false"
    ):
        run_ranks(decides, 2, str(tmp_path / "set"), "true")
