"""Which compiler makes the code of traced graphs, and what each of them has to offer."""

import contextlib
import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from torch import Tensor, fx

from ddpkit.compile.layout import Layout
from ddpkit.torch_private import TESTED, is_tested

COMPILERS = ("inductor", "public", "interpreted")
"""`inductor`: the trace is handed to Inductor itself, by private names of torch; where they are untried, `public` serves.
`public`: traced by `make_fx`, compiled by `torch.compile`. `interpreted`: what is traced runs operation by operation."""

Function = Callable[..., Sequence[Tensor | None]]
"""Takes a batch and tensors that are not part of it, such as parameters; may write into the latter."""

Kernel = Callable[[list[Any]], Sequence[Any]]
"""Code of a graph; empties the list of inputs."""

Tangents = Callable[["Symbols"], Sequence[Tensor]]
"""Makes tensors without values that a function takes as a third argument."""

Source = tuple[str, int]
"""Where an input of a second half comes from: `("saved", n)` by the first one, or `("tangent", n)`."""

CHANGES_BATCH = "The model changes its batch in place: let it work on copies."
DRAWN = "ddpkit_drawn"
"""In a node's meta: what draws random numbers, and which line calls it."""


class Symbols(ABC):
    """Symbolic sizes, and tensors without values whose shapes they are.

    Attributes:
        sizes: the symbolic sizes by name.
        leaves: the tensors of a batch.
        symbols: the sympy symbol of each size.
    """

    sizes: dict[str, Any]
    leaves: list[Tensor]
    symbols: dict[str, sympy.Symbol]

    @abstractmethod
    def like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors without values, of the same fixed shapes, strides, dtypes and devices."""

    @abstractmethod
    def without_values(self) -> AbstractContextManager[Any]:
        """A context in which functions can be called with tensors without values."""

    @abstractmethod
    def conditions(self) -> list[tuple[sympy.Basic, str | None]]:
        """The conditions on sizes under which the trace is valid, each with the line of the model that imposed it, if known."""

    @abstractmethod
    def are_fixed(self) -> bool:
        """Whether a symbolic size was specialised to a number."""


@dataclass
class Traced:
    """A graph of `sizes, leaves of the batch, fixed tensors` (and `tangents`) -> outputs.

    Attributes:
        graph: the graph.
        symbols: the symbolic sizes.
        inputs: the symbolic sizes and tensors without values that it was traced with.
        outputs: the tensors without values that the function returned; None where it returned None.
    """

    graph: fx.GraphModule
    symbols: Symbols
    inputs: list[Any]
    outputs: list[Tensor | None]


class Backend(ABC):
    """Traces functions to graphs, and compiles the graphs."""

    @abstractmethod
    def symbols(self, layout: Layout, sizes: Mapping[str, int], fixed: Sequence[Tensor]) -> Symbols:
        """Symbolic sizes.

        Args:
            layout: the form of the batches, which names the sizes.
            sizes: those of an example batch; the code is tuned for them.
            fixed: tensors of fixed shape.
        """

    @abstractmethod
    def trace(
        self, function: Function, layout: Layout, symbols: Symbols, fixed: Sequence[Tensor], tangents: Tangents | None
    ) -> Traced:
        """The graph of `function(batch, fixed)`, or with tangents of `function(batch, fixed, tangents)`."""

    @abstractmethod
    def is_changed(self, x: Tensor) -> bool:
        """Whether an input of a traced function, or a copy of one, was changed in place."""

    @abstractmethod
    def prepare(self, graph: fx.GraphModule, symbols: Symbols, *, inference: bool) -> None:
        """Rewrites a graph before it is compiled or interpreted."""

    @abstractmethod
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
        """Compiles a graph, which may be modified: see `ddpkit.compile.graph.lower`."""

    @abstractmethod
    def strides(self, kernel: Kernel, symbols: Symbols) -> list[tuple[Any, ...] | None]:
        """The strides of each output of the code, as symbolic sizes; None for those of the trace, and for what is no tensor."""

    def settings(self) -> Any:
        """What the compiler has been told, printable and the same in every process; None where code cannot be stored."""
        return None

    def is_kernel(self, value: Any) -> bool:
        """Whether this is code of a graph that `pack` takes."""
        del value
        return False

    def pack(self, kernel: Kernel) -> bytes | None:
        """Code that has run, in a form that another process can `unpack`; None if that cannot be done."""
        raise NotImplementedError

    def unpack(self, content: bytes) -> Kernel:
        """The code that was packed. What it was generated for is not looked at."""
        raise NotImplementedError

    @abstractmethod
    def halves(
        self, joint: Traced, kept: int, changed: Collection[int]
    ) -> tuple[fx.GraphModule, fx.GraphModule, list[Source]]:
        """Splits a joint graph, traced with tangents, into a forward and a backward graph.

        Args:
            joint: the joint graph.
            kept: number of its outputs that the forward graph returns, before what it saves; the backward graph returns the rest.
            changed: indices of inputs that are overwritten before the backward graph runs.

        Returns:
            The forward graph, the backward graph, and where the inputs of the latter come from.
        """


_compiler = "inductor"


def use(compiler: str) -> None:
    """Chooses the compiler for graphs that this process traces from now on: one of `COMPILERS`."""
    global _compiler  # noqa: PLW0603
    assert compiler in COMPILERS
    _compiler = compiler


@contextlib.contextmanager
def using(compiler: str) -> Iterator[None]:
    """A context in which graphs are compiled by the chosen compiler."""
    before = _compiler
    use(compiler)
    try:
        yield
    finally:
        use(before)


def interprets() -> bool:
    """Whether graphs are not compiled."""
    return _compiler == "interpreted"


def backend() -> Backend:
    """The backend that the chosen compiler and this release of torch call for."""
    if _compiler != "public" and (inductor := _inductor()) is not None:
        return inductor
    from ddpkit.compile.public import Public

    return Public()


@functools.cache
def _inductor() -> Backend | None:
    """The one that needs torch's private names; None and a warning where they are untried, missing or other ones."""
    first, last = (".".join(map(str, version)) for version in TESTED)
    if not is_tested():
        why = f"torch {torch.__version__} is not among the releases that this was tested with ({first} to {last})"
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch 2.11 uses what it deprecates itself
                from ddpkit.compile.inductor import Inductor, unlike

            differences = unlike()
        except (ImportError, AttributeError) as error:
            differences = [str(error)]
        else:
            if not differences:
                return Inductor()
        why = f"torch {torch.__version__} lacks what this needs of its compiler ({differences[0]})"
    if not dist.is_initialized() or dist.get_rank() == 0:
        warnings.warn(
            f"{why}: graphs are traced by make_fx and compiled by torch.compile, which is slower; see docs/explanation/torch.md.",
            stacklevel=3,
        )
    return None


def distinct(sizes: Mapping[str, int], fixed: Collection[int]) -> dict[str, int]:
    """Sizes near the given ones, none the same as another, or as one that is fixed, or smaller than 5."""
    hints: dict[str, int] = {}
    for name, size in sizes.items():
        hint = max(size, 5)
        while hint in fixed or hint in hints.values():
            hint += 1
        hints[name] = hint
    return hints


def output_of(graph: fx.GraphModule) -> fx.Node:
    """The node that lists a graph's outputs."""
    return graph.graph.output_node()


def copy_of(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy to compile, which rewrites what it is given."""
    nodes = fx.Graph()
    output = nodes.output(nodes.graph_copy(graph.graph, {}))
    output.meta = dict(output_of(graph).meta)
    return fx.GraphModule(graph, nodes)


def copied(node: fx.Node) -> fx.Node:
    """A copy of an input of a graph, made before anything is computed."""
    first = next(x for x in node.graph.nodes if x.op != "placeholder")
    with node.graph.inserting_before(first):
        copy = node.graph.call_function(torch.ops.aten.clone.default, (node,))
    copy.meta = dict(node.meta)
    return copy
