"""Runs whose steps are recorded, against runs whose steps are not."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from ddpkit.errors import InputError
from ddpkit.experiments import setup
from ddpkit.experiments.config import read
from ddpkit.ranks.group import Environment

LOSSES = ["loss", "loss_energy", "loss_forces", "grad_norm"]
RUN = ("compile=true", "precision=float64", "train.max_epochs=8", "check_kernels=false", "deterministic=true")
MODEL = {"cpu": "model._target_=pairs.Pairs", "cuda": "model.num_layers=1"}
HERE = {"cpu": ("device=cpu", "compiler=interpreted"), "cuda": ("device=cuda", "compiler=inductor")}
SIZED = [
    ("cpu", 2),
    pytest.param(("cuda", 2), marks=pytest.mark.gpu(2)),
    pytest.param(("cuda", 4), marks=pytest.mark.gpu(4)),
]


def steps(folder):
    return pd.read_csv(folder / "steps.csv", float_precision="round_trip")


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module", params=SIZED, ids=lambda sized: f"{sized[1]}-{sized[0]}")
def sized(request):
    device, ranks = request.param
    return (*RUN, *HERE[device], MODEL[device]), ranks


@pytest.fixture(scope="module")
def folder(sized, tmp_path_factory):  # noqa: ARG001  (one for each)
    return tmp_path_factory.mktemp("recorded")


def test_ranks_train_as_without(ddpkit_run, sized, folder):
    compiled, ranks = sized
    ddpkit_run(*compiled, "cuda_graphs=false", f"run_dir={folder / 'plain'}", ranks=ranks)
    done = ddpkit_run(*compiled, "cuda_graphs=true", f"run_dir={folder / 'recorded'}", ranks=ranks)
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


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(ddpkit_run, sized, folder):
    compiled, ranks = sized
    run = folder / "parts"
    whole = steps(folder / "recorded")[["step", *LOSSES]]
    ddpkit_run(*compiled, "cuda_graphs=true", "train.max_steps=39", f"run_dir={run}", ranks=ranks)
    pd.testing.assert_frame_equal(steps(run)[["step", *LOSSES]], whole[:39], check_exact=True)
    again = (word for word in compiled if word.startswith(("device=", "model.")))
    ddpkit_run(f"resume={run}", *again, "train.max_steps=null", "train.max_epochs=8", ranks=ranks)
    pd.testing.assert_frame_equal(steps(run)[["step", *LOSSES]], whole, check_exact=True)
    assert summary(run)["captured_steps"] > 30


@pytest.mark.parametrize(
    ("device", "ranks", "strategy"),
    [
        ("cpu", 2, "standard"),
        pytest.param("cuda", 2, "standard", marks=pytest.mark.gpu(2)),
        pytest.param("cuda", 2, "overlap", marks=pytest.mark.gpu(2)),
        pytest.param("cuda", 4, "standard", marks=pytest.mark.gpu(4)),
    ],
)
def test_strategies_that_act_during_the_backward_pass(ddpkit_run, tmp_path, device, ranks, strategy):
    words = (*RUN, *HERE[device], MODEL[device], f"strategy={strategy}", "train.max_epochs=4")
    for graphs in ("false", "true"):
        ddpkit_run(*words, f"cuda_graphs={graphs}", f"run_dir={tmp_path / graphs}", ranks=ranks)
    assert summary(tmp_path / "true")["captured_steps"] > 12
    # filled up, sums over rows are rounded otherwise
    pd.testing.assert_frame_equal(
        steps(tmp_path / "false")[LOSSES], steps(tmp_path / "true")[LOSSES], rtol=1e-9, atol=0
    )


@pytest.mark.parametrize(
    ("overrides", "device", "expected"),
    [
        ("cuda_graphs=auto compile=true", "cuda", True),
        ("cuda_graphs=auto compile=true", "cpu", False),
        ("cuda_graphs=auto", "cuda", False),
        ("cuda_graphs=auto compile=true strategy=standard", "cuda", True),
        ("cuda_graphs=auto compile=true strategy=overlap", "cuda", True),
        ("cuda_graphs=auto compile=true strategy=ingraph", "cuda", True),
        ("cuda_graphs=true compile=true", "cpu", True),
        ("compile=true", "cuda", True),
        ("compile=true cuda_graphs=false", "cuda", False),
    ],
)
def test_where_steps_are_recorded(overrides, device, expected):
    here = Environment(device=torch.device(device))
    assert setup.records(read(overrides.split()), here) is expected


def test_ranks_that_share_a_gpu_do_not_record():
    here = Environment(device=torch.device("cuda"), world_size=2, backend="gloo")
    assert not setup.records(read(["compile=true"]), here)
    assert setup.records(read(["compile=true"]), replace(here, backend="nccl"))
    with pytest.raises(InputError, match="NCCL alone allows, and these use gloo: give each rank a GPU"):
        setup.records(read(["compile=true", "cuda_graphs=true"]), here)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [("cuda_graphs=true", "add compile=true"), ("cuda_graphs=perhaps", "use one of auto, true, false")],
)
def test_what_does_not_go_together_is_refused(overrides, sentence):
    with pytest.raises(InputError, match=sentence):
        read(overrides.split())
