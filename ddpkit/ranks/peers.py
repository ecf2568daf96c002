"""The ranks as they know each other."""

import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ddpkit.ranks import processes
from ddpkit.ranks.launchers import Place


@dataclass(frozen=True)
class Peer:
    """A rank, as the others see it.

    Attributes:
        host: name of its host.
        machine: the same for ranks that share a host and its network.
        process: its number there.
        address: of its host, from which it reaches the store.
        reached: address at which it reaches the store.
    """

    host: str
    machine: str
    process: int
    address: str
    reached: str

    def describe(self, rank: int) -> str:
        """The rank in words."""
        return f"rank {rank} (process {self.process} on {self.host})"

    def state(self) -> str:
        """The state of its process, which is one of this host, as `ps` shows it: T is stopped, Z and X have ended."""
        try:
            return processes.state(self.process)
        except (OSError, IndexError):
            return "X"


def machine() -> str:
    """The same for processes that share a host, its network and its process numbers."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8])
    for name in ("net", "pid"):
        with suppress(OSError):
            parts.append(str(Path(f"/proc/self/ns/{name}").readlink()))
    return "/".join(parts)


def beside(rank: int, peers: Sequence[Peer]) -> list[int]:
    """The other ranks of a rank's host."""
    return [other for other, peer in enumerate(peers) if other != rank and peer.machine == peers[rank].machine]


def ended_beside(rank: int, peers: Sequence[Peer]) -> list[int]:
    """Those of them whose processes have ended; none where this system does not show processes."""
    if not peers or peers[rank].state() == "X":
        return []
    return [other for other in beside(rank, peers) if peers[other].state() in "ZX"]


def counted(here: Place, peers: Sequence[Peer]) -> Place:
    """The place with local numbers that the ranks of a host counted, where the launcher told none."""
    if here.counted:
        return here
    of_host = sorted([here.rank, *beside(here.rank, peers)])
    return Place(here.launcher, here.rank, here.world_size, of_host.index(here.rank), len(of_host), said=here.said)
