"""The whole step as one graph: energy, forces, loss and parameter gradients."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ddpkit.compile import parity
from ddpkit.compile.graph import Conditions, Kernel, Traced, lower, trace
from ddpkit.compile.layout import Layout, describe, sizes_of
from ddpkit.compile.objective import Criterion, Objective, State, differentiable, loss_of, total
from ddpkit.compile.parity import Difference
from ddpkit.compile.situations import Situations
from ddpkit.compile.snapshot import Snapshot
from ddpkit.compile.update import GraphUpdate, InGraph
from ddpkit.compile.variants import Code, Tally, Variants
from ddpkit.errors import InputError
from ddpkit.ranks.agree import PATIENT_TIMEOUT, exchange, name_ranks
from ddpkit.sync.base import GradientSync
from ddpkit.sync.flat import FlatSync
from ddpkit.sync.ingraph import InGraphSync

_NO_EAGER = "with optimizer_in_graph there is no eager code to fall back on: leave that option out."


@dataclass
class StepCode(Code):
    """A compiled step.

    Attributes:
        kernel: `sizes, leaves, state, targets -> leaves of the result, shown, norm where the graph updates`.
        result: how the criterion's output is put together.
        is_tensor: which leaves of that are tensors.
        constants: those that are not.
        shown: names of the model's outputs that follow.
        used: which trained parameters have a gradient.
        updates: whether the optimizer's step is part of it.
    """

    kernel: Kernel
    result: pytree.TreeSpec
    is_tensor: list[bool]
    constants: list[Any]
    shown: list[str]
    used: list[bool]
    updates: bool


@dataclass
class Situation:
    """What belongs to a state of model and criterion.

    Attributes:
        state: their tensors.
        trained: the parameters that are trained, by the strategy's names.
        variants: code; the second one's graph averages over ranks as well.
        update: the optimizer's step, where the graph that averages takes it.
        used: which parameters have a gradient on any rank, once that is known of the code.
        present: `[parameters]` bool, the same for the graph that averages.
        own: where gradients go that the strategy has no place for.
        steps_to_wait: before anything is compiled.
    """

    state: State
    trained: dict[str, nn.Parameter]
    variants: dict[bool, Variants[StepCode]]
    update: GraphUpdate | None
    used: dict[bool, list[bool]] = field(default_factory=dict)
    present: Tensor = field(default_factory=lambda: torch.empty(0))
    own: list[Tensor] = field(default_factory=list)
    steps_to_wait: int = 0

    def tensors(self) -> list[Tensor]:
        """The trained parameters."""
        return self.state.tensors()[: self.state.trained]


class CompiledGradients:
    """Accumulates gradients of micro-batches in `.grad` by compiled code, with eager code for batches that it does not hold for.

    The gradients are written where they stay: into the slices of `custom`'s flat buffer, into the buckets of `ingraph`, else into
    tensors made once. Where model or criterion change otherwise than in the values of tensors, other code is used.

    Args:
        model: any module.
        criterion: see `make_step`.
        sync: a strategy that acts after the backward pass, or `ingraph`.
        tolerance: of the parity gate; None for one that suits the dtypes.
        examples: batches of other shapes, to tell what varies in them and to check with.
        update: the optimizer's step, where it is part of the graph that averages.

    Attributes:
        applied: `[]`, the norm of the last gradient before clipping, if the graph has applied it; else None.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        sync: GradientSync,
        tolerance: float | None = None,
        examples: Sequence[Any] = (),
        update: InGraph | None = None,
    ) -> None:
        self._update = update
        self.applied: Tensor | None = None
        self._objective = Objective(model, criterion)
        self._sync = sync
        self._tolerance = tolerance
        self._tally = Tally(list(examples))
        self._begun = False
        self._now: Situation
        self._used: dict[bool, dict[str, bool]] = {}  # as last known, which parameters have a gradient on any rank
        roots = {"model": model, "criterion": criterion}
        self._situations = Situations(roots, self._make, tuple if update is None else update.form)
        self._make(Snapshot(roots))  # refuses what can be refused before the first step

    def _make(self, snapshot: Snapshot) -> Situation:
        """What belongs to a state."""
        trained = self._sync.parameters
        places = self._sync.views if isinstance(self._sync, InGraphSync) else trained
        if unknown := [name for name in trained if name not in places]:
            raise InputError(
                f"Parameter {unknown[0]!r} was frozen when strategy=ingraph laid out its buckets: make the step again "
                "(ddpkit.make_step) once it is to be trained."
            )
        state = State(snapshot, trained)
        update = None if self._update is None else self._update.of(trained)
        made = Situation(state, trained, {}, update)
        made.variants = {reduces: self._make_variants(made, reduces) for reduces in (False, True)}
        made.present = torch.ones(len(trained), dtype=torch.bool, device=next(iter(trained.values())).device)
        if not isinstance(self._sync, FlatSync | InGraphSync):
            made.own = [torch.empty_like(p) for p in trained.values()]
        return made

    def _make_variants(self, now: Situation, reduces: bool) -> Variants[StepCode]:
        return Variants(
            lambda batches, sizes: self._trace(now, batches, sizes, reduces),
            self._lower,
            lambda code, batch, leaves, sizes: self._compare(now, code, batch, leaves, sizes, reduces),
            self._tally,
            self._stand_in if reduces else None,
        )

    @property
    def seconds(self) -> float:
        """Spent on tracing, compiling and checking."""
        return self._tally.seconds

    @property
    def eager(self) -> int:
        """Batches run eagerly, because the compiled code does not hold for them."""
        return self._tally.eager

    @property
    def differences(self) -> list[Difference]:
        """What the checks against eager code have found."""
        return self._tally.differences

    # --- a step ---------------------------------------------------------------------------------------------------

    def prepare(self, batch: Any, *, accumulates: bool = False) -> None:
        """Traces, compiles and checks, if that has not been done.

        All ranks come by together for the first time, and with `ingraph` whenever there is something to do.

        Args:
            batch: one that is going to be trained on.
            accumulates: whether more than one micro-batch is going to be given at once.

        Raises:
            ParityError: compiled code computes something else than eager code.
        """
        now = self._now = self._situations.now()
        reduces = self._reduces(accumulates)
        variants = now.variants[reduces]
        if variants.codes or now.steps_to_wait:
            return
        in_graph = isinstance(self._sync, InGraphSync)
        if in_graph:
            self._meet(now, several=accumulates)
        variants.prepare(
            batch,
            together=in_graph or not self._begun,
            before_check=lambda code: self._note_used(now, code.used, reduces),
        )
        self._begun = True
        self._situations.ignore(now.state.rewritten)

    def _meet(self, now: Situation, *, several: bool) -> None:
        """Makes sure that all ranks compile, and the same."""
        everyone = exchange(
            "compile the step",
            [several, zlib.crc32(" ".join(now.trained).encode())],
            self._sync.timeout if self._begun else PATIENT_TIMEOUT.total_seconds(),
            "under strategy=ingraph every rank must change model, criterion and optimizer at the same step, and give several "
            "micro-batches where the others do",
        )
        unlike = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
        if not unlike:
            return
        if any(theirs[0] != several for theirs in everyone):
            raise InputError(
                f"{name_ranks([r for r, theirs in enumerate(everyone) if theirs[0]]).capitalize()} gave several micro-batches "
                "where the others gave one: under strategy=ingraph give a list of several on every rank, or one batch on each."
            )
        raise InputError(
            f"{name_ranks(unlike).capitalize()} train other parameters than rank 0: freeze and unfreeze the same ones on every "
            "rank."
        )

    def _note_used(self, now: Situation, used: Sequence[bool], reduces: bool) -> None:
        """Asks which parameters have a gradient on any rank, where that is to be alike on all."""
        if not isinstance(self._sync, InGraphSync):
            return
        anywhere = self._sync.used_anywhere(dict(zip(now.trained, used, strict=True)))
        self._used[reduces] = anywhere
        now.used[reduces] = list(anywhere.values())
        if reduces:
            now.present = torch.tensor(now.used[reduces], device=now.present.device)

    def _reduces(self, accumulates: bool) -> bool:
        return isinstance(self._sync, InGraphSync) and not accumulates

    def __call__(self, batches: Sequence[Any]) -> Any:
        """Returns the criterion's output, detached and summed over the batches. `prepare` comes first."""
        self.applied = None
        now = self._now
        reduces = self._reduces(len(batches) > 1)
        landing = self._landing(now)
        used = [False] * len(landing)
        results = []
        for batch in batches:
            before = [view.clone() if there else None for view, there in zip(landing, used, strict=True)]
            result, _, mine = self._run(now, batch, landing, reduces)
            both = [
                (view, old) for view, old, there in zip(landing, before, mine, strict=True) if old is not None and there
            ]
            if both:
                torch._foreach_add_([view for view, _ in both], [old for _, old in both])
            for view, old, there in zip(landing, before, mine, strict=True):
                if old is not None and not there:
                    view.copy_(old)
            used = [a or b for a, b in zip(used, mine, strict=True)]
            results.append(result)
        if isinstance(self._sync, InGraphSync):
            if not reduces:
                self._average(now, used)
            # alike on all ranks, lest their optimizers do different things
            known = self._used.get(reduces, {})
            used = now.used.get(reduces) or [known.get(name, True) for name in now.trained]
        if now.update is not None and self.applied is not None:
            now.update.note()
        for parameter, view, there in zip(now.trained.values(), landing, used, strict=True):
            parameter.grad = view if there else None
        now.steps_to_wait -= now.steps_to_wait > 0
        return total(results)

    def _average(self, now: Situation, used: Sequence[bool]) -> None:
        """Averages what lies in the buckets of `ingraph`, zero where this rank has no gradient."""
        assert isinstance(self._sync, InGraphSync)
        mine = {name for name, there in zip(now.trained, used, strict=True) if there}
        for name, view in self._sync.views.items():
            if name not in mine:
                view.zero_()
        self._sync.average()

    def _run(
        self, now: Situation, batch: Any, landing: list[Tensor], reduces: bool
    ) -> tuple[Any, dict[str, Tensor], list[bool]]:
        """One micro-batch, compiled if there is code for it: result, shown outputs, which gradients are there."""
        leaves, structure = pytree.tree_flatten(batch)
        found = None if now.steps_to_wait else now.variants[reduces].find(batch, leaves, structure)
        if found is not None:
            code, sizes = found
            return self._compiled(now, code, leaves, sizes, self._targets(now, landing, reduces))
        if reduces and now.update is not None:
            raise InputError(f"{self._why_eager(now, batch, leaves, structure)}; {_NO_EAGER}")
        if now.steps_to_wait:
            self._tally.eager += 1
        result, shown, gradients = self._eager(now, batch)
        with torch.no_grad():
            for view, gradient in zip(landing, gradients, strict=True):
                if gradient is not None:
                    view.copy_(gradient)
        used = [g is not None for g in gradients]
        if reduces:
            self._average(now, used)
        return result, shown, used

    def _why_eager(self, now: Situation, batch: Any, leaves: Sequence[Any], structure: pytree.TreeSpec) -> str:
        if now.steps_to_wait:
            return f"{self._situations.unsteady} changes too often for the compiled step (see the warning)"
        shape, cause = describe(sizes_of(Layout.of([batch]), batch)), now.variants[True].cause(leaves, structure)
        return f"The compiled step does not hold for a batch of {shape}{cause}"

    def _compiled(
        self, now: Situation, code: StepCode, leaves: Sequence[Any], sizes: dict[str, int], targets: list[Tensor]
    ) -> tuple[Any, dict[str, Tensor], list[bool]]:
        tensors = [leaf.contiguous() for leaf in leaves if isinstance(leaf, Tensor)]
        inputs = [
            *(sizes[name] for name in code.layout.names),
            *tensors,
            *now.state.tensors(),
            *targets,
        ]
        with torch.no_grad():
            outputs = list(code.kernel(inputs))
        if code.updates:
            self.applied = outputs.pop()
        constants, values = iter(code.constants), iter(outputs)
        result = pytree.tree_unflatten(
            [next(values) if tensor else next(constants) for tensor in code.is_tensor], code.result
        )
        return result, dict(zip(code.shown, values, strict=True)), code.used

    def _eager(self, now: Situation, batch: Any) -> tuple[Any, dict[str, Tensor], list[Tensor | None]]:
        result, shown = self._objective(batch)
        gradients = torch.autograd.grad(differentiable(result), now.tensors(), allow_unused=True)
        detached = pytree.tree_map_only(Tensor, Tensor.detach, (result, shown))
        return *detached, list(gradients)

    # --- where things are -----------------------------------------------------------------------------------------

    def _landing(self, now: Situation) -> list[Tensor]:
        """Where each trained parameter's gradient goes."""
        if not isinstance(self._sync, FlatSync | InGraphSync):
            return now.own
        views = self._sync.views
        if isinstance(self._sync, FlatSync) and set(now.trained) != set(views):
            return [torch.empty_like(p) for p in now.tensors()]  # the strategy notices at its next synchronize()
        return [views[name] for name in now.trained]

    def _targets(self, now: Situation, landing: list[Tensor], reduces: bool) -> list[Tensor]:
        """What the graph writes into, besides the state."""
        if not (reduces and isinstance(self._sync, InGraphSync)):
            return landing
        return [*self._sync.flat, *(now.update.tensors(now.present) if now.update else [])]

    # --- tracing, compiling, checking -----------------------------------------------------------------------------

    def _trace(
        self, now: Situation, examples: Sequence[Any], sizes: dict[str, int], reduces: bool
    ) -> tuple[Traced, dict[str, Any]]:
        """The graph, and what else there is to a code."""
        layout = Layout.of(examples)
        found: dict[str, Any] = {"layout": layout}
        state = now.state
        update = now.update if reduces else None

        def function(batch: Any, fixed: list[Tensor]) -> list[Tensor | None]:
            trained = [tensor.detach().requires_grad_() for tensor in fixed[: state.trained]]
            values = [*trained, *fixed[state.trained : len(state.names)]]
            with torch.enable_grad():
                result, shown = state.call(values, self._objective, batch)
                gradients = torch.autograd.grad(differentiable(result), trained, allow_unused=True)
            leaves, found["result"] = pytree.tree_flatten(result)
            found["is_tensor"] = [isinstance(leaf, Tensor) for leaf in leaves]
            found["constants"] = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
            found["shown"] = list(shown)
            found["used"] = [gradient is not None for gradient in gradients]
            targets = fixed[len(state.names) :]
            found["updates"] = update is not None
            norm: list[Tensor] = []
            with torch.no_grad():
                if reduces:
                    assert isinstance(self._sync, InGraphSync)
                    flat = targets[: len(self._sync.flat)]
                    self._sync.reduce_in_graph(dict(zip(now.trained, gradients, strict=True)), flat)
                    if update is not None:
                        slices = self._sync.slices(flat)
                        averages = [slices[name] for name in now.trained]
                        norm = [update(fixed[: state.trained], averages, flat, targets[len(flat) :])]
                else:
                    for target, gradient in zip(targets, gradients, strict=True):
                        if gradient is not None:
                            target.copy_(gradient)
            return [leaf.detach() for leaf in (*leaves, *shown.values(), *norm) if isinstance(leaf, Tensor)]

        fixed = [*state.tensors(), *self._targets(now, self._landing(now), reduces)]
        return trace(function, layout, sizes, fixed), found

    def _lower(self, traced: tuple[Traced, dict[str, Any]]) -> StepCode:
        graph, found = traced
        first_fixed = len(graph.symbols.sizes) + len(graph.symbols.leaves)
        fixed = range(first_fixed, len(graph.inputs))
        kernel = lower(graph.graph, graph.symbols, graph.inputs, fixed)
        return StepCode(kernel=kernel, conditions=Conditions(graph.symbols), **found)

    def _compare(
        self,
        now: Situation,
        code: StepCode,
        batch: Any,
        leaves: Sequence[Any],
        sizes: dict[str, int],
        reduces: bool,
    ) -> list[Difference]:
        """Differences between compiled and eager code; leaves everything as it was."""
        state = now.state.tensors()
        names, landing, tolerance = (
            list(now.trained),
            self._landing(now),
            self._tolerance or parity.tolerance_for(state),
        )
        with now.state.undisturbed() as before:
            eager = self._by_name(*self._eager(now, batch), names, reduces=reduces)
            eager |= now.state.moved(before)
        update = now.update if reduces else None
        changed = [] if update is None else [*now.tensors(), *update.tensors(now.present)]
        with now.state.undisturbed([*landing, *changed]) as before:
            result, shown, used = self._compiled(now, code, leaves, sizes, self._targets(now, landing, reduces))
            views = [view.clone() if there or reduces else None for view, there in zip(landing, used, strict=True)]
            mine = self._by_name(result, shown, views, names, reduces=False)
            mine |= now.state.moved(before)
            updated = [p.detach().clone() for p in now.tensors()] if update else []
            averages = [view.clone() for view in landing] if update else []
        shape = describe(sizes)
        found = parity.differences(mine, eager, names, tolerance, shape)
        if update is not None:
            found += update.differences(names, updated, averages, now.present, tolerance, shape)
        return found

    def _stand_in(self) -> None:
        """Takes part in a comparison of averages for which this rank has no batch: adds zeros."""
        assert isinstance(self._sync, InGraphSync)
        self._sync.averaged({})
        for body in self._sync.flat:
            self._sync.all_reduce(torch.zeros_like(body))

    def _by_name(
        self,
        result: Any,
        shown: dict[str, Tensor],
        gradients: Sequence[Tensor | None],
        names: Sequence[str],
        *,
        reduces: bool,
    ) -> dict[str, Tensor | None]:
        by_name = dict(zip(names, gradients, strict=True))
        if reduces:
            assert isinstance(self._sync, InGraphSync)
            averages = self._sync.averaged(by_name)
            by_name = {name: averages[name] for name in names}
        return {"loss": loss_of(result), **shown, **by_name}
