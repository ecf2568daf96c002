"""Ranks that wait for one another and agree, through the store that they share: no collective, which would not wait so long."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from ddpkit.errors import InputError, RankDisagreementError, unusable_path
from ddpkit.ranks import phase
from ddpkit.ranks.group import environment, store

T = TypeVar("T")
U = TypeVar("U")

# Compiling, labelling and first reads are waited for through the store, where no watchdog runs.
PATIENT_TIMEOUT = timedelta(hours=4)

_agreements = 0


@contextmanager
def agree(what: str = "this", timeout: timedelta = PATIENT_TIMEOUT) -> Iterator[None]:
    """Makes an error on any rank an error on every rank.

    All ranks must come by. The ranks wait for one another through the store, so that one of them may take its time.

    Raises:
        InputError: where a rank raised one, or could not use a file; the message is that rank's.
        RuntimeError: where a rank failed otherwise; the message names rank and cause.
    """
    error: BaseException | None = None
    try:
        yield
    except Exception as raised:  # noqa: BLE001  (told to all ranks, then raised)
        error = unusable_path(raised) or raised
    if not dist.is_initialized() or dist.get_world_size() == 1:
        if error is not None:
            raise error
        return
    global _agreements  # noqa: PLW0603  (ranks count alike)
    _agreements += 1
    shared, key, rank = store(), f"agree/{_agreements}", dist.get_rank()
    if error is not None:
        kind = "input" if isinstance(error, InputError) else "failure"
        text = str(error) if kind == "input" else f"Rank {rank} failed in {what}: {type(error).__name__}: {error}"
        shared.set(f"{key}/error", f"{kind}\n{text}")
    if shared.add(f"{key}/arrived", 1) == dist.get_world_size():
        shared.set(f"{key}/done", "1")
    with phase.waiting(f"the other ranks in {what}"):
        shared.wait([f"{key}/done"], timeout)
    if not shared.check([f"{key}/error"]):
        return
    kind, text = shared.get(f"{key}/error").decode().split("\n", 1)
    wait_for_readers(shared, f"{key}/read")
    raised_by_all = error or (InputError(text) if kind == "input" else RuntimeError(text))
    raised_by_all.everywhere = True  # type: ignore[attr-defined]  # see InputError
    raise raised_by_all


def wait_for_readers(shared: dist.Store, key: str) -> None:
    """Keeps rank 0, which may hold the store and is about to leave, until every rank has read what it had to."""
    if shared.add(key, 1) == dist.get_world_size():
        shared.set(f"{key}/all", "1")
    elif dist.get_rank() == 0:
        with suppress(RuntimeError), phase.waiting("the other ranks to hear of it"):  # someone is gone already
            shared.wait([f"{key}/all"], timedelta(seconds=10))


_shared = 0


def share(make: Callable[[], Any], what: str = "this") -> Any:
    """Has rank 0 make a plain value (what JSON holds) and gives it to every rank.

    Raises:
        InputError, RuntimeError: on every rank, where rank 0 failed.
    """
    global _shared  # noqa: PLW0603  (ranks count alike)
    _shared += 1
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return json.loads(json.dumps(make()))
    key = f"share/{_shared}"
    with agree(what):
        if dist.get_rank() == 0:
            store().set(key, json.dumps(make()))
    return json.loads(store().get(key))


@contextmanager
def first_rank_first(what: str = "this", *, per_host: bool = False) -> Iterator[bool]:
    """Lets one rank do a thing before the others do it.

    Yields:
        Whether this rank goes first: rank 0, or with `per_host` local rank 0 of each host.
    """
    here = environment()
    goes_first = here.local_rank == 0 if per_host else here.rank == 0
    if goes_first:
        with agree(what):
            yield True
    else:
        with agree(what):
            pass
        yield False


_meetings = 0


def exchange(what: str, value: Any, seconds: float, remedy: str) -> list[Any]:
    """Waits until all ranks have come, and tells what each has brought.

    Args:
        what: they do, for the message.
        value: of this rank, plain (what JSON holds).
        seconds: to wait for the others.
        remedy: for the message.

    Returns:
        The values by rank.

    Raises:
        RankDisagreementError: some rank has not come; it names them.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size == 1:
        return [value]
    global _meetings  # noqa: PLW0603  (ranks count alike, or a meeting fails)
    _meetings += 1
    shared, here = store(), f"meeting/{_meetings}"
    shared.set(f"{here}/{dist.get_rank()}", json.dumps(value))
    deadline = time.monotonic() + seconds
    missing = []
    for rank in range(size):
        left = max(1.0, deadline - time.monotonic())
        with suppress(RuntimeError):  # the store's timeout
            shared.wait([f"{here}/{rank}"], timedelta(seconds=left))
        if not shared.check([f"{here}/{rank}"]):
            missing.append(rank)
    if missing:
        raise RankDisagreementError(
            f"Rank {dist.get_rank()} has waited {seconds:.0f} s for {name_ranks(missing)} in order to {what}: {remedy}."
        )
    return [json.loads(shared.get(f"{here}/{rank}")) for rank in range(size)]


def in_turn(trace: Callable[[], T], lower: Callable[[T], U]) -> U:
    """Traces on all ranks at once, then compiles on one rank of each host, then on the others, which find the code on disk.

    Nobody waits in a collective meanwhile: ranks wait for one another through the store. An error on one rank is raised on all.

    Args:
        trace: makes a graph.
        lower: compiles it.
    """
    result: U | None = None
    with agree("tracing the model"):
        graph = trace()
    with first_rank_first("compiling the model", per_host=True) as goes_first:
        if goes_first:
            result = lower(graph)
    with agree("compiling the model"):
        if not goes_first:
            result = lower(graph)
    return result  # type: ignore[return-value]


@phase.waiting("the other ranks' counts")
def most_on_ranks(count: int) -> int:
    """The largest of the ranks' counts (one collective)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return count
    counts = [0] * dist.get_world_size()
    dist.all_gather_object(counts, count)
    return max(counts)


def name_ranks(numbers: Sequence[int]) -> str:
    """Ranks in words."""
    return f"rank{'s' * (len(numbers) != 1)} {', '.join(map(str, numbers))}"
