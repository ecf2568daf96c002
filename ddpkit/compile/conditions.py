"""For which sizes of a batch a graph holds."""

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
from sympy.core.function import Application  # type: ignore[import-untyped]

from ddpkit.compile.backend import Symbols


class Conditions:
    """For which sizes a graph holds.

    Tracing and code generation note every decision that depends on a size. Whether a size is 1 is only asked to tell whether it
    is broadcast, and code for any other size is right for 1 unless the function itself broadcasts; this is tried before use
    (`ones`).

    Args:
        symbols: after tracing and lowering.

    Attributes:
        not_one: names of sizes that were taken not to be 1.
        ones: those of them for which 1 has been tried and found right.
    """

    def __init__(self, symbols: Symbols) -> None:
        names = {symbol: name for name, symbol in symbols.symbols.items()}
        self.not_one: set[str] = set()
        self.ones: set[str] = set()
        tests: list[sympy.Basic] = []
        self._lines: dict[int, str] = {}  # of the model, by place in the tests
        for test, line in symbols.conditions():
            symbol = _asks_for_one(test)
            if symbol is not None and symbol in names:
                self.not_one.add(names[symbol])
            else:
                if line is not None:
                    self._lines[len(tests)] = line
                tests.append(test)
        self._names = list(names.values())
        self._symbols, self._tests = list(names), tests
        self._test = _function(self._symbols, tests)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_test"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._test = _function(self._symbols, self._tests)

    def hold(self, sizes: Mapping[str, int], ones: Collection[str] = ()) -> bool:
        """Whether the graph may be used for these sizes.

        Args:
            sizes: by name.
            ones: names for which 1 is taken to be right, besides those found so.
        """
        values = [sizes[name] for name in self._names]
        small = [name for name, size in zip(self._names, values, strict=True) if size < 2]
        if any(
            sizes[name] == 0 or (name in self.not_one and name not in self.ones and name not in ones) for name in small
        ):
            return False
        return all(self._test(*values))

    def broken_at(self, sizes: Mapping[str, int]) -> str | None:
        """The line of the model that fixed or compared a size, so that the graph does not hold for these; None if none did.

        Args:
            sizes: by name.
        """
        values = [sizes[name] for name in self._names]
        holds = self._test(*values)
        return next((line for n, line in self._lines.items() if not holds[n]), None)


def _function(symbols: Sequence[sympy.Symbol], tests: Sequence[sympy.Basic]) -> Callable[..., list[Any]]:
    """Tests as a function of plain integers; what torch adds to sympy's functions computes itself, but for what Python has."""
    own = {f.func.__name__: _PYTHON.get(f.func.__name__, f.func) for test in tests for f in test.atoms(Application)}
    return sympy.lambdify(symbols, list(tests), modules=[own, "math"])  # type: ignore[no-any-return]


_PYTHON = {
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Max": max,
    "Min": min,
}


def _asks_for_one(test: sympy.Basic) -> sympy.Basic | None:
    """The symbol s if the test is s != 1, s >= 2 or s > 1."""
    if not isinstance(test, sympy.Ne | sympy.Ge | sympy.Gt | sympy.Le | sympy.Lt):
        return None
    left, right = test.args
    bounds: dict[type, int] = {sympy.Ne: 1, sympy.Ge: 2, sympy.Gt: 1}
    mirrored: dict[type, int] = {sympy.Ne: 1, sympy.Le: 2, sympy.Lt: 1}
    for kind, bound in bounds.items():
        if isinstance(test, kind) and left.is_Symbol and right == bound:
            return left
    for kind, bound in mirrored.items():
        if isinstance(test, kind) and right.is_Symbol and left == bound:
            return right
    return None
