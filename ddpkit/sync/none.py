"""No communication."""

from collections.abc import Callable

from ddpkit.sync.base import GradientSync


class NoSync(GradientSync):
    """Averages nothing: every rank keeps its own gradients, so the ranks diverge. For timing a step without communication.

    Args:
        module: any module.
        options: those of `GradientSync`.
    """

    name = "none"
    comms = ("torch", "mpi")
    averages = False

    def reduce(self) -> None:
        """Does nothing."""

    def recordable_average(self) -> Callable[[], None]:
        """Does nothing."""
        return self.reduce
