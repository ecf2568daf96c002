"""Runs that are killed, told to leave, or given a bad checkpoint."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from starts import wait_for
from tiny import TINY

from ddpkit import checkpoint
from ddpkit.checkpoint import random_state, set_random_state
from ddpkit.errors import RankLostError
from ddpkit.experiments import run
from ddpkit.experiments.config import read
from ddpkit.ranks.group import Environment
from ddpkit.ranks.lifeline import Lifeline, alive
from ddpkit.ranks.mpirun import mpirun
from ddpkit.record import RunFolder, record_failure


def test_random_numbers_go_on_where_they_were(tmp_path):
    def draw():
        return torch.rand(3).tolist(), [random.random() for _ in range(3)], np.random.normal(size=3).tolist()  # noqa: NPY002

    draw()
    state = random_state(torch.device("cpu"))
    expected = draw()
    torch.save(state, tmp_path / "a.pt")
    set_random_state(torch.load(tmp_path / "a.pt", weights_only=True), torch.device("cpu"))
    assert draw() == expected


def test_only_a_running_run_can_be_said_to_have_failed(tmp_path):
    folder = RunFolder(tmp_path / "run")
    for status, expected in (("running", "failed"), ("finished", "finished")):
        folder.summarize(status=status, error=None, parameters=7)
        record_failure(folder.path, "Rank 1 is gone.")
        summary = json.loads((folder.path / "summary.json").read_text())
        assert (summary["status"], summary["parameters"]) == (expected, 7)
        assert (summary["error"] == "Rank 1 is gone.") is (expected == "failed")
    record_failure(tmp_path / "nothing", "Rank 1 is gone.")
    assert not (tmp_path / "nothing").exists()


def test_a_run_that_is_given_up_while_its_ranks_agree_on_the_folder_says_so(tmp_path, monkeypatch):
    job = run.Job(read([f"run_dir={tmp_path / 'run'}"]), Environment())

    @contextmanager
    def agree(what):
        yield
        if what == "setting up the run":  # rank 1 never comes, and a thread is told so
            job.record_failure("Rank 1 is stopped.")

    monkeypatch.setattr(run, "agree", agree)
    job.open([])
    job.close_failed(KeyboardInterrupt("SIGTERM came"))  # from mpirun, which has noticed as well
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("failed", "Rank 1 is stopped.")


class Job:
    """`ddpkit-run` on two ranks, under way."""

    def __init__(self, *overrides):
        command, variables = mpirun(2)
        words = [sys.executable, "-m", "ddpkit.experiments", "run", *overrides]
        self.mpirun = subprocess.Popen(
            [*command, *words], env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def ranks(self):
        """Process number of each rank."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = dict(
                    word.split("=", 1) for word in (process / "environ").read_text().split("\0") if "=" in word
                )
                started = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, UnicodeDecodeError):
                continue
            if started == self.mpirun.pid and "OMPI_COMM_WORLD_RANK" in environment:
                found[int(environment["OMPI_COMM_WORLD_RANK"])] = int(process.name)
        return found

    def after_steps(self, run, count):
        """Waits until so many steps are logged."""
        rows = run / "steps.csv"
        wait_for(
            lambda: (rows.exists() and len(rows.read_text().splitlines()) > count) or self.mpirun.poll() is not None
        )
        assert self.mpirun.poll() is None, self.mpirun.communicate()[0]


@pytest.fixture
def overrides(clusters, cache):
    words = dict(word.split("=", 1) for word in TINY) | {
        "data.path": clusters, "data.cache": cache, "train.max_epochs": 1000, "train.checkpoint_every": 2,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in words.items()]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run_with_its_name(rank, overrides, tmp_path, ddpkit_run):
    run = tmp_path / "run"
    job = Job(*overrides, f"run_dir={run}")
    job.after_steps(run, 5)
    processes = job.ranks()
    os.kill(processes[rank], signal.SIGKILL)
    said, _ = job.mpirun.communicate(timeout=300)
    assert job.mpirun.returncode != 0
    wait_for(lambda: not any(Path(f"/proc/{number}").exists() for number in processes.values()), seconds=30.0)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "failed", said
    assert f"rank {rank} (process {processes[rank]}" in summary["error"]
    if rank == 1:
        total = checkpoint.load(run / "checkpoints" / "last.pt")["progress"]["step"] + 5
        ddpkit_run(*overrides, f"resume={run}", f"train.max_steps={total}", ranks=2)
        assert list(pd.read_csv(run / "steps.csv").step) == list(range(1, total + 1))


@pytest.mark.parametrize(
    ("number", "receiver", "more"),
    [
        (signal.SIGTERM, "rank", ()),
        (signal.SIGUSR1, "mpirun", ()),
        (signal.SIGUSR1, "rank", ("train.checkpoint_every=never",)),
    ],
)
def test_a_signal_has_all_ranks_save_and_leave(number, receiver, more, overrides, tmp_path, ddpkit_run):
    run = tmp_path / "run"
    job = Job(*overrides, *more, f"run_dir={run}")
    job.after_steps(run, 3)
    os.kill(job.ranks()[1] if receiver == "rank" else job.mpirun.pid, number)
    said, _ = job.mpirun.communicate(timeout=300)
    assert job.mpirun.returncode == 0, said
    summary = json.loads((run / "summary.json").read_text())
    steps = summary["steps"]
    assert (summary["status"], summary["error_kind"]) == ("stopped", None)
    assert summary["error"].startswith(f"stopped by {number.name} after step {steps}")
    assert len(pd.read_csv(run / "steps.csv")) == steps
    assert ("continue with resume=" in summary["error"]) is not bool(more)
    if more:
        assert "train.checkpoint_every=never" in summary["error"]
        return
    assert checkpoint.load(run / "checkpoints" / "last.pt")["progress"]["step"] == steps
    ddpkit_run(*overrides, f"resume={run}", f"train.max_steps={steps + 3}", ranks=2)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["error"], summary["steps"]) == ("finished", None, steps + 3)


def test_a_rank_whose_launcher_is_gone_says_so(monkeypatch):
    lifeline = Lifeline(Environment(launcher="mpirun"), print)
    lifeline.step = lambda: 5
    assert str(lifeline.explain(OSError(5, "Input/output error"))) == "[Errno 5] Input/output error"
    here = os.getppid()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    said = str(lifeline.explain(OSError(5, "Input/output error")))
    assert said == f"At step 5 mpirun (process {here}) was gone; resume goes on from the last checkpoint."


def test_a_rank_that_can_ask_nobody_names_itself(monkeypatch):
    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(Lifeline, "explain", no_memory)
    with (
        pytest.raises(RankLostError, match=r"^Rank 3 failed before the first step: MemoryError$"),
        alive(Environment(launcher="srun", rank=3), print),
    ):
        raise MemoryError


PROGRAM = """
    import os, sys, time
    from datetime import timedelta
    from pathlib import Path
    import ddpkit, torch, torch.distributed as dist
    from ddpkit.ranks.lifeline import Lifeline
    (Path(__file__).parent / os.environ["OMPI_COMM_WORLD_RANK"]).touch()
    while not all((Path(__file__).parent / rank).exists() for rank in "01"):  # so that imports count for no timeout
        time.sleep(0.01)
    here = ddpkit.init_process_group(device="cpu", timeout=timedelta(seconds=3))
    lifeline = Lifeline(here, print)
    lifeline.step = lambda: 5
    try:
        if here.rank == 1 and sys.argv[1] == "fails":
            raise MemoryError("no room")
        if here.rank == 1:
            time.sleep(9)
        else:
            dist.all_reduce(torch.ones(1))
    except Exception as error:
        reason = lifeline.explain(error)
        print(f"told {here.rank} {type(reason).__name__}: {reason}\\n", end="", flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize(
    ("what", "sentences"),
    [
        ("fails", ["RankLostError: Rank 1 failed at step 5: MemoryError: no room"] * 2),
        ("hangs", ["RankLostError: At step 5 rank 1 (process"]),
    ],
)
def test_all_ranks_learn_what_happened_to_one(what, sentences, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    command, variables = mpirun(2)
    done = subprocess.run(
        [*command, sys.executable, program, what],
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    told = sorted(line for line in done.stdout.splitlines() if line.startswith("told"))
    assert len(told) == len(sentences), done.stdout + done.stderr
    for rank, (line, sentence) in enumerate(zip(told, sentences, strict=True)):
        assert line.startswith(f"told {rank} {sentence}")
    assert what == "fails" or "did not come to the others" in told[0]


FAILING = """
    import os, sys, time
    import ddpkit.loss
    from ddpkit.experiments.cli import main

    busy = float(sys.argv.pop(1))

    class Loss(ddpkit.loss.EnergyForcesLoss):
        calls = 0

        def __call__(self, *arguments):
            Loss.calls += 1
            rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
            if Loss.calls == 3 and rank == 1:
                raise MemoryError("no room")
            if Loss.calls == 3:
                time.sleep(busy)  # as a host does that waits for its GPU
            return super().__call__(*arguments)

    import ddpkit.experiments.setup
    ddpkit.experiments.setup.EnergyForcesLoss = Loss
    main()
"""


@pytest.mark.parametrize("busy", ["0", "3"])
def test_the_error_of_one_rank_is_printed_once(busy, overrides, tmp_path):
    program, run = tmp_path / "program.py", tmp_path / "run"
    program.write_text(textwrap.dedent(FAILING))
    command, variables = mpirun(2)
    words = [sys.executable, program, busy, "run", *overrides, f"run_dir={run}"]
    done = subprocess.run([*command, *words], env=variables, capture_output=True, text=True, timeout=300, check=False)
    said = [line for line in done.stderr.splitlines() if "ddpkit: " in line]
    assert len(said) == 1, done.stderr
    assert said[0].endswith("ddpkit: Rank 1 failed at step 3: MemoryError: no room")
    assert "Rank 1 failed at step 3" in json.loads((run / "summary.json").read_text())["error"]
