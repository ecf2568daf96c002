"""A compiled model that autograd can go through: energy, forces, and the derivative of any loss on them by the parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ddpkit.capture.recording import as_one
from ddpkit.compile import parity
from ddpkit.compile.conditions import Conditions
from ddpkit.compile.graph import (
    Kernel,
    Symbols,
    Traced,
    halves,
    is_changed,
    lower,
    strides_of,
    trace,
)
from ddpkit.compile.layout import Flat, Layout, describe
from ddpkit.compile.objective import apart
from ddpkit.compile.outputs import Tree, WithFacts
from ddpkit.compile.situations import Situation, Situations
from ddpkit.compile.snapshot import Snapshot
from ddpkit.compile.state import State
from ddpkit.compile.stored import Stored, described
from ddpkit.compile.variants import Code, Variants


def compile_forces(
    model: nn.Module, example_batch: Any, *, tolerance: float | None = None, examples: Sequence[Any] = ()
) -> "CompiledForces":
    """Compiles a model that computes forces (or other derivatives) inside, so that a loss on them can be differentiated.

    The result is called like the model and trained like it: its parameters are the model's. The code computes gradients with
    respect to parameters, and none with respect to the batch. In evaluation mode, or without gradients, the model itself runs.

    All ranks must call it. One rank on each host compiles; the others load the code from its disk.

    Args:
        model: called with a batch, returns a tensor or a pytree of tensors. It may call
            `torch.autograd.grad(..., create_graph=True)`.
        example_batch: a `Batch`, or any pytree of tensors. Sizes may change afterwards.
        tolerance: by how much compiled and eager code may differ, relative; by default 1e-10 in float64 and 1e-4 in float32.
        examples: batches of other shapes. Which sizes of a `Batch` may vary is known. For other types of batch the examples show
            it, and a size that varies later without having varied in them costs another compilation.

    Raises:
        ParityError: compiled code computes something else than eager code.
    """
    compiled = CompiledForces(model, tolerance=tolerance, examples=examples)
    compiled.prepare(example_batch)
    return compiled


@dataclass(frozen=True)
class ForcesFacts:
    """What tracing a model tells beside the graph.

    Attributes:
        layout: the form of the batches.
        result: the model's output without its tensors.
        differentiable: which of the tensors have a derivative.
        updated: places in the state of buffers that the model changes.
        used: which trained parameters have a gradient.
    """

    layout: Layout
    result: Tree
    differentiable: list[bool]
    updated: list[int]
    used: list[bool]


@dataclass
class ForcesCode(Code):
    """A compiled model.

    Attributes:
        forward: `sizes, leaves, state -> outputs, changed buffers, saved`.
        backward: from what `arguments` lists to gradients.
        facts: how to read what they return.
        arguments: where the backward code's inputs come from: `("saved", n)` or `("tangent", n)`.
    """

    forward: Kernel
    backward: Kernel
    facts: ForcesFacts
    arguments: list[tuple[str, int]]


class _Apply(torch.autograd.Function):
    """Forward and backward code as one node of autograd."""

    @staticmethod
    def forward(ctx: Any, code: ForcesCode, sizes: dict[str, int], leaves: list[Tensor], *state: Tensor) -> Any:  # type: ignore[override]
        outputs = list(as_one(code.forward, [*(sizes[name] for name in code.layout.names), *leaves, *state]))
        count, updates = len(code.facts.differentiable), len(code.facts.updated)
        for n, value in zip(code.facts.updated, outputs[count : count + updates], strict=True):
            state[n].copy_(value)
        saved = outputs[count + updates :]
        ctx.code, ctx.states = code, len(state)
        ctx.plain = [None if isinstance(x, Tensor) else x for x in saved]
        ctx.save_for_backward(*(x for x in saved if isinstance(x, Tensor)))
        results = [x.view_as(x) if any(x is leaf for leaf in leaves) else x for x in outputs[:count]]
        ctx.mark_non_differentiable(
            *(x for x, has_one in zip(results, code.facts.differentiable, strict=True) if not has_one)
        )
        return tuple(results)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        code: ForcesCode = ctx.code
        tensors = iter(ctx.saved_tensors)
        sources = {
            "saved": [next(tensors) if x is None else x for x in ctx.plain],
            "tangent": [
                g.contiguous() for g, has_one in zip(gradients, code.facts.differentiable, strict=True) if has_one
            ],
        }
        results = iter(as_one(code.backward, [sources[kind][n] for kind, n in code.arguments]))
        by_parameter = [next(results) if is_used else None for is_used in code.facts.used]
        return None, None, None, *by_parameter, *([None] * (ctx.states - len(by_parameter)))


@dataclass(frozen=True)
class Instead:
    """What a compiled model, or a strategy's wrapper of it, is called with where a recording has run it.

    Attributes:
        run: returns what the call returns.
    """

    run: Callable[[], Any]


@dataclass
class ForcesSituation(Situation):
    """What belongs to a state of the model.

    Attributes:
        variants: code.
    """

    variants: Variants[ForcesCode]


class CompiledForces(nn.Module):
    """Made by `compile_forces`.

    Args:
        model: what is compiled.
        tolerance: see `compile_forces`.
        examples: see `compile_forces`.

    Attributes:
        model: the model itself.
        tally: what the code has cost and shown so far.
    """

    def __init__(self, model: nn.Module, *, tolerance: float | None = None, examples: Sequence[Any] = ()) -> None:
        super().__init__()
        self.model = model
        self._tolerance, self._examples = tolerance, list(examples)
        self._forget()

    def _forget(self) -> None:
        self._begun = False
        self.tally = parity.Tally(self._examples)
        self._situations = Situations({"model": self.model}, self._make)

    def _make(self, snapshot: Snapshot) -> ForcesSituation:
        """What belongs to a state of the model."""
        state = State(snapshot, {name: p for name, p in self.model.named_parameters() if p.requires_grad})
        return ForcesSituation(
            state,
            Variants(
                lambda examples, sizes: self._trace(state, examples, sizes),
                self._lower,
                lambda code, batch, sizes: self._compare(state, code, batch, sizes),
                self.tally,
                Stored(lambda: described(state, (), {"model": self.model}, ["forces"]), state),
            ),
        )

    def __getstate__(self) -> dict[str, Any]:
        """A copy compiles anew: code belongs to the process."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_situations", "tally")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()

    @property
    def seconds_compile(self) -> float:
        """Seconds spent on tracing, compiling and checking."""
        return self.tally.seconds

    @property
    def eager(self) -> int:
        """Batches run eagerly, because the compiled code does not hold for them."""
        return self.tally.eager

    @property
    def differences(self) -> list[parity.Difference]:
        """What the checks against eager code have found."""
        return self.tally.differences

    def forward(self, batch: Any) -> Any:
        """Calls the model's compiled code, or the model itself where there is nothing to differentiate."""
        if isinstance(batch, Instead):
            return batch.run()
        if not self.training or not torch.is_grad_enabled():
            return self.model(batch)
        now = self._situations.now()
        if now.steps_to_wait:
            now.steps_to_wait -= 1
            self.tally.eager += 1
            return self.model(batch)
        if not now.variants.codes and self._begun:
            self._compile(now, batch, together=False)
        flat = Flat.of(batch)
        ready = now.variants.find(flat)
        return self.model(batch) if ready is None else self._call(now.state.tensors(), *ready, flat)

    def prepare(self, batch: Any) -> None:
        """Traces, compiles and checks, if that has not been done. All ranks must make the first call together.

        Args:
            batch: one that is going to be trained on.

        Raises:
            ParityError: compiled code computes something else than eager code.
        """
        if not self._begun and self.training:
            self._compile(self._situations.now(), batch, together=True)

    def _compile(self, now: ForcesSituation, batch: Any, *, together: bool) -> None:
        now.variants.prepare(batch, together=together)
        self._begun = True
        self._situations.ignore(now.state.rewritten)

    def _call(self, tensors: Sequence[Tensor], code: ForcesCode, sizes: dict[str, int], batch: Flat) -> Any:
        leaves = [leaf.detach() for leaf in batch.tensors()]
        return code.facts.result.fill(iter(_Apply.apply(code, sizes, leaves, *tensors)))  # type: ignore[no-untyped-call]

    # --- for recordings of a step ---------------------------------------------------------------------------------

    def state(self) -> State:
        """The model's tensors; another one for all that code is made anew for, batches apart."""
        return self._situations.now().state

    def holds_for(self, batches: Sequence[Any]) -> bool:
        """Whether there is compiled code for all of these batches, checked."""
        now = self._situations.now()
        return (
            self.training
            and not now.steps_to_wait
            and all(now.variants.look_up(Flat.of(batch)) is not None for batch in batches)
        )

    def call_with(self, tensors: Sequence[Tensor], batch: Any) -> Any:
        """Calls the compiled code with other tensors in the places of the model's.

        Args:
            tensors: as `state` has them.
            batch: one that `holds_for` holds for.
        """
        flat = Flat.of(batch)
        ready = self._situations.now().variants.look_up(flat)
        assert ready is not None
        return self._call(tensors, *ready, flat)

    def _trace(self, state: State, examples: Sequence[Any], sizes: dict[str, int]) -> tuple[Traced, ForcesFacts]:
        """The joint graph of outputs and gradients, and what else there is to a code."""
        layout = Layout.of(examples)

        def run(batch: Any, fixed: Sequence[Tensor]) -> tuple[Tree, list[Tensor], list[Tensor], list[Tensor]]:
            trained = [tensor.detach().requires_grad_() for tensor in fixed[: state.trained]]
            rest = [tensor.clone() for tensor in fixed[state.trained :]]
            with torch.enable_grad():
                result = state.call([*trained, *rest], self.model, batch)
            return *Tree.of(result), trained, rest

        def tangents(symbols: Symbols) -> list[Tensor]:
            with symbols.without_values():
                _, outputs, _, _ = run(layout.fill(symbols.sizes, symbols.leaves), symbols.like(state.tensors()))
                return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in outputs if x.requires_grad]

        def joint(
            batch: Any, fixed: list[Tensor], given: list[Tensor] | None = None
        ) -> tuple[list[Tensor | None], ForcesFacts]:
            tree, outputs, trained, rest = run(batch, fixed)
            gradients = torch.autograd.grad([x for x in outputs if x.requires_grad], trained, given, allow_unused=True)
            changed = {n: value for n, value in enumerate(rest, state.trained) if is_changed(value)}
            facts = ForcesFacts(
                layout,
                tree,
                [x.requires_grad for x in outputs],
                list(changed),
                [gradient is not None for gradient in gradients],
            )
            return [*(x.detach() for x in outputs), *changed.values(), *gradients], facts

        function = WithFacts(joint)
        traced = trace(function, layout, sizes, state.tensors(), tangents)
        return traced, function.facts

    def _lower(self, traced: tuple[Traced, ForcesFacts]) -> ForcesCode:
        """Cuts the joint graph in two, and compiles both halves."""
        joint, facts = traced
        symbols = joint.symbols
        first_fixed = len(symbols.sizes) + len(symbols.leaves)
        kept = len(facts.differentiable) + len(facts.updated)
        first, second, arguments = halves(joint, kept, [first_fixed + n for n in facts.updated])
        primals = len(joint.inputs) - sum(facts.differentiable)
        forward = lower(first, symbols, joint.inputs[:primals], range(first_fixed, primals), inference=False)
        values = [node.meta["val"] for node in second.graph.find_nodes(op="placeholder")]
        strides = strides_of(forward, symbols)[kept:]
        with symbols.without_values():  # what the first half keeps may lie otherwise in memory than it was traced
            for n, (kind, place) in enumerate(arguments):
                if kind == "saved" and isinstance(values[n], Tensor) and strides[place] is not None:
                    values[n] = values[n].as_strided(values[n].shape, strides[place])
        backward = lower(second, symbols, values, (), backward=True, inference=False)
        return ForcesCode(facts.layout, Conditions(symbols), forward, backward, facts, arguments)

    def _compare(self, state: State, code: ForcesCode, batch: Flat, sizes: dict[str, int]) -> list[parity.Difference]:
        """Differences from eager code of the outputs, and of the gradient of a loss on them; leaves everything as it was."""
        tensors = state.tensors()
        names = state.names[: state.trained]
        both = []
        for call in (lambda: self._call(state.tensors(), code, sizes, batch), lambda: self.model(apart(batch.batch))):
            with state.undisturbed() as before:
                outputs = parity.named(call())
                gradients = torch.autograd.grad(parity.probe(outputs), tensors[: len(names)], allow_unused=True)
                values = {k: v.detach() for k, v in outputs.items()}
                both.append(values | dict(zip(names, gradients, strict=True)) | state.changes(before))
        tolerance = self._tolerance or parity.tolerance_for(tensors)
        compiled, eager = both
        return parity.differences(compiled, eager, names, tolerance, describe(sizes))
