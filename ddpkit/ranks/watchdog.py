"""A small process beside each rank that bounds its whole life, from the first import to MPI's end.

A thread cannot do this: it stands still while its process is stopped, while a call into C keeps Python's lock (`MPI_Init`), and
after Python's end. The watchdog is forked before anything heavy is imported, ends with its rank, and reads what the rank tells it
(phase, whether it waits for others) from shared memory and whether it makes progress from `/proc`. A rank that is stopped, or
that neither waits nor computes nor reads nor writes for the timeout, is killed with a sentence that names it.

Between the meeting of the ranks and their parting they tell each other through the store (`ddpkit.ranks.lifeline`), and who is
missing is named by the others; the watchdog then acts a few seconds later, on what is left.
"""

import gc
import mmap
import os
import re
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ddpkit.ranks import phase
from ddpkit.ranks.launchers import Place, any_rank, place
from ddpkit.ranks.processes import Meter, below, born, name_thread, stat, state
from ddpkit.summary import record_failure

DEFAULT_TIMEOUT = 600.0  # seconds, of train.timeout
GRACE = 6.0  # seconds that the other ranks get to say who is missing
_PATH = 1024
_WORDS = 2048


@dataclass(frozen=True)
class Seen:
    """How a rank stands, as it told its watchdog.

    Attributes:
        changes: how often it has told something new.
        phase: of its life.
        waits: 0 if it works, 1 if it waits for other ranks, 2 if it waits patiently.
        together: whether the ranks watch over each other meanwhile.
        limit: the timeout, seconds.
        run_dir: its run folder, empty before it has one.
        beats: how often its threads have told that they run.
        words: why the run ended, as far as it knows.
    """

    changes: int
    phase: str
    waits: int
    together: bool
    limit: float
    run_dir: str
    beats: int = 0
    words: str = ""


class Board:
    """Memory that a rank and its watchdog share: the rank writes how it stands, the watchdog for how long it has been idle."""

    _head = struct.Struct("<qBBBd")
    _idle = struct.Struct("<d")
    _beats = struct.Struct("<q")
    _at = _idle.size + _beats.size  # where the head begins

    def __init__(self, limit: float) -> None:
        self._memory = mmap.mmap(-1, self._at + self._head.size + _PATH + _WORDS)
        self._changes, self._together, self._limit = 0, False, limit
        self.tell()

    def tell(self) -> None:
        """Tells how this rank stands now."""
        self._changes += 1
        self._write(
            self._at,
            self._head.pack(self._changes, phase.number(), phase.patience(), self._together, self._limit),
        )

    def watch_together(self, together: bool, limit: float | None = None) -> None:
        """Tells whether the ranks watch over each other from now on, and what the timeout is."""
        self._together, self._limit = together, limit or self._limit
        self.tell()

    def belongs_to(self, run_dir: Path) -> None:
        """Tells the run folder whose summary is to tell of a failure."""
        path = os.fsencode(run_dir.absolute())
        if len(path) <= _PATH:
            start = self._at + self._head.size
            self._memory[start : start + len(path)] = path

    def leave_word(self, sentence: str) -> None:
        """Has the watchdog tell why the run ended, where that cannot be written by the rank itself. The first one counts."""
        start = self._at + self._head.size + _PATH
        if not self._memory[start]:
            words = sentence.encode()[:_WORDS]
            self._memory[start : start + len(words)] = words

    def beat(self) -> None:
        """Tells that threads of this rank still run; called again and again while the ranks watch over each other."""
        (beats,) = self._beats.unpack_from(self._memory, self._idle.size)
        self._write(self._idle.size, self._beats.pack(beats + 1))

    @property
    def idle(self) -> float:
        """For how many seconds this rank has made no progress, as its watchdog sees it."""
        return float(self._idle.unpack_from(self._memory, 0)[0])

    @idle.setter
    def idle(self, seconds: float) -> None:
        self._write(0, self._idle.pack(seconds))

    def _write(self, start: int, words: bytes) -> None:
        """Replaces bytes by others at once; `pack_into` would fill them with zeros first, which the other process may read."""
        self._memory[start : start + len(words)] = words

    def read(self) -> Seen:
        """How the rank stands."""
        changes, number, waits, together, limit = self._head.unpack_from(self._memory, self._at)
        start = self._at + self._head.size
        path = self._memory[start : start + _PATH].rstrip(b"\0")
        words = self._memory[start + _PATH :].rstrip(b"\0").decode(errors="replace")
        (beats,) = self._beats.unpack_from(self._memory, self._idle.size)
        return Seen(changes, phase.PHASES[number], waits, bool(together), limit, os.fsdecode(path), beats, words)


board: Board | None = None
"""Of this process, where it has a watchdog."""


def leave_word(sentence: str) -> None:
    """Tells the watchdog of this process, where it has one, why the run ended."""
    if board is not None:
        board.leave_word(sentence)


def start(overrides: Sequence[str]) -> None:
    """Forks the watchdog of this rank, where there are several.

    Args:
        overrides: of the command line, for `train.timeout`: the configuration is read later, by what may hang.

    Raises:
        InputError: the launcher's variables cannot be read.
    """
    global board  # noqa: PLW0603  (a process has one watchdog)
    here = place()
    if here.world_size == 1 or board is not None or not Path("/proc/self/stat").exists():
        return
    board = Board(_timeout(overrides))
    ward = os.getpid()
    gc.freeze()  # so that the two share their memory
    if os.fork() == 0:
        try:
            _watch(ward, here, board)
        finally:
            os._exit(0)
    gc.unfreeze()
    phase.listeners.append(board.tell)


def _timeout(overrides: Sequence[str]) -> float:
    """`train.timeout` of the command line."""
    timeout = DEFAULT_TIMEOUT
    for word in overrides:
        if given := re.fullmatch(r"\+{0,2}train\.timeout=(.*)", word):
            with suppress(ValueError):
                timeout = float(given[1])
    return timeout if timeout > 0 else DEFAULT_TIMEOUT


@dataclass
class Ages:
    """For how many seconds a rank has been stopped, has made no progress, and has waited for others. Time during which the
    watchdog was stopped itself, as with a whole job that is suspended, does not count.
    """

    stopped: float = 0.0
    idle: float = 0.0
    waited: float = 0.0


def verdict(seen: Seen, ages: Ages) -> str:
    """What is wrong with a rank, in words that follow its name; empty if nothing is."""
    limit = seen.limit + GRACE if seen.together else seen.limit
    if ages.stopped >= limit:
        return f"has been stopped for {ages.stopped:.0f} s"
    if ages.idle >= limit and (seen.together or not seen.waits):
        return f"has made no progress for {ages.idle:.0f} s (it used no processor time, read and wrote nothing)"
    # A rank that is stopped is named by its own watchdog first.
    if seen.waits == 1 and not seen.together and ages.waited >= limit + GRACE / 2:
        return f"has waited {ages.waited:.0f} s for the other ranks"
    return ""


def _watch(ward: int, here: Place, board: Board) -> None:
    """The life of a watchdog: ends with its rank, or ends it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # the rank may have something to save
    name_thread("ddpkit:watchdog")
    rank, beside, launcher = here.rank, here.local_size, stat(Path(f"/proc/{ward}"))[1]
    ages, meter = Ages(), Meter(ward)
    last, changes, beats = time.monotonic(), -1, -1
    started: dict[int, str] = {}
    tick = 0.25
    while not _ended(ward, tick):
        now = time.monotonic()
        passed, last = min(now - last, 3 * tick), now
        seen = board.read()
        tick = min(5.0, max(0.25, seen.limit / 40))
        try:
            stopped = state(ward) in "tT"
            progressed = meter.progressed(passed)
            started = meter.below
        except (OSError, IndexError):
            continue  # it is ending
        ages.stopped = ages.stopped + passed if stopped else 0.0
        anew = seen.changes != changes
        changes = seen.changes
        ages.waited = ages.waited + passed if seen.waits and not anew else 0.0
        # One that waits runs its threads meanwhile, unless it is stuck: they need Python's lock.
        waits = seen.waits and (not seen.together or seen.beats != beats)
        beats = seen.beats
        ages.idle = ages.idle + passed if not (progressed or anew or waits) else 0.0
        board.idle = ages.idle
        if why := verdict(seen, ages):
            name = f"Rank {rank} (process {ward} on {socket.gethostname()})"
            others = "".join(f", {other}" for other in _others(ward)) if seen.waits else ""
            after = "; resume goes on from the last checkpoint" if seen.run_dir and seen.phase != "end" else ""
            sentence = f"{name} {why} in phase {seen.phase}{others}: the run ends{after}."
            if seen.run_dir:
                record_failure(Path(seen.run_dir), sentence)
            # Ranks that watched over this one have said so before they ended.
            if not (seen.together and beside > 1 and not list(_siblings(ward))):
                sys.stderr.write(f"\nddpkit: {sentence}\n")
                sys.stderr.flush()
            _kill(ward)
            return
    seen = board.read()
    if seen.run_dir and seen.words:  # all ranks may have been unable to write that
        record_failure(Path(seen.run_dir), seen.words)
    if seen.phase != "end":
        _end_orphans(started)
    _tell_of_launcher(seen, here.launcher, launcher)


def _end_orphans(started: Mapping[int, str]) -> None:
    """Ends what a rank that was ended has left behind, such as processes that compile.

    Args:
        started: when each process that it had started was.
    """
    for process, when in started.items():
        with suppress(OSError, IndexError):
            if born(process) == when:
                os.kill(process, signal.SIGKILL)


def _tell_of_launcher(seen: Seen, name: str, process: str) -> None:
    """Has the run's summary tell of a launcher that was killed: its ranks may end with it, before they can say anything."""
    with suppress(OSError, IndexError):
        if not seen.run_dir or state(int(process)) not in "ZX":
            return
    time.sleep(1.0)  # one of them may be about to tell more
    record_failure(
        Path(seen.run_dir),
        f"In phase {seen.phase} {name} (process {process}) was gone, and its ranks ended with it; resume goes on from the "
        "last checkpoint.",
    )


def _ended(process: int, seconds: float) -> bool:
    """Whether the parent of this process has ended; waits so long for that."""
    try:
        descriptor = os.pidfd_open(process)
    except OSError:
        time.sleep(seconds if os.getppid() == process else 0)
    else:
        try:
            select.select([descriptor], [], [], seconds)
        finally:
            os.close(descriptor)
    return os.getppid() != process


def _siblings(ward: int) -> Iterator[int]:
    """The processes that the same launcher started on this host, but for this rank."""
    parent = stat(Path(f"/proc/{ward}"))[1]
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            fields = stat(path)
            if fields[1] == parent and fields[0] not in "ZX" and path.name != str(ward):
                yield int(path.name)


def _others(ward: int) -> list[str]:
    """The ranks beside this one that are stopped or in another phase."""
    described = []
    own = phase.of(ward)
    for process in _siblings(ward):
        with suppress(OSError, IndexError):
            stopped, now = state(process) in "tT", phase.of(process)
            if not stopped and now == own:
                continue
            text = Path(f"/proc/{process}/environ").read_text(errors="replace")
            variables = dict(word.split("=", 1) for word in text.split("\0") if "=" in word)
            where = f" in phase {now}" if now else " starting"
            described.append(f"rank {any_rank(variables)} (process {process}) is{' stopped' * stopped}{where}")
    return described


def _kill(ward: int) -> None:
    """Ends a rank and all that it started; a stopped process obeys SIGKILL alone."""
    for process in [ward, *below(ward)]:  # listed first: they change their parent when it ends
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
