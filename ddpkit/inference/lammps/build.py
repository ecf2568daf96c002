"""The plugin: compiled for this torch and this LAMMPS, and kept."""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddpkit.errors import InputError, writing
from ddpkit.inference.lammps.installation import Installation, cache_folder
from ddpkit.ranks import cores

_log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "plugin"
NAME = "ddpkitplugin.so"  # LAMMPS loads what ends in plugin.so by itself where LAMMPS_PLUGIN_PATH points to
OPTIONS = ("-O2", "-std=c++20", "-fPIC", "-shared")
TOOLKIT = Path("/usr/local/cuda")  # where NVIDIA's installer puts it
# Folders of PyPI's packages, beside torch's, with headers of CUDA.
CUDA_PACKAGES = ("nvidia/cu13/include", "nvidia/cuda_runtime/include", "triton/backends/nvidia/include")


def torch_folder() -> Path:
    """Where torch is installed; it is not imported."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def built(installation: Installation) -> Path:
    """The plugin for this installation, compiled where it has not been.

    Of several processes one compiles, and the others wait.

    Raises:
        InputError: there is no compiler, or it fails; or this LAMMPS takes no plugins.
    """
    plugin = cache_folder() / _digest(installation) / NAME
    if not plugin.is_file():
        with writing(plugin.parent):
            plugin.parent.mkdir(parents=True, exist_ok=True)
            with _alone(plugin.parent):
                if not plugin.is_file():
                    _compile(installation, plugin)
    return plugin


def _digest(installation: Installation) -> str:
    facts = hashlib.sha256()
    torch, lammps = torch_folder(), installation.program
    for path in sorted(SOURCE.iterdir()):
        facts.update(path.read_bytes())
    for path in (
        lammps,
        *sorted(lammps.parent.glob("liblammps.so*")),
        *sorted(lammps.parent.parent.glob("lib*/liblammps.so*")),
    ):
        about = path.stat()
        facts.update(f"{path} {about.st_size} {about.st_mtime_ns}\n".encode())
    headers = (str(installation.mpi.headers), str(_cuda_headers(torch)))
    words = (str(torch), importlib.metadata.version("torch"), *headers, sys.executable, *OPTIONS)
    facts.update("\n".join(words).encode())
    return facts.hexdigest()[:16]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While this is open, no other process is inside for this folder."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(installation: Installation, plugin: Path) -> None:
    version, flags = _told(installation)
    compiler = next((path for name in _compilers() if (path := shutil.which(name))), None)
    if compiler is None:
        raise InputError(
            "There is no C++ compiler here, which LAMMPS' plugin needs once: install g++, or set CXX to a compiler."
        )
    _log.warning("compiling the plugin for LAMMPS, some ten seconds, once")
    torch = torch_folder()
    with tempfile.TemporaryDirectory(dir=plugin.parent) as made:
        command = [compiler, *OPTIONS, *flags, f'-DDDPKIT_LAMMPS_VERSION="{version}"']
        command += [f"-I{path}" for path in (installation.headers, installation.mpi.headers, torch / "include")]
        command += ["pair_ddpkit.cpp", "-o", f"{made}/{NAME}", f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}"]
        # The C++ library that torch loads, where a toolchain would link its own into the plugin.
        command += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-l:libstdc++.so.6"]
        for options in _for_gpus(torch):
            with cores.all_of_job():
                done = subprocess.run([*command, *options], cwd=SOURCE, capture_output=True, text=True, check=False)
            if not done.returncode:
                break
        else:
            why = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-300:]).strip()
            raise InputError(
                f"{compiler} cannot compile the plugin for {installation.program} ({why}): use a compiler that knows C++20, "
                "such as g++ 11, and a LAMMPS of 2024 or later."
            )
        (Path(made) / NAME).replace(plugin)


def _has_cuda(torch: Path) -> bool:
    return (torch / "lib" / "libtorch_cuda.so").is_file()


def _for_gpus(torch: Path) -> list[list[str]]:
    """What the compiler is told besides where torch computes on NVIDIA GPUs; the later where it fails with the earlier.

    Without headers of CUDA that it can use, steps on a GPU cannot be replayed, which the plugin says then.
    """
    if not _has_cuda(torch):
        return [[]]
    launched = ["-ltorch_cuda"]
    headers = _cuda_headers(torch)
    return [["-DDDPKIT_CUDA", f"-I{headers}", *launched, "-lc10_cuda"], launched] if headers else [launched]


def _cuda_headers(torch: Path) -> Path | None:
    """The headers of CUDA's runtime where torch computes on GPUs: of a toolkit, or else those of PyPI's packages."""
    if not _has_cuda(torch):
        return None
    toolkits = [Path(told) for name in ("CUDA_HOME", "CUDA_PATH") if (told := os.environ.get(name))]
    if nvcc := shutil.which("nvcc"):
        toolkits.append(Path(nvcc).resolve().parent.parent)
    places = [toolkit / "include" for toolkit in (*toolkits, TOOLKIT)]
    places += [torch.parent / package for package in CUDA_PACKAGES]
    # some packages have the first without the second, which it includes
    needed = ("cuda_runtime.h", "crt/host_config.h")
    return next((place for place in places if all((place / name).is_file() for name in needed)), None)


def _compilers() -> tuple[str, ...]:
    return (chosen,) if (chosen := os.environ.get("CXX")) else ("g++", "c++", "clang++")


def _told(installation: Installation) -> tuple[str, list[str]]:
    """The version of a LAMMPS, and the flags that its headers need."""
    command = [str(installation.program), "-h"]
    done = subprocess.run(command, env=installation.environment(), capture_output=True, text=True, check=False)
    version = re.search(r"Parallel Simulator - (.+)", done.stdout)
    if done.returncode or version is None:
        why = " ".join((done.stderr or done.stdout).split())[-300:]
        raise InputError(
            f"{installation.program} does not run ({why}): install 'ddpkit[lammps]', or set DDPKIT_LMP to one that does."
        )
    packages = re.search(r"Installed packages:(.*?)(?:List of|\Z)", done.stdout, re.DOTALL)
    if packages is None or "PLUGIN" not in packages[1].split():
        raise InputError(
            f"{installation.program} was built without plugins: install 'ddpkit[lammps]', or build LAMMPS with "
            "`-D PKG_PLUGIN=on`."
        )
    return version[1].strip(), re.findall(r"^(-DLAMMPS_\w+)", done.stdout, re.MULTILINE)
