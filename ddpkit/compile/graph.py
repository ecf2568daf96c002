"""Functions of batches as graphs: tracing with symbolic sizes, and making code of them.

The function is traced once, below autograd: what it does with `torch.autograd.grad` (forces, and parameter gradients of a loss
on forces) comes out as ordinary operations, so nothing differentiates the graph afterwards, and `torch.compile`'s refusal of
double backward does not matter. Which compiler does it is chosen in `ddpkit.compile.backend`.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.operator_schemas import get_signature_for_torch_op

from ddpkit.compile import cache, digest
from ddpkit.compile.backend import (
    DRAWN,
    Function,
    Kernel,
    Source,
    Symbols,
    Tangents,
    Traced,
    backend,
    copy_of,
    interprets,
    output_of,
)
from ddpkit.compile.layout import Layout
from ddpkit.compile.lines import failing_line
from ddpkit.compile.script import as_python, remedy
from ddpkit.errors import InputError, exhausted

__all__ = ["Kernel", "Symbols", "Traced", "halves", "is_changed", "lower", "strides_of", "trace"]


def trace(
    function: Function,
    layout: Layout,
    sizes: Mapping[str, int],
    fixed: Sequence[Tensor],
    tangents: Tangents | None = None,
) -> Traced:
    """Traces `function(batch, fixed)`, or with tangents `function(batch, fixed, tangents)`.

    Args:
        function: returns tensors and Nones; may change tensors of `fixed` in place, but not those of the batch.
        layout: the form of batches.
        sizes: of the batch at hand.
        fixed: tensors of fixed shape.
        tangents: makes tensors without values that are given as a third argument.

    Raises:
        InputError: what the function does cannot be written as a graph; the message names its line.
    """
    cache.make_ready()
    symbols = backend().symbols(layout, sizes, fixed)
    with _saying_what_cannot_be_traced(symbols):
        traced = backend().trace(function, layout, symbols, fixed, tangents)
    _refuse_random_numbers(traced.graph)
    return traced


@contextlib.contextmanager
def traced_as(subject: str) -> Iterator[None]:
    """Inside a traced function: has what fails be told of `subject` instead of the model. No eager code replaces it."""
    try:
        yield
    except Exception as error:
        error.subject = subject  # type: ignore[attr-defined]
        raise


# What tracing raises where a tensor's values are asked for.
_ASKS_FOR_VALUES = {"DataDependentOutputException", "DynamicOutputShapeException", "GuardOnDataDependentSymNode"}


@contextlib.contextmanager
def _saying_what_cannot_be_traced(symbols: Symbols) -> Iterator[None]:
    """Turns a question about values, TorchScript that takes sizes for fixed ones, and what else fails into one sentence."""
    with as_python() as scripts:
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            if exhausted(error):
                raise
            line, subject, instead = failing_line(error), getattr(error, "subject", None), ""
            if subject is None:
                subject, instead = "The model", ", or train with compile=False"
            if isinstance(error, torch.jit.Error) or type(error).__name__ in _ASKS_FOR_VALUES:
                if scripts:
                    raise InputError(f"{subject} cannot be compiled: {remedy(scripts)}.") from error
                asked = line or getattr(error, "func", None) or str(error).split("\n", 1)[0]
                raise InputError(
                    f"{subject} cannot be compiled: what it does depends on the values of tensors ({asked}): leave out .item(), "
                    f"comparisons that Python looks at and boolean indexing{instead}."
                ) from error
            if line is None:
                raise
            what = str(error).split("\n", 1)[0]
            raise InputError(
                f"{subject} cannot be compiled: {line} fails where sizes are symbols and tensors have no values "
                f"({type(error).__name__}: {what}): change that line{instead}."
            ) from error
    if scripts and symbols.are_fixed():
        raise InputError(f"The model cannot be compiled for batches of other sizes than the first: {remedy(scripts)}.")


def _refuse_random_numbers(graph: fx.GraphModule) -> None:
    """Looks for random numbers that something is made of.

    Raises:
        InputError: names the operation and the line.
    """
    used: set[fx.Node] = set()
    for node in reversed(graph.graph.nodes):  # torch keeps operations that draw, whatever becomes of their results
        if node.op == "output" or node in used or _writes(node):
            used.update(node.all_input_nodes)
    drawing = [node for node in graph.graph.nodes if (node in used or _writes(node)) and _draws(node)]
    if not drawing:
        return
    raise InputError(
        f"The model cannot be compiled: it draws random numbers ({drawing[0].meta.get(DRAWN, drawing[0].name)}), which compiled "
        "code would draw otherwise than eager code: leave dropout and noise out (p=0), draw them outside and hand them over in "
        "the batch, or train with compile=False."
    )


def _writes(node: fx.Node) -> bool:
    """Whether an operation changes a tensor in place, as those do whose names end in an underscore."""
    return node.op == "call_function" and getattr(node.target, "__name__", "").partition(".")[0].endswith("_")


def _draws(node: fx.Node) -> bool:
    """Whether an operation draws random numbers; some do only where a probability or a flag among their arguments says so."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    (signature,) = get_signature_for_torch_op(node.target)  # type: ignore[arg-type, misc]
    given = {name: p.default for name, p in signature.parameters.items() if p.default is not p.empty}
    given |= dict(zip(signature.parameters, node.args, strict=False)) | node.kwargs
    return all(given.get(name, True) not in (0, False) for name in ("p", "dropout_p", "train", "training"))


def is_changed(x: Tensor) -> bool:
    """Whether a tensor that a traced function was given, or made by copying, has been changed in place."""
    return backend().is_changed(x)


class Interpreted:
    """Runs a traced graph operation by operation, as eager code would: what the trace changes, without the compiler.

    Args:
        graph: the graph.

    Attributes:
        output_strides: that the outputs were traced with.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self._module = copy_of(graph)
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
    """Makes code of a graph, or takes it from the compiler's cache on disk; `Interpreted` where that is chosen.

    Args:
        graph: what to compile.
        symbols: its sizes.
        inputs: tensors without values, and sizes.
        fixed: places of inputs whose memory stays where it is.
        backward: whether this is the second half of a function.
        inference: whether nothing is kept for a second half.
    """
    compiler = backend()
    compiler.prepare(graph, symbols, inference=inference)
    if interprets():
        return Interpreted(graph)

    def compiled() -> Kernel:
        with cache.sealing():
            return compiler.compile(graph, symbols, inputs, fixed, backward=backward, inference=inference)

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


def strides_of(kernel: Kernel, symbols: Symbols) -> list[tuple[Any, ...] | None]:
    """The strides that each output of a graph's code really has, as symbolic sizes; None where those of the trace will do."""
    return list(kernel.output_strides) if isinstance(kernel, Interpreted) else backend().strides(kernel, symbols)


def halves(joint: Traced, kept: int, changed: Collection[int]) -> tuple[fx.GraphModule, fx.GraphModule, list[Source]]:
    """Cuts a graph that was traced with tangents in two: see `Backend.halves`."""
    return backend().halves(joint, kept, changed)
