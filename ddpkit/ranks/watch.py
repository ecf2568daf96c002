"""Who is missing when a rank waits in vain."""

import atexit
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch.distributed as dist

from ddpkit.errors import RankDisagreementError
from ddpkit.ranks import phase, processes
from ddpkit.ranks.group import is_of_communication, known_peers, store
from ddpkit.ranks.network import within
from ddpkit.ranks.wait import wait_for

TICK = 0.5  # seconds
UNEQUAL = "give every rank equally many batches (drop the last ones, or limit their number)"
before_abort: list[Callable[[str], None]] = []
"""Called with the sentence, by a thread, before a watch ends the process."""

_threads: weakref.WeakKeyDictionary[threading.Thread, threading.Event] = weakref.WeakKeyDictionary()


@atexit.register
def _end_all() -> None:
    """Ends the threads while Python still runs: one that is inside the store when Python goes would abort the process."""
    threads = dict(_threads)
    for ended in threads.values():
        ended.set()
    for thread in threads:
        thread.join(2.0)


class Watch:
    """Tells the other ranks, through the store, that this one waits; and after a timeout, who does not.

    The steady state costs two assignments per step: a thread looks twice a second and writes to the store only if something
    has changed.

    Args:
        timeout: seconds.
        aborts: end the process at the timeout from the thread, for waits that cannot be broken (a blocking MPI call).
    """

    _made: ClassVar[int] = 0  # ranks make their strategies in the same order

    def __init__(self, timeout: float, *, aborts: bool) -> None:
        self.timeout = timeout
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._name = f"watch/{Watch._made}"
        self._store = dist.PrefixStore(self._name, store())  # type: ignore[attr-defined]
        Watch._made += 1
        self._since: float | None = None
        self._call = self._meetings = self._begun = 0
        self._told = ""
        self._elsewhere: tuple[float, str] | None = None
        self._ended = threading.Event()
        # Apart, because telling takes for ever where rank 0, which holds the store, is stopped.
        for look in (Watch._tell, Watch._abort_when_due) if aborts else (Watch._tell,):
            thread = threading.Thread(target=_look_after, args=(weakref.ref(self), self._ended, look), daemon=True)
            thread.start()
            _threads[thread] = self._ended

    def close(self) -> None:
        """Ends the thread."""
        self._ended.set()

    @contextmanager
    def waiting(self, call: int, *, computes: bool = False) -> Iterator[None]:
        """Around what may wait for other ranks; turns a failure of the collective into one that says who is missing.

        Args:
            call: number of the `synchronize()`; 0 where the strategy is being made.
            computes: whether the model runs inside as well, whose own errors are left as they are.
        """
        self._call = call
        self._since = time.monotonic()
        try:
            with phase.waiting("the other ranks' gradients"):
                yield
        except (RankDisagreementError, FloatingPointError):
            raise
        except RuntimeError as error:
            if computes and not is_of_communication(error):
                raise
            # Where rank 0, which holds the store, is stopped, asking takes for ever.
            cause = str(error).splitlines()[0]
            sentence = within(10 * TICK, lambda: self.missing() or self._unlike(cause))
            raise RankDisagreementError(sentence or self._unanswered()) from error
        finally:
            self._since = None

    def missing(self) -> str | None:
        """A sentence about the ranks that are not waiting where this one is; None if all are."""
        waited = time.monotonic() - (self._since or time.monotonic())
        self._tell()
        time.sleep(2 * TICK)  # lets the others tell
        late = []
        for rank in range(self._size):
            call, state, _ = self._read(rank)
            if (call, state) != (self._call, "waiting"):
                late.append(
                    f"rank {rank} ({'waits in' if state == 'waiting' else 'last heard of after'} number {call})"
                    if self._call
                    else f"rank {rank}"
                )
        if not late:
            return None
        must = (
            "call synchronize() equally often; see whether that rank has failed or left its loop early"
            if self._call
            else "make the same strategies in the same order; see whether that rank has failed"
        )
        return (
            f"Rank {self._rank} waited {waited:.0f} s in {self._where} for {', '.join(late)}: every rank must {must}."
        )

    def _unlike(self, cause: str) -> str:
        return (
            f"On rank {self._rank} a collective of {self._where} failed, though every rank had come there "
            f"({cause}): ranks communicate differently, such as after another number of backward passes, or "
            "one of them has died there."
        )

    def _unanswered(self) -> str:
        return (
            f"Rank {self._rank} waited in {self._where}, and rank 0, which holds the store, is gone: see what ended it."
        )

    @property
    def _where(self) -> str:
        return f"synchronize() number {self._call}" if self._call else "make_sync()"

    def begin_batch(self) -> None:
        """Counts a batch, for `meet` to compare."""
        self._begun += 1

    @contextmanager
    def elsewhere(self, what: str) -> Iterator[None]:
        """Around collectives that are not of `synchronize()`."""
        self._elsewhere = time.monotonic(), what
        try:
            yield
        finally:
            self._elsewhere = None

    def meet(self, what: str, call: int) -> None:
        """Waits for the other ranks where none of them may be in a later `synchronize()` or batch than this one's last.

        Args:
            what: the place, in words.
            call: number of this rank's last `synchronize()`.

        Raises:
            RankDisagreementError: another rank goes on elsewhere, came after another number, or did not come within the timeout.
            RankLostError: another rank has ended.
        """
        self._meetings += 1
        shared, here, start = store(), f"{self._name}/meet/{self._meetings}", time.monotonic()
        keys = {f"{here}/{rank}": rank for rank in range(self._size)}
        shared.set(f"{here}/{self._rank}", f"{call},{what}")

        def refuse() -> None:
            for key, rank in keys.items():
                if not shared.check([key]):
                    self._refuse_ahead(rank, what, call, time.monotonic() - start)

        missing = wait_for(
            shared, [*keys], self.timeout, f"at {what}", rank=self._rank, peers=known_peers(), refuse=refuse
        )
        if missing:
            late = ", ".join(f"rank {keys[key]}" for key in missing)
            raise RankDisagreementError(
                f"Rank {self._rank} waited {self.timeout:.0f} s at {what} for {late}: {UNEQUAL}, or see whether that "
                "rank has failed."
            )
        for key, rank in keys.items():
            theirs, place = shared.get(key).decode().split(",", 1)
            if (int(theirs), place) != (call, what):
                raise RankDisagreementError(
                    f"Rank {rank} has come to {place} after synchronize() number {theirs}, but rank {self._rank} to {what} after "
                    f"number {call}: {UNEQUAL}."
                )

    def _refuse_ahead(self, rank: int, what: str, call: int, waited: float) -> None:
        """Says so if a rank is where it waits for this one in vain."""
        theirs, state, begun = self._read(rank)
        goes_on = ""
        if state == "waiting" and theirs > call:
            goes_on = (
                f"waits in synchronize() number {theirs}, but rank {self._rank} has come to {what} after number {call}"
            )
        elif waited > min(10 * TICK, self.timeout):  # not where it is about to come here
            if begun > self._begun:
                goes_on = f"goes on to batch number {begun}, but rank {self._rank} has come to {what} after {self._begun} batches"
            elif state not in ("waiting", "working", "gone"):
                goes_on = f"waits in {state}, but rank {self._rank} has come to {what}"
        if goes_on:
            raise RankDisagreementError(f"Rank {rank} {goes_on}: {UNEQUAL}.")

    def _tell(self) -> None:
        waiting = self._since is not None and time.monotonic() - self._since >= TICK
        state = "waiting" if waiting else "working"
        if self._elsewhere is not None and time.monotonic() - self._elsewhere[0] >= TICK:
            state = self._elsewhere[1]
        now = f"{self._call - (self._since is not None and not waiting)},{self._begun},{state}"
        if now != self._told:
            self._store.set(str(self._rank), now)
            self._told = now

    def _read(self, rank: int) -> tuple[int, str, int]:
        try:
            if not self._store.check([str(rank)]):
                return 0, "working", 0
            call, begun, state = self._store.get(str(rank)).decode().split(",", 2)
        except RuntimeError:  # the store's own rank is gone
            return 0, "gone", 0
        return int(call), state, int(begun)

    def _abort_when_due(self) -> None:
        since = self._since
        if since is None or time.monotonic() - since < self.timeout:
            return
        waited = f"Rank {self._rank} waited {self.timeout:.0f} s in {self._where}"
        sentence = within(10 * TICK, lambda: self.missing() or f"{waited}.")
        sentence = sentence or f"{waited}: rank 0, which holds the store, does not answer."
        for tell in before_abort:
            tell(sentence)
        sys.stderr.write(f"ddpkit: {sentence}\n")
        sys.stderr.flush()
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(2)


def _look_after(reference: "weakref.ref[Watch]", ended: threading.Event, look: Callable[[Watch], None]) -> None:
    processes.name_thread(processes.WATCHER)
    while not ended.wait(TICK):
        watch = reference()
        if watch is None:
            return
        try:
            look(watch)
        except RuntimeError:  # the store is gone: the run is ending
            return
        del watch
