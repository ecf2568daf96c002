"""Runs whose batches are made in processes of their own."""

import os
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
from test_faults import Job, overrides  # noqa: F401  (a fixture)

from ddpkit.ranks.processes import below

LOSSES = ["step", "epoch", "loss", "loss_energy", "loss_forces", "grad_norm", "atoms", "edges"]


def rows(run):
    return pd.read_csv(run / "steps.csv", float_precision="round_trip")[LOSSES]


def makers(process):
    return [n for n in below(process) if "makers.main" in Path(f"/proc/{n}/cmdline").read_text()]


def gone(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until_gone(processes):
    end = time.monotonic() + 30
    while left := [n for n in processes if not gone(n)]:
        assert time.monotonic() < end, f"{left} are still there"
        time.sleep(0.05)


def test_steps_are_the_same_also_from_the_middle_of_an_epoch_on(run_here, tmp_path):
    common = ("train.max_epochs=3", "train.checkpoint_every=4", "train.batch_size=8")
    assert not run_here(*common, "train.workers=0", f"run_dir={tmp_path / 'a'}")
    assert not run_here(*common, "train.workers=2", "train.max_steps=9", f"run_dir={tmp_path / 'b'}")
    assert len(rows(tmp_path / "b")) == 9
    assert not run_here(*common, "train.workers=1", "train.max_steps=null", f"resume={tmp_path / 'b'}")
    pd.testing.assert_frame_equal(rows(tmp_path / "a"), rows(tmp_path / "b"))
    assert not makers(os.getpid())


def test_a_maker_that_is_killed_ends_the_run_with_a_sentence(overrides, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    job = Job(*overrides, "train.workers=1", f"run_dir={run}")
    job.after_steps(run, 3)
    ranks = job.ranks()
    ours = {rank: makers(process) for rank, process in ranks.items()}
    assert [len(ours[rank]) for rank in (0, 1)] == [1, 1]
    os.kill(ours[1][0], signal.SIGKILL)
    told, _ = job.mpirun.communicate(timeout=120)
    assert job.mpirun.returncode == 2, told
    assert told.count("A process that makes batches") == 1
    assert "was ended by SIGKILL, as systems do where memory runs out: give the job more memory" in told
    assert "A process that makes batches" in (run / "summary.json").read_text()
    until_gone([*ranks.values(), *ours[0], *ours[1]])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_maker_outlives_its_rank(overrides, tmp_path, number):  # noqa: F811
    run = tmp_path / "run"
    job = Job(*overrides, "train.workers=2", f"run_dir={run}")
    job.after_steps(run, 3)
    ranks = job.ranks()
    ours = [n for process in ranks.values() for n in makers(process)]
    assert len(ours) == 4
    os.kill(ranks[1], number)
    told, _ = job.mpirun.communicate(timeout=120)
    assert "A process that makes batches" not in told
    until_gone([*ranks.values(), *ours])
