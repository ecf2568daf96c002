"""What a model and its criterion hold as Python state, which tracing bakes into compiled code.

Looked at is what can be reached from model and criterion through attributes, containers, `functools.partial` and bound methods,
and what the classes of those objects hold. Not looked at are closures, globals, containers of more than `_LARGEST` items, and
objects of the standard library, torch and NumPy other than containers, modules, tensors and arrays.
"""

import functools
import operator
import sys
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ddpkit.torch_private import version_of

_SCALARS = (
    bool, int, float, complex, str, bytes, type(None), np.generic, torch.dtype, torch.device, torch.Size,
)  # fmt: skip
_LARGEST = 1000  # items of a container that are looked at one by one
_MOST = 20_000  # objects
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_CLOSED = frozenset({"torch", "numpy", *sys.stdlib_module_names}) - {"types", "__main__"}
_STATE_OF = operator.attrgetter("requires_grad", "dtype", "is_cuda")
_END = (object(),)  # what grows or shrinks before it moves it


class Place(NamedTuple):
    """Where a tensor is held.

    Attributes:
        home: a dict or a list.
        key: of the tensor in it.
        path: the same in words, such as `criterion.weight`.
        tensor: what is there.
    """

    home: Any
    key: Any
    path: str
    tensor: Tensor


class Snapshot:
    """The state of some objects at one moment.

    Args:
        roots: objects by name.
        ignored: paths that are left out.

    Attributes:
        entries: what code depends on, by path: values, and the identity or form of what is no plain value.
        values: the paths of plain values.
        places: of all tensors that can be replaced by others while tracing.
        modules: the modules that are reached through no other module.
        homes: what was looked into, attributes of modules and objects, dicts and lists: path, form of the keys' paths, itself.
        key: the same for two snapshots that the same code holds for.
    """

    def __init__(self, roots: Mapping[str, Any], ignored: frozenset[str] = frozenset()) -> None:
        self.entries: dict[str, Hashable] = {}
        self.values: set[str] = set()
        self.places: list[Place] = []
        self.modules: list[nn.Module] = []
        self.homes: list[tuple[str, str, Any]] = []
        self._ignored = ignored
        self._seen: dict[int, str] = {}
        self._kept: list[Any] = []  # so that nothing else gets the identity of what is known
        self._read: list[Callable[[], Iterable[Any]]] = []
        self._sized: list[Any] = []
        self._constants: list[Tensor] = []
        self._arrays: list[np.ndarray[Any, Any]] = []
        self._classes: set[type] = set()
        self._inside = 0  # so many modules
        for name, root in roots.items():
            self._visit(root, name)
        for kind in self._classes:
            self._visit_class(kind)
        self._read.append(_END.__iter__)
        self._parameters = list(
            {id(p.tensor): p.tensor for p in self.places if isinstance(p.tensor, nn.Parameter)}.values()
        )
        self._objects = [*self._now()]
        self._unnamed = self._state()
        self.key: Hashable = frozenset(self.entries.items()), self._unnamed[1:]

    def stands(self) -> bool:
        """Whether all is as it was. New objects of the same value are taken over."""
        try:
            if self._state() != self._unnamed:
                return False
            if all(map(operator.is_, self._objects, self._now())):
                return True
            now = [*self._now()]
        except (AttributeError, KeyError):
            return False
        if len(now) != len(self._objects) or not all(map(_is_like, self._objects, now)):
            return False
        self._objects = now
        return True

    def changes(self, other: "Snapshot") -> list[str]:
        """The paths at which another snapshot has something else."""
        mine, theirs = self.entries, other.entries
        return [
            path for path in {**mine, **theirs} if path not in mine or path not in theirs or mine[path] != theirs[path]
        ]

    def _now(self) -> Iterator[Any]:
        return chain.from_iterable(map(operator.call, self._read))

    def _state(self) -> tuple[Any, ...]:
        """What does not show in the identity of objects."""
        return (
            [*map(len, self._sized)],
            tuple(map(_STATE_OF, self._parameters)),
            tuple(map(version_of, self._constants)),
            tuple([a.tobytes() for a in self._arrays]),
        )

    # --- looking around -------------------------------------------------------------------------------------------

    def _visit(self, value: Any, path: str, home: Any = None, key: Any = None) -> None:
        """Takes down a value, which lies in `home[key]` where that can be set."""
        if path in self._ignored:
            return
        if isinstance(value, _SCALARS):
            self.entries[path] = _canonical(value)
            self.values.add(path)
        elif isinstance(value, Tensor):
            self._visit_tensor(value, path, home, key)
        elif (first := self._seen.get(id(value))) is not None:
            self.entries[path] = ("as", first)
        elif len(self._kept) >= _MOST:
            self.entries[path] = ("identity", id(value))
        else:
            self._visit_object(value, path)

    def _visit_tensor(self, tensor: Tensor, path: str, home: Any, key: Any) -> None:
        first = self._seen.setdefault(id(tensor), path)
        self._kept.append(tensor)
        if home is None:
            self.entries[path] = ("identity", id(tensor))
            self._constants.append(tensor)
            return
        stride = tensor.stride() if tensor.layout is torch.strided else ()
        self.entries[path] = ("tensor", type(tensor), tuple(tensor.shape), stride, tensor.dtype, tensor.device, first)
        self.places.append(Place(home, key, path, tensor))

    def _visit_object(self, value: Any, path: str) -> None:
        self._kept.append(value)
        if not isinstance(value, tuple | frozenset):  # which may be one object by accident
            self._seen[id(value)] = path
        self.entries[path] = ("object", type(value))
        if isinstance(value, nn.Module):
            self._visit_module(value, path)
        elif isinstance(value, dict):
            self._visit_dict(value, path, "[{!r}]")
        elif isinstance(value, list | tuple | set | frozenset):
            self._visit_sequence(value, path)
        elif isinstance(value, functools.partial):
            for name in ("func", "args", "keywords"):
                self._visit(getattr(value, name), f"{path}.{name}")
        elif isinstance(value, types.MethodType):
            self.entries[path] = ("method", value.__func__)
            self._visit(value.__self__, f"{path}.__self__")
        elif isinstance(value, types.FunctionType) and vars(value):
            self.entries[path] = ("identity", id(value))
            self._visit_dict(vars(value), path, ".{}")
        elif isinstance(value, np.ndarray) and value.dtype != object and value.size <= _LARGEST:
            self._arrays.append(value)
        elif isinstance(value, type | types.FunctionType) or type(value).__module__.partition(".")[0] in _CLOSED:
            self.entries[path] = ("identity", id(value))
        else:
            self._visit_plain(value, path)

    def _visit_module(self, module: nn.Module, path: str) -> None:
        self._classes.add(type(module))
        if not self._inside:
            self.modules.append(module)
        self._inside += 1
        attributes = vars(module)
        self.homes.append((path, ".{}", attributes))
        for name in ("_parameters", "_buffers", "_modules"):
            part = attributes[name]
            if isinstance(part, dict):
                self._visit_dict(part, path, ".{}")
            else:  # of a ScriptModule
                self.homes.append((path, ".{}", part))
                for key, value in part.items():
                    self._visit(value, f"{path}.{key}", part, key)
        for name in _HOOKS:
            if name in attributes:
                self._visit_dict(attributes[name], f"{path}.{name}", "[{}]")
        self._sized.append(attributes)
        self._visit_items(attributes, path, ".{}", _INTERNAL)
        self._inside -= 1

    def _visit_plain(self, value: Any, path: str) -> None:
        """An object of the user's."""
        self._classes.add(type(value))
        if hasattr(value, "__dict__"):
            self._visit_dict(vars(value), path, ".{}")
        named = chain.from_iterable(_names(vars(kind).get("__slots__", ())) for kind in type(value).__mro__)
        if slots := [name for name in named if name not in ("__dict__", "__weakref__") and hasattr(value, name)]:
            self._read.append(functools.partial(operator.attrgetter(*slots, slots[0]), value))
            for name in slots:
                self._visit(getattr(value, name), f"{path}.{name}")

    def _visit_dict(self, value: dict[Any, Any], path: str, form: str) -> None:
        if not 0 < len(value) <= _LARGEST or self._ignored:
            self._sized.append(value)
        if len(value) <= _LARGEST:
            self.homes.append((path, form, value))
            self._visit_items(value, path, form, frozenset())

    def _visit_items(self, value: dict[Any, Any], path: str, form: str, internal: frozenset[str]) -> None:
        paths = {key: path + form.format(key) for key in value if key not in internal}
        paths = {key: where for key, where in paths.items() if where not in self._ignored}
        if len(paths) == len(value) > 0:  # of an empty one the size is looked at
            self._read.append(value.values)
        elif paths:  # the first one twice, because a getter of one thing gives no tuple
            self._read.append(functools.partial(operator.itemgetter(*paths, next(iter(paths))), value))
        for key, where in paths.items():
            self._visit(value[key], where, value, key)

    def _visit_sequence(self, value: Any, path: str) -> None:
        # A subclass of tuple may refuse to tell its length, as e3nn's irreps do; none can change it.
        if isinstance(value, tuple):
            if tuple.__len__(value) > _LARGEST:
                return
        elif len(value) > _LARGEST:
            self._sized.append(value)
            return
        if not isinstance(value, tuple | frozenset):
            self._read.append(value.__iter__)
        home = value if isinstance(value, list) else None
        if home is not None:
            self.homes.append((path, "[{}]", home))
        for n, item in enumerate(sorted(value, key=repr) if isinstance(value, set | frozenset) else value):
            self._visit(item, f"{path}[{n}]", home, n)

    def _visit_class(self, kind: type) -> None:
        """Plain values that classes of the user's hold."""
        for one in kind.__mro__:
            if one.__module__.partition(".")[0] in _CLOSED:
                continue
            held = {k: v for k, v in vars(one).items() if isinstance(v, _SCALARS) and not k.startswith("__")}
            self._sized.append(vars(one))
            if held:
                self._read.append(functools.partial(operator.itemgetter(*held, next(iter(held))), vars(one)))
            for name, value in held.items():
                self.entries[f"{one.__name__}.{name}"] = _canonical(value)
                self.values.add(f"{one.__name__}.{name}")


def _names(slots: str | Iterable[str]) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def _canonical(value: Any) -> Hashable:
    """The same for values that no computation tells apart: 1 and 1.0 differ, zeros of two signs too, a NaN is like another."""
    return type(value), repr(value)


def _is_like(old: Any, new: Any) -> bool:
    """Whether code for the one holds for the other, as far as can be told quickly."""
    if old is new:
        return True
    return type(old) is type(new) and isinstance(old, _SCALARS) and _canonical(old) == _canonical(new)
