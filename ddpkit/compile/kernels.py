"""The C++ kernels of a graph, compiled a few files at a time.

Inductor gives each kernel a file of its own. Its headers take a compiler longer than the kernel does, many times over, so the
kernels of a graph are shared out to as many files as are compiled side by side.
"""

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.cpu_vec_isa import VecISA, valid_vec_isa_list
from torch._inductor.utils import clear_on_fresh_cache

from ddpkit.ranks.cores import all_of_job

_INCLUDE = re.compile(r"^#include .*$", re.MULTILINE)
_OTHER_DIRECTIVE = re.compile(r"^\s*#\s*(?!include\b|pragma\b)\w+", re.MULTILINE)
_ENTRY = re.compile(r"\bkernel\(")

# Inductor's loader hands the address of a function that finds a tensor's memory over in an environment variable.
_BINDINGS = r"""
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cstdlib>
#include <exception>
#include <type_traits>
#include <utility>

static void* (*memory_of)(PyObject*);

struct Raised {};  // Python has the error

template <typename T> static T number(T value) {
    if (value == T(-1) && PyErr_Occurred()) throw Raised{};
    return value;
}

template <typename T> static T argument(PyObject* x) {
    if constexpr (std::is_pointer_v<T>) return static_cast<T>(memory_of(x));
    else if constexpr (std::is_floating_point_v<T>) return static_cast<T>(number(PyFloat_AsDouble(x)));
    else return static_cast<T>(number(PyLong_AsLongLong(x)));
}

// No tuple of the arguments: a compiler takes a minute over one of two hundred.
template <typename... T, size_t... n>
static PyObject* run(void (*kernel)(T...), PyObject* const* given, std::index_sequence<n...>) {
    try {
        kernel(argument<T>(given[n])...);
    } catch (Raised) {
        return nullptr;
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
    Py_RETURN_NONE;
}

template <typename... T>
static PyObject* check_and_run(void (*kernel)(T...), PyObject* const* given, Py_ssize_t count) {
    if (count != sizeof...(T)) {
        PyErr_Format(PyExc_TypeError, "the kernel takes %zd arguments, not %zd", sizeof...(T), count);
        return nullptr;
    }
    return run(kernel, given, std::index_sequence_for<T...>{});
}

template <auto kernel> static PyObject* entry(PyObject*, PyObject* const* given, Py_ssize_t count) {
    return check_and_run(kernel, given, count);
}
"""
_MODULE = r"""
static PyMethodDef methods[] = {%s{nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "kernels", nullptr, -1, methods};

PyMODINIT_FUNC PyInit_kernels() {
    const char* address = std::getenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR");
    if (address == nullptr) {
        PyErr_SetString(PyExc_RuntimeError, "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR is not set");
        return nullptr;
    }
    memory_of = reinterpret_cast<decltype(memory_of)>(std::strtoull(address, nullptr, 10));
    return PyModule_Create(&module);
}
"""
_METHOD = '{"%s", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(entry<%s>)), METH_FASTCALL, nullptr},\n'


# Torch up to 2.12 imports torch, for seconds, in each of a dozen processes that try whether a library can be loaded.
_TRY_LIBRARY = """
import ctypes

def load():
    for library in {libraries}:
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    ctypes.CDLL("__lib_path__")

try:
    load()
except OSError:
    import torch
    ctypes.CDLL("__lib_path__")
"""


def look_at_the_processor() -> None:
    """Finds out in the background which vector instructions there are: Inductor compiles a program for each and tries it."""
    if VecISA._avx_py_load.lstrip().startswith("import torch"):  # noqa: SLF001
        folder = Path(torch.__file__).parent / "lib"
        libraries = [str(folder / name) for name in ("libc10.so", "libtorch_cpu.so")]
        VecISA._avx_py_load = _TRY_LIBRARY.format(libraries=libraries)  # noqa: SLF001

    def look() -> None:
        with all_of_job():
            valid_vec_isa_list()

    threading.Thread(target=look, name="look at the processor", daemon=True).start()


@clear_on_fresh_cache
class _Files(CppPythonBindingsCodeCache):
    """Inductor's cache of libraries, for our files: flags, locks and places are its own."""

    cache: dict[str, Callable[[], ModuleType]] = {}  # type: ignore[assignment]  # noqa: RUF012  (Inductor's interface)
    cache_clear = staticmethod(cache.clear)
    entry_function = "kernels"


@dataclass(frozen=True)
class _Kernel:
    source: str


@contextlib.contextmanager
def compiled_together() -> Iterator[None]:
    """While this is open, a graph is compiled on all cores of the job, and its C++ kernels share files."""
    one_by_one, wait = AsyncCompile.cpp_pybinding, AsyncCompile.wait

    def keep(compiler: AsyncCompile, argument_types: list[str], source: str) -> Any:
        if _OTHER_DIRECTIVE.search(source):  # macros would reach into other kernels
            return one_by_one(compiler, argument_types, source)
        return _Kernel(source)

    def compile_kept(compiler: AsyncCompile, scope: dict[str, Any]) -> None:
        kernels = {name: value.source for name, value in scope.items() if isinstance(value, _Kernel)}
        threads = get_compile_threads()
        submit = compiler.submit if threads > 1 else None
        # started all together, then waited for
        shares = shared_out(kernels, threads)
        loading = [
            _Files.load_async(file_of({name: kernels[name] for name in share}), submit_fn=submit) for share in shares
        ]
        for share, load in zip(shares, loading, strict=True):
            library = load()
            scope.update({name: getattr(library, name) for name in share})
        wait(compiler, scope)

    AsyncCompile.cpp_pybinding, AsyncCompile.wait = keep, compile_kept  # type: ignore[assignment, method-assign]
    try:
        with all_of_job():
            threads = inductor_config.decide_compile_threads()
            # Compiling the headers ahead takes longer than a few files gain by it.
            with inductor_config.patch(compile_threads=threads, cpp_cache_precompile_headers=False):
                yield
    finally:
        AsyncCompile.cpp_pybinding, AsyncCompile.wait = one_by_one, wait  # type: ignore[method-assign]


def shared_out(sources: dict[str, str], count: int) -> list[list[str]]:
    """Names in at most `count` lists, whose sources are about equally long together."""
    shares: list[list[str]] = [[] for _ in range(min(count, len(sources)))]
    lengths = [0] * len(shares)
    for name in sorted(sources, key=lambda name: (-len(sources[name]), name)):
        shortest = lengths.index(min(lengths))
        shares[shortest].append(name)
        lengths[shortest] += len(sources[name])
    return shares


def file_of(sources: dict[str, str]) -> str:
    """One C++ file with Python bindings of several kernels, each in a namespace of its own."""
    includes = dict.fromkeys(line for source in sources.values() for line in _INCLUDE.findall(source))
    bodies = [
        f"namespace in_{name} {{\n{_ENTRY.sub(f'{name}(', _INCLUDE.sub('', source))}\n}}\n"
        for name, source in sources.items()
    ]
    methods = "".join(_METHOD % (name, f"in_{name}::{name}") for name in sources)
    return "\n".join([*includes, _BINDINGS, *bodies, _MODULE % methods])
