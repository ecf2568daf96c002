"""How far training has come, and how long it took."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Progress:
    """Where training stands. `step` and `epoch` count what is done; `seconds` are walltime, validation included."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best: float = float("inf")
    epochs_since_best: int = 0
    seconds_in_epoch: float = 0.0
    loss_sum_in_epoch: float = 0.0
    rows_in_epoch: int = 0
    seconds: float = 0.0
    seconds_data: float = 0.0  # that steps waited for their batches, of this rank
    seconds_steps: float = 0.0  # of all steps, of this rank
    skipped: int = 0  # updates that were not applied on some rank, because its gradient was not finite
    eager_steps: int = 0  # in which some rank ran eager code although the step is compiled
    captured_steps: int = 0  # that this rank replayed from a recording

    def count(self, stretch: "Stretch") -> None:
        """Adds the times of some steps."""
        self.seconds_in_epoch += stretch.seconds
        self.seconds_steps += stretch.seconds
        self.seconds_data += stretch.waited


@dataclass
class Stretch:
    """The steps between two rows of `steps.csv`, and what they took on this rank, in seconds.

    Attributes:
        began: by `time.perf_counter`.
        steps: how many there were.
        waited: for batches.
        seconds: from the beginning to `end()`.
    """

    began: float
    steps: int = 0
    waited: float = 0.0
    seconds: float = 0.0

    def draw(self, batches: Iterator[T]) -> T | None:
        """The next batch; None where there is no other."""
        asked = time.perf_counter()
        drawn = next(batches, None)
        self.waited += time.perf_counter() - asked
        return drawn

    def end(self) -> "Stretch":
        """Ends it; returns the one that begins."""
        now = time.perf_counter()
        self.seconds = now - self.began
        return Stretch(now)
