"""What a digest of objects and code tells apart, and what it does not."""

import functools
import threading
import types

import numpy as np
import pytest
import torch
from torch import nn

from ddpkit.compile.identity import UnknownError, digest

CONSTANT = 1.0


def of(value, inputs=()):
    return digest({"value": value}, inputs, ())


def function(source, **names):
    """What a line of code makes `f`; its global variables are `names`."""
    space = {"__name__": "__main__", **names}
    exec(compile(source, "user.py", "exec"), space)  # noqa: S102
    return space["f"]


def closing_over(value):
    return lambda x: x * value


def with_default(value):
    def f(x, y=value):
        return x * y

    return f


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


SAME = {
    "numbers": (lambda: 1.0, lambda: 1.0),
    "closures": (lambda: closing_over(2), lambda: closing_over(2)),
    "modules": (lambda: nn.Linear(2, 3), lambda: nn.Linear(2, 3)),
    "code": (lambda: function("f = lambda x: x + y", y=1), lambda: function("f = lambda x: x + y", y=1)),
    "names that no code reads": (
        lambda: function("f = lambda x: x + y", y=1, z=1), lambda: function("f = lambda x: x + y", y=1, z=2),
    ),
    "sets": (lambda: {"a", "b", "c"}, lambda: {"c", "b", "a"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_the_same(name):
    one, two = SAME[name]
    if name == "modules":
        one, two = one(), two()
        assert of(one, one.parameters()) == of(two, two.parameters())
    else:
        assert of(one()) == of(two())


OTHER = {
    "types": (1, 1.0),
    "signs of zero": (0.0, -0.0),
    "flags": (True, 1),
    "orders": ([1, 2], [2, 1]),
    "nesting": ([[1], 2], [[1, 2]]),
    "keys": ({"a": 1}, {"b": 1}),
    "aliases": ((x := [1], x), ([1], [1])),
    "closures": (closing_over(2), closing_over(3)),
    "defaults": (with_default(2), with_default(3)),
    "partials": (functools.partial(max, 1), functools.partial(max, 2)),
    "constants in code": (function("f = lambda x: x + 1"), function("f = lambda x: x + 2")),
    "types of constants": (function("f = lambda x: x + 1"), function("f = lambda x: x + 1.0")),
    "operations": (function("f = lambda x: x + 1"), function("f = lambda x: x - 1")),
    "attributes": (function("f = lambda x: x.sin()"), function("f = lambda x: x.cos()")),
    "lines": (function("f = lambda x: x"), function("\nf = lambda x: x")),
    "global variables": (function("f = lambda x: x + y", y=1), function("f = lambda x: x + y", y=2)),
    "functions of functions": (
        function("f = lambda x: (lambda: y)()", y=1),
        function("f = lambda x: (lambda: y)()", y=2),
    ),
    "variables of modules": (
        function("f = lambda x: settings.y", settings=types.SimpleNamespace(y=1)),
        function("f = lambda x: settings.y", settings=types.SimpleNamespace(y=2)),
    ),
    "slots": (Slotted(1), Slotted(2)),
    "arrays": (np.array([1.0]), np.array([2.0])),
    "tensors": (torch.tensor([1.0]), torch.tensor([2.0])),
    "dtypes": (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64)),
    "modules of torch": (nn.Dropout(0.1), nn.Dropout(0.2)),
    "modes": (nn.Linear(2, 2).train(), nn.Linear(2, 2).eval()),
}


@pytest.mark.parametrize("name", OTHER)
def test_others(name):
    one, two = OTHER[name]
    inputs = [p for x in (one, two) if isinstance(x, nn.Module) for p in x.parameters()]
    assert of(one, inputs) != of(two, inputs)


def test_a_module_counts_by_what_code_reads_of_it():
    module = types.ModuleType("users")
    module.__dict__.update(a=1, b=1, inner=types.ModuleType("users.inner"))
    module.inner.c = 1
    f = function("f = lambda x: x + users.a + users.inner.c", users=module)
    before = of(f)
    module.b = 2
    assert of(f) == before
    module.inner.c = 2
    changed = of(f)
    assert changed != before
    module.a = 2
    assert of(f) not in (before, changed)


def test_of_inputs_the_form_counts_and_which_they_are():
    a, b = torch.zeros(3), torch.ones(3)
    assert of([a, a], [a, b]) == of([b, b], [b, a])
    assert of([a, b], [a, b]) != of([a, a], [a, b])
    assert of([a], [a]) != of([torch.zeros(4)], [a])


def test_a_decorated_method_is_looked_through():
    def decorated(factor):
        class Model(nn.Module):
            @torch.no_grad()
            def forward(self, x):
                return x * factor

        return Model()

    assert of(decorated(1.0)) == of(decorated(1.0))
    assert of(decorated(1.0)) != of(decorated(2.0))


def test_custom_operators_count_by_their_functions():
    def operator(factor):
        @torch.library.custom_op("ddpkit_tests::scaled", mutates_args=())
        def scaled(x: torch.Tensor) -> torch.Tensor:
            return x * factor

        @scaled.register_fake
        def _(x):
            return torch.empty_like(x)

        return scaled

    assert of(operator(1.0)) != of(operator(2.0))


@pytest.mark.parametrize(
    "value",
    [
        threading.Lock(),
        (x for x in ()),
        torch.jit.trace(nn.Linear(1, 1), torch.zeros(1, 1)),
        function("f = lambda x: eval('x')"),
        function("f = lambda x: getattr(users, x)", users=types.ModuleType("users")),
        np.array([object()]),
        {object(), object()},
    ],
    ids=lambda value: type(value).__name__,
)
def test_refused(value):
    with pytest.raises(UnknownError):
        of(value)
