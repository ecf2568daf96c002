"""Checkpoints that are missing, torn, or cannot be written."""

import threading
import time
from pathlib import Path

import pytest
import torch

from ddpkit import checkpoint
from ddpkit.errors import InputError


def state(step=3):
    return {
        "model_spec": {}, "model": {"weight": torch.ones(4)}, "ema": None, "optimizer": {}, "scheduler": None,
        "progress": {"step": step, "epoch": 1},
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name, step in (("last.pt", 5), ("best.pt", 3)):
        checkpoint.save(tmp_path / "checkpoints" / name, state(step))
    return tmp_path


def refusal(call, *arguments):
    with pytest.raises(InputError) as raised:
        call(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_the_last_checkpoint_is_gone_on_from(run):
    assert checkpoint.load_to_resume(run)["progress"]["step"] == 5


@pytest.mark.parametrize("bytes_left", [0, 100, -1])
def test_a_torn_last_checkpoint_names_the_best_one(bytes_left, run):
    last = run / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:bytes_left])
    said = refusal(checkpoint.load_to_resume, run)
    assert "last.pt cannot be read" in said
    assert f"cp {run}/checkpoints/best.pt {last}" in said
    assert "step 3" in said
    (run / "checkpoints" / "best.pt").replace(last)
    assert checkpoint.load_to_resume(run)["progress"]["step"] == 3


def test_a_missing_last_checkpoint_names_the_best_one(run):
    (run / "checkpoints" / "last.pt").unlink()
    assert "best.pt" in refusal(checkpoint.load_to_resume, run)


def test_where_no_checkpoint_is_left_a_new_run_is_the_remedy(run):
    (run / "checkpoints" / "best.pt").write_bytes(b"")
    (run / "checkpoints" / "last.pt").write_bytes(b"")
    said = refusal(checkpoint.load_to_resume, run)
    assert "last.pt cannot be read" in said
    assert "best.pt" not in said
    assert "run_dir" in said
    for path in run.glob("checkpoints/*"):
        path.unlink()
    assert "has no checkpoint" in refusal(checkpoint.load_to_resume, run)


def test_to_predict_without_a_checkpoint_advises_nothing_of_resuming(run):
    for path in run.glob("checkpoints/*"):
        path.unlink()
    for where in (run, run / "checkpoints" / "last.pt", run / "nowhere"):
        said = refusal(checkpoint.load_model, where)
        assert "no checkpoint" in said
        assert "resume" not in said


def test_a_full_disk_leaves_the_checkpoint_before(run):
    before = (run / "checkpoints" / "last.pt").read_bytes()
    if Path("/dev/full").exists():
        (run / "checkpoints" / "last.pt.part").symlink_to("/dev/full")
        said = refusal(checkpoint.save, run / "checkpoints" / "last.pt", state(9))
        assert "free some space" in said
    assert (run / "checkpoints" / "last.pt").read_bytes() == before
    assert not (run / "checkpoints" / "last.pt.part").is_symlink()


def test_a_disk_that_hangs_is_named_within_the_timeout(run, monkeypatch):
    free = threading.Event()
    monkeypatch.setattr(checkpoint, "save", lambda *_: free.wait(30))
    writer = checkpoint.Writer(timeout=0.2)
    writer.write([run / "checkpoints" / "last.pt"], state())
    began = time.monotonic()
    said = refusal(writer.wait)
    assert time.monotonic() - began < 5
    assert "last.pt" in said
    assert "0.2 s" in said
    free.set()
