"""How a run whose rank failed, died or hangs ends: soon, and with a sentence that names the rank.

A rank that fails says why in the store that all ranks share. One whose communication breaks off looks there; where nothing was
said, it looks for the processes of its host that are gone or stopped; and at last all that wait in vain sign a list, so that
whoever is not on it is to blame.

Meanwhile each rank tells the others that it lives, its phase, whether it waits and whether it makes progress, by a thread with a
connection of its own; rank 0 judges them and all judge rank 0. A rank that compiles or labels for an hour is left alone.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from ddpkit.errors import (
    InputError,
    NonFiniteGradientError,
    RankDisagreementError,
    RankLostError,
    everywhere,
    own,
    unusable_path,
)
from ddpkit.ranks import group, phase, processes, watchdog
from ddpkit.ranks.agree import agree
from ddpkit.ranks.group import Environment, is_of_communication, store
from ddpkit.ranks.network import within
from ddpkit.ranks.peers import Peer, beside
from ddpkit.ranks.switches import signals
from ddpkit.ranks.wait import wait_for_readers
from ddpkit.ranks.watch import before_abort

E = TypeVar("E", bound=BaseException)

_ANSWER = 2.0  # seconds that the store may take, and that ranks get to sign
_NOTICE = 5.0  # seconds that a rank gets to notice by itself that another one has failed
_LOOK = 0.25  # seconds between looks at the clock


@contextmanager
def alive(here: Environment, keep: Callable[[str], None] = lambda _: None, *, doing: str = "") -> Iterator["Lifeline"]:
    """Around all that ranks do together once they have met: they end soon where one of them fails, dies or hangs.

    Args:
        here: as of `Lifeline`.
        keep: likewise.
        doing: likewise.

    Raises:
        as what is inside; or what happened to another rank, of which that is the consequence.
    """
    lifeline = Lifeline(here, keep, doing)
    if doing and here.world_size == 1:  # there is nothing to keep, and nobody to tell
        yield lifeline
        return
    try:
        with lifeline.listening():
            yield lifeline
    except BaseException as error:
        try:
            failure = lifeline.explain(error)
        except (MemoryError, RuntimeError, OSError):  # what ended this rank may not let it ask the others
            failure = own(RankLostError(lifeline.failed(error)))
        if failure is error:
            raise
        raise failure from error


class Lifeline:
    """What this rank knows of the end of the others. All ranks make one together.

    Args:
        here: where this process stands.
        keep: called with a sentence as soon as it is known that the run cannot go on, also from a thread.
        doing: what the ranks do, for messages; empty for a run, which has steps and can be resumed.
    """

    def __init__(self, here: Environment, keep: Callable[[str], None], doing: str = "") -> None:
        self._here, self._keep, self._doing = here, keep, doing
        self._launcher = os.getppid()
        self._listened = threading.Event()  # to the last signal
        self.step: Callable[[], int] = lambda: 0  # the step under way; 0 before the first
        self._said = False
        self._voice = threading.Lock()
        self._peers: list[Peer] = []
        if here.world_size > 1:
            self._store = store()
            self._peers = group.peers()
        self._limit = group.timeout_of_group()
        self._tick = min(2.0, max(0.25, self._limit / 16))  # seconds between two signs of life
        self._left, self._turned = threading.Event(), threading.Event()
        self._beats: list[threading.Thread] = []
        self._news = _News()

    def keeps_in(self, run_dir: Path) -> None:
        """Has the watchdog of this rank tell of a failure in that run folder too."""
        if watchdog.board is not None:
            watchdog.board.belongs_to(run_dir)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals that announce an end are heeded at once, even while the main thread computes.

        SIGTERM and SIGUSR1 raise KeyboardInterrupt, where nobody else handles them as the trainer does. `mpirun` leaves the
        other ranks a quarter of a second when one has died; what is to be kept must be written by then.
        """
        reader, writer = socket.socketpair()
        writer.setblocking(False)

        def interrupt(number: int, _: object) -> None:
            self._listened.clear()
            raise KeyboardInterrupt(f"{signal.Signals(number).name} came {self._when()}.")

        handlers = {signal.SIGTERM: interrupt, signal.SIGUSR1: interrupt, signal.SIGCONT: lambda *_: None}
        with writer, signals(handlers, writer.fileno()):
            threading.Thread(target=self._listen, args=(reader,), daemon=True).start()
            before_abort.append(self._keep)
            self._begin()
            try:
                yield
                self._part()
            finally:
                before_abort.remove(self._keep)

    def _listen(self, reader: socket.socket) -> None:
        while numbers := reader.recv(64):
            if self._stood_still():
                continue  # this process was stopped itself: the others know better
            if self._gone():
                time.sleep(0.05)  # a process that was stopped with this one needs a moment to go on too
            if gone := self._gone():
                # by a rank that failed while this one was busy, and has said so itself
                told = self._news.told or self._told(0.1)
                sentence = told[-1] if told else self._sentence(gone)
                self._keep(sentence)
                if told:
                    self._said = True
                self._say(sentence)
            elif signal.SIGTERM in numbers and self._here.is_first:
                self._keep(f"SIGTERM came {self._when()}, and the run was ended before it could leave by itself.")
            self._listened.set()

    def explain(self, error: BaseException) -> BaseException:
        """What to raise for an error of this rank: itself, told to the others, or what happened to another rank before.

        Takes a few seconds at most.
        """
        if isinstance(error, NonFiniteGradientError) and self.step():  # on every rank
            return everywhere(NonFiniteGradientError(f"During step {self.step()}: {error}"))
        if self._here.launcher != "alone" and os.getppid() != self._launcher:  # to write to its pipes fails, for one
            lost = RankLostError(
                self._ended(f"{self._when()} {self._here.launcher} (process {self._launcher}) was gone")
            )
            return lost if self._here.world_size == 1 else self._tell("failure", lost)
        if self._here.world_size > 1 and self._stood_still():
            sentence = self._ended(f"{self._name(self._here.rank)} had been stopped, and the others ended the run")
            self._end(sentence, None)  # what they said of it stays in the summary
        if isinstance(error, KeyboardInterrupt):
            self._listened.wait(0.2)  # it may have been sent because another rank is gone, which is then kept
            if self._said:
                return _said(error)
        alone = self._here.world_size == 1 or not isinstance(error, Exception)
        if alone or getattr(error, "everywhere", False):
            return error
        if isinstance(error, FloatingPointError):
            return everywhere(error)
        error = unusable_path(error) or error
        if isinstance(error, InputError):
            return self._tell("input", error)
        if cause := self._cause(error):
            return cause
        if isinstance(error, RankDisagreementError | RankLostError):
            return error
        return self._tell("failure", RankLostError(self.failed(error)))

    def failed(self, error: BaseException) -> str:
        """That this rank failed, as a sentence."""
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}".removesuffix(": ")
        return f"Rank {self._here.rank} failed {self._when()}: {what}"

    def _tell(self, kind: str, error: Exception) -> Exception:
        """Leaves word of this rank's error, and lets the others notice. Whoever is first has to print it."""
        word = f"{kind}\n{self._here.rank}\n{error}"
        first = within(_ANSWER, lambda: self._store.compare_set("failed", "", word).decode())
        within(_ANSWER, dist.destroy_process_group)  # breaks what the others wait in
        if self._here.is_first:
            time.sleep(1.0)  # the store lives in this process
        return own(error) if first in (None, word) else _said(error)

    def _cause(self, error: BaseException) -> Exception | None:
        """What another rank said, or what happened to it."""
        told = self._told(_ANSWER)
        if told:
            kind, rank, text = told
            if kind == "lost":
                self._keep(text)
                if self._speaks([int(rank)]):
                    self._say(text)
                self._stay()
            return _said(InputError(text) if kind == "input" else RankLostError(text))
        if told is not None and isinstance(error, RankLostError) and getattr(error, "own", False):
            return error  # the other rank has told why it has left
        deadline = time.monotonic() + 0.2  # a process that has just been killed may not be gone yet
        while not (gone := self._gone()) and time.monotonic() < deadline:
            time.sleep(0.01)
        if not gone and (is_of_communication(error) or isinstance(error, RankDisagreementError | RankLostError)):
            gone = self._unsigned() if told is not None else f"{self._name(0)}, which holds the store, does not answer"
        if not gone:
            return None
        lost = RankLostError(self._sentence(gone))
        with self._voice:
            if self._said:
                return _said(lost)
            self._said = True
        return lost

    def _told(self, seconds: float) -> tuple[str, ...] | None:
        """Kind, rank and text of what another rank said; empty if nothing, None where the store does not answer."""

        def ask() -> tuple[str, ...]:
            return tuple(self._store.get("failed").decode().split("\n", 2)) if self._store.check(["failed"]) else ()

        return within(seconds, ask)

    def _gone(self) -> str:
        """The ranks of this host whose processes have ended or are stopped; empty where all are well."""
        gone = []
        for rank in self._beside():
            state = self._peers[rank].state()
            if state in "ZX":
                gone.append(f"{self._name(rank)} ended without a word (killed, or out of memory)")
            elif state in "Tt":
                gone.append(f"{self._name(rank)} is stopped{self._in_phase(rank)}")
        return " and ".join(gone)

    def _beside(self) -> list[int]:
        """The other ranks of this host."""
        return beside(self._here.rank, self._peers)

    def _name(self, rank: int) -> str:
        return self._peers[rank].describe(rank)

    def _unsigned(self) -> str:
        """The ranks that do not wait in vain as this one does."""
        ranks = range(self._here.world_size)
        within(_ANSWER, lambda: self._store.set(f"waited/{self._here.rank}", ""))
        time.sleep(_ANSWER)
        missing = within(_ANSWER, lambda: [r for r in ranks if not self._store.check([f"waited/{r}"])])
        if missing is None:
            return f"{self._name(0)}, which holds the store, does not answer"
        names = [self._name(rank) for rank in missing[:8]]
        return f"{', '.join(names)} did not come to the others: hung, stopped or lost" if names else ""

    # -- signs of life -------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Begins to watch the others, and to be watched."""
        if self._here.world_size == 1:
            return
        if watchdog.board is not None:
            watchdog.board.watch_together(together=True, limit=self._limit)
        phase.listeners.append(self._turn)
        for work in (self._exchange, self._look):
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            self._beats.append(thread)

    def _turn(self) -> None:
        """Has a new phase told at once."""
        if phase.number() != self._news.phase:
            self._turned.set()

    def _part(self) -> None:
        """Ends that, once all ranks have come to their end. From here on the watchdogs alone bound what is left."""
        if self._here.world_size == 1:
            return
        with agree("ending the run"):
            pass
        self._left.set()
        self._turned.set()
        phase.listeners.remove(self._turn)
        if watchdog.board is not None:
            watchdog.board.watch_together(together=False)
        for thread in self._beats:
            thread.join(_ANSWER)
        with phase.waiting("the other ranks to hear of it"):
            wait_for_readers(self._store, "parted", self._here.rank, self._here.world_size)
        phase.wait_from_now("the other ranks to end")

    def _exchange(self) -> None:
        """A thread: tells that this rank lives, and reads what the others told. Stands still where the store does not answer."""
        processes.name_thread(processes.WATCHER)
        me, news = self._here.rank, self._news
        judge = Judge(self._here.world_size, self._limit)
        number = 0
        last = time.monotonic()
        try:
            shared = self._store.clone()  # type: ignore[attr-defined]  # the main thread may keep the other connection for hours
            while not self._left.is_set():
                number += 1
                number_told, stand = phase.number(), self._stand()
                shared.set(f"alive/{me}", json.dumps({"number": number} | stand))
                news.phase = number_told
                if me == 0:
                    now = time.monotonic()
                    passed, last = min(now - last, 3 * self._tick), now
                    self._judge(shared, judge, passed)
                first = shared.get("alive/0") if shared.check(["alive/0"]) else b""
                if first != news.first:
                    news.first, news.since_first = first, 0.0
                if not news.told and shared.check(["failed"]):
                    news.told = tuple(shared.get("failed").decode().split("\n", 2))
                news.since_answer = 0.0
                self._turned.wait(self._tick)
                self._turned.clear()
                self._left.wait(min(_LOOK, self._tick))  # many short phases are told as one
        except RuntimeError:
            news.broken = True

    def _stand(self) -> dict[str, Any]:
        """How this rank stands."""
        wait = phase.waits()
        return {
            "phase": phase.current()[0],
            "waits": "" if wait is None else wait.what,
            "since": 0.0 if wait is None else wait.since,
            "patient": wait is not None and wait.patient,
            "idle": 0.0 if watchdog.board is None else watchdog.board.idle,
        }

    def _judge(self, shared: dist.Store, judge: "Judge", passed: float) -> None:
        """Rank 0 looks at all ranks, and says which is lost."""
        keys = [f"alive/{rank}" for rank in range(self._here.world_size)]
        if not shared.check(keys):  # some rank has not begun
            texts = [shared.get(key) if shared.check([key]) else b"{}" for key in keys]
        else:
            texts = shared.multi_get(keys)  # type: ignore[attr-defined]
        ended = [rank for rank in self._beside() if self._peers[rank].state() in "ZX"]
        lost, what = judge.look(texts, ended, passed)
        lost = [rank for rank in lost if what != SILENT or not self._computes(rank)]
        if lost or what == ALL_WAIT:
            sentence = self._verdict(lost, what, judge)
            shared.compare_set("failed", "", f"lost\n{lost[0] if lost else -1}\n{sentence}")

    def _computes(self, rank: int) -> bool:
        """Whether a rank of this host that gives no sign of life computes all the same: a call into C may keep Python's lock."""
        if rank not in self._beside() or self._peers[rank].state() in "TtZX":
            return False
        with suppress(OSError, IndexError):
            process = self._peers[rank].process
            before = processes.used(process)[0]
            time.sleep(_ANSWER)
            # A share that a busy host leaves it; threads that wait for Python's lock use less.
            return processes.used(process)[0] - before > 0.03 * _ANSWER
        return False

    def _verdict(self, lost: Sequence[int], what: str, judge: "Judge") -> str:
        """What happened, in a sentence."""
        if what == ALL_WAIT:
            waits = [f"rank {rank} for {stand['waits']} in phase {stand['phase']}" for rank, stand in judge.shown()]
            return self._ended(
                f"all ranks have waited for {self._limit:.0f} s ({', '.join(waits)}): they do different things, or the network "
                "between them has stopped"
            )
        parts = [self._describe(rank, what, judge.phase(rank)) for rank in lost[:8]]
        more = f" and {len(lost) - 8} more" * (len(lost) > 8)
        return self._ended(f"{' and '.join(parts)}{more}")

    def _in_phase(self, rank: int) -> str:
        """The phase of a rank of this host, as the end of a sentence; empty where it is not to be seen."""
        with suppress(OSError):
            if now := phase.of(self._peers[rank].process):
                return f" in phase {now}"
        return ""

    def _describe(self, rank: int, what: str, told: str) -> str:
        """A lost rank, what happened to it, and in which phase: the one of its process where that is to be seen, else as told."""
        beside = rank in self._beside()
        where = (self._in_phase(rank) if beside else "") or (f" in phase {told}" if told in phase.PHASES else "")
        if what == IDLE:
            hint = " (it used no processor time, read and wrote nothing)"
            return f"{self._name(rank)} has made no progress for {self._limit:.0f} s{where}{hint}"
        if beside and (state := self._peers[rank].state()) in "TtZX":
            if state in "Tt":
                return f"{self._name(rank)} has been stopped for {self._limit:.0f} s{where}"
            return f"{self._name(rank)} ended without a word (killed, or out of memory){where}"
        hint = " (it is stopped, or its host or the network is down)"
        return f"{self._name(rank)} has given no sign of life for {self._limit:.0f} s{where}{hint}"

    def _stood_still(self) -> bool:
        """Whether this process has just been stopped itself."""
        now = time.monotonic()
        return bool(self._news.clock) and (now - self._news.clock > _NOTICE or now - self._news.resumed < _NOTICE)

    def _look(self) -> None:
        """A thread: ends this process where another rank has failed or is lost. Never waits for anything."""
        processes.name_thread(processes.WATCHER)
        news, noticed = self._news, 0.0
        news.clock = time.monotonic()
        while not self._left.wait(_LOOK):
            now = time.monotonic()
            if now - news.clock > _NOTICE:
                news.resumed = now
            passed, news.clock = min(now - news.clock, 3 * _LOOK), now
            if watchdog.board is not None:
                watchdog.board.beat()
            news.since_answer += passed
            news.since_first += passed
            if news.told or news.broken:
                noticed += passed
            if news.told and news.told[0] == "lost":
                self._end(news.told[2], [int(news.told[1])])
            elif news.told and noticed > _NOTICE:
                speaks = self._peers[int(news.told[1])].machine != self._peers[self._here.rank].machine
                self._end(news.told[2], [] if speaks else None, 2 if news.told[0] == "input" else 1)
            elif self._here.is_first:
                continue
            elif news.broken and noticed > _ANSWER:
                what = self._gone() or f"{self._name(0)}, which holds the store, is gone, or the network to it is down"
                self._end(self._sentence(what), [0])
            elif max(news.since_first, news.since_answer) >= self._limit and not self._computes(0):
                told = json.loads(news.first)["phase"] if news.first else ""
                self._end(self._ended(self._describe(0, SILENT, told)), [0])

    def _speaks(self, lost: Sequence[int]) -> bool:
        """Whether this rank says for its host what happened to the lost ones."""
        beside = [*self._beside(), self._here.rank]
        return min((rank for rank in beside if rank not in lost), default=-1) == self._here.rank

    def _say(self, sentence: str) -> None:
        """Prints what happened, once."""
        with self._voice:
            if not self._said:
                print(f"\nddpkit: {sentence}", file=sys.stderr, flush=True)  # after a progress bar
            self._said = True

    def _end(self, sentence: str, lost: Sequence[int] | None, code: int = 1) -> None:
        """Ends this process, from a thread: the main thread waits where nothing can wake it.

        Args:
            sentence: what happened.
            lost: the ranks that are to blame; None where one of this host has said it.
            code: exit code.
        """
        self._keep(sentence)
        if lost is not None and self._speaks(lost):
            self._say(sentence)
        else:
            time.sleep(1.0)  # whoever ends first has the launcher end the others
        self._stay()
        for process in processes.below(os.getpid()):
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        os._exit(code)

    def _stay(self) -> None:
        """Keeps the store, which may live in rank 0, until the others have read in it what happened."""
        if self._here.is_first:
            time.sleep(self._tick + 2 * _LOOK)

    def _when(self) -> str:
        if self._doing:
            return f"in {self._doing}"
        return f"at step {self.step()}" if self.step() else "before the first step"

    def _sentence(self, gone: str) -> str:
        return self._ended(f"{self._when()} {gone}")

    def _ended(self, what: str) -> str:
        """The sentence on the end of what the ranks do."""
        after = f"{self._doing} ends" if self._doing else "resume goes on from the last checkpoint"
        return f"{what[0].upper()}{what[1:]}; {after}."


def _said(error: E) -> E:
    """Marks an error whose sentence has been printed, by the rank that had it or by this one."""
    error.said = True  # type: ignore[attr-defined]
    return error


@dataclass
class _News:
    """What the threads of a lifeline know. Times in seconds that this process has run meanwhile."""

    phase: int = -1  # that was told last, its place in PHASES
    first: bytes = b""  # what rank 0 told last
    since_first: float = 0.0
    since_answer: float = 0.0  # of the store
    told: tuple[str, ...] = ()  # kind, rank and text of a failure
    broken: bool = False  # whether the store is gone
    clock: float = 0.0  # when the process was last seen to run
    resumed: float = float("-inf")  # when it was seen to go on after it had been stopped


ENDED, SILENT, IDLE, ALL_WAIT = "ended", "silent", "idle", "all wait"


class Judge:
    """Tells from what ranks say of themselves which of them are lost.

    Args:
        world_size: number of ranks.
        limit: seconds without a sign of life, or without progress.
    """

    def __init__(self, world_size: int, limit: float) -> None:
        self._limit = limit
        self._texts = [b""] * world_size
        self._ages = [0.0] * world_size
        self._stands: list[dict[str, Any]] = [{} for _ in range(world_size)]
        self._waits: list[tuple[str, float]] = []
        self._all_wait = 0.0

    def look(self, texts: Sequence[bytes], ended: Sequence[int], passed: float) -> tuple[list[int], str]:
        """Looks at what all ranks told.

        Args:
            texts: of each rank, what it told last (see `Lifeline._stand`).
            ended: ranks whose processes are known to have ended.
            passed: seconds since the last call.

        Returns:
            The lost ranks and what happened to them: `ENDED`, `SILENT`, `IDLE`, or `ALL_WAIT` without any rank; none and an
            empty string if all is well.
        """
        for rank, text in enumerate(texts):
            self._ages[rank] = 0.0 if text != self._texts[rank] else self._ages[rank] + passed
            if text != self._texts[rank]:
                self._stands[rank] = json.loads(text)
        self._texts = list(texts)
        # A rank may end a moment after it has said why.
        if lost := [rank for rank in ended if self._ages[rank] >= 2 * _ANSWER]:
            return lost, ENDED
        if lost := [rank for rank, age in enumerate(self._ages) if age >= self._limit]:
            return lost, SILENT
        if lost := [
            r for r, stand in enumerate(self._stands) if stand and not stand["waits"] and stand["idle"] >= self._limit
        ]:
            return lost, IDLE
        waits = [(stand.get("waits", ""), stand.get("since", 0.0)) for stand in self._stands]
        stuck = all(what for what, _ in waits) and not any(stand["patient"] for stand in self._stands)
        self._all_wait = self._all_wait + passed if stuck and waits == self._waits else 0.0
        self._waits = waits
        # Collectives end by themselves at the limit, and name more.
        return ([], ALL_WAIT) if self._all_wait >= self._limit + _NOTICE else ([], "")

    def phase(self, rank: int) -> str:
        """The phase that a rank was in last; empty if it has told none."""
        return str(self._stands[rank].get("phase", ""))

    def shown(self) -> list[tuple[int, dict[str, Any]]]:
        """The first few ranks and how they stand."""
        return list(enumerate(self._stands))[:4]
