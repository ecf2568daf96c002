"""The whole step as one graph: the objective, its gradients, and what follows them."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddpkit.capture.recording import as_one
from ddpkit.compile import parity
from ddpkit.compile.conditions import Conditions
from ddpkit.compile.graph import Kernel, Traced, lower, trace, traced_as
from ddpkit.compile.identity import UnknownError
from ddpkit.compile.layout import Flat, Layout, describe, sizes_of
from ddpkit.compile.objective import Criterion, Objective, differentiable, loss_of, total
from ddpkit.compile.outputs import Tree, WithFacts
from ddpkit.compile.parity import Difference
from ddpkit.compile.situations import Situation, Situations
from ddpkit.compile.snapshot import Snapshot
from ddpkit.compile.state import State
from ddpkit.compile.stored import Stored, described
from ddpkit.compile.variants import Code, Variants
from ddpkit.errors import InputError
from ddpkit.ranks.agree import on_the_way_to
from ddpkit.sync.after import AfterGradients
from ddpkit.sync.base import GradientSync
from ddpkit.torch_private import add_all, pytree


@dataclass(frozen=True)
class StepFacts:
    """What tracing a step tells beside the graph.

    Attributes:
        layout: the form of the batches.
        result: the criterion's output without its tensors.
        shown: names of the model's outputs that come after these.
        used: which trained parameters have a gradient.
    """

    layout: Layout
    result: Tree
    shown: list[str]
    used: list[bool]


@dataclass
class StepCode(Code):
    """A compiled step.

    Attributes:
        kernel: `sizes, leaves, state, tensors of what follows -> tensors of the result, shown, norm where the graph updates`.
        facts: how to read that.
    """

    kernel: Kernel
    facts: StepFacts


@dataclass(frozen=True)
class Outcome:
    """What came of a micro-batch, beside the gradients in their places.

    Attributes:
        result: the criterion's output, detached.
        shown: the model's outputs that are compared.
        used: which trained parameters have a gradient on this rank.
        norm: `[]`, of the global gradient before clipping, if the graph has updated the parameters; else None.
    """

    result: Any
    shown: dict[str, Tensor]
    used: list[bool]
    norm: Tensor | None = None


@dataclass
class StepSituation(Situation):
    """What belongs to a state of model and criterion.

    Attributes:
        after: what follows the gradients.
        variants: code, by what follows in it.
    """

    after: AfterGradients
    variants: dict[AfterGradients, Variants[StepCode]]


class CompiledGradients:
    """Brings gradients to `.grad` by compiled code, and by eager code for batches that it does not hold for.

    The strategy says what follows the gradients (`GradientSync.after_gradients`): where they are written, what is communicated,
    and whether the parameters are updated. Where model or criterion change otherwise than in the values of tensors, other code is
    used.

    Args:
        model: any module.
        criterion: see `make_step`.
        sync: the strategy.
        optimizer: steps the parameters.
        clip_norm: upper bound of the norm of the global gradient.
        tolerance: of the parity gate; None for one that suits the dtypes.
        examples: batches of other shapes, to tell what varies in them and to check with.

    Attributes:
        tally: what the code has cost and shown so far.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        sync: GradientSync,
        optimizer: Optimizer,
        clip_norm: float | None = None,
        tolerance: float | None = None,
        examples: Sequence[Any] = (),
    ) -> None:
        self._objective = Objective(model, criterion)
        self._sync, self._optimizer, self._clip_norm = sync, optimizer, clip_norm
        self._tolerance = tolerance
        self.tally = parity.Tally(list(examples))
        self._begun = False
        self._now: StepSituation
        roots = {"model": model, "criterion": criterion}
        self._situations = Situations(roots, self._make, lambda: sync.graph_form(optimizer))
        self._make(Snapshot(roots))  # refuses what can be refused before the first step

    def _make(self, snapshot: Snapshot) -> StepSituation:
        """What belongs to a state."""
        trained = self._sync.parameters
        after = self._sync.after_gradients(trained, optimizer=self._optimizer, clip_norm=self._clip_norm)
        state = State(snapshot, trained)
        return StepSituation(state, after, {one: self._make_variants(state, one) for one in (after, after.for_each)})

    def _make_variants(self, state: State, after: AfterGradients) -> Variants[StepCode]:
        return Variants(
            lambda batches, sizes: self._trace(state, after, batches, sizes),
            self._lower,
            lambda code, batch, sizes: self._compare(state, after, code, batch, sizes),
            self.tally,
            Stored(lambda: self._described(state, after), state),
            after.stand_in if after.communicates else None,
        )

    def _described(self, state: State, after: AfterGradients) -> str:
        """What the code of a state depends on."""
        if (form := after.form()) is None:
            raise UnknownError(f"what {type(after).__name__} traces")
        return described(state, after.tensors(), vars(self._objective), ["step", type(after).__qualname__, form])

    # --- a step ---------------------------------------------------------------------------------------------------

    def prepare(self, batch: Any, *, accumulates: bool = False) -> None:
        """Traces, compiles and checks, if that has not been done.

        All ranks come by together for the first time, and whenever there is something to do where the strategy says so.

        Args:
            batch: one that is going to be trained on.
            accumulates: whether more than one micro-batch is going to be given at once.

        Raises:
            ParityError: compiled code computes something else than eager code.
        """
        with on_the_way_to("compile the step"):
            now = self._now = self._situations.now()
        variants = now.variants[now.after.for_each if accumulates else now.after]
        if variants.codes or now.steps_to_wait:
            return
        now.after.before_compiling(first=not self._begun, several=accumulates)
        variants.prepare(
            batch,
            together=now.after.communicates or not self._begun,
            before_check=lambda code: now.after.note_used(code.facts.used),
        )
        self._begun = True
        self._situations.ignore(now.state.rewritten)

    def __call__(self, batches: Sequence[Any]) -> tuple[Any, Tensor | None]:
        """Runs the micro-batches of a step. `prepare` comes first.

        Returns:
            The criterion's output, detached and summed over the batches; and, where the parameters have been updated as well,
            `[]`, the norm of the global gradient before clipping, else None.
        """
        now = self._now
        after = now.after if len(batches) == 1 else now.after.for_each
        places, used = after.places, [False] * len(after.trained)
        outcomes = []
        for batch in batches:
            earlier = {n: places[n].clone() for n, is_used in enumerate(used) if is_used}
            outcome = self._run(now, after, batch)
            _add(places, earlier, outcome.used)
            used = [a or b for a, b in zip(used, outcome.used, strict=True)]
            outcomes.append(outcome)
        if after is not now.after:
            now.after.run([place if is_used else None for place, is_used in zip(places, used, strict=True)])
        after.finish()
        for parameter, place, is_present in zip(after.trained.values(), places, now.after.present(used), strict=True):
            parameter.grad = place if is_present else None
        now.steps_to_wait -= now.steps_to_wait > 0
        return total([outcome.result for outcome in outcomes]), outcomes[-1].norm

    # --- for recordings of a step ---------------------------------------------------------------------------------

    @property
    def situation(self) -> Hashable:
        """Differs for all that code is made anew for, batches apart; as of the last `prepare`."""
        return self._now.state

    def holds_for(self, batches: Sequence[Any]) -> bool:
        """Whether there is compiled code for all of these micro-batches, checked."""
        now = self._now
        variants = now.variants[now.after if len(batches) == 1 else now.after.for_each]
        return not now.steps_to_wait and all(variants.look_up(Flat.of(batch)) is not None for batch in batches)

    def tensors(self) -> list[Tensor]:
        """All tensors that a step reads and writes, beside the batch; brings settings that are read on the device there."""
        return [*self._now.state.tensors(), *self._now.after.places, *self._now.after.tensors()]

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """Those of model and criterion."""
        state = self._now.state
        return list(zip(state.names, state.tensors(), strict=True))

    def finish(self) -> None:
        """Called where a recording has brought the gradients."""
        self._now.after.finish()

    # --- a micro-batch --------------------------------------------------------------------------------------------

    def _run(self, now: StepSituation, after: AfterGradients, batch: Any) -> Outcome:
        """One micro-batch, compiled if there is code for it."""
        flat, variants = Flat.of(batch), now.variants[after]
        ready = None if now.steps_to_wait else variants.find(flat)
        if ready is not None:
            return self._compiled(now.state, after, *ready, flat)
        if after.no_eager:
            raise InputError(f"{self._why_eager(now, variants, flat)}; {after.no_eager}")
        self.tally.eager += now.steps_to_wait > 0
        result, shown, gradients = self._eager(now.state, batch)
        after.run(gradients)
        return Outcome(result, shown, [gradient is not None for gradient in gradients])

    def _why_eager(self, now: StepSituation, variants: Variants[StepCode], batch: Flat) -> str:
        if now.steps_to_wait:
            return f"{self._situations.unsteady} changes too often for the compiled step (see the warning)"
        shape = describe(sizes_of(Layout.of([batch.batch]), batch.batch))
        return f"The compiled step does not hold for a batch of {shape}{variants.cause(batch)}"

    def _compiled(
        self, state: State, after: AfterGradients, code: StepCode, sizes: dict[str, int], batch: Flat
    ) -> Outcome:
        inputs = [
            *(sizes[name] for name in code.layout.names),
            *batch.tensors(),
            *state.tensors(),
            *after.tensors(),
        ]
        with torch.no_grad():
            outputs = iter(as_one(code.kernel, inputs))
        facts = code.facts
        result = facts.result.fill(outputs)
        shown = {name: next(outputs) for name in facts.shown}
        return Outcome(result, shown, facts.used, next(outputs, None))

    def _eager(self, state: State, batch: Any) -> tuple[Any, dict[str, Tensor], list[Tensor | None]]:
        result, shown = self._objective(batch)
        trained = state.tensors()[: state.trained]
        gradients = torch.autograd.grad(differentiable(result), trained, allow_unused=True)
        detached = pytree.tree_map_only(Tensor, Tensor.detach, (result, shown))
        return *detached, list(gradients)

    # --- tracing, compiling, checking -----------------------------------------------------------------------------

    def _trace(
        self, state: State, after: AfterGradients, examples: Sequence[Any], sizes: dict[str, int]
    ) -> tuple[Traced, StepFacts]:
        """The graph, and what else there is to a code."""
        layout = Layout.of(examples)

        def step(batch: Any, fixed: list[Tensor]) -> tuple[list[Tensor | None], StepFacts]:
            parameters, others = fixed[: state.trained], fixed[state.trained : len(state.names)]
            trained = [tensor.detach().requires_grad_() for tensor in parameters]
            with torch.enable_grad():
                result, shown = state.call([*trained, *others], self._objective, batch)
                gradients = torch.autograd.grad(differentiable(result), trained, allow_unused=True)
            with torch.no_grad(), traced_as(f"{type(after).__name__}.trace()"):
                norm = after.trace(parameters, gradients, fixed[len(state.names) :])
            tree, tensors = Tree.of(result)
            outputs = [*tensors, *shown.values(), *([] if norm is None else [norm])]
            facts = StepFacts(layout, tree, list(shown), [gradient is not None for gradient in gradients])
            return [x.detach() for x in outputs], facts

        function = WithFacts(step)
        traced = trace(function, layout, sizes, [*state.tensors(), *after.tensors()])
        return traced, function.facts

    def _lower(self, traced: tuple[Traced, StepFacts]) -> StepCode:
        graph, facts = traced
        first_fixed = len(graph.symbols.sizes) + len(graph.symbols.leaves)
        kernel = lower(graph.graph, graph.symbols, graph.inputs, range(first_fixed, len(graph.inputs)))
        return StepCode(facts.layout, Conditions(graph.symbols), kernel, facts)

    def _compare(
        self, state: State, after: AfterGradients, code: StepCode, batch: Flat, sizes: dict[str, int]
    ) -> list[Difference]:
        """Differences between compiled and eager code; leaves everything as it was."""
        names, tolerance, shape = (
            list(after.trained),
            self._tolerance or parity.tolerance_for(state.tensors()),
            describe(sizes),
        )
        written = [*after.tensors(), *after.updates]
        with state.undisturbed(written) as before:
            result, shown, gradients = self._eager(state, batch.batch)
            expected = dict(zip(names, after.expected(gradients), strict=True))
            eager = {"loss": loss_of(result), **shown, **expected, **state.changes(before)}
        with state.undisturbed(written) as before:
            outcome = self._compiled(state, after, code, sizes, batch)
            brought, updated = ([x.detach().clone() for x in tensors] for tensors in (after.places, after.updates))
            present = [is_used or after.communicates for is_used in outcome.used]
            values = {name: x if has_one else None for name, x, has_one in zip(names, brought, present, strict=True)}
            compiled = {"loss": loss_of(outcome.result), **outcome.shown, **values, **state.changes(before)}
        measured = parity.differences(compiled, eager, names, tolerance, shape)
        return measured + after.differences(updated, brought, tolerance, shape)


def _add(places: Sequence[Tensor], earlier: dict[int, Tensor], used: Sequence[bool]) -> None:
    """Adds the gradients of earlier micro-batches to those of this one; puts them back where this one has none."""
    added = [n for n in earlier if used[n]]
    if added:
        add_all([places[n] for n in added], [earlier[n] for n in added])
    for n, value in earlier.items():
        if not used[n]:
            places[n].copy_(value)
