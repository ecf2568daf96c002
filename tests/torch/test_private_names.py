"""Private names of torch stand in two modules, which know what becomes of it where torch lacks them."""

import ast
import operator
import re
import subprocess
import sys
import tomllib
import types
import warnings
from pathlib import Path
from unittest import mock

import pytest
import sympy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Max, Min, Mod, PythonMod
from torch.utils._sympy.printers import PythonPrinter

from ddpkit import torch_private
from ddpkit.compile import backend, inductor
from ddpkit.compile.conditions import _function
from ddpkit.compile.public import Public
from ddpkit.errors import InputError
from ddpkit.ranks.switches import deterministic_algorithms

ROOT = Path(__file__).parents[2]
HOMES = {"ddpkit/torch_private.py", "ddpkit/compile/inductor.py"}
# torch's documentation lists it, unlike the rest of torch.fx.experimental
DOCUMENTED = "torch.fx.experimental.proxy_tensor"
CLASSES = (torch.Tensor, nn.Module, torch.optim.Optimizer, nn.parallel.DistributedDataParallel, fx.Node, fx.Graph,
           fx.GraphModule, torch.distributed.ProcessGroup, torch.distributed.Store, types.ModuleType)  # fmt: skip
FUSED = torch.optim.SGD([nn.Parameter(torch.zeros(1))], fused=True)
INSTANCES = (nn.Module(), torch.ops.aten.add.Tensor, torch.ops, FUSED)
PRIVATE = {name for home in (*CLASSES, *INSTANCES) for name in dir(home) if re.match(r"_[a-z]", name)}
PRIVATE |= {name for name in dir(torch) if name.startswith("_foreach")}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_uses(tree):
    """Where a module names something private of torch: lines and names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            home = getattr(node, "module", None)
            for alias in node.names:
                path = f"{home}.{alias.name}" if home else alias.name
                hidden = any(map(is_private, path.split(".")))
                experimental = path.startswith("torch.fx.experimental") and not path.startswith(DOCUMENTED)
                if path.split(".")[0] == "torch" and (hidden or experimental):
                    yield node.lineno, path
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            owner = root.id if isinstance(root, ast.Name) else ""
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if owner in ("torch", "dist", "fx", "nn", "F") or (node.attr in PRIVATE and not is_own):
                yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and "attr" in getattr(node.func, "id", getattr(node.func, "attr", "")):
            for argument in node.args:
                if isinstance(argument, ast.Constant) and argument.value in PRIVATE:
                    yield node.lineno, argument.value


def test_they_stand_in_two_modules():
    places = [path for room in ("ddpkit", "models", "experiments", "analysis") for path in (ROOT / room).rglob("*.py")]
    assert len(places) > 100
    uses = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in places
        if str(path.relative_to(ROOT)) not in HOMES
        for line, name in private_uses(ast.parse(path.read_text()))
    ]
    assert uses == []


@pytest.mark.parametrize(
    "code",
    [
        "import torch._inductor.config as c", "from torch.utils import _pytree", "torch._C._len()", "p.grad._version",
        "from torch._guards import tracing", "dist.distributed_c10d._get_default_store()", "m._parameters",
        "torch._foreach_add_(a, b)", "getattr(x, '_version')", "operator.attrgetter('_version')", "node.target._schema",
        "from torch.fx.experimental.symbolic_shapes import ShapeEnv", "wrapper._get_ddp_logging_data()",
        "getattr(optimizer, '_step_supports_amp_scaling', False)",
    ],
)  # fmt: skip
def test_the_search_knows_them(code):
    assert list(private_uses(ast.parse(code)))


def test_what_is_public_or_ours_is_left_alone():
    for code in (
        "self._modules",
        "torch.__version__",
        f"from {DOCUMENTED} import make_fx",
        "x.__dict__",
        "sys._getframe()",
    ):
        assert not list(private_uses(ast.parse(code)))


tried = pytest.mark.skipif(
    not torch_private.is_tested(),
    reason=f"torch {torch.__version__} is not among the releases tried: the public way serves",
)


@tried
def test_this_release_is_as_it_was_tried():
    assert inductor.unlike() == []
    assert torch_private.is_tested()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend._inductor.cache_clear()
        assert isinstance(backend.backend(), inductor.Inductor)


def test_the_range_begins_where_the_package_does():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "torch>=" + ".".join(map(str, torch_private.TESTED[0])) in project["dependencies"]


def test_the_documents_name_the_range():
    first, last = (".".join(map(str, version)) for version in torch_private.TESTED)
    assert f"torch {first} to {last} |" in (ROOT / "docs/explanation/torch.md").read_text()
    assert f"tried up to {last} (docs/explanation/torch.md)" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(("version", "tested"), [
    ("2.10.9", False), ("2.11.0", True), ("2.13.0+cpu", True), ("2.14.1+cu130", True), ("2.15.0a0+git12", False),
    ("3.0", False),
])  # fmt: skip
def test_versions_are_compared_by_their_numbers(version, tested):
    assert torch_private.is_tested(version) is tested


@pytest.fixture
def _asked_anew():
    backend._inductor.cache_clear()
    yield
    backend._inductor.cache_clear()


@pytest.mark.usefixtures("_asked_anew")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (mock.patch.object(backend, "is_tested", return_value=False), "is not among the releases"),
        (mock.patch.object(inductor, "unlike", return_value=["make_fx(tracing_mode)"]), r"\(make_fx\(tracing_mode\)\)"),
        (mock.patch.dict(sys.modules, {"ddpkit.compile.inductor": None}), "lacks what this needs of its compiler"),
    ],
)
def test_otherwise_the_public_way_serves_with_one_warning(change, says):
    tested = mock.patch.object(backend, "is_tested", return_value=True)
    with tested, change, pytest.warns(UserWarning, match=says) as told:
        chosen = [backend.backend() for _ in range(3)]
    assert len(told) == 1
    assert all(isinstance(one, Public) for one in chosen)


def test_another_signature_is_noticed(monkeypatch):
    monkeypatch.setattr(inductor, "_TAKES", [*inductor._TAKES, (lambda x: x, ("x", "of_tomorrow"))])
    assert inductor.unlike() == ["test_another_signature_is_noticed.<locals>.<lambda>(x, of_tomorrow)"]


@pytest.mark.usefixtures("_asked_anew")
@pytest.mark.skipif(torch_private.is_tested(), reason="this release is among those tried")
def test_a_release_that_was_not_tried_is_served_the_public_way_with_one_warning():
    with pytest.warns(UserWarning, match="is not among the releases") as told:
        chosen = [backend.backend() for _ in range(3)]
    assert len(told) == 1
    assert all(isinstance(one, Public) for one in chosen)


@tried
def test_the_compiler_is_loaded_where_warnings_are_errors():
    program = "from ddpkit.compile.backend import backend; print(type(backend()).__name__)"
    command = [sys.executable, "-W", "error::DeprecationWarning", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "Inductor\n", done.stderr


def test_missing_names_are_told_when_loaded_and_done_without():
    program = """
import warnings, torch, torch.distributed
del torch._foreach_copy_, torch._foreach_norm, torch._foreach_lerp_
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    from ddpkit.torch_private import copy_all, lerp_all, norms_of
x, y = [torch.zeros(3), torch.zeros(2)], [torch.ones(3), torch.ones(2)]
copy_all(x, y)
assert [float(n) for n in norms_of(x, 1)] == [3, 2]
lerp_all(x, [torch.zeros(3), torch.zeros(2)], 0.25)
assert [float(n) for n in norms_of(x, 1)] == [2.25, 1.5]
print([str(w.message).split(":")[0] for w in told])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert [done.stdout.count(f"has no _foreach_{name}") for name in ("copy_", "lerp_", "norm")] == [1, 1, 1]


def test_without_collectives_inside_graphs_another_strategy_is_named():
    with (
        mock.patch.object(torch.ops, "_c10d_functional", types.SimpleNamespace()),
        pytest.raises(InputError, match="choose strategy=custom"),
    ):
        torch_private.functional_collectives()


m, n = sympy.symbols("m n", integer=True, positive=True)
DIVISORS = st.sampled_from([m, n, sympy.Integer(2), sympy.Integer(3)])
EXPRESSIONS = st.recursive(
    st.one_of(DIVISORS, st.just(sympy.Integer(1))),
    lambda inner: st.one_of(
        st.builds(lambda f, a, b: f(a, b), st.sampled_from([operator.add, operator.mul, Max, Min]), inner, inner),
        st.builds(lambda f, a, b: f(a, b), st.sampled_from([FloorDiv, CleanDiv, Mod, PythonMod]), inner, DIVISORS),
    ),
    max_leaves=5,
)
RELATIONS = st.sampled_from([sympy.Eq, sympy.Ne, sympy.Le, sympy.Lt])


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(EXPRESSIONS, EXPRESSIONS, RELATIONS, st.integers(2, 9))
def test_conditions_are_computed_as_torch_prints_them(left, right, relation, size):
    test = relation(left, right)
    printed = PythonPrinter().doprint(test)
    sizes = (size, size + 3)
    expected = eval(f"lambda m, n: {printed}", dict(SYMPY_INTERP))(*sizes)  # noqa: S307
    assert bool(_function([m, n], [test])(*sizes)[0]) == bool(expected)


def test_reductions_have_one_variant_where_algorithms_are_deterministic():
    """Which of two is faster depends on what else a GPU does, and their last bits differ."""
    told = {}
    for wanted in (False, True):
        with deterministic_algorithms(wanted=wanted):
            told[wanted] = inductor._settings(on_gpu=True)
    assert told[True] == told[False] | {"dynamic_scale_rblock": False}
    assert "dynamic_scale_rblock" not in told[False]
