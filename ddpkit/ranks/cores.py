"""The processor cores that a job was given on this host.

Launchers bind each rank to a core or two, and the other ranks of a host wait while one compiles or reads: what works alone may
use the cores of all of them, but never those of other jobs.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# What starts ranks, as the names of processes, which Linux cuts at 15 letters. SLURM's own is not among them: it is root's, and
# may run on every core.
_LAUNCHERS = (
    "mpirun",
    "mpiexec",
    "prterun",
    "prted",
    "orterun",
    "orted",
    "mpiexec.hydra",
    "hydra_pmi_proxy",
    "hydra_bstrap_pr",
)


def of_job() -> set[int]:
    """The cores that this process may use while the other ranks of its job on this host wait.

    Those that the launcher may run on itself, where ranks have one; else those of the control group, where it holds fewer than
    the host; else those that this process is bound to.
    """
    own = os.sched_getaffinity(0)
    launcher = _of_launcher()
    if launcher is not None:
        return own | launcher
    group = _of_group()
    return own | group if group is not None and len(group) < (os.cpu_count() or 1) else own


@contextmanager
def all_of_job() -> Iterator[None]:
    """While this is open, this thread and what it starts may run on every core of the job on this host."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    take_all_of_job()
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def take_all_of_job() -> None:
    """Lets this thread, and what it starts, run on every core of the job on this host."""
    with suppress(OSError):
        os.sched_setaffinity(0, of_job())


def _of_launcher() -> set[int] | None:
    """The cores of the nearest ancestor that is a launcher; None where there is none."""
    pid = os.getppid()
    with suppress(OSError, ValueError):
        while pid > 0:
            if Path(f"/proc/{pid}/comm").read_text().strip() in _LAUNCHERS:
                return os.sched_getaffinity(pid)
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def _of_group() -> set[int] | None:
    """The cores of this process's control group; None where that cannot be told."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for wanted, place, name in _GROUPS:
                file = Path(place + path) / name
                if wanted in controllers.split(",") and file.is_file():
                    return _read_list(file.read_text())
    return None


# of version 2 and version 1 of Linux's control groups: controller, where they lie, file
_GROUPS = (
    ("", "/sys/fs/cgroup", "cpuset.cpus.effective"),
    ("cpuset", "/sys/fs/cgroup/cpuset", "cpuset.effective_cpus"),
)


def _read_list(text: str) -> set[int]:
    """`0-3,8` as a set."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores
