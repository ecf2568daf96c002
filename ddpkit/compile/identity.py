"""What a trace depends on beside the graph's inputs, in a form that is the same in every process: a digest of code and values.

Looked at is what can be reached from some objects: attributes, containers, classes with their methods, functions with the
variables that they close over, and the global variables and modules that their code names. Of code it is the compiled form, so
that the digest is of what runs, whatever has become of the file. Packages of Python, torch and what is installed count by their
release; of installed packages that are reached, the files' sizes and times count as well.

What cannot be told apart by this is refused (`UnknownError`), and then nothing may be kept of the trace.
"""

import dis
import functools
import hashlib
import importlib.util
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpkit.torch_private import SCRIPTED

_PLAIN = (
    bool, int, float, complex, str, bytes, type(None), type(Ellipsis), type(NotImplemented), slice, range, np.generic, np.dtype,
    torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format,
)  # fmt: skip
_BUILT_IN = (
    types.BuiltinFunctionType, types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType,
    types.GetSetDescriptorType, types.MemberDescriptorType, types.MethodWrapperType,
)  # fmt: skip
_OPERATORS = (type(torch.ops.aten.add), type(torch.ops.aten.add.Tensor))
_READ = frozenset({"ddpkit", "__main__"})  # wherever they lie: like the user's code
_RELEASED = frozenset({"torch", "numpy", "triton", "sympy", "functorch", "torchgen", *sys.stdlib_module_names}) - {
    "__main__"
}
# What a class holds that no computation reads, or that its other parts are made of.
_OF_A_CLASS = frozenset({
    "__dict__", "__weakref__", "__doc__", "__module__", "__firstlineno__", "__static_attributes__", "_abc_impl",
    "__abstractmethods__", "__annotations__", "__annotate_func__", "__annotations_cache__", "__dataclass_fields__",
    "__dataclass_params__", "__match_args__", "__orig_bases__", "__parameters__",
})  # fmt: skip
_MOST = 200_000  # objects
# By these, code reaches what it does not name.
_BY_NAME = frozenset({"globals", "eval", "exec", "__import__", "import_module"})


class UnknownError(Exception):
    """Something that another process could not tell from another thing."""


def digest(roots: Mapping[str, Any], inputs: Iterable[Tensor], beside: Iterable[Any]) -> str:
    """A digest of all that a trace of some objects depends on.

    Args:
        roots: the objects by name.
        inputs: tensors that are inputs of the graph: their form counts and not their values.
        beside: plain values.

    Raises:
        UnknownError: something cannot be told apart.
    """
    reader = _Reader(inputs)
    try:
        reader.look(dict(roots))
        reader.look(list(beside))
    except RecursionError as error:
        raise UnknownError("objects that are nested too deeply") from error
    for package in sorted(reader.installed):
        reader.put(package, *_files_of(package))
    return reader.result()


class _Reader:
    """Goes through objects and puts down what it meets.

    Args:
        inputs: see `digest`.

    Attributes:
        installed: packages that were met.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        self._sum = hashlib.sha256()
        self._inputs = {id(tensor): n for n, tensor in reversed([*enumerate(inputs)])}
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # so that nothing else gets the identity of what was seen
        self._classes: set[type] = set()
        self.installed: set[str] = set()

    def put(self, *words: Any) -> None:
        self._sum.update(repr(words).encode(errors="surrogatepass"))

    def result(self) -> str:
        return self._sum.hexdigest()

    def look(self, value: Any) -> None:
        """Puts down a value."""
        if isinstance(value, _PLAIN) and type(value).__module__.partition(".")[0] in _RELEASED:
            self.put(type(value).__name__, repr(value))
            return
        number = self._seen.setdefault(id(value), len(self._seen))
        if number < len(self._kept):
            self.put("as", number)
            return
        if number >= _MOST:
            raise UnknownError(f"more than {_MOST} objects")
        self._kept.append(value)
        self.put(type(value).__module__, type(value).__qualname__)
        self._look_inside(value)

    def _look_inside(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, np.ndarray):
            self._array(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.ModuleType):
            self.put(value.__name__)
            self._place(value.__name__)
        elif isinstance(value, _BUILT_IN):
            self.put(value.__qualname__)
            if not isinstance(owner := getattr(value, "__self__", None), types.ModuleType | None):
                self.look(owner)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._all((value.__func__, value.__self__))
        elif isinstance(value, staticmethod | classmethod | functools.cached_property):
            self.look(value.func if isinstance(value, functools.cached_property) else value.__func__)
        elif isinstance(value, property):
            self._all((value.fget, value.fset, value.fdel))
        elif isinstance(value, functools.partial):
            self._all((value.func, value.args, value.keywords))
        elif isinstance(value, types.CodeType):
            self._code(value, {})
        elif isinstance(value, types.CellType):
            self._all([value.cell_contents] if _is_filled(value) else [])
        else:
            self._object(value)

    def _all(self, values: Iterable[Any]) -> None:
        for value in values:
            self.look(value)
        self.put("end")

    # --- values ---------------------------------------------------------------------------------------------------

    def _tensor(self, tensor: Tensor) -> None:
        place = self._inputs.get(id(tensor))
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_meta:
            raise UnknownError(f"a tensor of the class {type(tensor).__name__}")
        self.put(place, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)
        if place is None:  # a constant of the graph
            self._sum.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    def _array(self, array: np.ndarray[Any, Any]) -> None:
        if array.dtype.hasobject:
            raise UnknownError("an array of objects")
        self.put(array.shape, array.dtype.str)
        self._sum.update(np.ascontiguousarray(array).tobytes())

    def _object(self, value: Any) -> None:
        kind = type(value)
        self._class(kind)
        if isinstance(value, torch.jit.ScriptModule | torch.jit.ScriptFunction):
            if not hasattr(value, SCRIPTED):
                raise UnknownError("TorchScript")
            self.look(getattr(value, SCRIPTED))
            return
        if isinstance(value, torch.fx.GraphModule):
            self.put(value.code)
        is_container = True
        if isinstance(value, dict | types.MappingProxyType):
            self._all(part for item in value.items() for part in item)
        elif isinstance(value, list):
            self._all(list.__iter__(value))
        elif isinstance(value, tuple):
            self._all(tuple.__iter__(value))
        elif isinstance(value, set | frozenset):
            if not all(isinstance(item, _PLAIN) for item in value):
                raise UnknownError("a set of objects")
            self._all(sorted(value, key=repr))
        else:
            is_container = False
        is_open = hasattr(value, "__dict__") and (_is_read(kind) or isinstance(value, nn.Module))
        if is_open:
            self._all(part for item in vars(value).items() for part in item)
        slots = [name for name in _slots(kind) if hasattr(value, name)] if _is_read(kind) else []
        self._all(part for name in slots for part in (name, getattr(value, name)))
        if not (is_container or is_open or slots):
            self._closed(value)

    def _closed(self, value: Any) -> None:
        """An object of Python's, torch's or an installed package: by what pickle would make it of."""
        if isinstance(value, _OPERATORS):
            self.put(str(value))
            return
        if isinstance(value, functools._lru_cache_wrapper):  # noqa: SLF001  (no public name)
            self.look(value.__wrapped__)
            return
        if isinstance(value, ContextVar):
            self.put(value.name)
            self.look(value.get(None))
            return
        if type(value).__name__ == "CustomOpDef":
            self._all(part for part in vars(value).values() if isinstance(part, types.FunctionType | str | dict))
            return
        try:
            parts = value.__reduce_ex__(4)
        except Exception as error:
            raise UnknownError(f"an object of the class {type(value).__qualname__}") from error
        self._all((parts,) if isinstance(parts, str) else (list(x) if isinstance(x, Iterator) else x for x in parts))

    # --- code -----------------------------------------------------------------------------------------------------

    def _place(self, module: str | None) -> bool:
        """Takes down the package of a module; whether its code counts by its release."""
        top = (module or "").partition(".")[0]
        if top in _READ or top in _RELEASED:
            return top in _RELEASED
        file = getattr(sys.modules.get(top), "__file__", None) or ""
        if _is_installed(file):
            self.installed.add(top)
        return _is_installed(file)

    def _class(self, kind: type) -> None:
        """A class and those that it derives from, with what they hold."""
        for one in kind.__mro__:
            self.put(one.__module__, one.__qualname__)
            if one in self._classes or self._place(one.__module__):
                continue
            self._classes.add(one)
            for name, value in vars(one).items():
                if name not in _OF_A_CLASS:
                    self.put(name)
                    self.look(value)

    def _function(self, function: types.FunctionType) -> None:
        self.put(function.__module__, function.__qualname__)
        self._all(function.__closure__ or ())
        if self._place(function.__globals__.get("__name__")):
            return
        self._all((*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()))
        self._code(function.__code__, function.__globals__)
        self._all(part for item in vars(function).items() for part in item)

    def _code(self, code: types.CodeType, names: Mapping[str, Any]) -> None:
        self.put(code.co_filename, code.co_firstlineno, code.co_flags, code.co_code, code.co_names, code.co_linetable)
        self.put(code.co_varnames, code.co_freevars, code.co_cellvars, getattr(code, "co_exceptiontable", b""))
        consts: list[Any] = [0, 0]
        read: list[str] = []
        modules: list[types.ModuleType] = []
        attributes: set[str] = set()
        for step in dis.get_instructions(code):
            if step.opname == "LOAD_CONST":
                consts.append(step.argval)
            elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                read.append(step.argval)
            elif step.opname == "IMPORT_NAME":  # after the level and the names that are imported
                modules.append(self._imported(step.argval, consts[-2], names))
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM"):
                attributes.add(step.argval)
        if by_name := _BY_NAME & {*read, *(attributes & {"import_module"})}:
            raise UnknownError(f"what {code.co_qualname} reaches by {min(by_name)}()")
        for name in dict.fromkeys(read):
            if name in names:
                self.put(name)
                self.look(names[name])
        modules += [names[name] for name in dict.fromkeys(read) if isinstance(names.get(name), types.ModuleType)]
        for module in modules:
            if "getattr" in read and not self._place(module.__name__):
                raise UnknownError(f"what {code.co_qualname} reaches by getattr()")
            self._attributes(module, attributes)
        for const in code.co_consts:
            if isinstance(const, types.CodeType):
                self._code(const, names)
            else:
                self.put(type(const).__name__, sorted(const, key=repr) if isinstance(const, frozenset) else const)

    def _imported(self, name: str, level: Any, names: Mapping[str, Any]) -> types.ModuleType:
        """A module that a function imports when it is called."""
        package = names.get("__package__") or ""
        full = importlib.util.resolve_name("." * level + name, package) if level else name
        if full not in sys.modules and not self._place(full):
            try:
                spec = importlib.util.find_spec(full.partition(".")[0])
            except (ImportError, ValueError):
                spec = None
            if spec is not None and not _is_installed(spec.origin or ""):
                raise UnknownError(f"{full}, which is not loaded yet")
        self.put(full)
        return sys.modules.get(full) or types.ModuleType(full)

    def _attributes(self, module: types.ModuleType, attributes: set[str]) -> None:
        """What code reads of a module: the names that stand in it."""
        if self._place(module.__name__):
            return
        for name in sorted(attributes & vars(module).keys()):
            value = vars(module)[name]
            self.put(name)
            self.look(value)
            if isinstance(value, types.ModuleType):
                self._attributes(value, attributes)


def _is_installed(file: str) -> bool:
    return "site-packages" in file or "dist-packages" in file


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_read(kind: type) -> bool:
    """Whether attributes of objects of a class are looked at one by one."""
    return kind.__module__.partition(".")[0] not in _RELEASED or kind.__module__ == "types"


def _slots(kind: type) -> list[str]:
    names: list[str] = []
    for one in kind.__mro__:
        slots = vars(one).get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    return [name for name in names if name not in ("__dict__", "__weakref__")]


@functools.cache
def _files_of(package: str) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files of an installed package."""
    file = getattr(sys.modules.get(package), "__file__", None)
    if file is None:
        return ()
    folder = Path(file).parent
    files = (
        [Path(file)] if Path(file).stem != "__init__" else sorted(p for p in folder.rglob("*") if p.suffix != ".pyc")
    )
    return tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.is_file())
