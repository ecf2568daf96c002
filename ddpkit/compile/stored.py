"""Compiled code on disk, so that a start traces and compiles nothing that an earlier one has.

An entry is found by a digest of all that the code depends on (`identity`, `surroundings`), holds what tracing told of it, and is
written when the code has been checked against eager code. It is checked again wherever it is used. It lies in the compiler's
cache, in the folder `ddpkit`, with a checksum of its own; a damaged one is removed.
"""

import contextlib
import functools
import hashlib
import io
import os
import pickle
import platform
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ddpkit.compile import cache, digest
from ddpkit.compile.backend import Kernel, backend, interprets
from ddpkit.compile.identity import digest as digest_of
from ddpkit.compile.layout import Layout
from ddpkit.compile.state import State
from ddpkit.torch_private import custom_operator, folder_of_cache, registrations, schemas_of

C = TypeVar("C")

_FACTOR = 2  # that sizes may differ by from those that code was tuned for
_TORCHS = frozenset(
    {"aten", "prims", "prim", "inductor", "_quantized", "_c10d_functional", "_inductor_test", "_dtensor"}
)


@dataclass(frozen=True)
class Entry:
    """What lies on disk of one code.

    Attributes:
        sizes: that it was tuned for.
        conditions: under which it holds.
        rewritten: what the traced objects replace when they are called, see `State`.
        operators: what was known of the operators that it calls and that are not torch's own.
        kernels: as the compiler's backend packs them.
        code: the rest, pickled.
    """

    sizes: dict[str, int]
    conditions: Any
    rewritten: set[str]
    operators: str
    kernels: list[bytes]
    code: bytes

    def serves(self, every: Iterable[Mapping[str, int]]) -> bool:
        """Whether the code holds for batches of these sizes, and was tuned for about as large ones."""
        return all(
            self.conditions.hold(sizes, self.conditions.not_one)
            and all(
                self.sizes[name] <= _FACTOR * size and size <= _FACTOR * self.sizes[name]
                for name, size in sizes.items()
            )
            for sizes in every
        )


class Stored(Generic[C]):
    """The code of one function on disk.

    Args:
        describe: returns a digest of what code depends on beside the form of batches, or raises an error where there is none.
        state: of the traced objects.
    """

    def __init__(self, describe: Callable[[], str], state: State) -> None:
        self._describe, self._state = describe, state
        self._paths: dict[str, Path | None] = {}

    def find(self, layout: Layout, every: Iterable[Mapping[str, int]]) -> Entry | None:
        """The entry for batches of a form and of these sizes; None if there is none, or it cannot be used.

        Call it before tracing: what is stored later goes by the digest as it is now.
        """
        path = self._path(layout)
        entry = None if path is None else _read(path)
        return entry if entry is not None and entry.serves(every) else None

    def load(self, entry: Entry) -> C | None:
        """The code of an entry; None if it cannot be used."""
        try:
            cache.make_ready()  # a damaged library would end the process
            with cache.sealing():
                kernels = [backend().unpack(content) for content in entry.kernels]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch's own trees use what it deprecates
                code: C = _Unpickler(io.BytesIO(entry.code), kernels).load()
            if _operators(kernels) != entry.operators:
                return None
        except Exception:  # noqa: BLE001  (whatever a damaged or foreign file leads to: it only saves time)
            return None
        for kernel in kernels:
            digest.note(kernel)
        self._state.rewritten |= entry.rewritten
        return code

    def keep(self, layout: Layout, sizes: dict[str, int], code: C, conditions: Any) -> None:
        """Writes code that has been checked; leaves out what cannot be written."""
        path = self._paths.get(layout.form())
        if path is None:
            return
        try:
            pickler = _Pickler(file := io.BytesIO())
            pickler.dump(code)
            kernels = [backend().pack(kernel) for kernel in pickler.kernels]
            if any(kernel is None for kernel in kernels):
                return
            operators = _operators(pickler.kernels)
            entry = Entry(sizes, conditions, self._state.rewritten, operators, kernels, file.getvalue())  # type: ignore[arg-type]
            content = pickle.dumps(entry)
        except Exception:  # noqa: BLE001  (it only saves time)
            return
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            temporary.write_bytes(hashlib.sha256(content).digest() + content)
            temporary.replace(path)

    def forget(self, layout: Layout) -> None:
        """Removes an entry that has turned out to be wrong."""
        if (path := self._paths.get(layout.form())) is not None:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _path(self, layout: Layout) -> Path | None:
        form = layout.form()
        if form not in self._paths:
            self._paths[form] = None
            # Objects that cannot be looked at are like those that cannot be told apart.
            with contextlib.suppress(Exception):
                self._paths[form] = self._made_path(layout)
        return self._paths[form]

    def _made_path(self, layout: Layout) -> Path | None:
        if interprets() or (settings := backend().settings()) is None:
            return None
        words = repr((layout.form(), layout.names if not layout.is_known else (), settings, surroundings()))
        name = hashlib.sha256(f"{words}\n{self._describe()}".encode()).hexdigest()
        return Path(folder_of_cache()) / cache.STORED / name[:2] / name


def described(state: State, tensors: Iterable[Tensor], roots: Mapping[str, Any], beside: Iterable[Any]) -> str:
    """A digest of what a trace depends on.

    Args:
        state: of the traced objects.
        tensors: further inputs of the graph.
        roots: the traced objects.
        beside: plain values.

    Raises:
        UnknownError: something cannot be told apart.
    """
    inputs = [*state.tensors(), *tensors]
    forms = [(tuple(x.shape), x.stride(), str(x.dtype), str(x.device), x.requires_grad) for x in inputs]
    return digest_of(roots, inputs, [*beside, forms, state.names, state.trained])


@functools.cache
def _releases() -> list[Any]:
    """What does not change while a process lives: releases, this package's code, the machine."""
    folder = Path(__file__).parents[1]
    own = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        own.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    places = list(dict.fromkeys(Path(place) for place in [*sys.path, sysconfig.get_path("purelib")]))
    places = [place for place in places if place.name in ("site-packages", "dist-packages") and place.is_dir()]
    installed = [path.name for place in places for path in sorted(place.glob("*-info"))]
    processor = torch.backends.cpu.get_cpu_capability(), platform.machine(), platform.processor()
    return [own.hexdigest(), installed, sys.version, torch.version.git_version, torch.version.cuda, processor]


def surroundings() -> list[Any]:
    """Releases, the machine, and what torch has been told: all that generated code depends on beside what is traced."""
    count = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    gpus = [torch.cuda.get_device_properties(n) for n in range(count)]
    kinds = ("cpu", "cuda")
    variables = {k: v for k, v in os.environ.items() if k.startswith(("TORCHINDUCTOR_", "TORCH_COMPILE", "TRITON_"))}
    return [
        torch.__version__,
        *_releases(),
        [(gpu.name, gpu.major, gpu.minor, gpu.multi_processor_count, gpu.total_memory) for gpu in gpus],
        sorted((k, v) for k, v in variables.items() if not k.endswith(("_CACHE_DIR", "_COMPILE_THREADS"))),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds],
    ]


def _operators(kernels: Iterable[Kernel]) -> str:
    """What is known of the operators that code calls and that are not torch's own."""
    sources = [str(getattr(kernel, "source_code", "")) for kernel in kernels]
    called = {call for source in sources for call in re.findall(r"torch\.ops\.(\w+)\.(\w+)", source)}
    told: list[Any] = []
    for space, name in sorted(called):
        if space in _TORCHS:
            continue
        told.append(schemas_of(getattr(getattr(torch.ops, space), name)))
        if (definition := custom_operator(f"{space}::{name}")) is not None:
            told.append(digest_of({name: definition}, (), ()))
        for line in registrations(f"{space}::{name}"):
            file = Path(re.sub(r":\d+$", "", line))
            told.append((line, hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""))
    if told:
        libraries = sorted(map(str, torch.ops.loaded_libraries))
        told += [(path, Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in libraries]
    return repr(told)


def _read(path: Path) -> Entry | None:
    """An entry; None if there is none. A damaged one is removed."""
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            entry = pickle.loads(content[32:])  # noqa: S301  (our own, in a folder that the compiler loads libraries from)
            if isinstance(entry, Entry):
                return entry
    except FileNotFoundError:
        return None
    except Exception:  # noqa: BLE001, S110  (what another release has written)
        pass
    with contextlib.suppress(OSError):
        path.unlink()
    return None


class _Pickler(pickle.Pickler):
    """Leaves kernels out.

    Attributes:
        kernels: that were met.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.kernels: list[Kernel] = []

    def persistent_id(self, value: Any) -> int | None:
        if not backend().is_kernel(value):
            return None
        self.kernels.append(value)
        return len(self.kernels) - 1


class _Unpickler(pickle.Unpickler):
    """Puts kernels in their places."""

    def __init__(self, file: io.BytesIO, kernels: list[Kernel]) -> None:
        super().__init__(file)
        self._kernels = kernels

    def persistent_load(self, number: int) -> Kernel:
        return self._kernels[number]
