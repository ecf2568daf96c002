"""Ranks that need not import torch: they are forked from a process that has done so and nothing else.

A start takes a few hundredths of a second instead of several seconds of processor time. What libraries read from the environment
when they are loaded is that of the nursery; everything else is set anew in each rank. (`multiprocessing`'s fork server would run
the caller's main module again in every rank, and gives all of them the environment that it was started with.)
"""

import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_READ_AT_LOADING = ("OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "LD_", "PYTHON", "CUDA_", "TORCH")
_READ_LATER = ("TORCHINDUCTOR_CACHE_DIR", "TORCHELASTIC_")
LIBRARY = (
    "ddpkit.compile.forces",
    "ddpkit.compile.gradients",
    "ddpkit.loss",
    "ddpkit.ranks.group",
    "ddpkit.step",
    "ddpkit.sync",
)
"""Modules that a rank is likely to need."""

# The compiler takes two seconds to get ready. Beside a GPU it is left out: had an import looked at the GPU, no fork could use it.
_SCRIPT = """
import contextlib, importlib, torch

for module in {modules}:
    importlib.import_module(module)
from ddpkit.testing.nursery import get_compiler_ready, leave, serve
if torch.cuda.device_count() == 0:
    with contextlib.suppress(Exception):  # another torch: ranks that compile will say so
        get_compiler_ready()
from ddpkit.testing.ranks import work

work(serve({descriptor}))
leave()
"""


class Child:
    """A process that the nursery has forked; like `subprocess.Popen` as far as it goes.

    Attributes:
        pid: its number. It leads a session of its own.
        returncode: None while it runs; minus the signal's number where a signal ended it.
    """

    def __init__(self, nursery: "Nursery", pid: int) -> None:
        self._nursery, self.pid = nursery, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The return code; None while it runs."""
        if self.returncode is None:
            self.returncode = self._nursery.code(self.pid, 0.0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Waits for its end.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if self.returncode is None:
            self.returncode = self._nursery.code(self.pid, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a rank", timeout)
        return self.returncode


class Nursery:
    """A process that forks ranks.

    Args:
        variables: its environment.
        modules: what it imports.
    """

    def __init__(self, variables: Mapping[str, str], modules: Sequence[str] = LIBRARY) -> None:
        self._socket, theirs = socket.socketpair()
        script = _SCRIPT.format(modules=list(modules), descriptor=theirs.fileno())
        self._process = subprocess.Popen(
            [sys.executable, "-c", script],
            env=dict(variables),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._text = b""
        self._codes: dict[int, int] = {}
        self._lock = threading.Lock()

    @property
    def lives(self) -> bool:
        """Whether it can still fork."""
        return self._process.poll() is None

    def fork(self, job: Path, variables: Mapping[str, str], output: Path, errors: Path | None = None) -> Child:
        """Starts a rank.

        Args:
            job: for `ddpkit.testing.ranks.work`.
            variables: its environment.
            output: a file for all that it prints.
            errors: a file for what it prints on the error stream, where that is to be kept apart.

        Raises:
            RuntimeError: the nursery is gone.
        """
        order = {
            "job": str(job),
            "variables": dict(variables),
            "outputs": [str(output), str(errors or output)],
            "folder": os.getcwd(),  # noqa: PTH109
        }
        with self._lock:
            self._socket.sendall(json.dumps(order).encode() + b"\n")
            while (pid := self._read()) is None:
                pass
            return Child(self, pid)

    def code(self, pid: int, timeout: float) -> int | None:
        """The return code of a rank, waited for no longer than so many seconds; None while it runs."""
        with self._lock:
            while pid not in self._codes and select.select([self._socket], [], [], timeout)[0]:
                self._read()
            return self._codes.pop(pid, None)

    def _read(self) -> int | None:
        """Reads messages; the number of a process that was started, if one says so."""
        received = self._socket.recv(1 << 16)
        if not received:
            raise RuntimeError("The process that forks ranks is gone.")
        *lines, self._text = (self._text + received).split(b"\n")
        started = None
        for line in lines:
            pid, code = json.loads(line)
            if code is None:
                started = int(pid)
            else:
                self._codes[pid] = code
        return started

    def close(self) -> None:
        """Ends the nursery; ranks that still run are not touched."""
        self._socket.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)


_nurseries: dict[tuple[Sequence[str], tuple[tuple[str, str], ...]], Nursery] = {}


def nursery(variables: Mapping[str, str], modules: Sequence[str] = LIBRARY) -> Nursery:
    """The nursery for ranks with this environment that has imported these modules; made where there is none."""
    at_loading = [name for name in variables if name.startswith(_READ_AT_LOADING) and not name.startswith(_READ_LATER)]
    key = (modules, tuple((name, variables[name]) for name in sorted(at_loading)))
    if key not in _nurseries or not _nurseries[key].lives:
        _nurseries[key] = Nursery(variables, modules)
        atexit.register(_nurseries[key].close)
    return _nurseries[key]


def get_compiler_ready() -> None:
    """Imports the compiler and sets it up, without the thread that torch's progress bars start: forks would lack it."""
    from tqdm import tqdm

    from ddpkit.compile.inductor import set_up

    interval, tqdm.monitor_interval = tqdm.monitor_interval, 0
    try:
        set_up()
    finally:
        tqdm.monitor_interval = interval


def serve(descriptor: int) -> str:
    """What the nursery does: forks ranks and tells of their ends. Returns in the ranks alone, with the path of the job."""
    control = socket.socket(fileno=descriptor)
    ended, waker = socket.socketpair()
    for one in (ended, waker):
        one.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    text = b""
    gc.freeze()  # so that collections do not touch what ranks share with this process
    while True:
        ready, _, _ = select.select([control, ended], [], [])
        if ended in ready:
            ended.recv(1 << 10)
            _tell_of_ends(control)
        if control not in ready:
            continue
        received = control.recv(1 << 16)
        if not received:
            os._exit(0)
        *lines, text = (text + received).split(b"\n")
        for line in lines:
            order = json.loads(line)
            pid = os.fork()
            if pid == 0:
                for one in (control, ended, waker):
                    one.close()
                return _become(order)
            control.sendall(json.dumps([pid, None]).encode() + b"\n")


def leave() -> None:
    """Ends a rank. Taking Python apart would touch, and so copy, all that it shares with the nursery: a second or two."""
    atexit._run_exitfuncs()  # noqa: SLF001  (Python has no public name for it)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _tell_of_ends(control: socket.socket) -> None:
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            control.sendall(json.dumps([pid, os.waitstatus_to_exitcode(status)]).encode() + b"\n")


def _become(order: dict[str, object]) -> str:
    """Makes this process the rank that was asked for."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.chdir(str(order["folder"]))
    outputs = order["outputs"]
    assert isinstance(outputs, list)
    for stream, path in enumerate(outputs, 1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    os.environ.clear()
    variables = order["variables"]
    assert isinstance(variables, dict)
    os.environ.update(variables)
    return str(order["job"])
