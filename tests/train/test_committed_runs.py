"""Run folders that version 0.1 wrote and that are committed: later versions go on with them, and predict with them."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from ddpkit import checkpoint
from ddpkit.experiments.cli import _dispatch
from ddpkit.models import Allegro, NequIP

RUNS = Path(__file__).parent / "runs_0_1"


@pytest.mark.parametrize(("name", "kind"), [("allegro", Allegro), ("nequip", NequIP)])
def test_a_run_of_0_1_goes_on(name, kind, tmp_path, monkeypatch):
    """The run stopped after 3 steps; `expected.csv` is that of the same version's run of 6."""
    shutil.copytree(RUNS / name, tmp_path / name)
    shutil.copy(RUNS / "frames.xyz", tmp_path)
    monkeypatch.chdir(tmp_path)
    model = checkpoint.load_model(tmp_path / name)
    assert isinstance(model, kind)
    weights = checkpoint.load(tmp_path / name / "checkpoints" / "last.pt")["model"]
    assert list(model.state_dict()) == list(weights)
    _dispatch(["run", f"resume={name}", "train.max_steps=6"])
    steps, expected = (pd.read_csv(tmp_path / name / f"{which}.csv") for which in ("steps", "expected"))
    columns = ["step", "epoch", "loss", "loss_energy", "loss_forces", "lr", "grad_norm", "atoms", "edges"]
    pd.testing.assert_frame_equal(steps[columns], expected[columns], rtol=1e-3)
    assert not torch.equal(next(checkpoint.load_model(tmp_path / name).parameters()), next(model.parameters()))
