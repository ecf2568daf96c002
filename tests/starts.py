"""The program `ddpkit`, started from a process that has imported what it needs: in tenths of a second instead of several seconds.

What runs is what the command runs, `ddpkit.experiments.cli.main` in a process of its own. Tests of launchers, and of what comes
before the first line of `ddpkit`, start Python anew (`launcher="mpirun"` or `"alone"`).
"""

import contextlib
import os
import pickle
import random
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ddpkit.ranks.mpirun import mpirun
from ddpkit.testing import ranks as testing
from ddpkit.testing.nursery import LIBRARY, nursery

MODULES = (*LIBRARY, "ddpkit.models", "ddpkit.experiments.run")


def main(words):
    from ddpkit.experiments import cli

    sys.argv = ["ddpkit", *words]
    cli.main()


def run_program(path, words):
    sys.argv = [path, *words]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise


def _job(folder, function, *arguments):
    job = {
        "module": __name__,
        "file": __file__,
        "function": function.__name__,
        "call": pickle.dumps((arguments, {})),
        "path": sys.path,
        "initialize": False,
        "folder": str(folder),
        "prints_itself": False,
    }
    (folder / "job").write_bytes(pickle.dumps(job))
    return folder / "job"


def _without_a_launcher(variables):
    names = (*testing.LAUNCHER_VARIABLES, *testing.RANK_VARIABLES, "PYTHONPATH")  # sys.path is handed on
    return {k: v for k, v in variables.items() if not k.startswith(names)}


@contextlib.contextmanager
def ddpkit(words, folder):
    """The program under way on one rank: a `Child`. It prints to `output` and `errors` in the folder."""
    variables = _without_a_launcher(os.environ)
    process = nursery(variables, MODULES).fork(
        _job(folder, main, words), variables, folder / "output0", folder / "errors0"
    )
    try:
        yield process
    finally:
        testing.end([process])


def fork_program(path, words, variables, folder):
    """A Python program under way, as `ddpkit` above; it must end well or not at all. It prints to `output` and `errors` there."""
    folder.mkdir()
    job = _job(folder, run_program, str(path), words)
    return nursery(variables, MODULES).fork(job, variables, folder / "output", folder / "errors")


def run_ddpkit(*words, ranks=1, launcher="torchrun", timeout=300):
    """Runs the program to its end, on several ranks as torchrun starts them, or by `mpirun`."""
    words = [str(word) for word in words]
    if launcher in ("mpirun", "alone"):
        command, variables = mpirun(ranks) if launcher == "mpirun" else ([], dict(os.environ))
        command = [*command, sys.executable, "-m", "ddpkit.experiments", *words]
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout, check=False)
    with tempfile.TemporaryDirectory(prefix="ddpkit-command-") as name:
        folder = Path(name)
        if ranks == 1:
            started = ddpkit(words, folder)
        else:
            _job(folder, main, words)
            started = testing.forked(ranks, _without_a_launcher(os.environ), folder, MODULES, is_split=True)
        with started as one_or_all:
            processes = one_or_all if isinstance(one_or_all, list) else [one_or_all]
            testing.wait(processes, timeout)
            codes = [process.poll() for process in processes]
        texts = [
            "".join((folder / f"{stream}{rank}").read_text() for rank in range(ranks))
            for stream in ("output", "errors")
        ]
        if None in codes and not any(codes):  # the others of a rank that has failed are ended, as launchers do
            raise subprocess.TimeoutExpired(words, timeout, *texts)
        return subprocess.CompletedProcess(words, next((code for code in codes if code), 0), *texts)


def wait_for(condition, process=None, seconds=300.0):
    """Waits until something is so, and as long as a process lives; the limit only keeps a test from lasting for ever."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert process is None or process.poll() is None, f"the process has ended ({process.returncode})"
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.01)
    return value


def bound(limit, unit):
    """Seconds within which something has to happen on a machine where ranks took `unit` to start: 2 to 4 where it is idle."""
    return limit + max(10.0, 3.0 * unit)


def free_port():
    """A port that nobody has, and that the system gives to nobody who asks for any."""
    while True:
        port = random.randrange(20000, 29000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
