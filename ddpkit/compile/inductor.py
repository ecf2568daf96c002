"""Graphs straight to Inductor: what ddpkit uses of the private names of torch's compiler. No other module names any.

`torch.compile` would trace a graph twice again, by Dynamo and by AOTAutograd, with sizes of its own choice, and could not be told
which memory stays where it is. All of this has been tried with the releases in `ddpkit.torch_private.TESTED`; for others, and
where `unlike` finds that something is missing or takes other arguments, `ddpkit.compile.public` serves.

- `ShapeEnv`, `ConstantSource`, `DimDynamic`, `FakeTensorMode`, `backed_size_oblivious`: sizes that are symbols, also where they
  are 1 or two of them are the same, and the line of a model that asks for them.
- `FunctionalTensor`, `FunctionalTensorMode`, `_functionalize_has_data_mutation`: what is changed in place, and graphs without it.
- `enable_python_dispatcher`, `select_decomp_table`, `fx_graph_cse`: the trace as AOTAutograd makes it.
- `TorchDispatchMode`: the line of a model that draws random numbers.
- `joint_graph_passes`, `min_cut_rematerialization_partition`, `compile_fx_inner`, `TracingContext`: what `torch.compile` does
  after AOTAutograd.
- `FxGraphCache`, `CompiledFxGraph`, `CompiledFxGraphConstants`, `PyCodeCache`, `BoxedBool`, `counters`: code that is stored
  without its graph, see `ddpkit.compile.stored`.
- `SchedulerNode`, `StarDep`, `WeakDep`, `OrderedSet`: `_order_kept`, which mends a fault of torch before 2.14.
- `AsyncCompile`, `CppPythonBindingsCodeCache`, `clear_on_fresh_cache`, `VecISA`: `compiled_together`, which makes
  compilation on CPUs faster, and `start_workers`, likewise on GPUs. Without them it is slower, and nothing is said.
"""

import contextlib
import functools
import inspect
import itertools
import pickle
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
import torch._inductor.config as inductor_config
import torch.fx.experimental._config as symbolic_config
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._dynamo.utils import counters
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, tracing
from torch._inductor.codecache import FxGraphCache, PyCodeCache
from torch._inductor.compile_fx import _CompileFxKwargs, compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.dependencies import StarDep, WeakDep
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.output_code import CompiledFxGraph, CompiledFxGraphConstants
from torch._inductor.scheduler import SchedulerNode
from torch._inductor.utils import BoxedBool
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._ordered_set import OrderedSet
from torch.utils._python_dispatch import TorchDispatchMode

from ddpkit.compile.backend import (
    CHANGES_BATCH,
    DRAWN,
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
from ddpkit.compile.kernels import file_of, has_directives, shared_out
from ddpkit.compile.layout import Layout, TensorLeaf
from ddpkit.compile.lines import calling_line, last_line
from ddpkit.errors import InputError
from ddpkit.ranks.cores import all_of_job
from ddpkit.ranks.group import environment
from ddpkit.torch_private import release

try:
    from torch._inductor.async_compile import AsyncCompile, get_compile_threads
    from torch._inductor.codecache import CppPythonBindingsCodeCache
    from torch._inductor.cpu_vec_isa import VecISA, valid_vec_isa_list
    from torch._inductor.utils import clear_on_fresh_cache
except ImportError:
    SHARES_FILES = False
else:
    _REPLACED = (
        (AsyncCompile.cpp_pybinding, ["self", "argtypes", "source_code"]),
        (AsyncCompile.wait, ["self", "scope"]),
    )
    SHARES_FILES = all(list(inspect.signature(method).parameters) == names for method, names in _REPLACED)

# On a CPU, Inductor would compute what is gathered anew at every place it is gathered to, one number at a time: NequIP's
# compiled step was slower than the eager one. Stored first, it is a fast loop of its own, and there is less code to compile.
_ON_CPU = {"realize_opcount_threshold": 1, "realize_reads_threshold": 1}
# With symbolic sizes, Triton kernels whose loops were reordered may fail to split (CantSplit, pytorch issue 183696).
_ON_GPU = {"loop_ordering_after_fusion": False}
# Of a reduction's variants torch leaves one where algorithms are to be deterministic, but where registers are short it adds one
# of smaller blocks and times both: which one wins, and so the last bits, would depend on what else the GPU does meanwhile.
_REPEATABLE = {"dynamic_scale_rblock": False}
# Torch before 2.13 takes a chain of conversions for its last one: what is rounded on purpose would not be
# (tests/torch/unrounded.py). Its other patterns are of attention and of products of matrices, by which potentials hardly gain.
_KEEPS_ROUNDING = {} if release() >= (2, 13) else {"pattern_matcher": False}

# A setting that counts for the key of a graph in the cache, and does nothing here: apart from what was compiled without
# `_order_kept`. With torch's own way, `cache_key_tag`, every start would time Triton's kernels anew, since the processes that
# compile them do not hear of it.
_IN_ORDER = {"aot_inductor.metadata": {"ddpkit": "in order"}}

# Functions of a user's that rewrite graphs: what they do is not known.
_CUSTOM_PASSES = (
    "post_grad_custom_pre_pass", "post_grad_custom_post_pass", "joint_custom_pre_pass", "joint_custom_post_pass",
    "_pre_fusion_custom_pass", "_post_fusion_custom_pass",
)  # fmt: skip

# What is called, with the arguments that are given by keyword or by place.
_TAKES: list[tuple[Callable[..., Any], tuple[str, ...]]] = [
    (make_fx, ("decomposition_table", "tracing_mode")),
    (ShapeEnv.evaluate_expr, ("orig_expr",)),
    (ShapeEnv.create_symbol, ("val", "source", "dynamic_dim")),
    (ShapeEnv.create_symintnode, ("sym", "hint", "source")),
    (ShapeEnv.deserialize_symexpr, ()),
    (FakeTensorMode, ("shape_env", "allow_non_fake_inputs")),
    (TracingContext, ("fake_mode",)),
    (joint_graph_passes, ("graph",)),
    (min_cut_rematerialization_partition, ("joint_module", "_joint_inputs", "num_fwd_outputs")),
    (compile_fx_inner, ("gm", "example_inputs")),
    (SchedulerNode.recompute_size_and_body, ()),
    (FxGraphCache.cache_hit_post_compile, ("graph", "cache_info", "constants")),
    (FxGraphCache._get_tmp_dir_for_key, ("key",)),
    (CompiledFxGraph.post_compile, ("example_inputs", "constants", "graph_kwargs")),
    (torch._functionalize_has_data_mutation, ()),  # type: ignore[attr-defined]
]
_COMPILES_WITH = {"static_input_idxs", "is_backward", "is_inference"}


def _settings(*, on_gpu: bool) -> dict[str, Any]:
    """What Inductor compiles with, as torch's switches stand."""
    if not on_gpu:
        return _ON_CPU
    return _ON_GPU | _REPEATABLE if torch.are_deterministic_algorithms_enabled() else _ON_GPU


def unlike() -> list[str]:
    """What takes other arguments here than it is called with, or lacks a setting; empty where all is as it was tried."""
    differences = []
    for function, names in _TAKES:
        if names and not set(names) <= set(inspect.signature(function).parameters):
            differences.append(f"{function.__qualname__}({', '.join(names)})")
    if not set(_CompileFxKwargs.__annotations__) >= _COMPILES_WITH:
        differences.append(f"compile_fx_inner({', '.join(sorted(_COMPILES_WITH))})")
    settings = [(inductor_config, name) for name in (*_ON_CPU, *_ON_GPU, *_REPEATABLE, *_KEEPS_ROUNDING, *_IN_ORDER)]
    settings += [(symbolic_config, "backed_size_oblivious")]
    return differences + [f"{home.__name__}.{name}" for home, name in settings if not hasattr(home, name)]


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


class FakeSymbols(Symbols):
    """Symbolic sizes of a `ShapeEnv`, and its fake tensors."""

    def __init__(self, layout: Layout, sizes: Mapping[str, int], fixed: set[int]) -> None:
        self.env = _Questions(specialize_zero_one=False, duck_shape=False)
        self.fake = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self.fake.cache_enabled = False  # where sizes are symbols, a look into it takes longer than to compute anew
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
        with self.fake:
            return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in tensors]

    @contextlib.contextmanager
    def without_values(self) -> Iterator[None]:
        with _size_oblivious(), self.fake, enable_python_dispatcher():
            yield

    def conditions(self) -> list[tuple[sympy.Basic, str | None]]:
        asked = [(guard.expr, self.env.lines.get(number)) for number, guard in enumerate(self.env.guards)]
        replaced = self.env.replacements
        return asked + [(sympy.Eq(s, replaced[s]), None) for s in self.symbols.values() if s in replaced]

    def are_fixed(self) -> bool:
        return any(size.is_number for size in self.env.replacements.values())


@contextlib.contextmanager
def _size_oblivious() -> Iterator[None]:
    """While tracing, a size that may be 1 is not asked whether it is."""
    patched = symbolic_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with patched, torch.autograd.set_multithreading_enabled(False):
        yield


class Inductor(Backend):
    """The trace without changes in place, by AOTAutograd's means; code by Inductor's inner compiler."""

    def symbols(self, layout: Layout, sizes: Mapping[str, int], fixed: Sequence[Tensor]) -> Symbols:
        if any(tensor.is_cuda for tensor in fixed):
            start_workers()
        else:
            look_at_the_processor()
        return FakeSymbols(layout, sizes, {size for tensor in fixed for size in tensor.shape})

    def trace(
        self, function: Function, layout: Layout, symbols: Symbols, fixed: Sequence[Tensor], tangents: Tangents | None
    ) -> Traced:
        primals = [*symbols.sizes.values(), *symbols.leaves, *symbols.like(fixed)]
        first_leaf, first_fixed = len(symbols.sizes), len(symbols.sizes) + len(symbols.leaves)
        present: list[bool] = []

        def flat(primals: list[Any], tangents: list[Tensor]) -> list[Tensor]:
            with _Draws(), FunctionalTensorMode():
                inner = [_functional(x) for x in primals]
                inner_tangents = [_functional(x) for x in tangents]
                batch = layout.fill(dict(zip(symbols.sizes, inner, strict=False)), inner[first_leaf:first_fixed])
                outputs = function(batch, inner[first_fixed:], *([inner_tangents] if tangents else []))
                results = [None if x is None else _plain(x) for x in outputs]
                changed = {n: _plain(x) for n, x in enumerate(inner) if isinstance(x, Tensor) and self.is_changed(x)}
            for n, value in changed.items():
                if n < first_fixed:
                    raise InputError(CHANGES_BATCH)
                primals[n].copy_(value)
            present[:] = [x is not None for x in results]
            return [x for x in results if x is not None]

        fake_tangents = [] if tangents is None else list(tangents(symbols))
        through = make_fx(flat, decomposition_table=_decompositions(), tracing_mode="real")
        with symbols.without_values():
            graph = through(primals, fake_tangents)
        graph = fx.GraphModule(graph, fx_graph_cse(graph.graph))
        graph.graph.eliminate_dead_code()
        values = iter([node.meta["val"] for node in output_of(graph).args[0]])  # type: ignore[union-attr]
        return Traced(
            graph, symbols, [*primals, *fake_tangents], [next(values) if is_one else None for is_one in present]
        )

    def is_changed(self, x: Tensor) -> bool:
        assert isinstance(x, FunctionalTensor)
        return bool(torch._functionalize_has_data_mutation(x.elem))  # type: ignore[attr-defined]

    def prepare(self, graph: fx.GraphModule, symbols: Symbols, *, inference: bool) -> None:
        with self._context(symbols):
            if inference:
                _rewrite(graph)
        output = output_of(graph)
        # outputs keep the strides they were traced with
        output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))  # type: ignore[arg-type]

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
        on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in inputs)
        patched = inductor_config.patch(_settings(on_gpu=on_gpu))
        with self._context(symbols), patched, _order_kept(), compiled_together():
            return compile_fx_inner(  # type: ignore[return-value]
                copy_of(graph),
                list(inputs),
                static_input_idxs=list(fixed),
                is_backward=backward,
                is_inference=inference,
            )

    def strides(self, kernel: Kernel, symbols: Symbols) -> list[tuple[Any, ...] | None]:
        assert isinstance(symbols, FakeSymbols)
        strides = kernel.output_strides  # type: ignore[attr-defined]
        return [one and tuple(symbols.env.deserialize_symexpr(x) for x in one) for one in strides]

    def settings(self) -> Any:
        if any(getattr(inductor_config, name, None) is not None for name in _CUSTOM_PASSES):
            return None
        return sorted(inductor_config.save_config_portable(ignore_private_configs=False).items(), key=str)

    def is_kernel(self, value: Any) -> bool:
        return isinstance(value, CompiledFxGraph)

    def pack(self, kernel: Kernel) -> bytes | None:
        """As Inductor keeps it itself, with the variants of Triton's kernels that were timed and chosen."""
        assert isinstance(kernel, CompiledFxGraph)
        if not kernel._fx_graph_cache_key:
            return None
        for path in sorted(Path(FxGraphCache._get_tmp_dir_for_key(kernel._fx_graph_cache_key)).iterdir()):
            if path.name.startswith("."):
                continue
            content = path.read_bytes()
            if pickle.loads(content).source_code == kernel.source_code:  # noqa: S301  (it has just been written or loaded)
                return pickle.dumps((content, _chosen(kernel)))
        return None

    def unpack(self, content: bytes) -> Kernel:
        packed, chosen = pickle.loads(content)  # noqa: S301  (see `ddpkit.compile.stored`)
        graph = pickle.loads(packed)  # noqa: S301  (likewise)
        constants = CompiledFxGraphConstants()
        try_without_torch()
        # Triton's kernels are there: processes to compile them would be started for nothing.
        alone = inductor_config.patch(compile_threads=1) if "cuda" in graph.device_types else contextlib.nullcontext()
        with compiled_together(), alone:
            kernel, _ = FxGraphCache.cache_hit_post_compile(graph, {}, constants)
        if kernel is None:
            raise FileNotFoundError("a part of the code")
        counters["inductor"]["fxgraph_cache_hit"] += 1  # as where Inductor itself finds it
        _choose(kernel, chosen)
        kernel.post_compile((), constants, {"cudagraphs": BoxedBool(False), "is_backward": False})  # type: ignore[typeddict-item]
        return kernel  # type: ignore[no-any-return]

    def halves(
        self, joint: Traced, kept: int, changed: Collection[int]
    ) -> tuple[fx.GraphModule, fx.GraphModule, list[Source]]:
        """Cuts where little has to be saved."""
        graph = joint.graph
        with self._context(joint.symbols):
            _rewrite(graph)
            first, second = min_cut_rematerialization_partition(graph, joint.inputs, num_fwd_outputs=kept)
        results: list[fx.Node] = list(output_of(first).args[0])  # type: ignore[arg-type]
        saved = [node.name for node in results[kept:]]
        overwritten = [node for n, node in enumerate(first.graph.find_nodes(op="placeholder")) if n in changed]
        output_of(first).args = (results[:kept] + [copied(x) if x in overwritten else x for x in results[kept:]],)
        inputs = [[node.name for node in g.graph.nodes if node.op == "placeholder"] for g in (graph, second)]
        tangents = [name for name in inputs[0] if "tangents" in name]
        return (
            first,
            second,
            [
                ("tangent", tangents.index(name)) if name in tangents else ("saved", saved.index(name))
                for name in inputs[1]
            ],
        )

    @contextlib.contextmanager
    def _context(self, symbols: Symbols) -> Iterator[None]:
        assert isinstance(symbols, FakeSymbols)
        with _size_oblivious(), tracing(TracingContext(symbols.fake)):
            yield


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Torch's own, and those of thin products of matrices on GPUs."""
    table = dict(select_decomp_table())
    for operation in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
        table[operation] = functools.partial(_product, table.get(operation, _leave))
    return table


def _product(otherwise: Callable[..., Any], one: Tensor, two: Tensor, **options: Any) -> Any:
    product = thin_product(one, two) if one.is_cuda and not options else None
    return otherwise(one, two, **options) if product is None else product


def thin_product(one: Tensor, two: Tensor) -> Tensor | None:
    """A product of matrices (or of batches of them) where something is 1 wide, as a multiplication and a sum; else None.

    Such a product reads each number once. Libraries' kernels do that at a fraction of the memory's speed on a GPU; the generated
    kernel does better, and what comes before and after is part of it.
    """
    rows, inner, columns = (isinstance(n, int) and n == 1 for n in (one.shape[-2], one.shape[-1], two.shape[-1]))
    if not (rows or inner or columns) or one.dtype not in (torch.float32, torch.float64):
        return None
    if inner:
        return one * two
    if columns:
        return (one * two.transpose(-1, -2)).sum(-1, keepdim=True)
    return (one.transpose(-1, -2) * two).sum(-2, keepdim=True)


def _leave(*_: Any, **__: Any) -> Any:
    return NotImplemented


def set_up() -> None:
    """Makes what torch makes before it rewrites its first graph; processes that are forked later share it."""
    symbols = FakeSymbols(Layout.of([torch.zeros(2)]), {}, set())
    with symbols.without_values():
        graph = make_fx(lambda x: [x + 1])(*symbols.leaves)
    Inductor().prepare(graph, symbols, inference=True)


def _rewrite(graph: fx.GraphModule) -> None:
    """What torch rewrites before a graph is cut and compiled."""
    with inductor_config.patch(_KEEPS_ROUNDING):
        joint_graph_passes(graph)


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
            node.meta[DRAWN] = f"{func.overloadpacket.__name__} at {last_line() or 'a line unknown'}"
        return result


def _functional(x: Any) -> Any:
    return FunctionalTensor.to_functional(x) if isinstance(x, Tensor) else x


def _plain(x: Any) -> Any:
    if not isinstance(x, FunctionalTensor):
        return x  # a constant of the model
    return x.from_functional()


@contextlib.contextmanager
def _order_kept() -> Iterator[None]:
    """While compiling, a loop that is rewritten to fit another one still waits for what changes its inputs in place.

    Torch before 2.14 forgets that, and a sum of scattered values (`nn.Embedding`'s gradient) was read before anything had been
    added to it (pytorch issues 185509 and 177631; tests/torch/read_too_early.py).
    """
    if release() >= (2, 14):
        yield
        return
    rewrite = SchedulerNode.recompute_size_and_body

    def rewrite_in_order(node: SchedulerNode, *arguments: Any, **options: Any) -> None:
        after = [dep for dep in node.read_writes.reads if isinstance(dep, StarDep | WeakDep)]
        rewrite(node, *arguments, **options)
        node.set_read_writes(node.read_writes.with_read(OrderedSet(after)).rename(node.mutation_renames))

    SchedulerNode.recompute_size_and_body = rewrite_in_order  # type: ignore[assignment, method-assign]
    try:
        with inductor_config.patch(_IN_ORDER):
            yield
    finally:
        SchedulerNode.recompute_size_and_body = rewrite  # type: ignore[method-assign]


# --- C++ kernels that share files: see ddpkit.compile.kernels -------------------------------------------------------------


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
    if not SHARES_FILES:
        return
    try_without_torch()

    def look() -> None:
        with all_of_job():
            valid_vec_isa_list()

    threading.Thread(target=look, name="look at the processor", daemon=True).start()


def try_without_torch() -> None:
    """Has those programs tried by processes that load torch's libraries alone."""
    if SHARES_FILES and release() < (2, 13) and VecISA._avx_py_load.lstrip().startswith("import torch"):
        folder = Path(torch.__file__).parent / "lib"
        libraries = [str(folder / name) for name in ("libc10.so", "libtorch_cpu.so")]
        VecISA._avx_py_load = _TRY_LIBRARY.format(libraries=libraries)


@functools.cache
def start_workers() -> None:
    """Starts the processes that compile Triton's kernels while the model is traced: they take seconds to import torch, and until
    they are ready every kernel is compiled in this process.
    """
    if not SHARES_FILES:
        return
    with all_of_job(), inductor_config.patch(compile_threads=_threads()):
        AsyncCompile.use_process_pool()


if SHARES_FILES:

    @clear_on_fresh_cache
    class _Files(CppPythonBindingsCodeCache):
        """Inductor's cache of libraries, for our files: flags, locks and places are its own."""

        cache: dict[str, Callable[[], ModuleType]] = {}  # type: ignore[assignment]  # noqa: RUF012  (Inductor's interface)
        cache_clear = staticmethod(cache.clear)
        entry_function = "kernels"


def _variants(kernel: CompiledFxGraph) -> dict[str, Any]:
    """The Triton kernels of a graph's code by name."""
    modules = [module for module in PyCodeCache.modules if getattr(module, "key", None) == kernel.cache_key]
    return {
        n: x
        for module in modules[-1:]
        for n, x in vars(module).items()
        if isinstance(getattr(x, "launchers", None), list)
    }


def _chosen(kernel: CompiledFxGraph) -> dict[str, str]:
    """Which variant of each Triton kernel runs."""
    return {name: str(x.launchers[0].config) for name, x in _variants(kernel).items() if len(x.launchers) == 1}


def _choose(kernel: CompiledFxGraph, chosen: Mapping[str, str]) -> None:
    """Leaves the variants that have been chosen before, so that none is timed again and every process runs the same."""
    for name, x in _variants(kernel).items():
        one = [launcher for launcher in x.launchers if str(launcher.config) == chosen.get(name)]
        if len(one) == 1:
            x.launchers = one


@dataclass(frozen=True)
class _Kernel:
    argument_types: list[str]
    source: str


@contextlib.contextmanager
def compiled_together() -> Iterator[None]:
    """While this is open, a graph is compiled on all cores of the job, and its C++ kernels share files.

    Where sharing fails, each kernel is compiled on its own, as Inductor does.
    """
    if not SHARES_FILES:
        with all_of_job():
            yield
        return
    one_by_one, wait = AsyncCompile.cpp_pybinding, AsyncCompile.wait

    def keep(compiler: AsyncCompile, argument_types: list[str], source: str) -> Any:
        if has_directives(source):  # macros would reach into other kernels
            return one_by_one(compiler, argument_types, source)
        return _Kernel(argument_types, source)

    def compile_kept(compiler: AsyncCompile, scope: dict[str, Any]) -> None:
        kernels = {name: value for name, value in scope.items() if isinstance(value, _Kernel)}
        try:
            scope.update(_loaded(compiler, {name: kernel.source for name, kernel in kernels.items()}))
        except Exception:  # noqa: BLE001  (it only saves time)
            for name, kernel in kernels.items():
                scope[name] = one_by_one(compiler, kernel.argument_types, kernel.source)
        wait(compiler, scope)

    AsyncCompile.cpp_pybinding, AsyncCompile.wait = keep, compile_kept  # type: ignore[assignment, method-assign]
    try:
        with all_of_job():
            threads = _threads()
            # Compiling the headers ahead takes longer than a few files gain by it.
            with inductor_config.patch(compile_threads=threads, cpp_cache_precompile_headers=False):
                yield
    finally:
        AsyncCompile.cpp_pybinding, AsyncCompile.wait = one_by_one, wait  # type: ignore[method-assign]


def _threads() -> int:
    """How many files or kernels are compiled side by side: ranks with a GPU each compile at the same time."""
    here = environment()
    return max(1, inductor_config.decide_compile_threads() // (here.local_size if here.device.type == "cuda" else 1))


def _loaded(compiler: "AsyncCompile", sources: dict[str, str]) -> dict[str, Any]:
    """Kernels by name, from as many files as are compiled side by side."""
    threads = get_compile_threads()
    submit = compiler.submit if threads > 1 else None
    # started all together, then waited for
    shares = shared_out(sources, threads)
    loading = [
        _Files.load_async(file_of({name: sources[name] for name in share}), submit_fn=submit) for share in shares
    ]
    kernels = {}
    for share, load in zip(shares, loading, strict=True):
        library = load()
        kernels.update({name: getattr(library, name) for name in share})
    return kernels
