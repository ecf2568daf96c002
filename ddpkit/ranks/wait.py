"""Waiting through the store that all ranks share: with a bound, and only while there is somebody to wait for.

A rank that ends says so in the store, with its last error where it had one. A rank of a run that fails says why (`lifeline`).
The processes of this host can be looked at. Whoever waits looks for all three.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from ddpkit.errors import InputError, RankLostError, own
from ddpkit.ranks.peers import Peer, ended_beside

LOOK = 0.25  # seconds between looks for ranks that have ended
_PAUSE = 0.25  # seconds at most between looks at the keys


def wait_for(
    shared: dist.Store,
    keys: Sequence[str],
    seconds: float,
    purpose: str,
    *,
    rank: int,
    peers: Sequence[Peer] = (),
    refuse: Callable[[], None] | None = None,
) -> list[str]:
    """Waits until all keys are in the store.

    Looks at the store now and then: a wait inside of it could not be interrupted, and warns each time it ends in vain.

    Args:
        shared: the store.
        keys: set by this or by other ranks.
        seconds: to wait at most.
        purpose: in words that follow "waits for it".
        rank: this one.
        peers: all ranks, where they are known: those of this host are looked at.
        refuse: called now and then while keys are missing; may raise.

    Returns:
        The keys that are missing in the end.

    Raises:
        RankLostError: another rank has failed or ended, or the store is gone.
        InputError: another rank has told one.
    """
    began = time.monotonic()
    looked = 0.0
    try:
        while not shared.check(list(keys)):
            waited = time.monotonic() - began
            if waited >= seconds:
                return [key for key in keys if not shared.check([key])]
            if waited - looked >= LOOK:
                looked = waited
                lost = _lost(shared, rank, peers, purpose)
                # What a rank has set before it ended counts.
                if lost is not None and not shared.check(list(keys)):
                    raise lost
                if refuse is not None:
                    refuse()
            time.sleep(min(_PAUSE, max(5e-4, waited / 20)))
    except dist.DistNetworkError as error:
        raise own(
            RankLostError(
                f"Rank {rank} waited for the others {purpose}, but the store that they share is gone: rank 0 or the launcher, "
                "which holds it, has ended, or the network to it is down."
            )
        ) from error
    return []


def _lost(shared: dist.Store, rank: int, peers: Sequence[Peer], purpose: str) -> InputError | RankLostError | None:
    """What to raise where another rank has failed or ended; None where none has."""
    if shared.check(["failed"]):
        kind, _, text = shared.get("failed").decode().split("\n", 2)
        return InputError(text) if kind == "input" else RankLostError(text)
    if shared.check(["left"]):
        number, why = shared.get("left").decode().split("\n", 1)
        if int(number) != rank:
            because = f" ({why})" if why else ""
            return own(
                RankLostError(
                    f"Rank {number} has ended{because}, but rank {rank} waits for it {purpose}: see what rank {number} says."
                )
            )
    if ended := ended_beside(rank, peers):
        names = " and ".join(peers[other].describe(other) for other in ended)
        return RankLostError(
            f"{names[0].upper()}{names[1:]} ended without a word (killed, or out of memory), but rank {rank} waits for it "
            f"{purpose}."
        )
    return None


def say_left(shared: dist.Store, rank: int, why: str, *, stays_for: int = 0) -> None:
    """Tells those that wait that a rank has ended; the first to say so is kept.

    Args:
        shared: the store.
        rank: this one.
        why: its last error; empty where it had none.
        stays_for: returns when so many ranks have said so: for the one whose process holds the store.
    """
    shared.compare_set("left", "", f"{rank}\n{why}")
    left = shared.add("have left", 1)
    while left < stays_for:
        time.sleep(0.01)
        left = shared.add("have left", 0)


def wait_for_readers(shared: dist.Store, key: str, rank: int, size: int) -> None:
    """Keeps rank 0, which may hold the store and is about to leave, until every rank has read what it had to, or for 10 s."""
    if shared.add(key, 1) == size:
        shared.set(f"{key}/all", "1")
    elif rank == 0:
        with suppress(RuntimeError):  # someone is gone already
            shared.wait([f"{key}/all"], timedelta(seconds=10))
