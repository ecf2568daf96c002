"""What works alone uses the cores of its job, and no others."""

import os
import subprocess
import sys

import pytest

from ddpkit.ranks import cores
from ddpkit.ranks.mpirun import mpirun

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no such call on this system")
PROGRAM = """
import os
from ddpkit.ranks.cores import all_of_job, of_job
before = os.sched_getaffinity(0)
with all_of_job():
    during = os.sched_getaffinity(0)
print("cores", sorted(before), sorted(of_job()), sorted(during), os.sched_getaffinity(0) == before)
"""
BOUND = "import os, sys; os.sched_setaffinity(0, {cores}); os.execvp(sys.argv[1], sys.argv[1:])"


def seen(given, *binding):
    """What two ranks under an mpirun that is bound to some cores say: their own cores, the job's, those used, put back."""
    command, environment = mpirun(2)
    command = [*command[:3], "--oversubscribe", *binding, sys.executable, "-c", PROGRAM]
    start = [sys.executable, "-c", BOUND.format(cores=given), *command]
    done = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [line.removeprefix("cores ") for line in done.stdout.splitlines() if line.startswith("cores ")]


def test_ranks_use_what_mpirun_was_given():
    everything = os.sched_getaffinity(0)
    one = {max(everything)}
    assert seen(one, "--bind-to", "none") == [f"{sorted(one)} {sorted(one)} {sorted(one)} True"] * 2
    bound = seen(everything, "--bind-to", "core") if len(everything) > 1 else []
    for line in bound:
        assert line.endswith(f"] {sorted(everything)} {sorted(everything)} True")


@pytest.mark.parametrize(
    ("launcher", "group", "expected"),
    [
        (None, None, {3}),
        ({2, 3}, {0, 1, 2, 3, 4}, {2, 3}),
        (None, {3, 5}, {3, 5}),
        (None, set(range(64)), {3}),
    ],
)
def test_never_more_than_is_known_to_be_the_jobs(launcher, group, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(cores, "_of_launcher", lambda: launcher)
    monkeypatch.setattr(cores, "_of_group", lambda: group)
    assert cores.of_job() == expected


def test_lists_of_cores():
    assert cores._read_list("0-2,7\n") == {0, 1, 2, 7}
