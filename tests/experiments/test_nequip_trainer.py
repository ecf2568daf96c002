"""nequip's own trainer, set beside ours."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from ddpkit.errors import InputError
from ddpkit.experiments import bench_nequip, nequip_trainer
from ddpkit.experiments.config import read
from ddpkit.experiments.nequip_file import Section
from ddpkit.experiments.nequip_trainer import Files
from ddpkit.experiments.nequip_training import trainer_settings, training_settings
from ddpkit.ranks.group import Environment
from ddpkit.ranks.mpirun import mpirun

pytest.importorskip("nequip")
pytest.importorskip("lightning")

TINY = (
    "model=nequip_tiny", "data=generated_crystals", "data.frames=20", "data.split=[0.5,0.25,0.25]", "precision=float64",
    "train.max_epochs=3", "train.validate=false", "train.checkpoint_every=never", "loss.stress=0.5", "device=cpu",
)  # fmt: skip
FILES = Files(Path("train.xyz"), Path("validation.xyz"), Path("weights.ckpt"), ("Cu",), 10)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def run(ranks, verb, folder, cache, *overrides):
    head, variables = mpirun(ranks)
    words = [*verb, *TINY, f"data.cache={cache}", f"run_dir={folder}", *overrides]
    command = [*head, sys.executable, "-m", "ddpkit.experiments", *words]
    variables |= {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)


def table(folder, name="steps.csv"):
    return pd.read_csv(folder / name, float_precision="round_trip")


@pytest.mark.long
def test_both_trainers_make_the_same_steps(tmp_path, cache):
    """The whole set is one batch, so that the order of frames does not matter: losses agree to the digits of extxyz."""
    ours, ddp, simple = (tmp_path / name for name in ("ours", "ddp", "simple"))
    for folder, verb in ((ours, ["run"]), (ddp, ["bench", "nequip", "ddp"]), (simple, ["bench", "nequip", "simple"])):
        done = run(2, verb, folder, cache, "train.batch_size=10")
        assert done.returncode == 0, done.stdout + done.stderr
    expected = table(ours)
    for folder in (ddp, simple):
        found = table(folder)
        for column in ("step", "epoch", "atoms", "edges", "lr"):
            assert found[column].tolist() == expected[column].tolist(), column
        assert found["loss"][0] == pytest.approx(expected["loss"][0], rel=1e-6)
        assert found["loss"].tolist() == pytest.approx(expected["loss"].tolist(), rel=1e-3)
        epochs = table(folder, "epochs.csv")
        assert epochs["epoch"].tolist() == [1, 2, 3]
        assert epochs["steps"].tolist() == [1, 1, 1]
        assert (epochs["seconds"] >= found["seconds"] - 1e-9).all()  # one step each, on the slowest rank
        facts = json.loads((folder / "summary.json").read_text())
        assert (facts["status"], facts["steps"], facts["epochs"]) == ("finished", 3, 3)
        assert facts["parameters"] == json.loads((ours / "summary.json").read_text())["parameters"]
        mine, its = (yaml.safe_load((place / "config.yaml").read_text()) for place in (folder, ours))
        assert {key for key in its if its[key] != mine[key]} == {"run_dir", "strategy"}
    assert table(ddp)["loss"].tolist() == pytest.approx(table(simple)["loss"].tolist(), rel=1e-12)


def test_an_epoch_has_as_many_steps_as_ours(tmp_path, cache):
    done = run(1, ["bench", "nequip", "simple"], tmp_path / "run", cache, "train.batch_size=4", "train.max_epochs=1")
    assert done.returncode == 0, done.stdout + done.stderr
    found = table(tmp_path / "run")
    assert found["step"].tolist() == [1, 2]  # of ten frames; the rest fills no batch
    epoch = table(tmp_path / "run", "epochs.csv")["seconds"][0]
    assert epoch == pytest.approx(found["seconds"].sum(), rel=1e-6)


def test_a_run_that_fails_says_so(tmp_path, cache):
    done = run(1, ["bench", "nequip", "simple"], tmp_path / "run", cache, "train.batch_size=4", "optimizer.lr=1e300")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ddpkit: The loss of nequip's trainer was not finite at step 2: lower optimizer.lr." in done.stderr
    facts = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (facts["status"], facts["error_kind"]) == ("failed", "NonFiniteLossError")


def made(scheme, *overrides):
    config = read([*TINY, "train.batch_size=8", *overrides])
    here = Environment(rank=1, world_size=2, local_rank=1, local_size=2, device=torch.device("cpu"))
    return config, nequip_trainer.training_file(config, scheme, FILES, here, 3)


@pytest.mark.parametrize(("scheme", "ours"), [("ddp", "standard"), ("simple", "custom")])
def test_the_training_file_means_what_the_configuration_does(scheme, ours):
    """`convert-config` reads it back."""
    config, file = made(scheme, "tf32=true", "train.clip_norm=2.5", "train.ema_decay=0.9", "optimizer.lr=0.01")
    remarks = []
    module = {key: value for key, value in file["training_module"].items() if key != "model"}
    settings = training_settings(Section(module, "training_module", remarks))
    settings |= {"loss": {key: value * 2.5 for key, value in settings["loss"].items() if key != "per_atom"}}
    assert settings["loss"] == pytest.approx({"energy": 1.0, "forces": 1.0, "stress": 0.5})
    assert settings["optimizer"] == dict(config.optimizer)
    assert settings["train"]["ema_decay"] == 0.9
    loader = Section(file["data"]["train_dataloader"], "train_dataloader", remarks)
    trainer = trainer_settings(Section(file["trainer"], "trainer", remarks), loader)
    assert (trainer["train"]["batch_size"], trainer["train"]["max_epochs"], trainer["train"]["clip_norm"]) == (
        8,
        3,
        2.5,
    )
    assert (trainer["tf32"], trainer["device"], trainer["strategy"]) == (True, "cpu", ours)


def test_kernels_and_compilation_are_nequips_own():
    model = made("simple", "model.kernels=openequivariance", "compile=true", "cuda_graphs=false")[1]["training_module"][
        "model"
    ]
    assert model["_target_"] == "nequip.model.modify"
    assert model["modifiers"] == [{"modifier": "enable_OpenEquivariance"}]
    assert model["model"]["compile_mode"] == "compile"
    plain = made("simple")[1]["training_module"]["model"]
    assert (plain["_target_"], plain["compile_mode"]) == ("nequip.model.ModelFromCheckpoint", "eager")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "The scheme is missing"),
        (["model=nequip_tiny"], "The scheme is missing"),
        (["fast"], "'fast' is no scheme of nequip's trainer: use ddp or simple"),
        (["simple", "strategy=custom"], "strategy=custom is not for nequip's trainer, whose scheme is simple"),
        (["simple", "+strategy.bucket_mb=1"], "bucket_mb=1 is not for nequip's trainer"),
        (["ddp", "compile=true"], "compile=true is not for nequip's trainer with ddp"),
        (["simple", "deterministic=true"], "deterministic=true is not for nequip's trainer"),
        (["simple", "train.accumulate=2"], "train.accumulate=2 is not for nequip's trainer"),
        (["simple", "scheduler=cosine"], "scheduler._target_=.* is not for nequip's trainer"),
        (
            ["simple", "model=allegro_tiny", "+model.kernels=openequivariance"],
            "model.kernels=openequivariance is not for",
        ),
        (["simple", "model=nequip_tiny", "model.kernels=openequivariance", "device=cpu"], "needs an NVIDIA GPU"),
        (["simple"], "run_dir is missing"),
    ],
)
def test_what_nequips_trainer_cannot_do_is_refused(words, said):
    with pytest.raises(InputError, match=said):
        bench_nequip.main(words)


def test_a_batch_that_cannot_be_divided_is_refused():
    config = read(["train.batch_size=9"])
    with pytest.raises(InputError, match=r"train.batch_size=9 cannot be divided among 2 ranks.*: use a multiple of 2"):
        nequip_trainer.batch_of_rank(config, 2)
    with pytest.raises(InputError, match=r"train.batch_size=9 is more than the 5 frames"):
        nequip_trainer.steps_per_epoch(config, type("Few", (), {"train": range(5)}))


def test_without_the_packages_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(nequip_trainer, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"the package nequip is missing: pip install 'ddpkit\[nequip\]'"):
        bench_nequip.main(["simple"])
