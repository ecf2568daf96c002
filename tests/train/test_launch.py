import os
import subprocess
import sys
import textwrap

import pytest
from starts import free_port

from ddpkit.errors import InputError
from ddpkit.ranks.launchers import Place, place
from ddpkit.ranks.mpirun import mpirun
from ddpkit.ranks.rendezvous import first_host


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
        (
            {
                "PALS_RANKID": "3",
                "PALS_DEPTH": "8",
                "PALS_LOCAL_RANKID": "1",
                "PMI_RANK": "3",
                "PMI_SIZE": "4",
                "PMI_LOCAL_RANK": "1",
                "PMI_LOCAL_SIZE": "2",
            },
            Place("pals", 3, 4, 1, 2),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_LOCAL_RANK": "1", "PALS_RANKID": "1"}, Place("pals", 1, 2, 1, 2)),
        (
            {
                "MV2_COMM_WORLD_RANK": "1",
                "MV2_COMM_WORLD_SIZE": "4",
                "MV2_COMM_WORLD_LOCAL_RANK": "1",
                "MV2_COMM_WORLD_LOCAL_SIZE": "2",
                "PMI_RANK": "1",
                "PMI_SIZE": "4",
            },
            Place("mvapich", 1, 4, 1, 2),
        ),
        (
            {"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "2", "FLUX_TASK_LOCAL_ID": "1", "PMI_RANK": "1", "PMI_SIZE": "2"},
            Place("flux", 1, 2, 1, 2),
        ),
        (
            {
                "JSM_NAMESPACE_RANK": "5",
                "JSM_NAMESPACE_SIZE": "6",
                "JSM_NAMESPACE_LOCAL_RANK": "1",
                "JSM_NAMESPACE_LOCAL_SIZE": "2",
                "PMIX_RANK": "5",
            },
            Place("jsrun", 5, 6, 1, 2),
        ),
        # A Kubeflow PyTorchJob runs one rank in each pod.
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"},
            Place("by hand", 1, 2, 0, 1),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Place("mpiexec", 1, 2, 0, 1)),
        # mpirun in an allocation: its daemons are a step of SLURM, which hands its variables down.
        (
            {
                "SLURM_NTASKS": "2",
                "SLURM_PROCID": "1",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_LOCALID": "0",
                "PMI_RANK": "1",
                "PMI_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            Place("mpirun", 3, 4, 1, 2),
        ),
        # What is left over from a shell that was one rank.
        (
            {
                "RANK": "0",
                "WORLD_SIZE": "1",
                "LOCAL_RANK": "0",
                "PMIX_RANK": "1",
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            Place("mpirun", 1, 2, 1, 2),
        ),
        # torchrun started by mpirun, once on each host.
        (
            {
                "TORCHELASTIC_RUN_ID": "none",
                "RANK": "5",
                "WORLD_SIZE": "8",
                "LOCAL_RANK": "1",
                "LOCAL_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
            },
            Place("torchrun", 5, 8, 1, 4),
        ),
        # A step of several tasks that contains a shell of salloc or a batch script is no step of srun.
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "4294967291"},
            Place("alone", 0, 1, 0, 1),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_NPROCS": "16"}, Place("alone", 0, 1, 0, 1)),
        ({"PMIX_RANK": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Place("alone", 0, 1, 0, 1)),
        ({"RANK": "0"}, Place("alone", 0, 1, 0, 1)),
        ({"NODE_RANK": "1", "NNODES": "2"}, Place("alone", 0, 1, 0, 1)),
        # A batch script outside srun is alone, whatever the allocation.
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"},
            Place("alone", 0, 1, 0, 1),
        ),
    ],
)
def test_place_under_each_launcher(variables, expected):
    assert place(variables) == expected


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set but RANK is not"),
        ({"RANK": "1"}, "RANK=1 is set and not WORLD_SIZE"),
        ({"PMIX_RANK": "0"}, "PMIX_RANK=0"),
        ({"PMIX_RANK": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, "PMIX_RANK=1"),
        ({"PALS_RANKID": "0"}, "PALS_RANKID=0"),
        ({"ALPS_APP_PE": "3"}, "ALPS_APP_PE=3"),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, "SLURM_PROCID=2"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, "MV2_COMM_WORLD_RANK is not"),
        ({"NEW_TASK_RANK": "0", "NEW_JOB_SIZE": "2"}, "NEW_TASK_RANK=0 and NEW_JOB_SIZE=2 look like a launcher"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "no rank of a job"),
        (
            {"RANK": "0", "WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            "contradict each other",
        ),
    ],
)
def test_what_tells_of_several_ranks_and_cannot_be_read_is_refused(variables, words):
    with pytest.raises(InputError, match=words) as refused:
        place(variables)
    assert any(remedy in str(refused.value) for remedy in ("set RANK", "unset"))


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
    import os
    import ddpkit, torch, torch.distributed as dist
    from ddpkit.ranks.agree import agree
    from ddpkit.ranks import group
    before = torch.get_num_threads(), dict(os.environ)
    here = ddpkit.init_process_group(device="cpu")
    assert ddpkit.init_process_group() is here
    x = torch.tensor([float(here.rank)])
    dist.all_reduce(x)
    try:
        with agree("the test"):
            if here.rank == here.world_size - 1:
                raise ddpkit.InputError("the last rank dislikes this")
    except ddpkit.InputError as error:
        disliked = str(error)
    try:
        with agree("the test"):
            if here.rank == 0:
                1 / 0
    except (RuntimeError, ZeroDivisionError) as error:
        failed = str(error)
        told = "Rank 0 failed in the test: ZeroDivisionError: division by zero"
        assert getattr(error, "told", failed) == told or here.world_size == 1
    try:
        with agree("the test"):
            if here.rank == 0:
                raise MemoryError
    except (RuntimeError, MemoryError) as error:
        assert getattr(error, "told", str(error)) == "Rank 0 failed in the test: MemoryError" or here.world_size == 1
    with agree():
        pass
    print(f"{here.launcher} {here.rank}/{here.world_size} {x.item():g} {disliked} | {failed}\\n", end="")
    group.shutdown()
    assert (torch.get_num_threads(), dict(os.environ)) == before
"""


def run(command, variables=None):
    variables = dict(os.environ if variables is None else variables)
    variables.pop("OMP_NUM_THREADS", None)  # ranks share the cores out
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
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
    lines = run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
            str(free_port()),
            program,
        ]
    )
    assert [line.split()[:3] for line in lines] == [["torchrun", f"{rank}/2", "1"] for rank in range(2)]


def test_alone(program):
    assert run([sys.executable, program])[0].split()[:3] == ["alone", "0/1", "0"]


RESTARTED = """
    import os
    import ddpkit
    from ddpkit.ranks.agree import agree, share
    here = ddpkit.init_process_group(device="cpu")
    with agree("the first thing"):
        pass
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    if attempt == "0" and here.rank == 1:
        raise MemoryError("no room")
    print(f"{here.rank} | {share(lambda: attempt)}\\n", end="")
"""


def test_ranks_that_torchrun_starts_again_do_not_hear_of_those_before(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(RESTARTED))
    options = ["--nproc-per-node", "2", "--max-restarts", "1", "--master-port", str(free_port())]
    assert run([sys.executable, "-m", "torch.distributed.run", *options, str(program)]) == ["0 | 1", "1 | 1"]
