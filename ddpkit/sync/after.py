"""What follows the gradients in a compiled step.

A compiled step is one graph: the objective, its gradients, and what a strategy lets follow them. `CompiledGradients` knows this
interface alone.
"""

import warnings
import zlib
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpkit.errors import InputError
from ddpkit.ranks.agree import PATIENT_TIMEOUT, exchange, name_ranks
from ddpkit.torch_private import functional_collectives

if TYPE_CHECKING:
    from ddpkit.compile.parity import Difference
    from ddpkit.sync.base import GradientSync


class AfterGradients:
    """What a compiled step does with its gradients. This base copies each one into a tensor, which becomes its `.grad`.

    `GradientSync.after_gradients` makes one for each state of model and criterion that code is compiled for, frozen and unfrozen
    parameters included. In every method, `gradients` has one entry for each trained parameter, in the order of `trained`.

    Args:
        trained: the trained parameters by name.
        places: the tensors that the gradients are written to, one for each parameter; None to allocate them.

    Attributes:
        trained: the trained parameters by name.
        communicates: whether it communicates. If so, all ranks compile it together and run it equally often.
        no_eager: why eager code cannot replace the compiled step, as a clause of an error message; empty if it can.
        updates: the parameters that it updates itself, instead of `optimizer.step()`.
    """

    communicates: ClassVar[bool] = False
    no_eager: ClassVar[str] = ""
    updates: Sequence[nn.Parameter] = ()

    def __init__(self, trained: Mapping[str, nn.Parameter], places: Sequence[Tensor] | None = None) -> None:
        self.trained, self._given = dict(trained), places

    # --- running --------------------------------------------------------------------------------------------------

    @cached_property
    def places(self) -> list[Tensor]:
        """The tensors that hold the gradients after the step, and become `.grad`."""
        return [torch.empty_like(p) for p in self.trained.values()] if self._given is None else list(self._given)

    def tensors(self) -> list[Tensor]:
        """The tensors that `trace` reads and writes beside the gradients; the same memory at every step."""
        return self.places

    def trace(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], tensors: Sequence[Tensor]
    ) -> Tensor | None:
        """Writes the gradients to their places, by operations that can be traced. It becomes part of the graph.

        Args:
            parameters: the trained parameters.
            gradients: those of this rank; None if the loss does not depend on a parameter. They must not be modified.
            tensors: the traced counterparts of `tensors()`; write into these (`copy_`).

        Returns:
            None. If it updates the parameters: `[]`, the norm of the global gradient before clipping.
        """
        del parameters
        for place, gradient in zip(tensors, gradients, strict=True):
            if gradient is not None:
                place.copy_(gradient)
        return None

    @torch.no_grad()
    def run(self, gradients: Sequence[Tensor | None]) -> None:
        """Does the same in eager mode, for batches that the compiled code does not serve. Updates no parameters.

        With several micro-batches it is called once, with the sums that `for_each` has accumulated.

        Args:
            gradients: those of this rank; an entry may be the very tensor of `places`.
        """
        self.trace(list(self.trained.values()), gradients, self.tensors())

    @property
    def for_each(self) -> "AfterGradients":
        """What replaces this for each one of several micro-batches, whose gradients are summed in its `places`."""
        return self

    def finish(self) -> None:
        """Called after all gradients of a step were written to their places."""

    def present(self, used: Sequence[bool]) -> list[bool]:
        """Which parameters get a `.grad`; the others keep None.

        Args:
            used: which parameters have a gradient on this rank.
        """
        return list(used)

    # --- compiling and checking -----------------------------------------------------------------------------------

    def form(self) -> Hashable | None:
        """What the traced operations depend on beside the tensors: plain values, the same in every process that would trace the
        same. With them, compiled code is stored for later starts; None, where this is not known, has every start trace.
        """
        return () if type(self).trace is AfterGradients.trace else None

    def before_compiling(self, *, first: bool, several: bool) -> None:
        """Called before the first code for these parameters is traced.

        Args:
            first: whether nothing has been compiled for this step yet.
            several: whether the code is for several micro-batches.
        """

    def note_used(self, used: Sequence[bool]) -> None:
        """Called once for these parameters, after the first code was traced and before it runs.

        Args:
            used: which parameters have a gradient on this rank.
        """

    def expected(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """What compiled code should write to the places, computed in another way. The parity check compares the two.

        The check calls it before the code, with `tensors()` as the code will read them, and restores what it writes to them.

        Args:
            gradients: those of this rank, from eager code.
        """
        return list(gradients)

    def stand_in(self) -> None:
        """Runs the collectives of a check (those of `expected`, then those of the code) on a rank without a batch to check."""

    def differences(
        self, updated: Sequence[Tensor], gradients: Sequence[Tensor], tolerance: float, shape: str
    ) -> "list[Difference]":
        """How far the update is from the expected one. Parameters and optimizer are as before the code ran when this is called.

        Args:
            updated: the parameters `updates` as the compiled code left them.
            gradients: what the code wrote to the places.
            tolerance: relative difference that is allowed.
            shape: the sizes of the batch, in words.
        """
        del updated, gradients, tolerance, shape
        return []


class AverageInGraph(AfterGradients):
    """Averages the gradients over the ranks inside the compiled step, by one all-reduce for each gradient.

    To write a strategy that acts in the graph, derive from this class and override `trace`. Use `start_average` and `wait`, or
    any other operation that can be traced (`torch.ops._c10d_functional`). All ranks must run the same collectives, so a gradient
    that is None on this rank counts as zero. What else there may be to do:

    - The strategy owns tensors (buffers, the residual of a compression): override `tensors()` to list them; the `places` are
      among them or are slices of them. Tensors whose values must last belong to the strategy (`self.sync`; its `attach()` can
      make them), since model and criterion may change to a state with another `AfterGradients`. They get into checkpoints
      by `GradientSync.state_dict`.
    - Those tensors keep values from step to step: a gradient that is NaN or infinite must not get into them
      (`torch.where(torch.isfinite(...), ...)`). Of such a step, `make_step` skips the update alone.
    - The result is not the mean up to rounding: override `expected` to say what it is.
    - What is sent is not one tensor of the size of each parameter: override `GradientSync.traffic` to say what it is.

    ```python
    class OneByOneSync(ddpkit.GradientSync):
        acts = "in graph"

        def after_gradients(self, trained, **_):
            return OneByOne(self, trained)


    class OneByOne(ddpkit.AverageInGraph):
        def trace(self, parameters, gradients, tensors):
            for parameter, gradient, place in zip(parameters, gradients, tensors, strict=True):
                own = torch.zeros_like(parameter) if gradient is None else gradient
                place.copy_(self.wait(self.start_average(own)))
    ```

    Args:
        sync: the strategy.
        trained: the trained parameters by name.

    Attributes:
        sync: the strategy.
    """

    communicates = True

    def __init__(self, sync: "GradientSync", trained: Mapping[str, nn.Parameter]) -> None:
        super().__init__(trained)
        self.sync = sync
        self._used: dict[str, bool] = {}

    # --- running --------------------------------------------------------------------------------------------------

    def start_average(self, tensor: Tensor) -> Tensor:
        """Adds the start of an average of a contiguous tensor over the ranks to the graph; `wait` returns the result.

        Args:
            tensor: of any shape and floating-point dtype, the same on all ranks. It is not changed.
        """
        sync = self.sync
        if sync.world_size == 1:
            return tensor
        averages = sync.comm.averages(tensor.device)
        scaled = (
            tensor if averages else tensor * (1 / sync.world_size)
        )  # before adding, as `GradientSync.all_reduce` does
        group = dist.group.WORLD.group_name  # type: ignore[union-attr]
        return functional_collectives().all_reduce(scaled, "avg" if averages else "sum", group)  # type: ignore[no-any-return]

    def wait(self, started: Tensor) -> Tensor:
        """The result of `start_average`, of the same shape and dtype."""
        return started if self.sync.world_size == 1 else functional_collectives().wait_tensor(started)

    def trace(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], tensors: Sequence[Tensor]
    ) -> Tensor | None:
        """Starts all averages, then writes each to its place."""
        started = [
            self.start_average(torch.zeros_like(p) if gradient is None else gradient.contiguous())
            for p, gradient in zip(parameters, gradients, strict=True)
        ]
        for place, average in zip(tensors, started, strict=True):
            place.copy_(self.wait(average))
        return None

    def form(self) -> Hashable | None:
        """What an average depends on, for the strategies that are part of this package."""
        return self._form_of_average() if type(self) is AverageInGraph else None

    def _form_of_average(self) -> Hashable:
        sync = self.sync
        if sync.world_size == 1:
            return (1,)
        devices = sorted({str(p.device) for p in self.trained.values()})
        averages = [sync.comm.averages(torch.device(device)) for device in devices]
        return sync.world_size, tuple(averages), str(dist.group.WORLD.group_name)  # type: ignore[union-attr]

    @cached_property
    def for_each(self) -> "AfterGradients":
        """Writes to the same places without averaging, which is done after the last micro-batch."""
        return AfterGradients(self.trained, self.places)

    def present(self, used: Sequence[bool]) -> list[bool]:
        """The same parameters on all ranks, so that their optimizers do the same."""
        del used
        known = self._used or self.sync.used
        return [known.get(name, True) for name in self.trained]

    # --- compiling and checking -----------------------------------------------------------------------------------

    def before_compiling(self, *, first: bool, several: bool) -> None:
        """Waits until all ranks compile the same code.

        Raises:
            InputError: some train other parameters, or have been given several micro-batches where others have not.
            RankDisagreementError: some rank does not come.
        """
        strategy = f"strategy={self.sync.name}"
        everyone = exchange(
            "compile the step",
            [several, zlib.crc32(" ".join(self.trained).encode())],
            PATIENT_TIMEOUT.total_seconds() if first else self.sync.timeout,
            f"under {strategy} every rank must change model, criterion and optimizer at the same step, and give several "
            "micro-batches where the others do",
        )
        unlike = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
        if not unlike:
            return
        if any(theirs[0] != several for theirs in everyone):
            raise InputError(
                f"{name_ranks([r for r, theirs in enumerate(everyone) if theirs[0]]).capitalize()} gave several micro-batches "
                f"where the others gave one: under {strategy} give a list of several on every rank, or one batch on each."
            )
        raise InputError(
            f"{name_ranks(unlike).capitalize()} train other parameters than rank 0: freeze and unfreeze the same ones on every "
            "rank."
        )

    def note_used(self, used: Sequence[bool]) -> None:
        """Finds out which parameters have a gradient on any rank (one collective); warns of those without one on this rank."""
        self._used = self._used_anywhere(dict(zip(self.trained, used, strict=True)))
        self.sync.used |= self._used

    @torch.no_grad()
    def _used_anywhere(self, used: dict[str, bool]) -> dict[str, bool]:
        if self.sync.world_size == 1:
            return used
        flags = torch.tensor(list(used.values()), dtype=torch.int32, device=next(iter(self.trained.values())).device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        anywhere = dict(zip(used, map(bool, flags.tolist()), strict=True))
        for name, elsewhere in anywhere.items():
            if elsewhere and not used[name]:
                warnings.warn(
                    f"Parameter {name!r} has no gradient on rank {self.sync.rank} but has one elsewhere: it counts as zero "
                    "here.",
                    stacklevel=5,
                )
        return anywhere

    @torch.no_grad()
    def expected(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The mean over the ranks, by one eager collective for each parameter."""
        averages = [
            torch.zeros_like(p) if gradient is None else gradient.clone()
            for p, gradient in zip(self.trained.values(), gradients, strict=True)
        ]
        for average in averages:
            self.sync.all_reduce(average)
        return list(averages)

    @torch.no_grad()
    def stand_in(self) -> None:
        """Contributes zeros to the other ranks' averages, and restores its own tensors."""
        nothing: list[Tensor | None] = [None] * len(self.trained)
        tensors = self.tensors()
        before = [tensor.clone() for tensor in tensors]
        self.expected(nothing)
        self.run(nothing)
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
