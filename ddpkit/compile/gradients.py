"""The whole step as one graph: energy, forces, loss and parameter gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ddpkit.compile import parity
from ddpkit.compile.graph import Conditions, Kernel, Traced, lower, trace
from ddpkit.compile.layout import Layout, describe, sizes_of
from ddpkit.compile.objective import Criterion, Objective, State, loss_of, total, undisturbed
from ddpkit.compile.parity import Difference
from ddpkit.compile.update import GraphUpdate
from ddpkit.compile.variants import Code, Variants
from ddpkit.errors import InputError
from ddpkit.sync.base import GradientSync
from ddpkit.sync.flat import FlatSync
from ddpkit.sync.ingraph import InGraphSync


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


class CompiledGradients:
    """Accumulates gradients of micro-batches in `.grad` by compiled code, with eager code for batches that it does not hold for.

    The gradients are written where they stay: into the slices of `custom`'s flat buffer, into the buckets of `ingraph`, else into
    tensors made once.

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
        update: GraphUpdate | None = None,
    ) -> None:
        self._update = update
        self.applied: Tensor | None = None
        self._objective = Objective(model, criterion)
        self._modules = list(self._objective.modules())[1:]
        self._sync = sync
        self._tolerance = tolerance
        self._parameters = list(model.parameters())
        self._kind: tuple[bool, ...] = ()
        # whether the graph averages over ranks as well
        self._variants = {reduces: self._make_variants(examples, reduces) for reduces in (False, True)}
        self._used: dict[bool, list[bool]] = {}  # which parameters have a gradient on any rank
        self._present = torch.empty(0)  # the same for the graph that averages, on the device
        self._note_kind()

    def _make_variants(self, examples: Sequence[Any], reduces: bool) -> Variants[StepCode]:
        return Variants(
            lambda batches, sizes: self._trace(batches, sizes, reduces),
            self._lower,
            lambda code, batch, leaves, sizes: self._compare(code, batch, leaves, sizes, reduces),
            examples,
            grows=not reduces,  # what averages is made by all ranks together
        )

    @property
    def seconds(self) -> float:
        """Spent on tracing, compiling and checking."""
        return sum(variants.seconds for variants in self._variants.values())

    @property
    def eager(self) -> int:
        """Batches run eagerly, because the compiled code does not hold for them."""
        return sum(variants.eager for variants in self._variants.values())

    @property
    def differences(self) -> list[Difference]:
        """What the checks against eager code have found."""
        return [difference for variants in self._variants.values() for difference in variants.differences]

    # --- a step ---------------------------------------------------------------------------------------------------

    def prepare(self, batch: Any, *, accumulates: bool = False) -> None:
        """Traces, compiles and checks, if that has not been done. All ranks come by together.

        Args:
            batch: one that is going to be trained on.
            accumulates: whether more than one micro-batch is going to be given at once.

        Raises:
            ParityError: compiled code computes something else than eager code.
        """
        self._note_kind()
        variants = self._variants[self._reduces(accumulates)]
        if not variants.codes:
            variants.prepare(batch)
            self._note_used(variants.codes[-1].used, self._reduces(accumulates))

    def _note_used(self, used: Sequence[bool], reduces: bool) -> None:
        """Asks once which parameters have a gradient on any rank, where that is to be alike on all."""
        if not isinstance(self._sync, InGraphSync) or reduces in self._used:
            return
        self._used[reduces] = self._sync.used_anywhere(used)
        if reduces:
            self._present = torch.tensor(self._used[reduces], device=self._trained()[0].device)

    def _updates(self, reduces: bool) -> GraphUpdate | None:
        """The optimizer's step, if it is part of the graph."""
        return self._update if reduces else None

    def _reduces(self, accumulates: bool) -> bool:
        return isinstance(self._sync, InGraphSync) and not accumulates

    def __call__(self, batches: Sequence[Any]) -> Any:
        """Returns the criterion's output, detached and summed over the batches."""
        self.prepare(batches[0], accumulates=len(batches) > 1)
        self.applied = None
        reduces = self._reduces(len(batches) > 1)
        landing = self._landing()
        used = [False] * len(landing)
        results = []
        for batch in batches:
            before = [view.clone() if there else None for view, there in zip(landing, used, strict=True)]
            result, _, mine = self._run(batch, landing, reduces)
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
                self._sync.average()
            used = self._used[reduces]  # alike on all ranks, lest their optimizers do different things
        if self._update is not None and self.applied is not None:
            self._update.note()
        for parameter, view, there in zip(self._trained(), landing, used, strict=True):
            parameter.grad = view if there else None
        return total(results)

    def _run(self, batch: Any, landing: list[Tensor], reduces: bool) -> tuple[Any, dict[str, Tensor], list[bool]]:
        """One micro-batch, compiled if there is code for it: result, shown outputs, which gradients are there."""
        leaves, structure = pytree.tree_flatten(batch)
        found = self._variants[reduces].find(batch, leaves, structure)
        if found is not None:
            code, sizes = found
            return self._compiled(code, leaves, sizes, self._targets(landing, reduces))
        if self._updates(reduces):
            cause = self._variants[reduces].cause(leaves, structure)
            raise InputError(
                f"The compiled step does not hold for a batch of {describe(sizes_of(Layout.of([batch]), batch))}{cause}; with "
                "optimizer_in_graph there is no eager code to fall back on: leave that option out."
            )
        result, shown, gradients = self._eager(batch)
        with torch.no_grad():
            for view, gradient in zip(landing, gradients, strict=True):
                if gradient is not None:
                    view.copy_(gradient)
                elif reduces:
                    view.zero_()
        if reduces:
            assert isinstance(self._sync, InGraphSync)
            self._sync.average()
        return result, shown, [g is not None for g in gradients]

    def _compiled(
        self, code: StepCode, leaves: Sequence[Any], sizes: dict[str, int], targets: list[Tensor]
    ) -> tuple[Any, dict[str, Tensor], list[bool]]:
        tensors = [leaf.contiguous() for leaf in leaves if isinstance(leaf, Tensor)]
        inputs = [
            *(sizes[name] for name in code.layout.names),
            *tensors,
            *self._state.tensors(),
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

    def _eager(self, batch: Any) -> tuple[Any, dict[str, Tensor], list[Tensor | None]]:
        result, shown = self._objective(batch)
        gradients = torch.autograd.grad(loss_of(result), self._trained(), allow_unused=True)
        detached = pytree.tree_map_only(Tensor, Tensor.detach, (result, shown))
        return *detached, list(gradients)

    # --- where things are -----------------------------------------------------------------------------------------

    def _note_kind(self) -> None:
        """Forgets the code where another set of parameters is trained, or modules have changed between train and eval."""
        kind = (*(p.requires_grad for p in self._parameters), *(m.training for m in self._modules))
        if kind == self._kind:
            return
        self._kind = kind
        for variants in self._variants.values():
            variants.clear()
        self._used.clear()
        self._state = State(self._objective, [p for p in self._parameters if p.requires_grad])
        self._present = torch.ones(self._state.trained, dtype=torch.bool, device=self._parameters[0].device)
        if self._update is not None:
            self._update.adopt(self._trained())
        if not isinstance(self._sync, FlatSync | InGraphSync):
            self._own = [torch.empty_like(p) for p in self._trained()]

    def _trained(self) -> list[Tensor]:
        return self._state.tensors()[: self._state.trained]

    def _names(self) -> list[str]:
        return [name.removeprefix("model.") for name in self._state.names[: self._state.trained]]

    def _landing(self) -> list[Tensor]:
        """Where each trained parameter's gradient goes."""
        if not isinstance(self._sync, FlatSync | InGraphSync):
            return self._own
        views = self._sync.views
        names = self._names()
        if set(names) != set(views):
            if isinstance(self._sync, InGraphSync):
                raise InputError(
                    "Parameters were frozen or unfrozen after make_step(strategy='ingraph'): make the step again."
                )
            return [torch.empty_like(p) for p in self._trained()]  # the strategy notices at its next synchronize()
        return [views[name] for name in names]

    def _targets(self, landing: list[Tensor], reduces: bool) -> list[Tensor]:
        """What the graph writes into, besides the state."""
        if not (reduces and isinstance(self._sync, InGraphSync)):
            return landing
        update = self._updates(reduces)
        return [*self._sync.flat, *(update.tensors(self._present) if update else [])]

    # --- tracing, compiling, checking -----------------------------------------------------------------------------

    def _trace(self, examples: Sequence[Any], sizes: dict[str, int], reduces: bool) -> tuple[Traced, dict[str, Any]]:
        """The graph, and what else there is to an code."""
        layout = Layout.of(examples)
        found: dict[str, Any] = {"layout": layout}
        state = self._state

        def function(batch: Any, fixed: list[Tensor]) -> list[Tensor | None]:
            values = dict(zip(state.names, fixed, strict=False))
            trained = {name: values[name].detach().requires_grad_() for name in state.names[: state.trained]}
            with torch.enable_grad():
                result, shown = state.call({**values, **trained}, batch)
                gradients = torch.autograd.grad(loss_of(result), list(trained.values()), allow_unused=True)
            leaves, found["result"] = pytree.tree_flatten(result)
            found["is_tensor"] = [isinstance(leaf, Tensor) for leaf in leaves]
            found["constants"] = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
            found["shown"] = list(shown)
            found["used"] = [gradient is not None for gradient in gradients]
            targets = fixed[len(state.names) :]
            update = self._updates(reduces)
            found["updates"] = update is not None
            norm: list[Tensor] = []
            with torch.no_grad():
                if reduces:
                    assert isinstance(self._sync, InGraphSync)
                    flat = targets[: len(self._sync.flat)]
                    self._sync.reduce_in_graph(gradients, flat)
                    if update is not None:
                        slices = self._sync.slices(flat)
                        averages = [slices[name] for name in self._names()]
                        norm = [update(fixed[: state.trained], averages, flat, targets[len(flat) :])]
                else:
                    for target, gradient in zip(targets, gradients, strict=True):
                        if gradient is not None:
                            target.copy_(gradient)
            return [leaf.detach() for leaf in (*leaves, *shown.values(), *norm) if isinstance(leaf, Tensor)]

        fixed = [*state.tensors(), *self._targets(self._landing(), reduces)]
        return trace(function, layout, sizes, fixed), found

    def _lower(self, traced: tuple[Traced, dict[str, Any]]) -> StepCode:
        graph, found = traced
        first_fixed = len(graph.symbols.sizes) + len(graph.symbols.leaves)
        fixed = range(first_fixed, len(graph.inputs))
        kernel = lower(graph.graph, graph.symbols, graph.inputs, fixed)
        return StepCode(kernel=kernel, conditions=Conditions(graph.symbols), **found)

    def _compare(
        self, code: StepCode, batch: Any, leaves: Sequence[Any], sizes: dict[str, int], reduces: bool
    ) -> list[Difference]:
        """Differences between compiled and eager code; leaves everything as it was."""
        state = self._state.tensors()
        buffers, tolerance = state[self._state.trained :], self._tolerance or parity.tolerance_for(state)
        names, landing = self._names(), self._landing()
        with undisturbed(buffers) as before:
            eager = self._by_name(*self._eager(batch), names, reduces=reduces)
            eager |= self._state.moved(before)
        update = self._updates(reduces)
        self._note_used(code.used, reduces)
        changed = [] if update is None else [*self._trained(), *update.tensors(self._present)]
        with undisturbed([*buffers, *landing, *changed]) as before:
            result, shown, used = self._compiled(code, leaves, sizes, self._targets(landing, reduces))
            views = [view.clone() if there or reduces else None for view, there in zip(landing, used, strict=True)]
            mine = self._by_name(result, shown, views, names, reduces=False)
            mine |= self._state.moved(before[: len(buffers)])
            updated = [p.detach().clone() for p in self._trained()] if update else []
            averages = [view.clone() for view in landing] if update else []
        shape = describe(sizes)
        found = parity.differences(mine, eager, names, tolerance, shape)
        if update is not None:
            found += update.differences(names, updated, averages, self._present, tolerance, shape)
        return found

    def _by_name(
        self,
        result: Any,
        shown: dict[str, Tensor],
        gradients: Sequence[Tensor | None],
        names: Sequence[str],
        *,
        reduces: bool,
    ) -> dict[str, Tensor | None]:
        if reduces:
            assert isinstance(self._sync, InGraphSync)
            gradients = self._sync.averaged(gradients)
        return {"loss": loss_of(result), **shown, **dict(zip(names, gradients, strict=True))}
