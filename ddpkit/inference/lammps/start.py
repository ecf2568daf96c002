"""LAMMPS, started so that the plugin is there and its torch computes as it should."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ddpkit.errors import InputError, everywhere
from ddpkit.inference.lammps import build
from ddpkit.inference.lammps.installation import MPICH_LIBRARY, Installation, with_first
from ddpkit.ranks.launchers import Place


def variables(installation: Installation, plugin: Path, ranks: int, ranks_here: int, rank: int) -> dict[str, str]:
    """What is set in the environment of each rank.

    Args:
        installation: of LAMMPS.
        plugin: loaded before the script.
        ranks: how many there are; the plugin sees to it that LAMMPS has as many.
        ranks_here: how many share this host's cores.
        rank: that the launcher gave this process.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // ranks_here)
    return {
        "LD_LIBRARY_PATH": with_first("LD_LIBRARY_PATH", installation.mpi.library.parent),
        # LAMMPS brings a dgemm_ of its own, ten times as slow as torch's, which comes first so
        "LD_PRELOAD": with_first("LD_PRELOAD", build.torch_folder() / "lib" / "libtorch_cpu.so"),
        "LAMMPS_PLUGIN_PATH": with_first("LAMMPS_PLUGIN_PATH", plugin.parent),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "DDPKIT_RANKS": str(ranks),
        "DDPKIT_RANK": str(rank),
    }


def command(
    installation: Installation, plugin: Path, arguments: Sequence[str], place: Place, ranks: int | None
) -> list[str]:
    """The command that runs LAMMPS: as this rank, or on `ranks` ranks of its own MPI.

    Args:
        installation: of LAMMPS.
        plugin: loaded before the script.
        arguments: of LAMMPS.
        place: of this process among those that a launcher started.
        ranks: how many to start; None for this process alone.

    Raises:
        InputError: the launcher is of another MPI than LAMMPS, or there is none.
    """
    if ranks is not None and place.world_size > 1:
        raise _by_all(
            place, f"-n {ranks} starts ranks by itself: leave -n away under {place.launcher}, or the launcher."
        )
    is_mpich = installation.mpi.library.name == MPICH_LIBRARY
    if place.world_size > 1 and is_mpich and place.launcher == "mpirun":
        raise _by_all(
            place,
            f"{place.world_size} ranks were started by Open MPI's mpirun, but {installation.program} was built against MPICH, so "
            f"each would run alone: use `ddpkit lammps -n {place.world_size} ...`, which starts them by MPICH's.",
        )
    total = ranks or place.world_size
    here = variables(installation, plugin, total, ranks or place.local_size, place.rank)
    env = shutil.which("env") or "/usr/bin/env"
    # set for the ranks alone: a launcher that preloads torch takes seconds to start
    rank = [env, *(f"{name}={value}" for name, value in here.items()), str(installation.program), *arguments]
    if ranks is None or ranks == 1:
        return rank
    launcher = installation.mpi.launcher or next(
        (Path(p) for n in ("mpiexec", "mpirun") if (p := shutil.which(n))), None
    )
    if launcher is None:
        raise InputError(
            f"{installation.mpi.library} has no mpiexec beside it: put it on the path, or start ranks by your launcher."
        )
    return [str(launcher), "-n", str(ranks), *rank]


def _by_all(place: Place, sentence: str) -> InputError:
    """A refusal of all ranks, which the first one says: not every launcher ends the others then."""
    error = everywhere(InputError(sentence))
    error.said = place.rank > 0  # type: ignore[attr-defined]
    return error


def run(words: list[str]) -> None:
    """Becomes this command, if it can be started."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.execv(words[0], words)  # noqa: S606
