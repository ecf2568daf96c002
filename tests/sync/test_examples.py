"""The examples of the documentation run under mpirun (MACE needs an environment of its own)."""

import subprocess
import sys
from pathlib import Path

import pytest

from ddpkit.ranks.mpirun import mpirun

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.mark.parametrize("name", ["01_plain_loop", "03_graph_network", "04_own_strategy"])
def test_example_runs(name):
    head, variables = mpirun(2)
    command = [*head, sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(
        command, env=variables | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        assert f"rank {rank} of 2" in done.stdout
