"""No communication."""

from collections.abc import Callable

from ddpkit.sync.base import GradientSync


class NoSync(GradientSync):
    """Leaves every rank its own gradients, so that ranks diverge: separates compute from communication in a study of speed.

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
