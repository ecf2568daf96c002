"""The public way: graphs traced by `make_fx` and compiled by `torch.compile`, without private names of torch.

It serves for releases of torch that the private one is untried with. It is slower to compile and to run: sizes of 1 and sizes
that happen to be the same are code of their own, the derivative of a model's forces computes the model once more, and nothing is
compiled before the first batch comes. Mends of torch's own faults are not part of it; the parity check is.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from ddpkit.compile.backend import (
    CHANGES_BATCH,
    Backend,
    Function,
    Kernel,
    Source,
    Symbols,
    Tangents,
    Traced,
    copied,
    copy_of,
    distinct,
    output_of,
)
from ddpkit.compile.layout import Layout, TensorLeaf
from ddpkit.compile.lines import model_line
from ddpkit.errors import InputError
from ddpkit.torch_private import pytree, version_of

_EMPTY = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default)


class TracedSymbols(Symbols):
    """Symbolic sizes that `make_fx` makes of integers; there are none before it traces."""

    def __init__(self, layout: Layout, sizes: Mapping[str, int], fixed: set[int]) -> None:
        self._layout = layout
        self.hints = distinct(sizes, fixed) if layout.is_known else dict(sizes)
        self.sizes, self.symbols, self.leaves = {}, {}, []
        self._tests: list[sympy.Basic] = []
        self._environment: Any = None

    def fill(self, sizes: Sequence[Any]) -> None:
        """Takes symbolic sizes, in the order of `hints`."""
        self.sizes = dict(zip(self.hints, sizes, strict=True))
        for name, size in self.sizes.items():
            symbol = sympy.Symbol(f"size_{len(self.symbols)}", integer=True)
            if isinstance(size, int):  # torch makes no symbols for 0 and 1
                self._tests.append(sympy.Eq(symbol, size))
            elif size.node.expr in self.symbols.values():  # and one for integers that are the same
                self._tests.append(sympy.Eq(symbol, size.node.expr))
            else:
                symbol, self._environment = size.node.expr, size.node.shape_env
                assert size >= 2  # which shortens all that is derived from it
            self.symbols[name] = symbol
        self.leaves = [
            torch.empty(
                [self.sizes[d] if isinstance(d, str) else d for d in leaf.dims], dtype=leaf.dtype, device=leaf.device
            )  # type: ignore[call-overload]
            for leaf in self._layout.leaves
            if isinstance(leaf, TensorLeaf)
        ]

    def like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in tensors]

    def without_values(self) -> AbstractContextManager[Any]:
        return nullcontext()  # what is traced has none

    def conditions(self) -> list[tuple[sympy.Basic, str | None]]:
        if self._environment is None:
            return [(test, None) for test in self._tests]
        replaced = self._environment.replacements
        tests = [*self._tests, *(sympy.Eq(s, replaced[s]) for s in self.symbols.values() if s in replaced)]
        return [(guard.expr, _line(guard)) for guard in self._environment.guards] + [(test, None) for test in tests]

    def are_fixed(self) -> bool:
        return self._environment is not None and any(s.is_number for s in self._environment.replacements.values())


def _line(guard: Any) -> str | None:
    """The line of the model that asked for a condition, if torch tells."""
    frame: Any = getattr(getattr(guard, "sloc", None), "framework_loc", None)
    return model_line(frame.filename, frame.lineno) if hasattr(frame, "filename") else None


class _Constants(TorchFunctionMode):
    """While tracing, takes tensors that a model holds besides its state for ones without values.

    Attributes:
        kept: pairs of both, by identity.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, self._without_values, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _without_values(self, x: Tensor) -> Tensor:
        if type(x) not in (Tensor, nn.Parameter):  # what is traced is of another class
            return x
        if id(x) not in self.kept:
            start = x.storage_offset()  # views of a strategy's buckets are asked for it
            extent = 1 + start + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
            memory = torch.empty([max(extent, 0)], dtype=x.dtype, device=x.device)
            self.kept[id(x)] = x, memory.as_strided(x.shape, x.stride(), start)
        return self.kept[id(x)][1]


class _Compiled:
    """Code that `torch.compile` makes when it is called."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.outputs = len(output_of(graph).args[0])  # type: ignore[arg-type]
        self._call = torch.compile(graph, dynamic=True, fullgraph=True)

    def __call__(self, inputs: list[Any]) -> Sequence[Any]:
        given = list(inputs)
        inputs.clear()
        with torch.no_grad():
            return self._call(*given)


class Public(Backend):
    """Inside of what is traced, inputs are made by operations, which then become the graph's placeholders."""

    def symbols(self, layout: Layout, sizes: Mapping[str, int], fixed: Sequence[Tensor]) -> Symbols:
        constant = {d for leaf in layout.leaves if isinstance(leaf, TensorLeaf) for d in leaf.dims if type(d) is int}
        return TracedSymbols(layout, sizes, constant | {size for tensor in fixed for size in tensor.shape})

    def trace(
        self, function: Function, layout: Layout, symbols: Symbols, fixed: Sequence[Tensor], tangents: Tangents | None
    ) -> Traced:
        assert isinstance(symbols, TracedSymbols)
        present: list[bool] = []
        constants = _Constants()
        count = 0

        def flat(*sizes: Any) -> list[Tensor]:
            nonlocal count
            symbols.fill(sizes)
            inputs = symbols.like(fixed)
            with constants:
                given = [] if tangents is None else list(tangents(symbols))
                batch = layout.fill(symbols.sizes, symbols.leaves)
                outputs = function(batch, inputs, *([given] if given else []))
            if any(self.is_changed(x) for x in symbols.leaves):
                raise InputError(CHANGES_BATCH)
            present[:] = [x is not None for x in outputs]
            count = len(given)
            return [*(x for x in outputs if x is not None), *given, *(fake for _, fake in constants.kept.values())]

        with torch.autograd.set_multithreading_enabled(False):
            graph = make_fx(flat, tracing_mode="symbolic")(*symbols.hints.values())
        graph = copy_of(graph)
        results: list[fx.Node] = list(output_of(graph).args[0])  # type: ignore[arg-type]
        first_given = sum(present)
        first_constant = first_given + count
        made = (node for node in graph.graph.nodes if node.op == "call_function" and node.target in _EMPTY)
        _to_placeholders(graph, "primals", list(islice(made, len(symbols.leaves) + len(fixed))))
        _to_placeholders(graph, "tangents", results[first_given:first_constant])
        for n, (node, (real, _)) in enumerate(zip(results[first_constant:], constants.kept.values(), strict=True)):
            graph.register_buffer(f"constant_{n}", real.detach())
            with graph.graph.inserting_before(node):
                _replace(node, graph.graph.get_attr(f"constant_{n}"))
        output_of(graph).args = (list(output_of(graph).args[0][:first_given]),)  # type: ignore[index, arg-type]
        graph.graph.eliminate_dead_code()
        graph.recompile()
        inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        values = iter([node.meta["val"] for node in output_of(graph).args[0]])  # type: ignore[union-attr]
        return Traced(graph, symbols, inputs, [next(values) if is_one else None for is_one in present])

    def is_changed(self, x: Tensor) -> bool:
        return version_of(x) > 0

    def prepare(self, graph: fx.GraphModule, symbols: Symbols, *, inference: bool) -> None:
        """Nothing: `torch.compile` does it."""

    def compile(
        self,
        graph: fx.GraphModule,
        symbols: Symbols,
        inputs: Sequence[Any],
        fixed: Sequence[int],
        *,
        backward: bool,
        inference: bool,
    ) -> Kernel:
        return _Compiled(graph)

    def strides(self, kernel: Kernel, symbols: Symbols) -> list[tuple[Any, ...] | None]:
        assert isinstance(kernel, _Compiled)
        return [None] * kernel.outputs

    def halves(
        self, joint: Traced, kept: int, changed: Collection[int]
    ) -> tuple[fx.GraphModule, fx.GraphModule, list[Source]]:
        """The first half saves its inputs, and the second begins anew."""
        first, second = copy_of(joint.graph), copy_of(joint.graph)
        results = list(output_of(second).args[0])[kept:]  # type: ignore[arg-type]
        output_of(second).args = (results,)
        second.graph.eliminate_dead_code()
        saved: list[fx.Node] = list(output_of(first).args[0])[:kept]  # type: ignore[arg-type]
        sources: list[Source] = []
        inputs = [[n for n in half.graph.nodes if n.op == "placeholder"] for half in (first, second)]
        tangents = [node for node in inputs[0] if "tangents" in node.name]
        for n, (node, twin) in enumerate(zip(*inputs, strict=True)):
            if not twin.users:
                second.graph.erase_node(twin)
            elif node in tangents:
                sources.append(("tangent", tangents.index(node)))
            else:
                sources.append(("saved", len(saved) - kept))
                saved.append(copied(node) if n in changed else node)
        output_of(first).args = (saved,)
        first.graph.eliminate_dead_code()
        for node in tangents:
            first.graph.erase_node(node)
        first.recompile()
        second.recompile()
        return first, second, sources


def _to_placeholders(graph: fx.GraphModule, name: str, nodes: Sequence[fx.Node]) -> None:
    """Makes inputs of nodes, after those that there are."""
    for n, node in enumerate(nodes):
        last = [x for x in graph.graph.nodes if x.op == "placeholder"][-1:]
        with graph.graph.inserting_after(last[0]) if last else graph.graph.inserting_before():
            placeholder = graph.graph.placeholder(f"{name}_{n}")
        _replace(node, placeholder)


def _replace(node: fx.Node, by: fx.Node) -> None:
    by.meta = dict(node.meta)
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)
