"""The campaign itself: that it plans, judges and counts as it says."""

import json
import shutil
import sys

import pytest
import torch
from starts import wait_for

from ddpkit.errors import InputError
from ddpkit.ranks import phase
from ddpkit.testing.__main__ import main
from ddpkit.testing.faults import judge, strikes
from ddpkit.testing.faults.campaign import COLUMNS, Campaign, Record
from ddpkit.testing.faults.job import Job
from ddpkit.testing.faults.judge import End
from ddpkit.testing.faults.plan import FAULTS, RUNS, Plan, Run, Trial
from ddpkit.testing.faults.report import report, upper_bound


def test_a_trial_follows_from_seed_and_number_alone_and_all_pairs_come_once():
    plan = Plan(3)
    pairs = [(plan.trial(n).fault, plan.trial(n).phase) for n in range(1, len(plan.cells) + 1)]
    assert sorted(pairs) == sorted(plan.cells)
    assert {phase for _, phase in pairs} == set(phase.PHASES)
    assert {fault for fault, _ in pairs} == set(FAULTS)
    assert [Plan(3).trial(n) for n in (150, 7)] == [plan.trial(150), plan.trial(7)]
    assert [Plan(4).trial(n).fault for n in range(1, 20)] != [plan.trial(n).fault for n in range(1, 20)]


def test_a_compilation_is_struck_in_compiled_runs_alone():
    trials = [Plan(0).trial(n) for n in range(1, 300)]
    assert all(trial.run.compiled for trial in trials if trial.phase == "compile")
    assert {trial.run for trial in trials} == set(RUNS)
    assert {trial.rank for trial in trials} == {0, 1}


def test_only_what_was_asked_for():
    plan = Plan(0, only=["kill", "stop", "step", "overlap"])
    assert set(plan.cells) == {("kill", "step"), ("stop", "step")}
    assert plan.runs == [Run("overlap", compiled=False)]
    with pytest.raises(InputError, match="called flood"):
        Plan(0, only=["flood"])
    with pytest.raises(InputError, match="No run"):
        Plan(0, only=["compile", "custom"])


def test_recorded_runs_are_struck_where_they_are_asked_for():
    plan = Plan(0, only=["kill", "step", "custom-recorded", "ingraph-recorded"])
    assert [run.label for run in plan.runs] == ["custom-recorded", "ingraph-recorded"]
    assert all(plan.trial(n).run.recorded and plan.trial(n).run.compiled for n in range(1, 9))
    assert not any(run.recorded for run in Plan(0).runs)


def test_a_record_of_other_columns_is_left_alone(tmp_path):
    (tmp_path / "trials.csv").write_text(",".join(COLUMNS[:-1]) + "\n")
    with pytest.raises(InputError, match="give another --out"):
        Record(tmp_path / "trials.csv")


KILLED = Trial(0, 1, "kill", "step", Run("custom", compiled=False), 1, 0.0, 0.0)
SLOW = Trial(0, 1, "slow", "step", Run("custom", compiled=False), 1, 0.0, 0.0)
GOOD = End(True, 1.0, 137, [], "failed", "At step 3 rank 1 (process 5 on host) ended without a word.", "")


@pytest.mark.parametrize(
    ("trial", "change", "complaint"),
    [
        (KILLED, {}, ""),
        (KILLED, {"status": "finished", "error": ""}, ""),
        (KILLED, {"status": "", "error": "", "output": "mpirun noticed that rank 1 exited on signal 9"}, ""),
        (KILLED, {"code": 0, "status": "stopped", "error": "stopped by SIGTERM after step 3, rank 1"}, ""),
        (KILLED, {"ended": False}, "not ended"),
        (KILLED, {"left": ["python worker"]}, "processes left: python worker"),
        (KILLED, {"code": 0}, "exit code 0"),
        (KILLED, {"status": "running"}, "says running"),
        (KILLED, {"error": "At step 3 rank 0 ended."}, "does not say"),
        (KILLED, {"error": "At step 3 rank 11 ended."}, "does not say"),
        (KILLED, {"error": "rank 1\nTraceback"}, "more than a sentence"),
        (KILLED, {"status": "", "error": ""}, "no word"),
        (SLOW, {}, "harmless"),
        (SLOW, {"status": "finished", "error": "", "code": 0}, ""),
        (SLOW, {"status": "finished", "error": "", "code": 1}, "exit code 1"),
    ],
)
def test_an_end_is_judged(trial, change, complaint):
    said = "; ".join(judge.faults_of_end(trial, End(**vars(GOOD) | change)))
    assert (complaint in said) if complaint else not said


@pytest.fixture
def runs(tmp_path):
    """Two equal run folders."""
    one, other = tmp_path / "one", tmp_path / "other"
    (one / "checkpoints").mkdir(parents=True)
    (one / "steps.csv").write_text("step,loss,lr,seconds\n1,0.5,0.1,1.0\n2,0.25,0.1,1.0\n3,0.125,0.1,1.0\n")
    (one / "epochs.csv").write_text("epoch,val_loss,seconds\n1,0.5,1.0\n")
    torch.save({"model": {"w": torch.ones(3)}, "progress": {"seconds": 1.0}}, one / "checkpoints" / "last.pt")
    shutil.copytree(one, other)
    return one, other


@pytest.mark.parametrize(
    ("name", "before", "after", "complaint"),
    [
        ("steps.csv", "2,0.25,0.1,1.0", "2,0.25,0.1,9.0", ""),
        ("steps.csv", "0.25,", "0.25000000000000006,", "step 2: loss is 0.25000000000000006, not 0.25"),
        ("steps.csv", "2,0.25,0.1,1.0\n", "", "step 1, 3, not 1-3"),
        ("steps.csv", "3,0.125", "2,0.125", "step 1-2, 2, not 1-3"),
        ("steps.csv", "3,0.125,0.1,1.0\n", "3,0.1", "step 1-2, not 1-3"),
        ("epochs.csv", "1,0.5", "1,0.75", "val_loss is 0.75"),
    ],
)
def test_one_bit_makes_a_difference(runs, name, before, after, complaint):
    one, other = runs
    text = (one / name).read_text()
    assert before in text
    (one / name).write_text(text.replace(before, after))
    said = judge.differences(one, other)
    assert (complaint in said) if complaint else not said


def test_weights_make_a_difference(runs):
    one, other = runs
    assert not judge.differences(one, other)
    torch.save({"model": {"w": torch.ones(3).nextafter(torch.zeros(3))}}, one / "checkpoints" / "last.pt")
    assert "/model/w" in judge.differences(one, other)
    (one / "checkpoints" / "last.pt").write_bytes(b"torn")
    assert "cannot be read" in judge.differences(one, other)


def test_rows_that_were_written_before_the_checkpoint_must_stay():
    before = [{"step": "1", "seconds": "2.0"}, {"step": "2", "seconds": "2.0"}, {"step": "3", "seconds": "2.0"}]
    after = [{"step": "1", "seconds": "2.0"}, {"step": "2", "seconds": "2.5"}, {"step": "3", "seconds": "2.5"}]
    assert not judge.lost(before, after, "step", 1)
    assert judge.lost(before, after, "step", 2) == "rows of step 2 were lost"


def test_what_no_failure_among_so_many_shows():
    assert upper_bound(0, 150) == pytest.approx(1 - 0.05 ** (1 / 150))
    assert upper_bound(0, 150) < 0.02
    assert upper_bound(1, 150) > 0.03
    assert upper_bound(3, 3) == 1.0


def test_the_table_counts_what_was_hit(tmp_path, capsys):
    record = Record(tmp_path / "trials.csv")
    row = dict.fromkeys(COLUMNS, "") | {
        "seed": 1,
        "strategy": "custom",
        "compiled": 1,
        "seconds": 2.0,
        "went_on": "resumed",
    }
    for number, (fault, hit, verdict) in enumerate(
        [("kill", "step", "failed"), ("kill", "step", "passed"), ("kill", "data", "passed"), ("stop", "", "missed")], 1
    ):
        record.add(row | {"trial": number, "fault": fault, "phase_hit": hit, "verdict": verdict, "why": "it\nfell"})
    record.add(row | {"trial": 1, "fault": "kill", "phase_hit": "step", "verdict": "passed"})  # made again
    assert Record(tmp_path / "trials.csv").known == {(1, n) for n in range(1, 4)}  # the missed one is tried again
    text = report(tmp_path)
    assert "| SIGKILL to one rank | 1/1 | 2/2 | 3/3 |" in text
    assert "3 faults (seed 1), 0 failures: at most 63.2% fail" in text
    assert "1 missed" in text
    assert main(["faults", "--report", str(tmp_path)]) == 0
    assert text in capsys.readouterr().out
    with pytest.raises(InputError, match=r"no trials\.csv"):
        report(tmp_path / "elsewhere")


CHILD = """
import subprocess, time, ddpkit.ranks.phase
ddpkit.ranks.phase.enter("checkpoint")
subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # mpirun waits for what it reads
time.sleep(600)
"""


def test_a_job_is_seen_from_outside_and_leaves_nothing(tmp_path):
    with Job([sys.executable, "-c", CHILD], 2, {}, tmp_path / "output", f"test-{tmp_path}") as job:
        wait_for(lambda: {job.phase(0), job.phase(1)} == {"checkpoint"}, job.mpirun)
        wait_for(lambda: len(job.left()) >= 5, job.mpirun)  # mpirun, ranks, their children
        assert not job.wait(0.1)
        assert not strikes.strike("slow", job, 1, None)  # nothing there that heeds SIGUSR2
        assert strikes.strike("kill", job, 1, None)
        assert job.wait(120)
        assert job.phase(1) == "gone"
        assert any("sleep 600" in words for words in job.left().values())
    assert not job.left()


def test_a_disk_is_full_until_there_is_room(tmp_path):
    with strikes.small_disk(tmp_path / "disk") as disk:
        if disk is None:
            pytest.skip("mounting is not permitted here")
        (disk / "first").write_text("kept")
        strikes._fill(disk)
        with pytest.raises(OSError, match="No space"):
            (disk / "second").write_text("x" * 8192)
        strikes.make_room(disk)
        (disk / "second").write_text("x" * 8192)
    assert not list((tmp_path / "disk").iterdir())


# -- real runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    return Campaign(tmp_path_factory.mktemp("faults"), timeout=20.0)


@pytest.mark.parametrize(
    ("fault", "when", "rank"),
    [
        ("kill", "step", 1),
        pytest.param("nan", "step", 1, marks=pytest.mark.long),
        pytest.param("disk", "step", 0, marks=pytest.mark.long),
        pytest.param("kill", "model", 1, marks=pytest.mark.long),
        pytest.param("slow", "validation", 1, marks=pytest.mark.long),
    ],
)
def test_a_struck_run_goes_on_bit_for_bit(campaign, fault, when, rank):
    row = campaign.run(Trial(0, 1, fault, when, Run("overlap", compiled=False), rank, 0.5, 0.5))
    assert row["verdict"] == "passed", json.dumps(row, indent=1)


@pytest.mark.parametrize(
    ("device", "fault", "strategy"),
    [
        pytest.param("cpu", "kill", "custom", marks=pytest.mark.long),
        pytest.param("cpu", "nan", "ingraph", marks=pytest.mark.long),
        pytest.param("cpu", "kill", "standard", marks=pytest.mark.long),
        pytest.param("cuda", "kill", "custom", marks=pytest.mark.gpu(2)),
        pytest.param("cuda", "kill", "standard", marks=pytest.mark.gpu(2)),
        pytest.param("cuda", "stop", "overlap", marks=pytest.mark.gpu(2)),
        pytest.param("cuda", "stop", "ingraph", marks=pytest.mark.gpu(2)),
        pytest.param("cuda", "nan", "custom", marks=pytest.mark.gpu(2)),
    ],
)
def test_a_replay_is_struck(tmp_path, device, fault, strategy):
    run = Run(strategy, compiled=True, recorded=True)
    row = Campaign(tmp_path, device=device, timeout=20.0).run(Trial(0, 1, fault, "step", run, 1, 0.7, 0.5))
    assert row["verdict"] == "passed", json.dumps(row, indent=1)


@pytest.mark.long
def test_a_campaign_has_no_failures(tmp_path):
    words = ["faults", "--count", "30", "--seed", "11", "--jobs", "2", "--timeout", "30", "--out", str(tmp_path)]
    assert main(words) == 0, (tmp_path / "report.md").read_text()
