"""The compiler's cache on disk: looked through before it is used, so that no damaged file in it can end a run.

A library that was cut short kills the process that loads it, and other damaged files would be met again by every start. So what
has been compiled is sealed: beside each file lies the checksum of its content. What does not agree with its seal is removed, and
compiled anew.
"""

import contextlib
import hashlib
import os
import shutil
import struct
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ddpkit.errors import InputError
from ddpkit.torch_private import LOADED, clear_caches, folder_of_cache

STORED = "ddpkit"
"""Folder in the cache whose files have checksums of their own: see `ddpkit.compile.stored`."""

_SEAL = ".seal"
_NOTE = ".looked-through"
_COARSE = 2_000_000_000  # nanoseconds: clocks of file systems are coarse
_looked_through: set[str] = set()


def make_ready() -> None:
    """Looks through the cache, once in a process.

    Raises:
        InputError: nothing can be written there.
    """
    folder = _folder()
    if str(folder) in _looked_through:
        return
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unusable(folder, error) from error
    _looked_through.add(str(folder))
    mend()


def mend() -> bool:
    """Removes damaged files, with one line of warning; returns whether there were any."""
    folder = _folder()
    note, boot = folder / _NOTE, _boot()
    begun = note.with_name(f"{note.name}.{os.getpid()}")
    begun.write_text(boot)
    known = 0
    with contextlib.suppress(OSError):
        if boot and note.read_text() == boot:
            known = note.stat().st_mtime_ns - _COARSE
    damaged = [path for path in _files(folder) if _is_damaged(path, known)]
    for path in damaged:
        _remove(path)
    begun.replace(note)  # of the time at which the look began
    if damaged:
        warnings.warn(
            f"{len(damaged)} damaged files were removed from the compiler's cache in {folder} ({damaged[0].name} ...): what they "
            "held is compiled anew.",
            stacklevel=2,
        )
    return bool(damaged)


@contextlib.contextmanager
def sealing() -> Iterator[None]:
    """Seals what is written into the cache while this is open."""
    began = time.time() - 1.0  # clocks of file systems are coarse
    yield
    for path in _files(_folder()):
        seal = _seal_of(path)
        with contextlib.suppress(OSError):
            if path.suffix == ".so" and not _is_whole_library(path):
                continue  # another process is writing it
            if path.stat().st_mtime >= began or (path.suffix == ".so" and not seal.exists()):
                temporary = seal.with_name(f"{seal.name}.{os.getpid()}")
                temporary.write_text(_checksum(path))
                temporary.replace(seal)


@contextlib.contextmanager
def afresh() -> Iterator[None]:
    """While this is open, an empty folder serves as the cache; it is removed afterwards."""
    before = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    with tempfile.TemporaryDirectory(prefix="ddpkit-compiled-", ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        clear_caches()
        try:
            yield
        finally:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
            clear_caches()


def _folder() -> Path:
    try:
        return Path(folder_of_cache())
    except OSError as error:
        raise _unusable(Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())), error) from error


def _unusable(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"The compiler's cache in {folder} cannot be written ({error.strerror}): set TORCHINDUCTOR_CACHE_DIR to a folder of your "
        "own on a disk of this host, or train with compile=False."
    )


def _files(folder: Path) -> list[Path]:
    """What has been compiled, without seals, locks and what is being written."""
    paths = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in ("locks", STORED)]
        paths += [
            Path(place) / name
            for name in names
            if not name.startswith(".") and not name.endswith((".lock", ".tmp", ".o", LOADED))
        ]
    return paths


def _seal_of(path: Path) -> Path:
    return path.with_name(f".{path.name}{_SEAL}")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _boot() -> str:
    """Differs for each start of the machine: what was whole stays so until then, unless its file says that it was changed."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _is_damaged(path: Path, known: int = 0) -> bool:
    """Whether a file is not what was sealed, or was cut short.

    Args:
        path: of the file.
        known: nanoseconds; sealed files that were last changed before are known to be whole.
    """
    try:
        seal = _seal_of(path)
        if seal.exists():
            if max(path.stat().st_ctime_ns, seal.stat().st_ctime_ns) < known:
                return False
            return seal.read_text() != _checksum(path)
        is_torn = path.stat().st_size == 0 or (path.suffix == ".so" and not _is_whole_library(path))
        return is_torn and not _is_being_compiled(path)
    except FileNotFoundError:  # another process has replaced it
        return False
    except (OSError, UnicodeDecodeError):
        return True


def _is_being_compiled(path: Path) -> bool:
    """Whether another process holds the lock under which a library is written."""
    lock = path.parents[1] / "locks" / f"{path.name.partition('.')[0]}.lock"
    if not lock.exists():
        return False
    try:
        with FileLock(str(lock), timeout=0):
            return False
    except Timeout:
        return True


def _is_whole_library(path: Path) -> bool:
    """Whether a library has all of its sections, the table of which stands at its end."""
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 64 or head[:5] != b"\x7fELF\x02":
        return False
    (table,), (size, count) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
    return path.stat().st_size >= int(table) + int(size) * int(count)


def _remove(path: Path) -> None:
    """Removes a damaged file, what it was made of, and the note that it could be loaded."""
    with contextlib.suppress(OSError):
        if "triton" in path.parts:  # its files are there all together or not at all
            shutil.rmtree(path.parent)
            return
        source = path.with_suffix(".cpp")
        for other in (path, source) if path.suffix == ".so" else (path,):
            for belongs in (_seal_of(other), other.with_name(f"{other.name}{LOADED}"), other):
                belongs.unlink(missing_ok=True)
