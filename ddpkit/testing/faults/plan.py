"""Which fault strikes which run when: a trial follows from the campaign's seed and its own number alone."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ddpkit.errors import InputError
from ddpkit.ranks.phase import PHASES

T = TypeVar("T")

_TRAINS = ("step", "checkpoint", "validation", "end")


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
        does: in words.
        names: what a run's sentence must hold, as a regular expression without case; `{rank}` is the rank struck.
        phases: in which it makes sense.
        harmless: whether the run must end as if nothing had happened.
    """

    does: str
    names: str = r"rank {rank}\b"
    phases: Sequence[str] = PHASES
    harmless: bool = False


FAULTS = {
    "kill": Fault("SIGKILL to one rank"),
    "stop": Fault("SIGSTOP to one rank, for ever"),
    "pause": Fault("SIGSTOP to one rank, SIGCONT three seconds later", harmless=True),
    "term": Fault("SIGTERM to one rank", names=r"rank {rank}\b|SIGTERM"),
    "usr1": Fault("SIGUSR1 to one rank", names=r"rank {rank}\b|SIGUSR1"),
    "mpirun-term": Fault("SIGTERM to mpirun", names=r"rank \d|SIGTERM"),
    "mpirun-usr1": Fault("SIGUSR1 to mpirun", names=r"rank \d|SIGUSR1"),
    "mpirun-kill": Fault("SIGKILL to mpirun", names=r"mpirun"),
    "disk": Fault("the disk of the run folder is full", names=r"space|could not be written|cannot be used"),
    "truncated": Fault("SIGKILL to one rank, then half of the last checkpoint is missing", phases=_TRAINS),
    "garbage": Fault("SIGKILL to one rank, then the last checkpoint holds random bytes", phases=_TRAINS),
    "nan": Fault(
        "the energies of one rank are NaN once", phases=("compile", "step", "validation"), names=r"NaN|infinite|by inf"
    ),
    "memory": Fault("MemoryError (on GPUs OutOfMemoryError) on one rank"),
    "limit": Fault("one rank gets no more memory from the system"),
    "slow": Fault("one rank sleeps for three seconds", harmless=True),
    "stuck": Fault("one rank sleeps for ever"),
    "frozen": Fault("one rank sleeps for ever, heeds no signal and lets no other thread of its interpreter run"),
}


@dataclass(frozen=True, order=True)
class Run:
    """The kind of run that is struck.

    Attributes:
        strategy: its name.
        compiled: whether the step is compiled.
        recorded: whether compiled steps are recorded and replayed.
    """

    strategy: str
    compiled: bool
    recorded: bool = False

    @property
    def label(self) -> str:
        """As in tables and names of folders."""
        return f"{self.strategy}-{'recorded' if self.recorded else 'compiled'}" if self.compiled else self.strategy


RUNS = (
    Run("custom", compiled=False),
    Run("custom", compiled=True),
    Run("standard", compiled=False),
    Run("standard", compiled=True),
    Run("overlap", compiled=False),
    Run("overlap", compiled=True),
    Run("ingraph", compiled=True),
)
RECORDED = tuple(Run(name, compiled=True, recorded=True) for name in ("standard", "custom", "overlap", "ingraph"))
"""Struck where they are asked for by name: which trial has which number stays as it was before they came."""


@dataclass(frozen=True)
class Trial:
    """One run that is struck.

    Attributes:
        seed: the campaign's.
        number: counts from 1.
        fault: a name of `FAULTS`.
        phase: in which it strikes.
        run: what is struck.
        rank: who is struck.
        entry: which of the phase's entries, as a share of their number, in [0, 1).
        share: when in the phase, as a share of its length, in [0, 1).
    """

    seed: int
    number: int
    fault: str
    phase: str
    run: Run
    rank: int
    entry: float
    share: float


class Plan:
    """The trials of a campaign: every pair of fault and phase once in random order, then again.

    Args:
        seed: of all choices.
        ranks: of a run.
        only: names of faults, phases and runs; of each kind that is named, only those.

    Raises:
        InputError: a name is unknown, or nothing is left.
    """

    def __init__(self, seed: int, ranks: int = 2, only: Iterable[str] = ()) -> None:
        words = set(only)
        every = {run.label: run for run in (*RUNS, *RECORDED)}
        if unknown := sorted(words - {*FAULTS, *PHASES, *every}):
            known = ", ".join((*FAULTS, *PHASES, *every))
            raise InputError(f"Nothing in the campaign is called {', '.join(unknown)}: choose from {known}.")

        def chosen(names: Iterable[str]) -> list[str]:
            return [name for name in names if name in words] or list(names)

        self.runs = [run for label, run in every.items() if label in words] or list(RUNS)
        faults, phases = chosen(FAULTS), chosen(PHASES)
        self.cells = [
            (fault, phase)
            for fault in faults
            for phase in phases
            if phase in FAULTS[fault].phases and self._runs_with(phase)
        ]
        if not self.cells:
            raise InputError(f"No run of the campaign meets {' '.join(sorted(words))}: ask for fewer things at once.")
        self._seed, self._ranks = seed, ranks

    def trial(self, number: int) -> Trial:
        """The trial with this number, from 1."""
        fault, phase = _turn(self.cells, number, f"{self._seed}/cells")
        run = _turn(self._runs_with(phase), number, f"{self._seed}/runs")
        draw = random.Random(f"{self._seed}/{number}")
        return Trial(self._seed, number, fault, phase, run, draw.randrange(self._ranks), draw.random(), draw.random())

    def _runs_with(self, phase: str) -> list[Run]:
        return [run for run in self.runs if run.compiled or phase != "compile"]


def _turn(things: Sequence[T], number: int, seed: str) -> T:
    """All in a random order, then all in another one."""
    cycle, place = divmod(number - 1, len(things))
    return random.Random(f"{seed}/{cycle}").sample(things, len(things))[place]
