"""How the ranks of a job meet: the store that they share, who and where they are, and the interface that they talk over."""

import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ddpkit.errors import InputError, RankLostError, everywhere, own
from ddpkit.ranks import network
from ddpkit.ranks.launchers import Place
from ddpkit.ranks.peers import Peer, machine
from ddpkit.ranks.wait import wait_for, wait_for_readers

TRIES = 8  # ports of a SLURM step
_HANDSHAKE = 5.0  # seconds; torch's client waits for ever for the answer of a program that is no store
LINKS = 16  # hosts that a host tries to reach
OPEN = "let ranks reach each other on all ports, or name another interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list such as `gpu[07-09,12],cpu1`."""
    head = re.match(r"([^\[,]+)(?:\[(\w+))?", nodelist)
    if head is None:
        raise InputError(f"SLURM's node list {nodelist!r} cannot be read: set MASTER_ADDR to the first host.")
    return head[1] + (head[2] or "")


# -- the store -------------------------------------------------------------------------------------------------------


def open_store(here: Place, timeout: timedelta, variables: Mapping[str, str] = os.environ) -> tuple[dist.Store, str]:
    """The store over which the ranks of a launcher meet.

    Returns:
        It, and the address at which this rank reaches it.

    Raises:
        InputError: it cannot be opened or reached.
    """
    if here.world_size == 1 and here.launcher != "torchrun":
        return dist.HashStore(), "127.0.0.1"
    if "MASTER_ADDR" in variables and "MASTER_PORT" in variables:
        return _at_master(here, timeout, variables)
    if here.launcher == "srun":
        return _of_step(here, timeout, variables)
    return _over_mpi(here, timeout)


def _at_master(here: Place, timeout: timedelta, variables: Mapping[str, str]) -> tuple[dist.Store, str]:
    host, port = variables["MASTER_ADDR"], variables["MASTER_PORT"]
    if not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise InputError(f"MASTER_PORT={port} is no port: set it to a free one, the same on all ranks.")
    serves = here.rank == 0 and variables.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if serves:
        served = _serve(int(port), timeout)
        if served is None:
            raise InputError(
                f"Port {port} (MASTER_PORT) is taken on {socket.gethostname()}: set MASTER_PORT to a free one, the same on all "
                "ranks."
            )
        with suppress(OSError):
            return served, network.resolve(host)[0]
        return served, ""
    return _join(here, [host], int(port), timeout, f"MASTER_ADDR={host}, MASTER_PORT={port}")


def _of_step(here: Place, timeout: timedelta, variables: Mapping[str, str]) -> tuple[dist.Store, str]:
    """Rank 0 of a SLURM step serves at the first port of a list that is free; the others look which it is."""
    host = first_host(variables.get("SLURM_STEP_NODELIST", ""))
    job = f"{variables.get('SLURM_JOB_ID')}.{variables.get('SLURM_STEP_ID')}"
    ports = step_ports(job)
    if here.rank == 0:
        low, high = network.ephemeral_ports()
        for port in sorted(ports, key=lambda port: low <= port <= high):
            if served := _serve(port, timeout):
                served.set("job", job)
                return served, _resolved(host)
        raise InputError(
            f"None of the ports {', '.join(map(str, ports))} is free on {socket.gethostname()}: set MASTER_ADDR={host} and "
            "MASTER_PORT to a free one."
        )
    deadline = time.monotonic() + timeout.total_seconds()
    why = ""
    while time.monotonic() < deadline:
        for port in ports:
            address, why = network.first_that_answers([host], port, 0.0)
            if address and (store := _joined(address, port, timeout, job)):
                return store, address
        time.sleep(0.2)
    raise own(
        InputError(
            f"Rank {here.rank} on {socket.gethostname()} does not reach rank 0 on {host} at any of the ports "
            f"{', '.join(map(str, ports))} within {timeout.total_seconds():.0f} s ({why or 'other programs answer'}): see "
            "whether rank 0 runs there, or set MASTER_ADDR to an address that this host reaches and MASTER_PORT."
        )
    )


def step_ports(job: str) -> list[int]:
    """Ports for the store of a SLURM step, outside of the usual range of outgoing connections, different for each step."""
    number = int(hashlib.sha256(job.encode()).hexdigest(), 16)
    zones = [(20000, 32768), (10000, 20000), (61000, 65536)]
    ports = []
    for attempt in range(TRIES):
        low, high = zones[attempt % len(zones)]
        ports.append(low + (number >> 8 * attempt) % (high - low))
    return ports


def _over_mpi(here: Place, timeout: timedelta) -> tuple[dist.Store, str]:
    """Rank 0 opens a store on a port that the system gives it, and tells the others through MPI."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"{here.said}, but there is no MPI to meet through ({error}): set MASTER_ADDR and MASTER_PORT, or install an "
            "MPI library."
        ) from error
    world = MPI.COMM_WORLD
    if (world.rank, world.size) != (here.rank, here.world_size):
        raise InputError(
            f"{here.launcher} started {here.world_size} ranks but mpi4py's MPI sees {world.size}: use the mpirun of the "
            "MPI that mpi4py was built with, or set MASTER_ADDR and MASTER_PORT."
        )
    served: dist.TCPStore | None = None
    meeting: tuple[list[str], int] | None = None
    if here.rank == 0:
        served = _serve(0, timeout)
        assert served is not None
        alone = here.counted and here.local_size == here.world_size
        meeting = (["127.0.0.1"] if alone else addresses()), served.port
    hosts, port = world.bcast(meeting)
    if served is not None:
        return served, hosts[0]
    return _join(here, hosts, port, timeout, "the address that rank 0 told")


def addresses() -> list[str]:
    """Addresses of this host that others may reach: that of the route outward first, loopback last."""
    outward = [network.source_for(address) for address in ("10.255.255.255", "2001:db8::1")]
    everything = [address for listed in network.interfaces().values() for address in listed]
    candidates = dict.fromkeys(address for address in (*outward, *everything) if address)
    return sorted(candidates, key=network.is_loopback)


def _serve(port: int, timeout: timedelta) -> "dist.TCPStore | None":
    """A store that others may join; None where the port is taken."""
    try:
        return dist.TCPStore(
            "127.0.0.1", port, None, is_master=True, wait_for_workers=False, timeout=timeout, multi_tenant=port != 0
        )
    except dist.DistNetworkError:
        return None


def _join(here: Place, hosts: Sequence[str], port: int, timeout: timedelta, source: str) -> tuple[dist.Store, str]:
    address, why = network.first_that_answers(hosts, port, timeout.total_seconds())
    if address:
        if store := network.within(_HANDSHAKE, lambda: _client(address, port, timeout)):
            return store, address
        why = f"{address}: what answers there is no store of torch"
    raise own(
        InputError(
            f"Rank {here.rank} on {socket.gethostname()} does not reach the rendezvous on port {port} within "
            f"{timeout.total_seconds():.0f} s ({why}; {source}): see whether rank 0 runs there and no firewall is between, or "
            "set MASTER_ADDR to an address of rank 0's host that this host reaches."
        )
    )


def _client(address: str, port: int, timeout: timedelta) -> "dist.TCPStore":
    return dist.TCPStore(address, port, None, is_master=False, wait_for_workers=False, timeout=timeout)


def _joined(address: str, port: int, timeout: timedelta, job: str) -> dist.Store | None:
    """The store of that job, where this is it: another program may have taken the port."""

    def join() -> dist.Store | None:
        store = _client(address, port, timedelta(seconds=_HANDSHAKE))
        store.wait(["job"], timedelta(seconds=_HANDSHAKE))
        if store.get("job").decode() != job:
            return None
        store.set_timeout(timeout)
        return store

    return network.within(_HANDSHAKE, join)


def _resolved(host: str) -> str:
    try:
        return network.resolve(host)[0]
    except OSError:
        return ""


# -- the others ------------------------------------------------------------------------------------------------------


def introduce(store: dist.Store, here: Place, reached: str, timeout: timedelta) -> list[Peer]:
    """Tells the others who and where this rank is, and waits for all of them.

    Args:
        store: shared by the ranks.
        here: what the launcher told.
        reached: address at which this rank reaches the store.
        timeout: for the last to come.

    Returns:
        All ranks.

    Raises:
        RankLostError: on every rank that came, naming those that did not.
    """
    me = Peer(socket.gethostname(), machine(), os.getpid(), network.source_for(reached) if reached else "", reached)
    seconds = timeout.total_seconds()
    store.set(f"peer/{here.rank}", json.dumps(asdict(me)))
    keys = [f"peer/{rank}" for rank in range(here.world_size)]
    if here.rank == 0:
        told: Any
        if missing := wait_for(store, keys, seconds, "at the rendezvous", rank=0):
            ranks = [key.rpartition("/")[2] for key in missing]
            shown = f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks[:8])}{' ...' * (len(ranks) > 8)}"
            told = (
                f"Of {here.world_size} ranks {shown} did not come to the rendezvous within {seconds:.0f} s: see "
                "whether they were started, and what they or their launcher say."
            )
        else:
            told = [json.loads(answer) for answer in store.multi_get(keys)]  # type: ignore[attr-defined]
        store.set("peers", json.dumps(told))
        if isinstance(told, str):
            time.sleep(1.0)  # this process may hold the store
            raise RankLostError(told)
    if wait_for(store, ["peers"], seconds + 2, "at the rendezvous", rank=here.rank):
        raise own(
            RankLostError(
                f"Rank {here.rank} on {me.host} has come to the rendezvous{f' at {reached}' * bool(reached)}, but rank 0 has not "
                f"said who else is there within {seconds:.0f} s: see whether rank 0 was started and still runs."
            )
        )
    told = json.loads(store.get("peers"))
    if isinstance(told, str):
        raise everywhere(RankLostError(told))
    return [Peer(**facts) for facts in told]


# -- the interface ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interface:
    """What the ranks of this host talk to other hosts over.

    Attributes:
        name: of the interface.
        address: its first one, which gloo and NCCL use.
        why: how it was chosen.
    """

    name: str
    address: str
    why: str


def interface(
    rank: int, peers: Sequence[Peer], of_host: Mapping[str, Sequence[str]], variables: Mapping[str, str] = os.environ
) -> Interface | None:
    """The interface over which this host reaches the others; None where all ranks are on one host.

    Gloo would take the address that the host's me name leads to, which is loopback on many systems; NCCL the first interface
    that is not, which may be a container's bridge.
    """
    me = peers[rank]
    others = [peer for peer in peers if peer.machine != me.machine]
    if not others:
        return None
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        chosen = variables.get(name, "").lstrip("=^").split(",")[0]
        if chosen in of_host and not variables[name].startswith("^"):
            return Interface(chosen, of_host[chosen][0], f"{name} is set")
    local = {address for listed in of_host.values() for address in listed}
    for address, why in _candidates(me, others, local):
        if address in local and not network.is_loopback(address) and (name := network.interface_of(address, of_host)):
            return Interface(name, of_host[name][0], why)
    return None


def _candidates(me: Peer, others: Sequence[Peer], local: "set[str]") -> Iterator[tuple[str, str]]:
    """Addresses of this host in the order of preference, with the reason for each."""
    yield me.address, f"it leads to the rendezvous at {me.reached}"
    for peer in others:
        if peer.reached in local:
            yield peer.reached, f"{peer.host} reaches the rendezvous there"
    for peer in others:
        if not network.is_loopback(peer.address):
            yield network.source_for(peer.address), f"it leads to {peer.host} at {peer.address}"
    yield addresses()[0], "it is the route outward"


def variables_for(chosen: Interface, variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What has gloo and NCCL use an interface; without what the user has set."""
    wanted = {"GLOO_SOCKET_IFNAME": chosen.name}
    if "NCCL_SOCKET_IFNAME" not in variables:
        family = "AF_INET6" if ":" in chosen.address else "AF_INET"
        wanted |= {"NCCL_SOCKET_IFNAME": f"={chosen.name}", "NCCL_SOCKET_FAMILY": family}
    return {name: value for name, value in wanted.items() if name not in variables}


def try_links(store: dist.Store, rank: int, peers: Sequence[Peer], address: str, timeout: timedelta) -> None:
    """Has one rank of each host connect to other hosts, so that what is not reachable is named before it hangs somewhere.

    Raises:
        InputError: on every rank, naming hosts, address and port.
    """
    firsts = [n for n, peer in enumerate(peers) if all(peer.machine != other.machine for other in peers[:n])]
    seconds = min(timeout.total_seconds(), 60.0)
    if rank in firsts:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, 0), family=family, backlog=4 * LINKS) as listener:
            store.set(f"links/listens/{rank}", f"{address} {listener.getsockname()[1]}")
            at = firsts.index(rank)
            targets = [firsts[(at + step) % len(firsts)] for step in range(1, min(LINKS, len(firsts) - 1) + 1)]
            errors = [error for target in targets if (error := _try_link(store, peers, rank, target, seconds))]
            store.set(f"links/tried/{rank}", "\n".join(errors))
            _require(store, [f"links/tried/{first}" for first in firsts], seconds, rank)
    answers = [f"links/tried/{first}" for first in firsts]
    _require(store, answers, seconds, rank)
    if failed := [text for key in answers for text in store.get(key).decode().splitlines()]:
        wait_for_readers(store, "links/read", rank, len(peers))
        more = f" (and {len(failed) - 1} more)" * (len(failed) > 1)
        raise everywhere(InputError(f"{failed[0]}{more}: {OPEN}."))


def _try_link(store: dist.Store, peers: Sequence[Peer], rank: int, target: int, seconds: float) -> str:
    """Why this host does not reach another one; empty where it does."""
    _require(store, [f"links/listens/{target}"], seconds, rank)
    address, port = store.get(f"links/listens/{target}").decode().split()
    for _ in range(2):
        why = network.connect(address, int(port), 5.0)
        if not why:
            return ""
    return f"Host {peers[rank].host} does not reach host {peers[target].host} at {address}, port {port} ({why})"


def _require(store: dist.Store, keys: list[str], seconds: float, rank: int) -> None:
    if missing := wait_for(store, keys, seconds, "at the rendezvous", rank=rank):
        shown = ", ".join(key.rpartition("/")[2] for key in missing[:8])
        raise own(
            RankLostError(
                f"Rank {shown} came to the rendezvous but no further within {seconds:.0f} s: see what it says."
            )
        )
