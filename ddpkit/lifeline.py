"""How a run whose rank failed, died or hangs ends: soon, and with a sentence that names the rank.

A rank that fails says why in the store that all ranks share. One whose communication breaks off looks there; where nothing was
said, it looks for the processes of its host that are gone or stopped; and at last all that wait in vain sign a list, so that
whoever is not on it is to blame.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from ddpkit.errors import InputError, NonFiniteGradientError, RankDisagreementError, RankLostError, unusable_path
from ddpkit.launch import Environment, is_of_communication, share, store, within
from ddpkit.sync.watch import before_abort

_ANSWER = 2.0  # seconds that the store may take, and that ranks get to sign


class Lifeline:
    """What this rank knows of the end of the others. All ranks make one together.

    Args:
        here: where this process stands.
        keep: called with a sentence as soon as it is known that the run cannot go on, also from a thread.
    """

    def __init__(self, here: Environment, keep: Callable[[str], None]) -> None:
        self._here, self._keep = here, keep
        self.step: Callable[[], int] = lambda: 0  # the step under way; 0 before the first
        self._said = False
        self._processes: list[tuple[str, int]] = []
        if here.world_size > 1:
            self._store = store()
            self._store.set(f"process/{here.rank}", f"{socket.gethostname()} {os.getpid()}")
            names = share(
                lambda: [self._store.get(f"process/{rank}").decode() for rank in range(here.world_size)],
                "meeting the others",
            )
            self._processes = [(host, int(number)) for host, number in map(str.split, names)]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals that announce an end are heeded at once, even while the main thread computes.

        SIGTERM and SIGUSR1 raise KeyboardInterrupt, where nobody else handles them as the trainer does. `mpirun` leaves the
        other ranks a quarter of a second when one has died; what is to be kept must be written by then.
        """
        reader, writer = socket.socketpair()
        writer.setblocking(False)

        def interrupt(number: int, _: object) -> None:
            raise KeyboardInterrupt(f"{signal.Signals(number).name} came {self._when()}.")

        handlers = {signal.SIGTERM: interrupt, signal.SIGUSR1: interrupt, signal.SIGCONT: lambda *_: None}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()
        before_abort.append(self._keep)
        try:
            yield
        finally:
            before_abort.remove(self._keep)
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            writer.close()

    def _listen(self, reader: socket.socket) -> None:
        while numbers := reader.recv(64):
            if self._gone():
                time.sleep(0.05)  # a process that was stopped with this one needs a moment to go on too
            if gone := self._gone():
                told = self._told(0.1)  # by a rank that failed while this one was busy, and has said so itself
                sentence = told[-1] if told else self._sentence(gone)
                self._keep(sentence)
                if not (told or self._said):
                    print(f"\nddpkit: {sentence}", file=sys.stderr, flush=True)  # after a progress bar
                self._said = True
            elif signal.SIGTERM in numbers and self._here.is_first:
                self._keep(f"SIGTERM came {self._when()}, and the run was ended before it could leave by itself.")

    def explain(self, error: BaseException) -> BaseException:
        """What to raise for an error of this rank: itself, told to the others, or what happened to another rank before.

        Takes a few seconds at most.
        """
        if isinstance(error, NonFiniteGradientError):  # on every rank
            return _everywhere(NonFiniteGradientError(f"During step {self.step()}: {error}"))
        alone = self._here.world_size == 1 or not isinstance(error, Exception)
        if alone or getattr(error, "everywhere", False):
            return error
        if isinstance(error, FloatingPointError):
            return _everywhere(error)
        error = unusable_path(error) or error
        if isinstance(error, InputError):
            return self._tell("input", error)
        if cause := self._cause(error):
            return cause
        if isinstance(error, RankDisagreementError):
            return error
        text = f"Rank {self._here.rank} failed {self._when()}: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
        return self._tell("failure", RankLostError(text))

    def _tell(self, kind: str, error: Exception) -> Exception:
        """Leaves word of this rank's error, and lets the others notice. Whoever is first has to print it."""
        word = f"{kind}\n{self._here.rank}\n{error}"
        first = within(_ANSWER, lambda: self._store.compare_set("failed", "", word).decode())
        within(_ANSWER, dist.destroy_process_group)  # breaks what the others wait in
        if self._here.is_first:
            time.sleep(1.0)  # the store lives in this process
        return _own(error) if first in (None, word) else _said(error)

    def _cause(self, error: BaseException) -> Exception | None:
        """What another rank said, or what happened to it."""
        told = self._told(_ANSWER)
        if told:
            kind, _, text = told
            return _said(InputError(text) if kind == "input" else RankLostError(text))
        deadline = time.monotonic() + 0.2  # a process that has just been killed may not be gone yet
        while not (gone := self._gone()) and time.monotonic() < deadline:
            time.sleep(0.01)
        if not gone and (is_of_communication(error) or isinstance(error, RankDisagreementError)):
            gone = self._unsigned() if told is not None else "rank 0, which holds the store, does not answer"
        if not gone:
            return None
        lost = RankLostError(self._sentence(gone))
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
        found = []
        for rank, (host, number) in enumerate(self._processes):
            if host != socket.gethostname() or rank == self._here.rank:
                continue
            try:
                state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                state = "Z"
            if state in "ZX":
                found.append(
                    f"rank {rank} (process {number} on {host}) ended without a word (killed, or out of memory)"
                )
            elif state in "Tt":
                found.append(f"rank {rank} (process {number} on {host}) is stopped")
        return " and ".join(found)

    def _unsigned(self) -> str:
        """The ranks that do not wait in vain as this one does."""
        ranks = range(self._here.world_size)
        within(_ANSWER, lambda: self._store.set(f"waited/{self._here.rank}", ""))
        time.sleep(_ANSWER)
        missing = within(_ANSWER, lambda: [r for r in ranks if not self._store.check([f"waited/{r}"])])
        if missing is None:
            return "rank 0, which holds the store, does not answer"
        names = [
            f"rank {rank} (process {self._processes[rank][1]} on {self._processes[rank][0]})" for rank in missing[:8]
        ]
        return f"{', '.join(names)} did not come to the others: hung, stopped or lost" if names else ""

    def _when(self) -> str:
        return f"at step {self.step()}" if self.step() else "before the first step"

    def _sentence(self, gone: str) -> str:
        when = self._when()
        return f"{when[0].upper()}{when[1:]} {gone}; resume goes on from the last checkpoint."


def _everywhere(error: Exception) -> Exception:
    """Marks an error that every rank raises."""
    error.everywhere = True  # type: ignore[attr-defined]
    return error


def _own(error: Exception) -> Exception:
    """Marks an error of this rank alone, which it has to print."""
    error.own = True  # type: ignore[attr-defined]
    return error


def _said(error: Exception) -> Exception:
    """Marks an error whose sentence has been printed, by the rank that had it or by this one."""
    error.said = True  # type: ignore[attr-defined]
    return error
