"""`ddpkit doctor`: what the launcher, the network, GPUs and libraries look like from here, and what is wrong.

Alone it looks at this host; under a launcher (`mpirun -n 2 ddpkit doctor`, `torchrun ... -m ddpkit.experiments doctor`) the ranks
meet as a run's would, and add numbers up through each backend that a run could use.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from ddpkit.errors import InputError, RankLostError
from ddpkit.ranks import network, phase, watchdog
from ddpkit.ranks.launchers import Place, place

WIDTH = 100
VALUES = 1 << 20  # that are added up, float32
REPEATS = 5
SHARED_MEMORY = 256 << 20  # bytes that NCCL and data loaders may want
DISK = 1 << 30
_SHARE = 0.6  # of the time for the ranks to meet, so that what is missing is named
SKEW = 2.0  # seconds between clocks, beyond which logs of two hosts mislead


@dataclass
class Screen:
    """What is shown: rows of a name and a text, then what is wrong."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, text: str) -> None:
        """Adds a row; without a name it goes on with the one before."""
        self.rows.append((name, text))

    def text(self) -> str:
        """All of it, in lines of at most `WIDTH`."""
        lines = [line for name, text in self.rows for line in _wrapped(f"{name:<11} ", text)]
        lines.append("")
        for problem in self.problems:
            lines += _wrapped("problem:    ", problem)
        lines.append("" if self.problems else "all is well")
        return "\n".join(lines).rstrip()


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False
    ) or [head]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ddpkit doctor`."""
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds after which it ends (default: %(default)s)"
    )


def main(args: argparse.Namespace) -> None:
    """Runs `ddpkit doctor`; ends with exit code 2 where something is wrong."""
    if not args.timeout > 0:
        raise InputError(f"--timeout {args.timeout} must be positive.")
    screen = Screen()
    phase.enter("import")
    try:
        here = place()
    except InputError as error:
        screen.add("launcher", "not recognised")
        _show_host(screen, _facts(None))
        screen.problems.append(str(error))
        _end(screen, shows=True)
    watchdog.start([f"train.timeout={args.timeout}"])  # MPI may block where no thread of Python runs
    screen.add("launcher", _launcher(here))
    facts = _facts(here)
    _show_host(screen, facts)
    _end_after(args.timeout, screen, here)
    try:
        everyone = _together(screen, facts, _SHARE * args.timeout)
    except (InputError, RankLostError) as error:
        screen.problems.append(str(error))
        _end(screen, shows=here.rank == 0 or not getattr(error, "everywhere", False))
    if here.rank == 0:
        screen.problems += judge(everyone)
    _end(screen, shows=here.rank == 0, together=True)


def _end(screen: Screen, *, shows: bool, together: bool = False) -> None:
    """Prints and ends with the exit code; all ranks with rank 0's where they have met."""
    failed = bool(screen.problems)
    if shows:
        print(screen.text(), flush=True)
    if together:
        from ddpkit.ranks import group
        from ddpkit.ranks.agree import share

        failed = share(lambda: failed, "the verdict")
        group.shutdown()
    phase.enter("end")
    phase.wait_from_now("the other ranks to end")
    sys.stdout.flush()
    if failed and not together:
        time.sleep(0.5)
        os._exit(2)  # in order, it would wait in MPI for ranks that may hang
    sys.exit(2 if failed else 0)


def _end_after(seconds: float, screen: Screen, here: Place) -> None:
    """Has a thread end this process, with what is known by then."""

    def end() -> None:
        wait = phase.waits()
        doing = f"waits for {wait.what}" if wait else f"is in phase {phase.current()[0]}"
        screen.problems.append(
            f"Rank {here.rank} on {socket.gethostname()} {doing} after {seconds:.0f} s: see what the rows above lack, or give "
            "more time with --timeout."
        )
        print(screen.text(), flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


# -- one rank ----------------------------------------------------------------------------------------------------------


def _facts(here: Place | None) -> dict[str, Any]:
    """What this process sees, in plain values."""
    import torch

    cache = Path(os.environ.get("DDPKIT_CACHE", Path.home() / ".cache" / "ddpkit"))
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "local": [0, 1] if here is None else [here.local_rank, here.local_size],
        "cores": len(os.sched_getaffinity(0)),
        "all_cores": os.cpu_count() or 1,
        "omp": os.environ.get("OMP_NUM_THREADS", ""),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("ddpkit", "torch", "numpy", "e3nn", "mpi4py")},
            "CUDA": torch.version.cuda or "none",
            "NCCL": _nccl(),
            "MPI": _mpi(),
        },
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        "card": _card(),
        "shared_memory": _free("/dev/shm"),  # noqa: S108  (asked for its room alone)
        "disk": _free("."),
        "cache": [str(cache), _free(str(next(path for path in (cache, *cache.parents) if path.exists())))],
        "interfaces": network.interfaces(),
        "clock": time.time(),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _nccl() -> str:
    """The version of the NCCL that torch brings along."""
    import torch

    if not torch.cuda.is_available():
        return "none"
    return ".".join(map(str, torch.cuda.nccl.version()))


def _mpi() -> str:
    """The MPI library that mpi4py finds, asked in another process: it must not be started here yet, and may end what asks."""
    ask = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    return re.split(r"[,\n\0]", _output([sys.executable, "-c", ask]).strip())[0] or "none"


def _free(path: str) -> int:
    """Bytes that may be written there; 0 where nothing may."""
    try:
        return shutil.disk_usage(path).free if os.access(path, os.W_OK) else 0
    except OSError:
        return 0


def _card() -> str:
    """What nvidia-smi knows; empty where there is none."""
    return _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])


def _output(command: Sequence[str]) -> str:
    program = shutil.which(command[0])
    if program is None:
        return ""
    try:
        return subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def links(topology: str) -> str:
    """The links between GPUs from the output of `nvidia-smi topo -m`, in words."""
    rows = [line.split() for line in re.sub(r"\x1b\[\d*m", "", topology).splitlines() if line.startswith("GPU")]
    kinds = [kind for number, row in enumerate(rows) for kind in row[number + 2 : len(rows) + 1]]
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    return ", ".join(f"{kind} between {count} pair{'s' * (count > 1)}" for kind, count in counts.items())


def _show_host(screen: Screen, facts: dict[str, Any]) -> None:
    """The rows on this host."""
    versions = facts["versions"]
    screen.add("software", ", ".join(f"{name} {version}" for name, version in versions.items()))
    threads = f"OMP_NUM_THREADS={facts['omp']}" if facts["omp"] else "OMP_NUM_THREADS is not set"
    screen.add("processors", f"{facts['cores']} of {facts['all_cores']} for this process; {threads}")
    gpus = facts["gpus"]
    screen.add("GPUs", f"{len(gpus)}: {', '.join(dict.fromkeys(gpus))}" if gpus else "none that torch sees")
    if len(gpus) > 1 and (shown := links(_output(["nvidia-smi", "topo", "-m"]))):
        screen.add("", shown)
    path, room = facts["cache"]
    screen.add(
        "room",
        f"shared memory {_size(facts['shared_memory'])}, this folder {_size(facts['disk'])}, {path} {_size(room)} free",
    )
    cards = Path("/sys/class/infiniband")
    adapters = [entry.name for entry in cards.iterdir()] if cards.is_dir() else []
    listed = [f"{name} {', '.join(addresses[:3])}" for name, addresses in facts["interfaces"].items()]
    screen.add("interfaces", "; ".join(listed) + (f"; InfiniBand {', '.join(adapters)}" if adapters else ""))


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _launcher(here: Place) -> str:
    if here.launcher == "alone":
        return "none (no launcher's variables are set): one rank"
    return f"{here.launcher} ({here.said}): rank {here.rank} of {here.world_size}"


# -- all ranks ---------------------------------------------------------------------------------------------------------


def _together(screen: Screen, facts: dict[str, Any], timeout: float) -> list[dict[str, Any]]:
    """Has the ranks meet, and adds numbers up through each backend.

    Returns:
        What each rank sees.
    """
    import torch

    from ddpkit.ranks import group

    phase.enter("rendezvous")
    joined = group.init_process_group(timeout=timedelta(seconds=timeout))
    facts |= {"local": [joined.local_rank, joined.local_size], "threads": torch.get_num_threads(), "clock": time.time()}
    facts["device"] = str(joined.device)
    facts["uuid"] = str(torch.cuda.get_device_properties(joined.device).uuid) if joined.device.type == "cuda" else ""
    everyone = [facts]
    if joined.world_size > 1:
        everyone = _gathered(facts, joined.rank, joined.world_size)
        _show_ranks(screen, everyone)
    phase.enter("step")
    for name, add in _backends(joined):
        screen.add("all-reduce", _timed(name, add, joined, screen))
    return everyone


def _gathered(facts: dict[str, Any], rank: int, world_size: int) -> list[dict[str, Any]]:
    """Every rank's facts, on every rank."""
    from ddpkit.ranks import group
    from ddpkit.ranks.agree import agree

    shared = group.store()
    with agree("telling the others"):
        shared.set(f"doctor/{rank}", json.dumps(facts))
    return [json.loads(shared.get(f"doctor/{number}")) for number in range(world_size)]


def _show_ranks(screen: Screen, everyone: Sequence[dict[str, Any]]) -> None:
    """The rows on ranks and hosts."""
    from ddpkit.ranks import group, rendezvous

    names = list(dict.fromkeys(facts["host"] for facts in everyone))
    screen.add("ranks", f"{len(everyone)} on {len(names)} host{'s' * (len(names) > 1)}")
    for rank, facts in enumerate(everyone[:16]):
        screen.add(
            "",
            f"rank {rank}: {facts['host']}, process {facts['process']}, local rank {facts['local'][0]} of {facts['local'][1]}, "
            f"{facts['device']}, {facts['cores']} cores, {facts['threads']} threads",
        )
    if len(everyone) > 16:
        screen.add("", f"and {len(everyone) - 16} more")
    peers = group.peers()
    shown: set[str] = set()
    for rank, peer in enumerate(peers):
        if peer.machine in shown or len(shown) == 8:
            continue
        shown.add(peer.machine)
        # The variables were set where they were not: what was chosen is asked without them.
        chosen = rendezvous.interface(rank, peers, everyone[rank]["interfaces"], {})
        if chosen is None:
            screen.add("network", "one host: loopback")
            break
        used = os.environ.get("GLOO_SOCKET_IFNAME", chosen.name) if rank == 0 else chosen.name
        screen.add("network" if rank == 0 else "", f"{peer.host}: {used}, {chosen.address} ({chosen.why})")


def _backends(joined: Any) -> list[tuple[str, Callable[[Any], Any]]]:
    """Each backend that a run could use here, with what adds up a tensor in place."""
    import torch.distributed as dist

    from ddpkit.sync.comm import MpiComm

    backends: list[tuple[str, Callable[[Any], Any]]] = []
    if joined.world_size == 1:
        return backends
    backends.append((joined.backend, dist.all_reduce))
    if joined.backend != "gloo":
        group = dist.new_group(backend="gloo")
        backends.append(("gloo", lambda tensor: dist.all_reduce(tensor, group=group)))
    with suppress(InputError):
        comm = MpiComm()
        backends.append(("MPI", lambda tensor: comm.all_reduce(tensor)))  # noqa: PLW0108  (its result is not waited for)
    return backends


def _timed(name: str, add: Callable[[Any], Any], joined: Any, screen: Screen) -> str:
    """How long an all-reduce takes, and whether it adds up."""
    import torch

    device = joined.device if name == "nccl" else torch.device("cpu")
    expected = joined.world_size * (joined.world_size + 1) / 2
    best = float("inf")
    with phase.waiting(f"the all-reduce through {name}"):
        for _ in range(REPEATS):
            tensor = torch.full((VALUES,), float(joined.rank + 1), device=device)
            _settle(device)
            began = time.perf_counter()
            add(tensor)
            _settle(device)
            best = min(best, time.perf_counter() - began)
    right = bool((tensor == expected).all())
    if not right:
        screen.problems.append(
            f"The all-reduce through {name} gave {float(tensor[0])} instead of {expected}: do not train with it here; look at "
            "the versions of the drivers and libraries on each host."
        )
    rate = tensor.nbytes / best / 1e9
    size = f"{tensor.nbytes >> 20} MiB"
    return (
        f"{name}: {size} in {1e3 * best:.2f} ms, {rate:.2f} GB/s, {'the sum is right' if right else 'the sum is WRONG'}"
    )


def _settle(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def judge(everyone: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong, each in a sentence with what to do.

    Args:
        everyone: the facts of each rank (see `_facts`), with `device`, `uuid` and `threads`.
    """
    problems = []
    first = everyone[0]
    for name in first["versions"]:
        versions = {facts["versions"][name]: facts["host"] for facts in everyone}
        if len(versions) > 1:
            told = ", ".join(f"{version} on {host}" for version, host in versions.items())
            problems.append(f"Versions of {name} differ ({told}): use the same environment on all hosts.")
    by_host: dict[str, list[dict[str, Any]]] = {}
    for facts in everyone:
        by_host.setdefault(facts["host"], []).append(facts)
    for host, ranks in by_host.items():
        one = ranks[0]
        uuids = [facts["uuid"] for facts in ranks if facts["uuid"]]
        if len(set(uuids)) < len(uuids):
            problems.append(
                f"{len(uuids)} ranks on {host} share {len(set(uuids))} GPU: start as many ranks as there are GPUs; as it is, "
                "they communicate through gloo, slowly."
            )
        if one["card"] and not one["gpus"]:
            problems.append(
                f"{host} has a GPU ({one['card'].splitlines()[0]}), but torch {one['versions']['torch']} sees none: install a "
                "CUDA build of torch that fits this driver, or look at CUDA_VISIBLE_DEVICES."
            )
        threads, cores = sum(facts["threads"] for facts in ranks), max(facts["cores"] for facts in ranks)
        if threads > one["all_cores"] and len(ranks) > 1:
            problems.append(
                f"{len(ranks)} ranks on {host} use {threads} threads on {one['all_cores']} processors: set OMP_NUM_THREADS to "
                f"{max(1, cores // len(ranks))}."
            )
        if one["shared_memory"] < SHARED_MEMORY:
            problems.append(
                f"Shared memory (/dev/shm) on {host} has {_size(one['shared_memory'])} free: NCCL and readers of data want "
                f"{_size(SHARED_MEMORY)}; in a container, start it with --shm-size=1g or more."
            )
        if one["disk"] < DISK:
            problems.append(
                f"This folder has {_size(one['disk'])} free on {host}: free some space, or run where there is room."
            )
        if one["cache"][1] == 0:
            problems.append(
                f"{one['cache'][0]} cannot be written on {host}: set DDPKIT_CACHE to a folder that can be written."
            )
    clocks = [facts["clock"] for facts in everyone]
    if max(clocks) - min(clocks) > SKEW:
        problems.append(
            f"Clocks differ by {max(clocks) - min(clocks):.1f} s between ranks: have the hosts follow a time server, or times in "
            "logs mislead."
        )
    allocated = os.environ.get("SLURM_NTASKS", "")
    if len(everyone) == 1 and allocated.isdigit() and int(allocated) > 1:
        problems.append(
            f"This is one rank, in an allocation of SLURM for {allocated} tasks: start with `srun ddpkit doctor` or `mpirun`."
        )
    return problems
