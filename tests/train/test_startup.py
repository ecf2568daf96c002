"""Ranks that are stopped or stuck before the first step."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from starts import bound, wait_for
from tiny import TINY

from ddpkit.ranks.mpirun import mpirun
from ddpkit.ranks.processes import below

TIMEOUT = 12


@pytest.fixture
def overrides(clusters, cache, tmp_path):
    return [
        *TINY,
        f"data.path={clusters}",
        f"data.cache={cache}",
        f"train.timeout={TIMEOUT}",
        f"run_dir={tmp_path / 'run'}",
    ]


def start(words):
    command, variables = mpirun(2)
    job = subprocess.Popen(
        [*command, sys.executable, *words], env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    job.began = time.monotonic()
    return job


def ranks(job):
    """Process number of each rank."""
    numbers = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            rank = re.search(r"OMPI_COMM_WORLD_RANK=(\d+)", (process / "environ").read_text())
            if rank and parent == str(job.pid):
                numbers[int(rank[1])] = int(process.name)
    return numbers


def in_phase(job, rank, phase):
    """Waits until a rank is in a phase; its process number, and the seconds since the start of the job."""
    process = wait_for(lambda: ranks(job).get(rank), job)
    name = Path(f"/proc/{process}/comm")
    deadline = time.monotonic() + 300
    while job.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if name.read_text().strip() == f"ddpkit:{phase}"[:15]:
                return process, time.monotonic() - job.began
        time.sleep(0.001)
    raise AssertionError(job.communicate()[0])


def family(job):
    """The processes of a job: ranks, their watchdogs and all that they started."""
    return list(below(job.pid))


def runs(process):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def end_of(job):
    """What a job said, after how many seconds it ended; none of its processes is left."""
    processes, began = family(job), time.monotonic()
    said, _ = job.communicate(timeout=300)
    took = time.monotonic() - began
    wait_for(lambda: not any(runs(process) for process in processes), seconds=30.0)
    assert job.returncode != 0, said
    return [line for line in said.splitlines() if "ddpkit: " in line and "warning: " not in line], took


@pytest.mark.parametrize(
    ("phase", "rank"),
    [
        ("import", 1),
        ("model", 0),
        pytest.param("rendezvous", 0, marks=pytest.mark.long),
        pytest.param("data", 1, marks=pytest.mark.long),
        pytest.param("validation", 1, marks=pytest.mark.long),
        pytest.param("end", 0, marks=pytest.mark.long),
    ],
)
def test_a_rank_that_is_stopped_is_named_within_the_timeout(phase, rank, overrides, tmp_path):
    job = start(["-m", "ddpkit.experiments", "run", *overrides])
    process, unit = in_phase(job, rank, phase)
    wait_for(lambda: list(below(process)), job)  # its watchdog
    os.kill(process, signal.SIGSTOP)
    said, took = end_of(job)
    assert took < bound(TIMEOUT, unit)
    assert len(said) == 1, said
    assert f"ank {rank} (process {process} on " in said[0]
    assert re.search(rf"(has been stopped for {TIMEOUT} s|is stopped) in phase {phase}", said[0])
    if phase in ("model", "validation"):
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["status"] == "failed"
        assert f"ank {rank} (process {process} on " in summary["error"]


SLOW = """
    import os, sys, time
    from ddpkit.experiments import run_data
    from ddpkit.experiments.cli import main

    what, original = sys.argv.pop(1), run_data.open_data

    def open_data(*arguments):
        if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
            began = time.monotonic()
            if what == "stuck":
                time.sleep(1000)
            while time.monotonic() - began < 14:
                sum(range(1 << 27))  # one call into C that keeps Python's lock for seconds
            while time.monotonic() - began < 28:
                open("/dev/zero", "rb").read(1 << 17)
                time.sleep(0.5)
        return original(*arguments)

    run_data.open_data = open_data
    main()
"""


def test_a_rank_that_is_stuck_is_named_within_the_timeout(overrides, tmp_path):
    (tmp_path / "program.py").write_text(textwrap.dedent(SLOW))
    job = start([str(tmp_path / "program.py"), "stuck", "run", *overrides])
    process, unit = in_phase(job, 1, "data")
    said, took = end_of(job)
    assert took < bound(TIMEOUT, unit)
    assert len(said) == 1, said
    assert f"Rank 1 (process {process} on " in said[0]
    assert f"has made no progress for {TIMEOUT} s in phase data" in said[0]
    assert "no progress" in json.loads((tmp_path / "run" / "summary.json").read_text())["error"]


LOCKED = """
    import ctypes, os, subprocess
    from ddpkit.experiments.cli import main
    from ddpkit.sync.flat import FlatSync

    original = FlatSync.reduce

    def reduce(sync):
        if sync.stats.calls == 1:  # as the compiler's workers, which are not to outlive the run
            subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if sync.stats.calls == 3:  # both keep Python's lock: one sleeps, one computes, as a call of CUDA that waits does
            if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
                ctypes.PyDLL(None).sleep(1000)
            sum(range(1 << 60))
        original(sync)

    FlatSync.reduce = reduce
    main()
"""


def test_ranks_whose_threads_stand_still_are_ended_by_their_watchdogs(overrides, tmp_path):
    (tmp_path / "program.py").write_text(textwrap.dedent(LOCKED))
    job = start([str(tmp_path / "program.py"), "run", *overrides])
    process, unit = in_phase(job, 1, "step")
    wait_for(lambda: len(family(job)) >= 6, job)  # ranks, watchdogs, what they started
    said, took = end_of(job)
    assert took < bound(TIMEOUT + 8, unit)
    assert any(f"Rank 1 (process {process} on " in line for line in said), said
    error = json.loads((tmp_path / "run" / "summary.json").read_text())["error"]
    assert f"Rank 1 (process {process} on " in error
    assert "has made no progress" in error


@pytest.mark.long
def test_a_rank_that_is_slow_is_left_alone(overrides, tmp_path):
    (tmp_path / "program.py").write_text(textwrap.dedent(SLOW))
    job = start([str(tmp_path / "program.py"), "slow", "run", *overrides, "train.max_steps=3"])
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said


def test_a_run_alone_has_no_watchdog():
    """A user may stop it for as long as they like."""
    program = "from ddpkit.ranks import watchdog; watchdog.start([]); print(watchdog.board)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"


def test_a_run_says_what_it_is_busy_with_before_its_first_step(run_here, tmp_path, capsys):
    compiled = ["model._target_=pairs.Pairs", "compile=true", "compiler=interpreted"]
    run_here(*compiled, "train.max_steps=1", "train.validate=false", f"run_dir={tmp_path / 'run'}")
    before, _ = capsys.readouterr().out.split("ready after")
    comparing, compiling = (before.find(word) for word in ("comparing kernels with a reference", "compiling the step"))
    assert -1 < comparing < compiling
