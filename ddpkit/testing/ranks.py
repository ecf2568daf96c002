"""Several ranks in a test: a function called on processes of their own."""

import contextlib
import importlib
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpkit.errors import InputError
from ddpkit.testing.nursery import LIBRARY, Child, nursery

GRACE = 6.0  # seconds that the other ranks get to tell what they know once one has failed
SHOWN = 300  # characters of the begin and of the end of what a rank printed, where it is told in one line
LAUNCHER_VARIABLES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_", "TORCHELASTIC_")
RANK_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


class RankFailure(AssertionError):  # noqa: N818  (pytest shows assertion errors without their frames)
    """A rank ended with an error or did not end. The message holds each rank's traceback or last output.

    Attributes:
        why: in one line, which processes ended without a result, how, and what they printed.
    """

    def __init__(self, report: str, why: str = "") -> None:
        super().__init__(report)
        self.why = why


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    launcher: str = "torchrun",
    timeout: float = 300.0,
    initialize: bool = True,
    environment: dict[str, str] | None = None,
    preload: Sequence[str] = (),
    **keywords: Any,
) -> list[Any]:
    """Calls a function on several ranks, each a process of its own, and returns what each returned.

    Args:
        function: at the top level of its module, so that the processes can import it.
        world_size: number of ranks.
        args: its arguments, picklable.
        launcher: `"torchrun"` (its environment variables, no other program) or `"mpirun"` (the real one).
        timeout: seconds after which all ranks are killed.
        initialize: call `ddpkit.init_process_group()` first.
        environment: further variables; `OMP_NUM_THREADS` is 1 unless given.
        preload: modules that ranks find imported. They are imported once, whatever the number of ranks and calls, but not for
            `mpirun`.
        keywords: its keyword arguments, picklable.

    Returns:
        The results by rank.

    Raises:
        RankFailure: a rank raised, crashed or did not end in time.
        InputError: there is no `mpirun`.
    """
    with tempfile.TemporaryDirectory(prefix="ddpkit-ranks-") as name:
        folder = Path(name)
        job = {
            "module": function.__module__,
            "file": getattr(sys.modules.get(function.__module__), "__file__", None),
            "function": function.__qualname__,
            "call": pickle.dumps((args, keywords)),
            "path": sys.path,
            "initialize": initialize,
            "folder": str(folder),
            "prints_itself": launcher == "mpirun",
        }
        (folder / "job").write_bytes(pickle.dumps(job))
        command = [
            sys.executable,
            "-c",
            "import sys; from ddpkit.testing.ranks import work; work(sys.argv[1])",
            str(folder / "job"),
        ]
        variables = {
            k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES) and k not in RANK_VARIABLES
        }
        variables = variables | {"OMP_NUM_THREADS": "1"} | (environment or {})
        if launcher == "mpirun":
            _run_mpirun(command, world_size, variables, folder, timeout)
        elif launcher == "torchrun":
            _run_processes(world_size, variables, folder, timeout, (*LIBRARY, *preload))
        else:
            raise InputError(f"launcher={launcher} is unknown: use torchrun or mpirun.")
        if not all((folder / f"result{rank}").exists() for rank in range(world_size)):
            raise RankFailure(_report(folder, world_size, timeout))
        return [_result(folder, rank) for rank in range(world_size)]


def work(path: str) -> None:
    """What each process of `run_ranks` runs."""
    job = pickle.loads(Path(path).read_bytes())  # noqa: S301  (written by run_ranks)
    rank = int(os.environ.get("RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or 0)
    target = Path(job["folder"]) / f"result{rank}"
    if job["prints_itself"]:
        _print_to(Path(job["folder"]) / f"output{rank}")
    failure: BaseException | None = None
    try:
        sys.path[:] = job["path"]
        function: Any = _import(job["module"], job["file"])
        for name in job["function"].split("."):
            function = getattr(function, name)
        if job["initialize"]:
            from ddpkit.ranks.group import init_process_group

            init_process_group()
        args, keywords = pickle.loads(job["call"])  # noqa: S301  (written by run_ranks)
        outcome = ("returned", function(*args, **keywords))
    except BaseException as error:  # noqa: BLE001  (told to the parent)
        outcome, failure = ("raised", traceback.format_exc()), error
    target.with_suffix(".part").write_bytes(pickle.dumps(outcome))
    target.with_suffix(".part").rename(target)
    sys.stdout.flush()
    sys.stderr.flush()
    # Leaving in the ordinary way waits for collectives that other ranks may never join.
    if failure is not None:
        if job["initialize"]:
            from ddpkit.ranks.group import say_left

            say_left(failure)
        os._exit(1)
    if job["initialize"]:
        from ddpkit.ranks.group import shutdown

        shutdown()


def _print_to(path: Path) -> None:
    """Sends what this process prints to a file: mpirun may lose the last words of a rank that is ended by a signal."""
    with path.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)


def _import(module: str, file: str | None) -> Any:
    """Imports a module by name, or from its file where it was run as a script or found by pytest alone."""
    if module != "__main__":
        with contextlib.suppress(ImportError):
            found = importlib.import_module(module)
            if file is None or getattr(found, "__file__", None) == file:
                return found
    if file is None:
        raise InputError(f"Module {module} has no file: put the function for the ranks into one.")
    name = "ranks_main" if module == "__main__" else module
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@contextlib.contextmanager
def forked(
    size: int, variables: Mapping[str, str], folder: Path, modules: Sequence[str] = LIBRARY, *, is_split: bool = False
) -> Iterator[list[Child]]:
    """Ranks that work off `folder / "job"`, started as torchrun's agent does; what is left of them afterwards is ended.

    This process holds the store, so that no port can be taken in between.

    Args:
        size: number of ranks.
        variables: their environment, but for what tells each its place.
        folder: for `output{rank}`, what each prints.
        modules: what they find imported.
        is_split: keep what they print on the error stream apart, in `errors{rank}`.
    """
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    variables = {**variables} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
    }
    processes: list[Child] = []
    try:
        for rank in range(size):
            of_rank = variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            errors = folder / f"errors{rank}" if is_split else None
            one = nursery(variables, modules).fork(folder / "job", of_rank, folder / f"output{rank}", errors)
            processes.append(one)
        yield processes
    finally:
        end(processes)


def _run_processes(size: int, variables: dict[str, str], folder: Path, timeout: float, modules: Sequence[str]) -> None:
    with forked(size, variables, folder, modules) as processes:
        wait(processes, timeout)
        codes = [process.poll() for process in processes]
    if any(process.returncode != 0 for process in processes):
        names = [f"rank {rank}" for rank in range(size)]
        printed = [_printed(folder / f"output{rank}") for rank in range(size)]
        raise RankFailure(_report(folder, size, timeout), _why(names, codes, printed))


def _run_mpirun(command: list[str], size: int, variables: dict[str, str], folder: Path, timeout: float) -> None:
    from ddpkit.ranks.mpirun import MPIRUN_SETTINGS, mpirun

    head, needed = mpirun(size)
    variables |= {name: value for name, value in needed.items() if name.startswith(MPIRUN_SETTINGS)}
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            [*head, *command],
            env=variables,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            wait([process], timeout)
            code = process.poll()
        finally:
            end([process])
    if process.returncode != 0:
        printed = _printed(*(folder / f"output{rank}" for rank in range(size)), folder / "output")
        raise RankFailure(_report(folder, size, timeout), _why(["mpirun"], [code], [printed]))


def wait(processes: "Sequence[subprocess.Popen[bytes] | Child]", timeout: float) -> None:
    """Returns when all have ended, one has failed and the others had their grace, or time is up."""
    deadline = time.monotonic() + timeout
    failed = False
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if all(code is not None for code in codes):
            return
        if not failed and any(codes):
            failed, deadline = True, min(deadline, time.monotonic() + GRACE)
        time.sleep(0.02)


def end(processes: "Sequence[subprocess.Popen[bytes] | Child]") -> None:
    """Ends what is left of the ranks, with their children."""
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
    for process in processes:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(GRACE)


def _result(folder: Path, rank: int) -> Any:
    kind, value = pickle.loads((folder / f"result{rank}").read_bytes())  # noqa: S301  (written by work)
    if kind == "raised":
        raise RankFailure(f"Rank {rank}:\n{value}")
    return value


def _printed(*files: Path) -> str:
    """What was printed to these files, in one line."""
    return " ".join(word for file in files if file.exists() for word in file.read_text(errors="replace").split())


def _why(names: Sequence[str], codes: Sequence[int | None], printed: Sequence[str]) -> str:
    """How the processes ended that left no result; of those that did not end, only where all others ended well."""
    is_over = any(codes)
    parts = []
    for name, code, words in zip(names, codes, printed, strict=True):
        if code == 0 or (code is None and is_over):
            continue
        if code is None:
            how = "did not end in time"
        else:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        told = words if len(words) <= 2 * SHOWN else f"{words[:SHOWN]} ... {words[-SHOWN:]}"
        parts.append(f"{name} {how}" + (f": {told}" if told else ""))
    return "; ".join(parts)


def _report(folder: Path, size: int, timeout: float) -> str:
    """What each rank left behind."""
    parts = []
    for rank in range(size):
        result, output = folder / f"result{rank}", folder / f"output{rank}"
        if result.exists():
            kind, value = pickle.loads(result.read_bytes())  # noqa: S301  (written by work)
            told = value if kind == "raised" else "ended well"
        else:
            told = f"no result within {timeout:.0f} s, or ended without one"
        tail = output.read_text(errors="replace")[-3000:] if output.exists() else ""
        parts.append(f"--- rank {rank}: {told}" + (f"\noutput:\n{tail}" if tail.strip() else ""))
    launcher = folder / "output"
    if launcher.exists() and (tail := launcher.read_text(errors="replace")[-3000:]).strip():
        parts.append(f"--- mpirun:\n{tail}")
    return "\n" + "\n".join(parts)
