import subprocess
import sys

import pytest

from ddpkit.experiments.doctor import WIDTH, Screen, judge, links
from ddpkit.ranks.mpirun import mpirun

FACTS = {
    "host": "a", "process": 1, "local": [0, 1], "cores": 4, "all_cores": 4, "threads": 1, "omp": "1", "gpus": [], "card": "",
    "versions": {"ddpkit": "0.1.0", "torch": "2.13.0"}, "uuid": "", "shared_memory": 1 << 34, "disk": 1 << 40,
    "cache": ["/cache", 1 << 40], "interfaces": {}, "clock": 1000.0,
}  # fmt: skip


def doctor(*words, command=(), variables=None):
    words = [*command, sys.executable, "-m", "ddpkit.experiments", "doctor", *words]
    return subprocess.run(words, env=variables, capture_output=True, text=True, timeout=300, check=False)


def test_two_ranks_are_shown_and_their_backends_tried():
    command, variables = mpirun(2)
    done = doctor(command=command, variables=variables | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    shown = done.stdout
    assert max(map(len, shown.splitlines())) <= WIDTH
    assert "mpirun (OMPI_COMM_WORLD_RANK=0, OMPI_COMM_WORLD_SIZE=2)" in shown
    assert shown.count("rank 0: ") == shown.count("rank 1: ") == 1
    for backend in ("gloo", "MPI"):
        assert f"all-reduce  {backend}: 4 MiB in" in shown
    assert shown.count("the sum is right") == 2
    assert shown.rstrip().endswith("all is well")


def test_alone():
    done = doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "none (no launcher's variables are set): one rank" in done.stdout
    assert "all-reduce" not in done.stdout


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "4"}, ["problem:", "WORLD_SIZE=4 is set but RANK is not"]),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            ["problem:", "does not reach the rendezvous on port 1 within 3 s", "connection refused"],
        ),
    ],
)
def test_what_is_broken_is_named(variables, words, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = doctor("--timeout", "5")
    assert done.returncode == 2
    shown = " ".join(done.stdout.split())
    assert all(word in shown for word in words), done.stdout + done.stderr
    assert "torch 2." in shown
    assert max(map(len, done.stdout.splitlines())) <= WIDTH


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ([{}], []),
        ([{}, {"host": "b"}], []),
        (
            [{"versions": {"ddpkit": "0.1.0", "torch": "2.11.0"}, "host": "b"}],
            ["Versions of torch differ", "2.11.0 on b"],
        ),
        ([{"uuid": "x"}, {"uuid": "x"}], ["2 ranks on a share 1 GPU"]),
        ([{"uuid": "x"}, {"uuid": "y"}], []),
        ([{"threads": 4}, {"threads": 4}], ["ranks on a use 9 threads on 4 processors: set OMP_NUM_THREADS to 1"]),
        ([{"host": "b", "shared_memory": 64 << 20}], ["Shared memory (/dev/shm) on b has 64 MiB free"]),
        ([{"host": "b", "disk": 5 << 20}], ["This folder has 5 MiB free on b"]),
        ([{"host": "b", "cache": ["/cache", 0]}], ["/cache cannot be written on b"]),
        ([{"host": "b", "clock": 1007.5}], ["Clocks differ by 7.5 s"]),
        (
            [{"host": "b", "card": "NVIDIA H100, 550.1\n"}],
            ["b has a GPU (NVIDIA H100, 550.1), but torch 2.13.0 sees none"],
        ),
    ],
)
def test_what_is_wrong_is_said(others, words, monkeypatch):
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    problems = judge([FACTS, *(FACTS | other for other in others)])
    assert len(problems) == bool(words)
    assert all(word in problems[0] for word in words)


def test_one_rank_in_an_allocation_for_several(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert "allocation of SLURM for 8 tasks" in judge([FACTS])[0]


def test_links_between_gpus():
    topology = """\
\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID
GPU0\t X \tNV18\tSYS\tPIX\t0-15\t0\t\tN/A
GPU1\tNV18\t X \tSYS\tSYS\t0-15\t0\t\tN/A
GPU2\tSYS\tSYS\t X \tSYS\t16-31\t1\t\tN/A
NIC0\tPIX\tSYS\tSYS\t X
"""
    assert links(topology) == "NV18 between 1 pair, SYS between 2 pairs"


def test_long_rows_are_wrapped():
    screen = Screen()
    screen.add("name", "word " * 60)
    screen.problems.append("Something is wrong: " + "do this " * 30)
    assert max(map(len, screen.text().splitlines())) <= WIDTH
