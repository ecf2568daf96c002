import socket
import subprocess
import sys
import textwrap

import pytest

from ddpkit.errors import InputError
from ddpkit.launch import Place, first_host, mpirun, place


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Place("alone", 0, 1, 0, 1)),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            Place("torchrun", 5, 8, 1, 4),
        ),
        (
            {
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            Place("mpirun", 3, 4, 1, 2),
        ),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            Place("mpiexec", 1, 2, 1, 2),
        ),
        (
            {
                "SLURM_PROCID": "9",
                "SLURM_STEP_NUM_TASKS": "16",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
            },
            Place("srun", 9, 16, 1, 8),
        ),
        # A batch script outside srun is alone, whatever the allocation.
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"},
            Place("alone", 0, 1, 0, 1),
        ),
    ],
)
def test_place_under_each_launcher(variables, expected):
    assert place(variables) == expected


def test_launcher_variables_that_are_no_numbers():
    with pytest.raises(InputError, match="RANK=x"):
        place({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("gpu7", "gpu7"), ("gpu[07-09,12],cpu1", "gpu07"), ("a-b3,c4", "a-b3"), ("n[3,5]", "n3")],
)
def test_first_host_of_a_node_list(nodelist, host):
    assert first_host(nodelist) == host


PROGRAM = """
    import ddpkit, torch, torch.distributed as dist
    from ddpkit import launch
    here = ddpkit.init_process_group(device="cpu")
    assert ddpkit.init_process_group() is here
    x = torch.tensor([float(here.rank)])
    dist.all_reduce(x)
    try:
        with launch.agree("the test"):
            if here.rank == here.world_size - 1:
                raise ddpkit.InputError("the last rank dislikes this")
    except ddpkit.InputError as error:
        told = str(error)
    try:
        with launch.agree("the test"):
            if here.rank == 0:
                1 / 0
    except (RuntimeError, ZeroDivisionError) as error:
        failed = str(error)
    with launch.agree():
        pass
    print(f"{here.launcher} {here.rank}/{here.world_size} {x.item():g} {told} | {failed}\\n", end="")
    launch.shutdown()
"""


def run(command, variables=None):
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return sorted(line for line in done.stdout.splitlines() if "|" in line)


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))
    return str(path)


def test_under_mpirun(program):
    command, variables = mpirun(3)
    lines = run([*command, sys.executable, program], variables)
    assert [line.split()[:3] for line in lines] == [["mpirun", f"{rank}/3", "3"] for rank in range(3)]
    assert all("the last rank dislikes this" in line for line in lines)
    assert all("division by zero" in line for line in lines)


def test_under_torchrun(program):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lines = run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), program]
    )
    assert [line.split()[:3] for line in lines] == [["torchrun", f"{rank}/2", "1"] for rank in range(2)]


def test_alone(program):
    assert run([sys.executable, program])[0].split()[:3] == ["alone", "0/1", "0"]
