"""CUDA C++ that is compiled when it is first needed, by the compiler of NVIDIA that comes with torch.

Neither nvcc nor a C++ compiler is needed. What has been compiled is kept on disk beside torch's own compiler cache.
"""

import ctypes
import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ddpkit.errors import InputError
from ddpkit.torch_private import folder_of_cache

FOLDER = "ddpkit-cuda"
_lock = threading.Lock()
_functions: dict[tuple[str, int, str], ctypes.c_void_p] = {}
_modules: dict[tuple[str, int], ctypes.c_void_p] = {}


def is_available() -> bool:
    """Whether there is a compiler."""
    return torch.version.cuda is not None and _compiler() is not None


def launch(
    text: str,
    function: str,
    grid: tuple[int, int],
    threads: int,
    arguments: Sequence[Tensor | int],
    others: Callable[[], Sequence[str]] = list,
) -> None:
    """Puts a kernel on the current stream of the device of its first tensor.

    Args:
        text: CUDA C++ with `extern "C"` kernels.
        function: name of one of them.
        grid: blocks along x and y.
        threads: of a block.
        arguments: tensors, of which the kernel gets the address, and numbers, which it gets as `int`.
        others: texts that will be needed too, asked for where this one has to be compiled: all are, side by side.

    Raises:
        InputError: the text cannot be compiled for this GPU, or NVIDIA's libraries are missing.
    """
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    index = torch.cuda.current_device() if device.index is None else device.index
    values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a) for a in arguments]
    places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    with torch.cuda.device(index):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        code = _function(text, index, function, others)
        _check(_driver().cuLaunchKernel(code, *grid, 1, threads, 1, 1, 0, stream, places, None))


def _function(text: str, index: int, name: str, others: Callable[[], Sequence[str]]) -> ctypes.c_void_p:
    key = (text, index, name)
    if (code := _functions.get(key)) is None:
        with _lock:
            module = _modules.get(key[:2])
            if module is None:
                if not _path(text, _kind(index)).exists():
                    _compile_all({text, *others()}, index)
                module = ctypes.c_void_p()
                _check(_driver().cuModuleLoadData(ctypes.byref(module), _binary(text, _kind(index))))
                _modules[key[:2]] = module
            code = ctypes.c_void_p()
            _check(_driver().cuModuleGetFunction(ctypes.byref(code), module, name.encode()))
            _functions[key] = code
    return code


def _compile_all(texts: set[str], index: int) -> None:
    """Compiles what is not on disk, as many at a time as this process has processors."""
    kind = _kind(index)
    missing = [text for text in texts if not _path(text, kind).exists()]
    if missing:
        with ThreadPoolExecutor(min(len(missing), len(os.sched_getaffinity(0)))) as pool:
            for _ in pool.map(lambda text: _binary(text, kind), missing):
                pass


def _kind(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def _path(text: str, kind: str) -> Path:
    key = hashlib.sha256(f"{kind} {torch.version.cuda} {text}".encode()).hexdigest()
    return Path(folder_of_cache()) / FOLDER / f"{key}.cubin"


def _binary(text: str, kind: str) -> bytes:
    """The code for a GPU: from disk, where its checksum stands before it, or compiled."""
    path = _path(text, kind)
    if path.exists():
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            return content[32:]
    code = _compiled(text, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    begun.write_bytes(hashlib.sha256(code).digest() + code)
    begun.replace(path)
    return code


def _compiled(text: str, kind: str) -> bytes:
    library, program = _compiler(), ctypes.c_void_p()
    if library is None:
        raise InputError("NVIDIA's run-time compiler (libnvrtc) is not on this machine: use kernels=ddpkit")
    if library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"ddpkit.cu", 0, None, None):
        raise InputError("NVIDIA's run-time compiler (nvrtc) cannot be used: use kernels=ddpkit")
    options = [f"--gpu-architecture={kind}".encode(), b"--std=c++17"]
    failed = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    if failed:
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        first = next((line for line in log.value.decode().splitlines() if "error" in line), "no reason given")
        raise InputError(f"CUDA kernels cannot be compiled for this GPU ({kind}: {first}): use kernels=ddpkit")
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, code)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


@lru_cache(maxsize=1)
def _compiler() -> ctypes.CDLL | None:
    for name in (f"libnvrtc.so.{str(torch.version.cuda).partition('.')[0]}", "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(code: int) -> None:
    if code:
        words = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(words))
        raise RuntimeError(f"CUDA: {words.value.decode() if words.value else code}")
