"""Finding out who and where this process is, and joining the others.

`init_process_group()` works under `mpirun`, `torchrun`, `srun` and alone, without a word of configuration.
"""

import logging
import os
import socket
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ddpkit.errors import InputError, RankLostError, own
from ddpkit.ranks import network, phase, rendezvous, wait
from ddpkit.ranks.launchers import Place, place
from ddpkit.ranks.peers import Peer, counted
from ddpkit.ranks.switches import at_exit, threads, variables
from ddpkit.torch_private import default_store

_log = logging.getLogger(__name__)

DEFAULT_TIMEOUT = timedelta(minutes=10)
_PARTING = 2.0  # seconds that rank 0 stays for the others at most


@dataclass(frozen=True)
class Environment:
    """Where this process stands among the ranks."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = "alone"
    device: torch.device = torch.device("cpu")  # noqa: RUF009  (devices never change)
    backend: str = "gloo"

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


_current: Environment | None = None
_peers: list[Peer] = []
_shared: dist.Store | None = None  # where this module has made the group
_groups = 0  # made so far; ranks count alike
_switches = ExitStack()
_timeout = DEFAULT_TIMEOUT


def init_process_group(
    device: str | None = None, backend: str | None = None, timeout: timedelta = DEFAULT_TIMEOUT
) -> Environment:
    """Joins the process group, and makes it where there is none.

    Args:
        device: `"cuda"` or `"cpu"`; by default the GPU of this local rank where there is one.
        backend: by default `"nccl"` with a GPU for each rank, else `"gloo"`.
        timeout: how long a collective may wait before the job ends.

    Returns:
        Where this process stands. A second call returns the same.

    Raises:
        InputError: the launcher and this installation do not fit together, or there are not enough GPUs.
    """
    global _current  # noqa: PLW0603  (a process belongs to one group)
    if _current is not None and dist.is_initialized():
        return _current
    here = place()
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"device={device} is unknown: use cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device=cuda was asked for, but torch sees no GPU here: use device=cpu or a CUDA build of torch."
        )
    on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
    shared: dist.Store | None = None
    _switches.close()  # of a group that was destroyed without shutdown()
    if not dist.is_initialized():
        _switches.enter_context(at_exit(_leave))
        with phase.waiting("the other ranks to come"):
            shared, here = _find_others(here, timeout)
    if on_gpu:
        chosen = torch.device("cuda", here.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(chosen)
    else:
        chosen = torch.device("cpu")
        _switches.enter_context(threads(_threads(here)))
    if shared is not None:
        with phase.waiting("the other ranks to connect"):
            _connect(shared, here, chosen, backend, timeout)
    _current = Environment(
        dist.get_rank(),
        dist.get_world_size(),
        here.local_rank,
        here.local_size,
        here.launcher,
        chosen,
        dist.get_backend(),
    )
    return _current


def _find_others(here: Place, timeout: timedelta) -> tuple[dist.Store, Place]:
    """The store of all ranks, once all have come, and where this one stands among them."""
    global _peers, _shared, _groups  # noqa: PLW0603  (a process belongs to one group)
    opened, reached = rendezvous.open_store(here, timeout)
    # A store that outlives the group, as torchrun's does when it starts ranks again, must not tell of those before.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if _agents_store() else "0"
    shared = dist.PrefixStore(f"group{attempt}.{_groups}", opened)
    _shared, _groups = shared, _groups + 1
    if here.world_size == 1:
        return shared, here
    _peers = rendezvous.introduce(store(), here, reached, timeout)
    if chosen := rendezvous.interface(here.rank, _peers, network.interfaces()):
        _switches.enter_context(variables(rendezvous.variables_for(chosen)))
        rendezvous.try_links(store(), here.rank, _peers, chosen.address, timeout)
    return shared, counted(here, _peers)


def _connect(shared: dist.Store, here: Place, device: torch.device, backend: str | None, timeout: timedelta) -> None:
    """Makes the process group."""
    global _timeout  # noqa: PLW0603  (likewise)
    _timeout = timeout
    chosen = backend or _backend(here, device)
    try:
        dist.init_process_group(
            chosen, store=shared, rank=here.rank, world_size=here.world_size, timeout=timeout,
            device_id=device if chosen == "nccl" else None,
        )  # fmt: skip
    except RuntimeError as error:
        if here.world_size == 1 or not is_of_communication(error):
            raise
        interface = os.environ.get("GLOO_SOCKET_IFNAME") or "the one of the host's name"
        raise own(
            RankLostError(
                f"Rank {here.rank} on {socket.gethostname()} did not connect to the others ({chosen}, interface {interface}: "
                f"{' '.join(str(error).split())[:200]}): look whether another rank has failed; {rendezvous.OPEN}."
            )
        ) from error


def peers() -> list[Peer]:
    """All ranks with their hosts and processes. The first call is for all ranks at once where others made the process group."""
    global _peers  # noqa: PLW0603  (likewise)
    if not _peers:
        here = place()
        alone = Place(here.launcher, dist.get_rank(), dist.get_world_size(), here.local_rank, here.local_size)
        _peers = rendezvous.introduce(store(), alone, "", _timeout)
    return _peers


def known_peers() -> list[Peer]:
    """The same, without waiting: empty where they have not been asked for."""
    return _peers


def timeout_of_group() -> float:
    """How long a collective may wait before the job ends, seconds."""
    return _timeout.total_seconds()


def _leave() -> None:
    """Leaves the process group while Python still runs.

    Otherwise a thread of gloo may touch Python objects during its end, which aborts the process; and a rank that failed would
    keep its connections open inside MPI's finalisation, where the others cannot see that it is gone.
    """

    def leave() -> None:
        if dist.is_initialized():
            say_left(getattr(sys, "last_value", None))  # the error that nobody has caught
            _close_recordings()
            dist.destroy_process_group()

    leaving = threading.Thread(target=leave, daemon=True)
    leaving.start()
    leaving.join(10.0)  # a collective that other ranks never joined may keep it
    time.sleep(
        0.1
    )  # torch's own modules may hold the group, so that its threads go on: let them drop their last tensors


def environment() -> Environment:
    """Where this process stands; alone where nothing was initialised."""
    if dist.is_initialized() and _current is None:
        return init_process_group()
    return _current or Environment()


def shutdown() -> None:
    """Leaves the process group, and undoes what it needed of the process. Ranks that wait for this one are told."""
    global _current, _peers, _shared
    if dist.is_initialized():
        say_left(None)
        _close_recordings()
        dist.destroy_process_group()
    _current, _peers, _shared = None, [], None
    _switches.close()


def _close_recordings() -> None:
    """Destroys CUDA graphs: a communicator that one of them uses waits for its end, for ever."""
    if "ddpkit.capture.steps" in sys.modules:
        sys.modules["ddpkit.capture.steps"].close_all()


def say_left(error: BaseException | None) -> None:
    """Tells the ranks that wait for this one that it ends. Rank 0, where the store may live, lets them read it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    shared, rank, size = store(), dist.get_rank(), dist.get_world_size()
    why = "" if error is None else " ".join(f"{type(error).__name__}: {error}".split())[:500]
    stays = rank == 0 and not _agents_store()
    network.within(_PARTING, lambda: wait.say_left(shared, rank, why, stays_for=size if stays else 0))


def store() -> dist.Store:
    """The key-value store that the ranks share, for what must not be a collective (long waits, who is missing)."""
    return dist.PrefixStore("ddpkit", default_store() if _shared is None else _shared)


def _agents_store() -> bool:
    """Whether the store lives in torchrun's agent rather than in rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def is_of_communication(error: BaseException) -> bool:
    """Whether a collective or the store failed; gloo's errors are plain ones that name its source file or a pair of ranks."""
    return isinstance(error, (dist.DistError, ConnectionError)) or any(
        word in str(error) for word in ("gloo", "pair closure")
    )


def _threads(here: Place) -> int:
    """Threads for this rank: OMP_NUM_THREADS, or an equal share of the processors that it may run on."""
    if "OMP_NUM_THREADS" in os.environ:
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    bound, all_of_host = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    return max(1, bound if bound < all_of_host else bound // here.local_size)


def _backend(here: Place, device: torch.device) -> str:
    """NCCL where every rank has a GPU of its own, else gloo."""
    if device.type == "cpu":
        return "gloo"
    own_device = f"{socket.gethostname()}/{torch.cuda.get_device_properties(device).uuid}"
    keys = [f"device/{rank}" for rank in range(here.world_size)]
    shared = store()
    shared.set(keys[here.rank], own_device)
    wait.wait_for(shared, keys, _timeout.total_seconds(), "in order to connect", rank=here.rank, peers=_peers)
    everyone = [shared.get(key).decode() for key in keys]
    if len(set(everyone)) == len(everyone):
        return "nccl"
    if here.rank == 0:
        _log.warning("Several ranks share a GPU, which NCCL refuses: communicating through gloo.")
    return "gloo"
