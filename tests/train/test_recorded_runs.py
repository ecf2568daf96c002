"""Runs whose steps are recorded, against runs whose steps are not."""

import json

import pandas as pd
import pytest
import torch

from ddpkit.errors import InputError
from ddpkit.experiments import setup
from ddpkit.experiments.config import read
from ddpkit.ranks.group import Environment

LOSSES = ["loss", "loss_energy", "loss_forces", "grad_norm"]
COMPILED = ("compile=true", "compiler=interpreted", "precision=float64", "train.max_epochs=8", "check_kernels=false")


def steps(folder):
    return pd.read_csv(folder / "steps.csv", float_precision="round_trip")


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recorded")


def test_two_ranks_train_as_without(ddpkit_run, folder):
    ddpkit_run(*COMPILED, f"run_dir={folder / 'plain'}", ranks=2)
    done = ddpkit_run(*COMPILED, "cuda_graphs=true", f"run_dir={folder / 'recorded'}", ranks=2)
    assert "recorded steps:" in done.stdout
    assert "steps replayed" in done.stdout
    told = summary(folder / "recorded")
    assert summary(folder / "plain")["captured_steps"] == 0
    assert 30 <= told["captured_steps"] < told["steps"] == 48
    assert told["recordings"] >= 2
    assert told["capacities"]["levels"]
    # filled up, sums over rows are rounded otherwise
    pd.testing.assert_frame_equal(
        steps(folder / "plain")[LOSSES], steps(folder / "recorded")[LOSSES], rtol=1e-9, atol=0
    )
    splits = steps(folder / "recorded")[["seconds_compute", "seconds_sync", "seconds_optimizer"]]
    assert splits.iloc[-1].isna().all()


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(ddpkit_run, folder):
    run = folder / "parts"
    ddpkit_run(*COMPILED, "cuda_graphs=true", "train.max_steps=39", f"run_dir={run}", ranks=2)
    ddpkit_run(f"resume={run}", "train.max_steps=null", "train.max_epochs=8", ranks=2)
    assert (steps(run)[["step", *LOSSES]] == steps(folder / "recorded")[["step", *LOSSES]]).all(axis=None)
    assert summary(run)["captured_steps"] > 30


@pytest.mark.parametrize(
    ("overrides", "device", "expected"),
    [
        ("cuda_graphs=auto compile=true", "cuda", True),
        ("cuda_graphs=auto compile=true", "cpu", False),
        ("cuda_graphs=auto", "cuda", False),
        ("cuda_graphs=auto compile=true strategy=standard", "cuda", False),
        ("cuda_graphs=auto compile=true strategy=ingraph", "cuda", True),
        ("cuda_graphs=true compile=true", "cpu", True),
        ("compile=true", "cuda", False),
    ],
)
def test_where_steps_are_recorded(overrides, device, expected):
    here = Environment(device=torch.device(device))
    assert setup.records(read(overrides.split()), here) is expected


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [("cuda_graphs=true", "add compile=true"), ("cuda_graphs=perhaps", "use one of auto, true, false")],
)
def test_what_does_not_go_together_is_refused(overrides, sentence):
    with pytest.raises(InputError, match=sentence):
        read(overrides.split())
