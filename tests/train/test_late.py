"""Rows that ranks read some steps later: nothing is lost, doubled or hidden, and all ranks act at the same step."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
import yaml
from test_faults import Job

from ddpkit import checkpoint
from ddpkit.experiments.config import read
from ddpkit.ranks.gather import Gather
from ddpkit.ranks.group import environment
from ddpkit.testing import run_ranks

LOSSES = ["loss", "loss_energy", "loss_forces", "grad_norm", "lr", "step", "epoch", "atoms", "edges"]


def rows(run):
    return pd.read_csv(run / "steps.csv", float_precision="round_trip")


def several_under_way():
    gather = Gather(environment(), timeout=20.0)
    for n in range(5):
        gather.send(torch.tensor([n + gather._size / 8], dtype=torch.float64), note=n)
    assert (len(gather), gather.oldest) == (5, 0)
    between = gather.numbers([7.0])  # does not disturb them
    came = [gather.receive() for _ in range(6)]
    return between.tolist(), [(everyone.tolist(), note) for everyone, note in came[:5]], came[5]


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_was_sent_first_comes_first(ranks):
    for between, came, nothing in run_ranks(several_under_way, ranks) if ranks > 1 else [several_under_way()]:
        assert between == [[7.0]] * ranks
        assert came == [([[n + ranks / 8]] * ranks, n) for n in range(5)]
        assert nothing is None


def the_same(a, b):
    """Whether two run folders tell the same but for times."""
    pd.testing.assert_frame_equal(rows(a)[LOSSES], rows(b)[LOSSES])
    epochs = [pd.read_csv(run / "epochs.csv").drop(columns="seconds") for run in (a, b)]
    pd.testing.assert_frame_equal(*epochs)


@pytest.mark.parametrize(
    "words",
    [["train.rows_late=5", "train.log_every=3"], ["train.rows_late=100"], ["train.rows_late=3", "train.log_every=2"]],
)
def test_the_same_rows_however_late_they_are_read(words, run_here, tmp_path):
    common = ("train.max_steps=11", "train.max_epochs=3", "train.checkpoint_every=4")
    assert run_here(*common, *words[1:], f"run_dir={tmp_path / 'a'}") == ""
    assert run_here(*common, *words, f"run_dir={tmp_path / 'b'}") == ""
    the_same(tmp_path / "a", tmp_path / "b")
    late = [yaml.safe_load((tmp_path / name / "config.yaml").read_text())["train"]["rows_late"] for name in "ab"]
    assert [1, words[0]] == [late[0], f"train.rows_late={late[1]}"]  # 1 on a CPU


def test_the_same_rows_on_two_ranks(ddpkit_run, tmp_path):
    for run, late in (("a", 1), ("b", 4)):
        words = ("deterministic=true", "train.max_steps=11", "train.checkpoint_every=4", f"run_dir={tmp_path / run}")
        ddpkit_run(*words, f"train.rows_late={late}", ranks=2)
    the_same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("value", [0, -3])
def test_rows_cannot_be_early(value):
    with pytest.raises(ValueError, match=rf"train.rows_late={value} is out of range: it must be at least 1"):
        read([f"train.rows_late={value}"])


@pytest.mark.parametrize(("bad", "words", "says", "written", "kept"), [
    ([3], ["train.rows_late=2"], "step 3 on rank 0; 1 update was not applied", 2, None),
    ([3, 4], ["train.rows_late=3"], "steps 3, 4 on rank 0; 2 updates were not applied", 2, None),
    ([5], ["train.rows_late=50", "train.checkpoint_every=3"], "step 5 on rank 0; 1 update was not applied", 4, 3),
    ([5, 6], ["train.rows_late=4", "train.log_every=4"], "steps 5, 6 on rank 0; 2 updates were not applied", 4, None),
    ([12], ["train.rows_late=8"], "step 12 on rank 0; 1 update was not applied", 11, 6),
])  # fmt: skip
def test_what_is_not_finite_is_told_of_the_right_step(
    bad, words, says, written, kept, broken, run_here, summary, tmp_path
):
    said = run_here(*broken(gradients=bad), "strategy=none", *words, "train.max_epochs=3")
    assert says in said
    assert ("the last checkpoint is good" in said) is (kept is not None)
    assert summary() | {"status": "failed", "error": said, "skipped": len(bad)} == summary()
    assert rows(tmp_path / "run").step.max() == written
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    assert (checkpoint.load(last)["progress"]["step"] if last.exists() else None) == kept


def test_all_ranks_are_told_of_the_right_step(broken, ddpkit_run, summary, tmp_path):
    words = (*broken(gradients=[3, 5], ranks=[1]), "strategy=none", "train.rows_late=4")
    done = ddpkit_run(*words, ranks=2, timeout=300, check=False)
    assert done.returncode == 1
    assert "steps 3, 5 on rank 1; 2 updates were not applied" in summary()["error"]
    assert done.stderr.count(summary()["error"]) == 1
    assert list(rows(tmp_path / "run").step) == [1, 2]


def test_the_rows_before_a_gradient_that_its_strategy_refuses_are_kept(broken, run_here, summary, tmp_path):
    assert "step 5" in run_here(*broken(gradients=[5]), "strategy=custom", "train.rows_late=20")
    assert list(rows(tmp_path / "run").step) == [1, 2, 3, 4]
    assert summary()["skipped"] == 1


@pytest.fixture
def overrides(clusters, cache):
    from tiny import TINY

    words = dict(word.split("=", 1) for word in TINY) | {
        "data.path": clusters, "data.cache": cache, "train.max_epochs": 1000, "train.validate": "false",
        "deterministic": "true", "train.rows_late": 4,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in words.items()]


def test_a_signal_has_all_ranks_leave_at_the_same_step(overrides, tmp_path):
    run = tmp_path / "run"
    job = Job(*overrides, f"run_dir={run}")
    job.after_steps(run, 3)
    os.kill(job.ranks()[1], signal.SIGTERM)
    said, _ = job.mpirun.communicate(timeout=300)
    assert job.mpirun.returncode == 0, said
    done = json.loads((run / "summary.json").read_text())["steps"]
    assert checkpoint.load(run / "checkpoints" / "last.pt")["progress"]["step"] == done
    assert list(rows(run).step) == list(range(1, done + 1))


def test_a_run_that_is_out_of_time_has_all_its_rows(overrides, tmp_path, run_here):
    run = tmp_path / "run"
    assert run_here(*overrides, f"run_dir={run}", "train.max_seconds=0.5") == ""
    done = json.loads((run / "summary.json").read_text())["steps"]
    assert 0 < done < 5000
    assert checkpoint.load(run / "checkpoints" / "last.pt")["progress"]["step"] == done
    assert list(rows(run).step) == list(range(1, done + 1))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 6))])
def test_a_run_killed_at_any_moment_goes_on_without_gap_or_double(seed, overrides, tmp_path, ddpkit_run):
    """The rows are those of a run that nothing happened to, bit for bit."""
    draw = random.Random(seed)
    run, words = tmp_path / "run", [*overrides, "train.checkpoint_every=3"]
    command = [sys.executable, "-m", "ddpkit.experiments", "run", *words, f"run_dir={run}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not (run / "checkpoints" / "last.pt").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(draw.random() / 5)
        process.kill()
    saved = checkpoint.load(run / "checkpoints" / "last.pt")["progress"]["step"]
    left = rows(run).step  # a torn last row has no whole number of columns, which pandas fills
    assert list(left[:saved]) == list(range(1, saved + 1))
    total = saved + 7
    ddpkit_run(*words, f"resume={run}", f"train.max_steps={total}")
    ddpkit_run(*words, f"run_dir={tmp_path / 'whole'}", f"train.max_steps={total}", "train.rows_late=1")
    assert list(rows(run).step) == list(range(1, total + 1))
    pd.testing.assert_frame_equal(rows(run)[LOSSES], rows(tmp_path / "whole")[LOSSES])
