"""Ranks that wait for one another and agree, through the store that they share: no collective, which would not wait so long."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import torch.distributed as dist

from ddpkit.errors import InputError, RankDisagreementError, RankLostError, unusable_path
from ddpkit.ranks import phase
from ddpkit.ranks.group import environment, known_peers, store
from ddpkit.ranks.wait import wait_for, wait_for_readers

T = TypeVar("T")
U = TypeVar("U")

# Compiling, labelling and first reads are waited for through the store, where no watchdog runs.
PATIENT_TIMEOUT = timedelta(hours=4)

_agreements = 0  # so far; ranks count alike
_exchanges = 0


@contextmanager
def agree(what: str = "this") -> Iterator[None]:
    """Makes an error on any rank an error on every rank.

    All ranks must enter it. They wait for one another through the store, without a collective, so that one of them may take long.

    Raises:
        InputError: where a rank raised one, or could not use a file; the message is that rank's.
        RuntimeError: where a rank failed otherwise; the message names rank and cause.
        RankLostError: a rank has ended instead, or has not come within `PATIENT_TIMEOUT`.
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
    shared, key, rank, size = store(), f"agree/{_agreements}", dist.get_rank(), dist.get_world_size()
    if error is not None:
        kind = "input" if isinstance(error, InputError) else "failure"
        text = str(error) if kind == "input" else f"Rank {rank} failed in {what}: {type(error).__name__}: {error}"
        text = text.removesuffix(": ")
        shared.set(f"{key}/error", f"{kind}\n{text}")
        if kind == "failure" and not type(error).__module__.startswith("ddpkit"):
            error.told = text  # type: ignore[attr-defined]  # with the rank, for the summary and the terminal
    if shared.add(f"{key}/arrived", 1) == size:
        shared.set(f"{key}/done", "1")
    with phase.waiting(f"the other ranks in {what}"):
        seconds = PATIENT_TIMEOUT.total_seconds()
        missing = wait_for(shared, [f"{key}/done"], seconds, f"in {what}", rank=rank, peers=known_peers())
    if missing:
        raise RankLostError(
            f"Rank {rank} has waited {seconds:.0f} s for the other ranks in {what}: see what keeps them."
        )
    if not shared.check([f"{key}/error"]):
        return
    kind, text = shared.get(f"{key}/error").decode().split("\n", 1)
    with phase.waiting("the other ranks to hear of it"):
        wait_for_readers(shared, f"{key}/read", rank, size)
    raised_by_all = error or (InputError(text) if kind == "input" else RuntimeError(text))
    raised_by_all.everywhere = True  # type: ignore[attr-defined]  # see InputError
    raise raised_by_all


def share(make: Callable[[], Any], what: str = "this") -> Any:
    """Has rank 0 make a plain value (what JSON holds) and gives it to every rank.

    Raises:
        as `agree`, where rank 0 failed.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return json.loads(json.dumps(make()))
    key = f"share/{_agreements}"
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


class on_the_way_to:  # noqa: N801  (used as a function; a generator would cost a step more)
    """Around what a rank does before it comes to `exchange`: those that wait for it are told of an error here.

    The rank itself may live on, and come after all.

    Args:
        what: that `exchange` is for.
    """

    _failed: ClassVar[set[str]] = set()

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if error is None and self._what not in self._failed:
            return
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        word = "" if error is None else f"{dist.get_rank()}\n{type(error).__name__}: {error}"
        with suppress(RuntimeError):  # the store is gone: those that wait see that too
            store().set(f"failed/{self._what}", word)
        (self._failed.discard if error is None else self._failed.add)(self._what)


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
        RankDisagreementError: some rank has not come, or has failed `on_the_way_to` this; it is named.
        RankLostError: some rank has ended.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size == 1:
        return [value]
    global _exchanges  # noqa: PLW0603  (ranks count alike, or an exchange fails)
    _exchanges += 1
    shared, rank = store(), dist.get_rank()
    # One that others have given up is over, for those as well that come too late.
    while shared.check([f"exchange/{_exchanges}/over"]):
        _exchanges += 1
    key = f"exchange/{_exchanges}"
    keys = [f"{key}/{other}" for other in range(size)]

    def refuse() -> None:
        if not shared.check([f"failed/{what}"]) or not (word := shared.get(f"failed/{what}").decode()):
            return
        other, why = word.split("\n", 1)
        shared.set(f"{key}/over", "")
        raise RankDisagreementError(
            f"Rank {rank} waits for rank {other} in order to {what}, but rank {other} has failed on the way to it ({why}): "
            f"{remedy}."
        )

    shared.set(keys[rank], json.dumps(value))
    purpose = f"in order to {what}"
    with phase.waiting(f"the other ranks {purpose}"):
        missing = wait_for(shared, keys, seconds, purpose, rank=rank, peers=known_peers(), refuse=refuse)
    if missing:
        shared.set(f"{key}/over", "")
        late = name_ranks([int(one.rpartition("/")[2]) for one in missing])
        raise RankDisagreementError(f"Rank {rank} has waited {seconds:.0f} s for {late} {purpose}: {remedy}.")
    return [json.loads(shared.get(one)) for one in keys]


def in_turn(trace: Callable[[], T], lower: Callable[[T], U]) -> U:
    """Traces on all ranks at once, then compiles on one rank of each host, then on the others, which find the code on disk.

    Code for a GPU names it, so that each rank with one of its own makes its code, all at the same time. Nobody waits in a
    collective meanwhile: ranks wait for one another through the store. An error on one rank is raised on all.

    Args:
        trace: makes a graph.
        lower: compiles it.
    """
    result: U | None = None
    with agree("tracing the model"):
        graph = trace()
    goes_first = False
    if environment().device.type != "cuda":
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
