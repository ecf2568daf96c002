import json

import pandas as pd
import pytest
import torch

from ddpkit import checkpoint
from ddpkit.train import Trainer

LOSSES = ["loss", "loss_energy", "loss_forces", "grad_norm"]


def steps(folder):
    return pd.read_csv(folder / "steps.csv", float_precision="round_trip")


def test_the_same_losses_on_any_number_of_ranks(ddpkit_run, tmp_path):
    """One global batch is the same mathematics on 1, 2 and 4 ranks, by DDP and by the flat all-reduce."""
    arms = {"one": (1, "custom"), "two": (2, "custom"), "four": (4, "custom"), "ddp": (2, "standard")}
    for name, (ranks, strategy) in arms.items():
        ddpkit_run("precision=float64", f"strategy={strategy}", f"run_dir={tmp_path / name}", ranks=ranks)
    one = steps(tmp_path / "one")
    assert len(one) == 12
    for name in arms:
        other = steps(tmp_path / name)
        pd.testing.assert_frame_equal(one[LOSSES], other[LOSSES], rtol=1e-9, atol=0)
        assert (one[["step", "epoch", "atoms", "edges"]] == other[["step", "epoch", "atoms", "edges"]]).all(axis=None)
        a, b = (pd.read_csv(tmp_path / folder / "epochs.csv") for folder in ("one", name))
        pd.testing.assert_frame_equal(a.drop(columns="seconds"), b.drop(columns="seconds"), rtol=1e-8)
    # Two summands have one order.
    assert (steps(tmp_path / "two")[LOSSES[:3]] == steps(tmp_path / "ddp")[LOSSES[:3]]).all(axis=None)


def test_an_epochs_loss_is_the_mean_over_its_rows(ddpkit_run, tmp_path):
    ddpkit_run("train.log_every=4", "train.max_epochs=3", f"run_dir={tmp_path}")
    rows, epochs = steps(tmp_path), pd.read_csv(tmp_path / "epochs.csv", float_precision="round_trip")
    assert rows["step"].tolist() == [4, 8, 12, 16]  # one in the first epoch of six steps, two in the second
    assert epochs["train_loss"].tolist() == pytest.approx(rows.groupby("epoch")["loss"].mean().tolist(), rel=1e-12)
    assert json.loads((tmp_path / "summary.json").read_text())["seconds_logging_per_row"] > 0


def test_validation_every_few_epochs_and_after_the_last(run_here, tmp_path, monkeypatch):
    """And checkpoints with it, or at the steps that were asked for."""
    saved = []
    monkeypatch.setattr(
        Trainer, "_write_checkpoints", lambda trainer, names: saved.append((trainer.progress.epoch, *names))
    )
    run_here("train.validate_every=3", "train.max_epochs=7", f"run_dir={tmp_path / 'a'}")
    epochs = pd.read_csv(tmp_path / "a" / "epochs.csv")
    assert epochs.epoch.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert epochs.epoch[epochs.val_forces_rmse.notna()].tolist() == [3, 6, 7]
    assert [epoch for epoch, *_ in saved] == [3, 6, 7]
    assert saved[0] == (3, "last", "best")
    saved.clear()
    words = ("train.validate_every=3", "train.max_epochs=4", "train.checkpoint_every=12")
    run_here(*words, f"run_dir={tmp_path / 'b'}")  # an epoch has 6 steps
    assert saved[0] == (2, "last")
    assert [epoch for epoch, *_ in saved] == [2, 3, 4]
    saved.clear()
    run_here("train.validate_every=9", "train.max_epochs=9", "train.max_steps=12", f"run_dir={tmp_path / 'c'}")
    assert pd.read_csv(tmp_path / "c" / "epochs.csv").val_forces_rmse.notna().tolist() == [False, True]
    assert saved == [(2, "last", "best")]


def test_a_run_that_ends_within_an_epoch_leaves_its_best_weights_too(run_here, tmp_path):
    run_here("train.max_steps=3", f"run_dir={tmp_path / 'run'}")
    last, best = (checkpoint.load(tmp_path / "run" / "checkpoints" / f"{name}.pt") for name in ("last", "best"))
    assert (last["progress"]["step"], best["progress"]["step"]) == (3, 3)
    assert last["progress"]["best"] == float("inf")  # goes on as if it had not been stopped
    assert best["progress"]["best"] < 10
    for name, value in last["ema"].items():
        assert torch.equal(value, best["ema"][name])


def test_training_learns_and_leaves_a_whole_run_folder(ddpkit_run, tmp_path):
    done = ddpkit_run("train.max_epochs=60", f"run_dir={tmp_path / 'run'}", ranks=2, launcher="mpirun")
    run = tmp_path / "run"
    epochs = pd.read_csv(run / "epochs.csv")
    assert epochs.val_forces_rmse.iloc[-1] < 0.5 * epochs.val_forces_rmse.iloc[0]
    assert list(epochs.epoch) == list(range(1, 61))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["steps"] == 360
    assert 0 < summary["data_share"] < 0.5
    assert summary["imbalance"] <= summary["imbalance_before"]
    assert "waiting for data" in done.stdout
    environment = json.loads((run / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert "parameters" in done.stdout
    model = checkpoint.load_model(run)
    assert model.species == ("Al", "Cu")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(ddpkit_run, tmp_path, ranks):
    common = ("deterministic=true", "train.max_epochs=3", "train.checkpoint_every=2", "train.clip_norm=10.0")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ddpkit_run(*common, f"run_dir={whole}", ranks=ranks)
    ddpkit_run(*common, f"run_dir={parts}", "train.max_steps=9", ranks=ranks)  # stops within the second epoch
    ddpkit_run(*common, f"resume={parts}", "train.max_steps=null", ranks=ranks)
    a, b = steps(whole), steps(parts)
    assert list(b.step) == list(range(1, 19))
    assert (a[LOSSES] == b[LOSSES]).all(axis=None)
    last = [checkpoint.load(run / "checkpoints" / "last.pt") for run in (whole, parts)]
    for part in ("model", "ema"):
        assert all(torch.equal(last[0][part][name], last[1][part][name]) for name in last[0][part])


def test_rows_after_the_checkpoint_are_dropped_and_made_again(ddpkit_run, tmp_path):
    run = tmp_path / "run"
    ddpkit_run("train.max_steps=6", "train.max_epochs=9", f"run_dir={run}", launcher="alone")
    with (run / "steps.csv").open("a") as file:
        file.write("7,2,1.0,1.0,1.0,,0.002,1.0,10,20,0.1,0.1,0.1,0.1,0.1\n8,2,1.0,1.0")  # torn by a kill
    ddpkit_run("train.max_epochs=9", f"resume={run}", "train.max_steps=14")
    assert list(steps(run).step) == list(range(1, 15))


def test_another_world_size_continues_the_same_sequence(ddpkit_run, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ddpkit_run("precision=float64", f"run_dir={whole}")
    ddpkit_run("precision=float64", f"run_dir={parts}", "train.max_steps=4")
    ddpkit_run("precision=float64", f"resume={parts}", "train.max_steps=null", ranks=3)
    pd.testing.assert_frame_equal(steps(whole)[LOSSES], steps(parts)[LOSSES], rtol=1e-9)
