"""The C++ kernels of a graph, compiled a few files at a time.

Inductor gives each kernel a file of its own. Its headers take a compiler longer than the kernel does, many times over, so the
kernels of a graph are shared out to as many files as are compiled side by side. `ddpkit.compile.inductor.compiled_together` has
Inductor do so.
"""

import re

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


def has_directives(source: str) -> bool:
    """Whether a kernel's source has directives of the preprocessor that would reach into others in its file."""
    return _OTHER_DIRECTIVE.search(source) is not None


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
