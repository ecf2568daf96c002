"""Gradients of recorded steps under strategies that act during the backward pass.

Such a strategy is called by autograd: by hooks on the parameters, or by a wrapper around the model. A replay calls nobody. So
gradients are computed by a recording first, in which parameters have others in their places, and then brought to the parameters
by a backward pass of one node, through the strategy's own module. In that pass it does all that it does in any step.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpkit.compile.forces import CompiledForces, Instead
from ddpkit.compile.objective import Criterion, apart, differentiable, total
from ddpkit.compile.situations import Situation, Situations
from ddpkit.compile.state import State
from ddpkit.errors import InputError
from ddpkit.sync.base import GradientSync
from ddpkit.torch_private import add_all, copy_all, pytree
from ddpkit.trained import Trained


class BackwardGradients:
    """Computes gradients apart from the strategy, and brings them to it.

    Args:
        core: the compiled model.
        criterion: see `make_step`; it runs as it is.
        trained: by what is differentiated.
        sync: the strategy; its module leads to `core`.

    Raises:
        InputError: the optimizer trains what neither the model nor the criterion holds.
    """

    def __init__(self, core: CompiledForces, criterion: Criterion, trained: Trained, sync: GradientSync) -> None:
        self._core, self._criterion, self._trained, self._sync = core, criterion, trained, sync
        self._places = [torch.empty_like(p) for p in trained.parameters]
        self._situations = Situations(
            {"criterion": criterion},
            lambda snapshot: Situation(State(snapshot, {})),
            self._look_at_model,
            "steps had to be recorded for each: from now on they run as they are",
        )
        self._of_model: State  # as of the last look
        self._now: Situation = self._situations.now()
        self._require_held()

    def _look_at_model(self) -> State:
        self._of_model = self._core.state()
        return self._of_model

    def _require_held(self) -> None:
        held = {*self._tensors(), *self._core.model.parameters()}
        for name, p in zip(self._trained.names, self._trained.parameters, strict=True):
            if p not in held:
                raise InputError(
                    f"The optimizer trains {name!r}, which neither the model nor the criterion holds, so a recording would lack "
                    "its gradient: make the criterion a torch.nn.Module that has it as a parameter, or leave cuda_graphs out."
                )

    # --- what a recording holds -----------------------------------------------------------------------------------

    def __call__(self, batches: Sequence[Any]) -> tuple[Any, None]:
        """Computes the gradients of micro-batches, summed, and puts them into `.grad`; no hook is called.

        Returns:
            The criterion's output, detached and summed over the batches; parameters are not updated.
        """
        trained = {n: p for n, p in enumerate(self._trained.parameters) if p.requires_grad}
        others: dict[Tensor, Tensor] = {p: p.detach().requires_grad_() for p in trained.values()}
        outputs, used = [], set[int]()
        for batch in batches:
            output, gradients = self._differentiate(batch, others)
            known = {n: g for n, g in zip(trained, gradients, strict=True) if g is not None}
            for bring, numbers in ((copy_all, known.keys() - used), (add_all, known.keys() & used)):
                if numbers:
                    bring([self._places[n] for n in numbers], [known[n] for n in numbers])
            used |= known.keys()
            outputs.append(output)
        for n, p in enumerate(self._trained.parameters):
            p.grad = self._places[n] if n in used else None
        return total(outputs), None

    def _differentiate(self, batch: Any, others: dict[Tensor, Tensor]) -> tuple[Any, Sequence[Tensor | None]]:
        """Those of one micro-batch, by parameters that stand in for the trained ones: nothing hangs on them, and autograd
        knows of no other stream that they were used on.
        """
        with torch.enable_grad():
            output = self._core.call_with([others.get(x, x) for x in self._of_model.tensors()], apart(batch))
            state = self._now.state
            result = state.call([others.get(x, x) for x in state.tensors()], self._criterion, output, batch)
            gradients = torch.autograd.grad(differentiable(result), list(others.values()), allow_unused=True)
        return pytree.tree_map_only(Tensor, Tensor.detach, result), gradients

    # --- which recording ------------------------------------------------------------------------------------------

    @property
    def situation(self) -> Hashable:
        """Differs for all that a step depends on, batches and the values of tensors apart."""
        self._now = self._situations.now()
        return self._now.state

    def holds_for(self, batches: Sequence[Any]) -> bool:
        """Whether steps with these micro-batches can be recorded; `situation` comes first."""
        if self._now.steps_to_wait:
            self._now.steps_to_wait -= 1
            return False
        return self._core.holds_for(batches)

    def tensors(self) -> list[Tensor]:
        """All tensors that a step reads and writes, beside the batch."""
        return [*self._tensors(), *self._places]

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """Those of model and criterion."""
        states = self._of_model, self._now.state
        return [named for state in states for named in zip(state.names, state.tensors(), strict=True)]

    def finish(self) -> None:
        """Called where a recording has brought the gradients."""

    def _tensors(self) -> list[Tensor]:
        return [*self._of_model.tensors(), *self._now.state.tensors()]

    # --- through the strategy -------------------------------------------------------------------------------------

    def through_backward(self, runs: Sequence[Callable[[], tuple[Any, None]]]) -> Any:
        """Runs recordings where the model would run, and brings their gradients by backward passes.

        Args:
            runs: of each micro-batch, what does as a call with it alone does.

        Returns:
            The criterion's output, detached and summed over the batches.
        """
        for parameter in self._trained.parameters:
            parameter.grad = None
        outputs = []
        for run in runs[:-1]:
            with self._sync.no_sync():
                outputs.append(self._bring(run, copied=True))
        outputs.append(self._bring(runs[-1], copied=len(runs) > 1))
        return total(outputs)

    def _bring(self, run: Callable[[], tuple[Any, None]], *, copied: bool) -> Any:
        """Brings what a run has computed.

        Args:
            run: see above.
            copied: whether another run writes to the same places before the step ends.
        """
        parameters = self._trained.parameters
        output: Any = None

        def instead() -> Tensor:
            nonlocal output
            before = [p.grad for p in parameters]
            output, _ = run()
            brought = [p.grad for p in parameters]
            for p, gradient in zip(parameters, before, strict=True):
                p.grad = gradient
            of_model = {*self._of_model.tensors()}  # those of them without a gradient are in the graph too, as ever
            passed = [
                (p, gradient.clone() if copied and gradient is not None else gradient)
                for p, gradient in zip(parameters, brought, strict=True)
                if p.requires_grad and (gradient is not None or p in of_model)
            ]
            return _Known.apply([gradient for _, gradient in passed], *(p for p, _ in passed))  # type: ignore[no-any-return, no-untyped-call]

        self._sync.module(Instead(instead)).backward(inputs=[p for p in parameters if p.requires_grad])
        return output


class _Known(torch.autograd.Function):
    """Its backward pass brings gradients that are known."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:  # type: ignore[override]
        ctx.gradients = gradients
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:  # type: ignore[override]
        # A tensor that nothing else holds becomes the `.grad` itself; another one is copied, by a kernel for each.
        return None, *(None if gradient is None else gradient.detach() for gradient in ctx.gradients)
