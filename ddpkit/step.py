"""One optimizer step: forward, loss, gradients, synchronisation, clipping, update.

`make_step` builds it for every strategy, compiled or not; a train loop calls it with one batch after another. Who does what
depends on when the strategy acts (`GradientSync.acts`):

| acts | `.grad` is written by | averaged by | parameters updated by |
|---|---|---|---|
| after backward | `EagerGradients`; compiled: `CompiledGradients` | `synchronize()` | `Update` |
| during backward | `EagerGradients`; compiled: through `CompiledForces` | the backward pass and `synchronize()` | `Update` |
| in graph | `CompiledGradients` | its graph (`AfterGradients.trace`) | `Update`, or its graph |

With `cuda_graphs`, `ddpkit.capture.steps.RecordedSteps` records these parts and replays them; where a strategy acts during the
backward pass, `ddpkit.capture.backward.BackwardGradients` brings gradients to it.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddpkit.compile.objective import Criterion, apart, differentiable, total
from ddpkit.compile.parity import Tally
from ddpkit.errors import InputError
from ddpkit.ranks.agree import on_the_way_to
from ddpkit.sync import GradientSync, Strategy, acts_of, attach, name_of
from ddpkit.torch_private import pytree
from ddpkit.trained import Trained, beside
from ddpkit.update import Update

if TYPE_CHECKING:
    from ddpkit.capture.steps import RecordedSteps
    from ddpkit.compile.forces import CompiledForces
    from ddpkit.compile.parity import Difference


def make_step(
    model: nn.Module,
    criterion: Criterion,
    optimizer: Optimizer,
    *,
    strategy: Strategy = "custom",
    compile: bool = False,  # noqa: A002  (the configuration's word)
    comm: str = "torch",
    clip_norm: float | None = None,
    tolerance: float | None = None,
    examples: Sequence[Any] = (),
    cuda_graphs: bool = False,
    **options: Any,
) -> "Step":
    """Builds the whole training step.

    With `compile`, the first call (or `Step.prepare`) traces the step, compiles it and checks it against eager code. Strategies
    that act after the backward pass get the gradients of one graph that holds the criterion too; for those that act during it
    (`standard`, `overlap`) the model is compiled by `ddpkit.compile_forces` and autograd goes through it.

    Whatever the optimizer holds is trained and averaged, beyond the model's parameters too. What the caller changes between steps
    is obeyed, compiled or not: frozen and unfrozen parameters, modes, all settings of the optimizer, and attributes of model,
    criterion and the objects that they hold. Where that needs other code, it is compiled then; an attribute that changes more
    than three times is better a buffer. Compiled code does not see changes of closures and globals, random numbers in it are
    refused, and with other parameters the step must be made again.

    Args:
        model: any module; called with a batch.
        criterion: called with the model's output and the batch; returns the loss as a 0-d tensor, or a dict of tensors with the
            loss under `"loss"`. Gradients of several micro-batches add up and ranks are averaged, so its terms are scaled
            with `ddpkit.global_mean`. It may have parameters of its own; with `compile` it must then be a module.
        optimizer: over the model's parameters, and others. With `fused=True` a non-finite gradient is skipped without waiting for
            the device.
        strategy: name, import path or class of the gradient synchronisation.
        compile: trace the step to one graph and compile it.
        comm: `"torch"` or `"mpi"`.
        clip_norm: upper bound of the norm of the global gradient.
        tolerance: by how much compiled and eager code may differ, relative; by default 1e-10 in float64 and 1e-4 in float32.
        examples: with `compile`, batches of other shapes than the first. In a `Batch` it is known what may vary; for other
            batches they tell, and what they do not tell costs another compilation later.
        cuda_graphs: with `compile`, record steps in CUDA graphs and replay them, so that the device does not wait for the host: a
            step whose batch has the sizes of an earlier one is recorded (`ddpkit.padding.pad` brings batches to few sizes).
            Under strategies that act during the backward pass, recordings do not see changes of closures and globals in the
            criterion either. On a CPU recordings are kept operation by operation, which shows whether a step can be recorded
            and wins nothing.
        options: passed on to the strategy.

    Raises:
        InputError: the choices do not go together.
    """
    if clip_norm is not None and not clip_norm > 0:
        raise InputError(f"clip_norm={clip_norm} is no bound for a norm: give a positive number or None.")
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("The model has no parameter to train: give one with requires_grad.")
    others = beside(model, criterion, optimizer)
    trained = Trained(optimizer, model, *others)
    core = None
    if compile and acts_of(strategy) == "during backward":
        from ddpkit.compile.forces import CompiledForces

        core = CompiledForces(model, tolerance=tolerance, examples=examples)
    sync = attach(strategy, core or model, *others, comm=comm, **options)
    if compile and core is None and sync.acts == "during backward":
        raise InputError(
            f"strategy={name_of(strategy)} makes a {sync.name}, which acts during the backward pass, and compile=True has to "
            "know that beforehand: give its class, or a functools.partial of it."
        )
    if sync.acts == "in graph" and not compile:
        raise InputError(f"strategy={name_of(strategy)} is part of the compiled step: use compile=True.")
    if cuda_graphs and not compile:
        raise InputError(
            f"cuda_graphs=True records compiled steps: use compile=True (here compile={compile}), or leave cuda_graphs out."
        )
    update = Update(trained, optimizer, clip_norm)
    gradients: Gradients
    recordable: Any
    if core is None and compile:
        from ddpkit.compile.gradients import CompiledGradients

        gradients = recordable = CompiledGradients(model, criterion, sync, optimizer, clip_norm, tolerance, examples)
    else:
        gradients = EagerGradients(sync, criterion, trained, core)
    recorded = None
    if cuda_graphs:
        from ddpkit.capture.steps import RecordedSteps

        if core is not None:
            from ddpkit.capture.backward import BackwardGradients

            recordable = BackwardGradients(core, criterion, trained, sync)
        recorded = RecordedSteps(trained, recordable, sync, update, optimizer)
    return Step(trained, sync, gradients, update, recorded)


class Step:
    """Runs one optimizer step per call; made by `make_step`.

    Attributes:
        sync: the gradient synchronisation.
        module: what computes the forward pass (the strategy's wrapper where it has one).
    """

    def __init__(
        self,
        trained: Trained,
        sync: GradientSync,
        gradients: "Gradients",
        update: Update,
        recorded: "RecordedSteps | None" = None,
    ) -> None:
        self.sync = sync
        self.module = sync.module
        self._trained = trained
        self._gradients = gradients
        self._update = update
        self._clock = Clock(trained.parameters[0].device)
        self._recorded = recorded

    def __call__(self, batch: Any, *, planned: bool = False) -> Any:
        """Trains on a batch, or on a list of micro-batches with one communication.

        Args:
            batch: what the model takes, or a list of such.
            planned: whether every rank gives batches of the same sizes at this step. With `cuda_graphs`, the communication is
                recorded together with the rest then; ranks that say this must all say it.

        Returns:
            What the criterion returned, detached; summed over micro-batches. It is this rank's share.
        """
        batches = batch if isinstance(batch, list) else [batch]
        self.prepare(batches)
        if self._recorded is None:
            return self._run(batches)
        self._clock.start()
        output = self._recorded.run(batches, planned=planned)
        if output is None:
            output = self._run(batches)
            self._recorded.note_plain()
        else:
            self._update.warn_if_skipped()
            self._clock.mark("whole")
        return output

    def _run(self, batches: list[Any]) -> Any:
        """Runs a step operation by operation."""
        for parameter in self._trained.parameters:
            parameter.grad = None
        self._clock.start()
        with self.sync.around_backward():
            output, norm = self._gradients(batches)
        self._clock.mark("compute")
        if self.sync.acts != "in graph":
            self.sync.synchronize()
        self._clock.mark("sync")
        if norm is None:
            self._update()
        else:  # the graph has updated the parameters
            self._update.note(norm)
        self._update.warn_if_skipped()
        self._clock.mark("optimizer")
        return output

    def prepare(self, batch: Any) -> None:
        """Compiles and checks the step, if that is wanted and not done. Otherwise the first call does it.

        All ranks come by together.

        Args:
            batch: a batch, or list of micro-batches, that is going to be trained on.

        Raises:
            InputError: the model, the criterion or the optimizer has other parameters than when the step was made.
            ParityError: compiled code computes something else than eager code.
        """
        with on_the_way_to("compile the step"):
            self._trained.require_same()
        batches = batch if isinstance(batch, list) else [batch]
        self._gradients.prepare(batches[0], accumulates=len(batches) > 1)

    @property
    def grad_norm(self) -> Tensor:
        """`[]`, norm of the global gradient of the last step, before clipping, on the model's device."""
        return self._update.grad_norm

    @property
    def skipped(self) -> Tensor:
        """`[]` int64, how many updates were not applied because the gradient was not finite, on the model's device.

        On a CPU each is a warning too; on a GPU the host would have to wait for that: look at this number now and then.
        """
        return self._update.skipped

    @property
    def captured_steps(self) -> int:
        """How many steps were replayed, in full or in part; 0 without `cuda_graphs`."""
        return 0 if self._recorded is None else self._recorded.count

    @property
    def recordings(self) -> int:
        """How many recordings have been made."""
        return 0 if self._recorded is None else self._recorded.made

    @property
    def seconds_recording(self) -> float:
        """Seconds spent on making them."""
        return 0.0 if self._recorded is None else self._recorded.seconds

    @property
    def seconds_compile(self) -> float:
        """Seconds spent on tracing, compiling and checking so far; 0 without `compile`."""
        return self._gradients.tally.seconds

    @property
    def eager_batches(self) -> int:
        """How many batches (micro-batches each) this rank has run eagerly so far although `compile` was asked for."""
        return self._gradients.tally.eager

    @property
    def differences(self) -> "list[Difference]":
        """How far compiled and eager code differ, for each tensor that has been compared."""
        return self._gradients.tally.differences

    @property
    def seconds(self) -> dict[str, float | None]:
        """Seconds that the last step spent on `compute`, `sync` and `optimizer`; None where they cannot be told apart.

        On a GPU, reading waits for the step to end; `timing` can be read later.
        """
        return self.timing()()

    def timing(self) -> Callable[[], dict[str, float | None]]:
        """What tells the `seconds` of the step just made, also when the next one is under way."""
        marks, separable = self._clock.marks, self.sync.separable

        def seconds() -> dict[str, float | None]:
            parts: dict[str, float | None] = {"compute": None, "sync": None, "optimizer": None}
            parts |= {name: value for name, value in self._clock.seconds(marks).items() if name in parts}
            return parts if separable else parts | {"compute": None, "sync": None}

        return seconds


class Gradients(Protocol):
    """Puts gradients into `.grad`."""

    @property
    def tally(self) -> Tally:
        """What compiled code has cost and shown so far."""

    def prepare(self, batch: Any, *, accumulates: bool = False) -> None:
        """Does what has to be done before a step; called before each."""

    def __call__(self, batches: Sequence[Any]) -> tuple[Any, Tensor | None]:
        """Runs the micro-batches of a step.

        Returns:
            The criterion's output, detached and summed over the batches; and, where the parameters have been updated as well,
            `[]`, the norm of the global gradient before clipping, else None.
        """


class EagerGradients:
    """Accumulates the gradients of micro-batches by ordinary autograd.

    Args:
        sync: its module is called.
        criterion: see `make_step`.
        trained: by what is differentiated.
        core: the compiled part of the module, if there is one.
    """

    def __init__(
        self, sync: GradientSync, criterion: Criterion, trained: Trained, core: "CompiledForces | None" = None
    ) -> None:
        self._sync, self._criterion, self._trained, self._core = sync, criterion, trained, core
        self.tally = Tally() if core is None else core.tally

    def prepare(self, batch: Any, *, accumulates: bool = False) -> None:
        """Compiles the core."""
        del accumulates
        if self._core is not None:
            self._core.prepare(batch)

    def __call__(self, batches: Sequence[Any]) -> tuple[Any, None]:
        """Returns the criterion's output, detached and summed over the batches; parameters are not updated."""
        outputs = []
        for batch in batches[:-1]:
            with self._sync.no_sync():
                outputs.append(self._backward(batch))
        outputs.append(self._backward(batches[-1]))
        return total(outputs), None

    def _backward(self, batch: Any) -> Any:
        output = self._criterion(self._sync.module(apart(batch)), batch)
        # Named, because there are other leaves: what the forces are derivatives by. Their gradients cost as much again.
        inputs = [p for p in self._trained.parameters if p.requires_grad]
        differentiable(output).backward(inputs=inputs)  # type: ignore[no-untyped-call]
        return pytree.tree_map_only(Tensor, Tensor.detach, output)


class Clock:
    """Splits a step into named parts without making the host wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Begins a step."""
        self.marks = [("start", self._now())]

    def mark(self, name: str) -> None:
        """Ends the part `name`."""
        self.marks.append((name, self._now()))

    def seconds(self, marks: list[tuple[str, Any]]) -> dict[str, float]:
        """Seconds of each part of a step; on a GPU, waits for its end."""
        if self._cuda and marks:
            marks[-1][1].synchronize()
        pairs = itertools.pairwise(marks)
        return {name: self._between(before, after) for (_, before), (name, after) in pairs}

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, before: Any, after: Any) -> float:
        return before.elapsed_time(after) / 1e3 if self._cuda else after - before  # type: ignore[no-any-return]
