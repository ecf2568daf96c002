"""Functions of batches as graphs: tracing with symbolic sizes, and compiling with Inductor.

The function is traced once, below autograd: what it does with `torch.autograd.grad` (forces, and parameter gradients of a loss
on forces) comes out as ordinary operations, so nothing differentiates the graph afterwards. The graph goes to Inductor's inner
compiler as it is: `torch.compile` would trace it twice again, by Dynamo and by AOTAutograd, and would refuse double backward.
"""

import contextlib
import itertools
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy  # type: ignore[import-untyped]
import torch
import torch._inductor.config as inductor_config
import torch.compiler.config as compiler_config
import torch.fx.experimental._config as symbolic_config
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._functorch.compile_utils import fx_graph_cse
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.dependencies import StarDep, WeakDep
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.scheduler import SchedulerNode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import (
    SYMPY_INTERP,
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
)
from torch.utils._ordered_set import OrderedSet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy.printers import PythonPrinter

from ddpkit.compile import cache, digest
from ddpkit.compile.kernels import compiled_together, look_at_the_processor
from ddpkit.compile.layout import Layout, TensorLeaf
from ddpkit.compile.lines import calling_line, failing_line, last_line
from ddpkit.compile.script import as_python, remedy
from ddpkit.errors import InputError

# On a CPU, Inductor would compute what is gathered anew at every place it is gathered to, one number at a time: NequIP's
# compiled step was slower than the eager one. Stored first, it is a fast loop of its own, and there is less code to compile.
_ON_CPU = {"realize_opcount_threshold": 1, "realize_reads_threshold": 1}
# With symbolic sizes, Triton kernels whose loops were reordered may fail to split (CantSplit, pytorch issue 183696).
_ON_GPU = {"loop_ordering_after_fusion": False}

# Takes a batch and tensors that are not part of it, such as parameters; may write into the latter.
Function = Callable[..., Sequence[Tensor | None]]


class _Questions(ShapeEnv):  # type: ignore[misc]
    """Notes for each condition on sizes which line of the model asked for it.

    Attributes:
        lines: by place in `guards`; what torch itself asked for is not in it.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.lines: dict[int, str] = {}

    def evaluate_expr(self, *arguments: Any, **options: Any) -> Any:
        before = len(self.guards)
        answer = super().evaluate_expr(*arguments, **options)
        if len(self.guards) > before and (line := calling_line()) is not None:
            self.lines |= dict.fromkeys(range(before, len(self.guards)), line)
        return answer


class Symbols:
    """Symbolic sizes, and fake tensors that have them.

    Args:
        layout: names the sizes.
        sizes: of the batch at hand; generated code is tuned for them.
        fixed: sizes that are something else.
    """

    def __init__(self, layout: Layout, sizes: Mapping[str, int], fixed: set[int]) -> None:
        self.env = _Questions(specialize_zero_one=False, duck_shape=False)
        self.fake = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self.sizes: dict[str, Any] = {}
        self.symbols: dict[str, sympy.Symbol] = {}
        hints = distinct(sizes, fixed) if layout.is_known else sizes
        for number, (name, hint) in enumerate(hints.items()):
            source = ConstantSource(f"size_{number}")  # ranks that name the same size otherwise generate the same code
            symbol = self.env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
            self.symbols[name] = symbol  # type: ignore[assignment]
            self.sizes[name] = self.env.create_symintnode(symbol, hint=hint, source=source)
        with self.fake:
            self.leaves = [
                torch.empty(
                    [self.sizes[d] if isinstance(d, str) else d for d in leaf.dims],
                    dtype=leaf.dtype,
                    device=leaf.device,
                )  # type: ignore[call-overload]
                for leaf in layout.leaves
                if isinstance(leaf, TensorLeaf)
            ]

    def like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Fake tensors of the same fixed shapes, strides, dtypes and devices."""
        with self.fake:
            return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in tensors]


def distinct(sizes: Mapping[str, int], fixed: set[int]) -> dict[str, int]:
    """Sizes near the given ones, none the same as another, or as one that is fixed, or smaller than 5."""
    hints: dict[str, int] = {}
    for name, size in sizes.items():
        hint = max(size, 5)
        while hint in fixed or hint in hints.values():
            hint += 1
        hints[name] = hint
    return hints


@contextlib.contextmanager
def size_oblivious() -> Iterator[None]:
    """While tracing, a size that may be 1 is not asked whether it is."""
    patched = symbolic_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with patched, torch.autograd.set_multithreading_enabled(False):
        yield


@dataclass
class Traced:
    """A graph of `sizes, leaves of the batch, fixed tensors` (and `tangents`) -> outputs.

    Attributes:
        graph: the graph.
        symbols: what its sizes are.
        inputs: the fake tensors and symbolic sizes it was traced with.
        outputs: the fake outputs, None where the function returned None.
    """

    graph: fx.GraphModule
    symbols: Symbols
    inputs: list[Any]
    outputs: list[Tensor | None]


def trace(
    function: Function,
    layout: Layout,
    sizes: Mapping[str, int],
    fixed: Sequence[Tensor],
    tangents: Callable[[Symbols], Sequence[Tensor]] | None = None,
) -> Traced:
    """Traces `function(batch, fixed)`, or with tangents `function(batch, fixed, tangents)`.

    Args:
        function: returns tensors and Nones; may change tensors of `fixed` in place, but not those of the batch.
        layout: the form of batches.
        sizes: of the batch at hand.
        fixed: tensors of fixed shape.
        tangents: makes fake tensors that are given as a third argument.

    Raises:
        InputError: what the function does cannot be written as a graph; the message names its line.
    """
    symbols = Symbols(layout, sizes, {size for tensor in fixed for size in tensor.shape})
    fake_fixed = symbols.like(fixed)
    primals = [*symbols.sizes.values(), *symbols.leaves, *fake_fixed]
    first_leaf, first_fixed = len(symbols.sizes), len(symbols.sizes) + len(symbols.leaves)
    present: list[bool] = []

    def flat(primals: list[Any], tangents: list[Tensor]) -> list[Tensor]:
        with _Draws(), FunctionalTensorMode():
            inner = [_functional(x) for x in primals]
            inner_tangents = [_functional(x) for x in tangents]
            batch = layout.fill(dict(zip(symbols.sizes, inner, strict=False)), inner[first_leaf:first_fixed])
            arguments = (batch, inner[first_fixed:]) if not tangents else (batch, inner[first_fixed:], inner_tangents)
            outputs = function(*arguments)
            results = [None if x is None else _plain(x) for x in outputs]
            changed = {n: _plain(x) for n, x in enumerate(inner) if isinstance(x, Tensor) and is_changed(x)}
        for n, value in changed.items():
            if n < first_fixed:
                raise InputError("The model changes its batch in place: let it work on copies.")
            primals[n].copy_(value)
        present[:] = [x is not None for x in results]
        return [x for x in results if x is not None]

    cache.make_ready()
    if not any(tensor.is_cuda for tensor in fixed):
        look_at_the_processor()
    with _saying_what_cannot_be_traced(symbols):
        fake_tangents = [] if tangents is None else list(tangents(symbols))
        through = make_fx(flat, decomposition_table=select_decomp_table(), tracing_mode="real")
        with size_oblivious(), symbols.fake, enable_python_dispatcher():
            graph = through(primals, fake_tangents)
    graph = fx.GraphModule(graph, fx_graph_cse(graph.graph))
    graph.graph.eliminate_dead_code()
    _refuse_random_numbers(graph)
    values = iter([node.meta["val"] for node in output_of(graph).args[0]])  # type: ignore[union-attr]
    return Traced(graph, symbols, [*primals, *fake_tangents], [next(values) if there else None for there in present])


@contextlib.contextmanager
def _saying_what_cannot_be_traced(symbols: Symbols) -> Iterator[None]:
    """Turns a question about values, TorchScript that takes sizes for fixed ones, and what else fails into one sentence."""
    with as_python() as scripts:
        try:
            yield
        except InputError:
            raise
        except (
            DataDependentOutputException,
            DynamicOutputShapeException,
            GuardOnDataDependentSymNode,
            torch.jit.Error,
        ) as error:
            if scripts:
                raise InputError(f"The model cannot be compiled: {remedy(scripts)}.") from error
            asked = getattr(error, "func", None) or str(error).split("\n", 1)[0]
            raise InputError(
                f"The model cannot be compiled: what it does depends on the values of tensors ({failing_line(error) or asked}): "
                "leave out .item(), comparisons that Python looks at and boolean indexing, or train with compile=False."
            ) from error
        except Exception as error:
            line = failing_line(error)
            if line is None:
                raise
            what = str(error).split("\n", 1)[0]
            raise InputError(
                f"The model cannot be compiled: {line} fails where sizes are symbols and tensors have no values "
                f"({type(error).__name__}: {what}): change that line, or train with compile=False."
            ) from error
    if scripts and any(size.is_number for size in symbols.env.replacements.values()):
        raise InputError(f"The model cannot be compiled for batches of other sizes than the first: {remedy(scripts)}.")


class _Draws(TorchDispatchMode):
    """While tracing, notes at operations that draw random numbers which line of the model, or which module, calls them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mode = get_proxy_mode() if torch.Tag.nondeterministic_seeded in func.tags else None
        if mode is None:
            return func(*args, **(kwargs or {}))
        nodes = mode.tracer.graph.nodes
        before = len(nodes)
        result = func(*args, **(kwargs or {}))
        for node in itertools.islice(reversed(nodes), len(nodes) - before):  # what it is decomposed into
            node.meta[_DRAWN] = f"{func.overloadpacket.__name__} at {last_line() or 'a line unknown'}"
        return result


_DRAWN = "ddpkit_drawn"  # in a node's meta: what drew, and where


def _refuse_random_numbers(graph: fx.GraphModule) -> None:
    """Looks for random numbers that something is made of.

    Raises:
        InputError: names the operation and the line.
    """
    used: set[fx.Node] = set()
    for node in reversed(graph.graph.nodes):  # torch keeps operations that draw, whatever becomes of their results
        if node.op == "output" or node in used or (node.op == "call_function" and node.target in _WRITES):
            used.update(node.all_input_nodes)
    drawing = [node for node in graph.graph.nodes if node in used and _draws(node)]
    if not drawing:
        return
    raise InputError(
        f"The model cannot be compiled: it draws random numbers ({drawing[0].meta.get(_DRAWN, drawing[0].name)}), which compiled "
        "code would draw otherwise than eager code: leave dropout and noise out (p=0), draw them outside and hand them over in "
        "the batch, or train with compile=False."
    )


_WRITES = {torch.ops.aten.copy_.default}  # what is changed in place is used


def _draws(node: fx.Node) -> bool:
    """Whether an operation draws random numbers; some do only where a probability or a flag among their arguments says so."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:  # noqa: SLF001
        return False
    names = [argument.name for argument in node.target._schema.arguments]  # noqa: SLF001  (no public way)
    given = {a.name: a.default_value for a in node.target._schema.arguments if a.has_default_value()}  # noqa: SLF001
    given |= dict(zip(names, node.args, strict=False)) | node.kwargs
    return all(given.get(name, True) not in (0, False) for name in ("p", "dropout_p", "train", "training"))


def _functional(x: Any) -> Any:
    return FunctionalTensor.to_functional(x) if isinstance(x, Tensor) else x


def _plain(x: Any) -> Any:
    if not isinstance(x, FunctionalTensor):
        return x  # a constant of the model
    return x.from_functional()


def is_changed(x: Tensor) -> bool:
    """Whether a tensor that a traced function was given has been changed in place."""
    assert isinstance(x, FunctionalTensor)
    return bool(torch._functionalize_has_data_mutation(x.elem))  # type: ignore[attr-defined]  # noqa: SLF001


def output_of(graph: fx.GraphModule) -> fx.Node:
    """The node that lists a graph's outputs."""
    return graph.graph.output_node()


Kernel = Callable[[list[Any]], Sequence[Any]]  # empties the list of inputs


class Interpreted:
    """Runs a traced graph operation by operation, as eager code would: what the trace changes, without the compiler.

    Args:
        graph: the graph.

    Attributes:
        output_strides: that the outputs were traced with.
    """

    enabled: ClassVar[bool] = False  # whether `lower` makes these, in this process

    def __init__(self, graph: fx.GraphModule) -> None:
        self._module = _copy(graph)
        values = [getattr(node, "meta", {}).get("val") for node in output_of(graph).args[0]]  # type: ignore[union-attr]
        self.output_strides = [v.stride() if isinstance(v, Tensor) else None for v in values]

    def __call__(self, inputs: list[Any]) -> Sequence[Any]:
        """Empties the list of inputs, as compiled code does."""
        given = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
        inputs.clear()
        with torch.no_grad():
            return self._module(*given)  # type: ignore[no-any-return]


def lower(
    graph: fx.GraphModule,
    symbols: Symbols,
    inputs: Sequence[Any],
    fixed: Sequence[int],
    *,
    backward: bool = False,
    inference: bool = True,
) -> Kernel:
    """Compiles a graph with Inductor, or takes it from Inductor's cache on disk; `Interpreted` where that is enabled.

    Args:
        graph: what to compile.
        symbols: its sizes.
        inputs: fake inputs.
        fixed: places of inputs whose memory stays where it is.
        backward: whether this is the second half of a function.
        inference: whether nothing is kept for a second half.
    """
    on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in inputs)
    patched = inductor_config.patch(_ON_GPU if on_gpu else _ON_CPU)
    with size_oblivious(), tracing(TracingContext(symbols.fake)), patched, _order_kept(), compiled_together():
        if inference:
            joint_graph_passes(graph)
        output = output_of(graph)
        # outputs keep the strides they were traced with
        output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))  # type: ignore[arg-type]
        if Interpreted.enabled:
            return Interpreted(graph)

        def compiled() -> Kernel:
            with cache.sealing():
                return compile_fx_inner(  # type: ignore[return-value]
                    _copy(graph),
                    list(inputs),
                    static_input_idxs=list(fixed),
                    is_backward=backward,
                    is_inference=inference,
                )

        kernel = _whatever_the_cache_holds(compiled)
        digest.note(kernel)
        return kernel


def _whatever_the_cache_holds(compiled: Callable[[], Kernel]) -> Kernel:
    """Compiles again without damaged files of the cache, and then without the cache, where the reason may lie in it."""
    cache.make_ready()
    try:
        return compiled()
    except Exception as error:  # noqa: BLE001  (what a damaged file leads to may be anything)
        first = error
    try:
        if cache.mend():
            return compiled()
        with cache.afresh():
            kernel = compiled()
    except Exception:  # noqa: BLE001  (the first one tells more)
        raise first from None
    warnings.warn(
        f"The compiler's cache in {os.environ['TORCHINDUCTOR_CACHE_DIR']} could not be used ({type(first).__name__}: "
        f"{' '.join(str(first).split())[:200]}), and the code was compiled without it: remove that folder.",
        stacklevel=2,
    )
    return kernel


@contextlib.contextmanager
def _order_kept() -> Iterator[None]:
    """While compiling, a loop that is rewritten to fit another one still waits for what changes its inputs in place.

    Torch up to 2.13 forgets that, and a sum of scattered values (`nn.Embedding`'s gradient) was read before anything had been
    added to it (pytorch issues 185509 and 177631).
    """
    rewrite = SchedulerNode.recompute_size_and_body

    def rewrite_in_order(node: SchedulerNode, *arguments: Any, **options: Any) -> None:
        after = [dep for dep in node.read_writes.reads if isinstance(dep, StarDep | WeakDep)]
        rewrite(node, *arguments, **options)
        node.set_read_writes(node.read_writes.with_read(OrderedSet(after)).rename(node.mutation_renames))

    tag = compiler_config.cache_key_tag + " in order"  # apart from what was compiled without
    SchedulerNode.recompute_size_and_body = rewrite_in_order  # type: ignore[assignment, method-assign]
    try:
        with compiler_config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
            yield
    finally:
        SchedulerNode.recompute_size_and_body = rewrite  # type: ignore[method-assign]


def strides_of(kernel: Kernel, symbols: Symbols) -> list[tuple[Any, ...] | None]:
    """The strides that each output of a compiled graph really has, as symbolic sizes; None for outputs that are no tensors."""
    found = kernel.output_strides  # type: ignore[attr-defined]  # Inductor's own
    if isinstance(kernel, Interpreted):
        return list(found)
    return [None if one is None else tuple(symbols.env.deserialize_symexpr(x) for x in one) for one in found]


def _copy(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy to compile, which rewrites what it is given."""
    nodes = fx.Graph()
    output = nodes.output(nodes.graph_copy(graph.graph, {}))
    output.meta = dict(output_of(graph).meta)
    return fx.GraphModule(graph, nodes)


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
        for number, guard in enumerate(symbols.env.guards):
            symbol = _asks_for_one(guard.expr)
            if symbol is not None and symbol in names:
                self.not_one.add(names[symbol])
            else:
                if number in symbols.env.lines:
                    self._lines[len(tests)] = symbols.env.lines[number]
                tests.append(guard.expr)
        tests += [
            sympy.Eq(symbol, symbols.env.replacements[symbol]) for symbol in names if symbol in symbols.env.replacements
        ]
        self.text = [PythonPrinter().doprint(test) for test in tests]  # type: ignore[no-untyped-call]
        self._arguments = ", ".join(str(symbol) for symbol in names)
        self._test = self._function(" and ".join(f"({test})" for test in self.text) or "True")
        self._names = list(names.values())

    def _function(self, expression: str) -> Callable[..., Any]:
        """A function of the sizes."""
        return eval(f"lambda {self._arguments}: {expression}", dict(SYMPY_INTERP))  # type: ignore[no-any-return]  # noqa: S307  (printed by sympy from our own symbols)

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
        return bool(self._test(*values))

    def broken_at(self, sizes: Mapping[str, int]) -> str | None:
        """The line of the model that fixed or compared a size, so that the graph does not hold for these; None if none did.

        Args:
            sizes: by name.
        """
        values = [sizes[name] for name in self._names]
        return next((line for n, line in self._lines.items() if not self._function(self.text[n])(*values)), None)


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
