"""What follows the gradients in a compiled step.

A compiled step is one graph: the objective, its gradients, and what a strategy lets follow them. `CompiledGradients` knows this
interface alone.
"""

import warnings
import zlib
from collections.abc import Mapping, Sequence
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
    """Copies each gradient to the tensor where it stays: what follows for strategies that average in `synchronize()`.

    Made by `GradientSync.after_gradients`, once for each set of trained parameters. Everywhere, gradients come as a list with one
    for each of them, in the order of `trained`.

    Args:
        trained: the trained parameters by name.
        places: where the gradients go; without, tensors are made once.

    Attributes:
        communicates: whether ranks communicate in it, so that all of them compile it together and run it equally often.
        no_eager: why a batch cannot be run without compiled code, as a part of a sentence; empty where it can.
        updates: parameters that it updates, so that the optimizer need not.
    """

    communicates: ClassVar[bool] = False
    no_eager: ClassVar[str] = ""
    updates: Sequence[nn.Parameter] = ()

    def __init__(self, trained: Mapping[str, nn.Parameter], places: Sequence[Tensor] | None = None) -> None:
        self.trained, self._given = dict(trained), places

    # --- running --------------------------------------------------------------------------------------------------

    @cached_property
    def places(self) -> list[Tensor]:
        """Where each gradient is in the end: what becomes `.grad`."""
        return [torch.empty_like(p) for p in self.trained.values()] if self._given is None else list(self._given)

    def tensors(self) -> list[Tensor]:
        """What `trace` is given to read and to write beside gradients; the same memory at every step."""
        return self.places

    def trace(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], tensors: Sequence[Tensor]
    ) -> Tensor | None:
        """Becomes part of the graph: brings the gradients to their places, by operations that can be traced.

        Args:
            parameters: the trained ones.
            gradients: of this rank; None where the loss does not depend on a parameter. They are not to be changed.
            tensors: what stands for `tensors()` while tracing; write into these (`copy_`).

        Returns:
            None; or, where it has updated the parameters, `[]`, the norm of the global gradient before clipping.
        """
        del parameters
        for place, gradient in zip(tensors, gradients, strict=True):
            if gradient is not None:
                place.copy_(gradient)
        return None

    @torch.no_grad()
    def run(self, gradients: Sequence[Tensor | None]) -> None:
        """The same without a graph, for batches that the compiled code does not hold for; updates nothing.

        Also called with the sums over several micro-batches, where each was followed by `for_each` alone.

        Args:
            gradients: of this rank; one may be its own place.
        """
        self.trace(list(self.trained.values()), gradients, self.tensors())

    @property
    def for_each(self) -> "AfterGradients":
        """What follows the gradients of each of several micro-batches instead; they are added up in its `places`."""
        return self

    def finish(self) -> None:
        """Called when all gradients of a step are in their places."""

    def present(self, used: Sequence[bool]) -> list[bool]:
        """Which parameters get a `.grad`.

        Args:
            used: which have a gradient on this rank.
        """
        return list(used)

    # --- compiling and checking -----------------------------------------------------------------------------------

    def before_compiling(self, *, first: bool, several: bool) -> None:
        """Called before the first code for these parameters is traced.

        Args:
            first: whether it is the first code of the step at all.
            several: whether it is for several micro-batches.
        """

    def note_used(self, used: Sequence[bool]) -> None:
        """Called with what the first code for these parameters has told, before it is run.

        Args:
            used: which parameters have a gradient on this rank.
        """

    def expected(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """What compiled code has to bring to the places, computed in another way: the check compares the two.

        Args:
            gradients: of this rank, from eager code.
        """
        return list(gradients)

    def stand_in(self) -> None:
        """Communicates as a check does (`expected`, then the code), for a rank that has no batch to check with."""

    def differences(
        self, updated: Sequence[Tensor], gradients: Sequence[Tensor], tolerance: float, shape: str
    ) -> "list[Difference]":
        """How far the update is from what it should be; called with all as it was before the code ran.

        Args:
            updated: what the code has made of `updates`.
            gradients: what it has brought to the places.
            tolerance: allowed.
            shape: the sizes of the batch, in words.
        """
        del updated, gradients, tolerance, shape
        return []


class AverageInGraph(AfterGradients):
    """Averages the gradients over the ranks inside the compiled step; here by one all-reduce for each.

    A strategy of your own that lives in the graph derives from this and overrides `trace`, for which there are
    `start_average` and `wait`, or any other operation that can be traced (`torch.ops._c10d_functional`). All ranks must
    communicate alike in it, so what is None on this rank counts as zero. Where it keeps tensors of its own (buffers, what
    compression has left over), `tensors()` lists them, and `places` are among them or slices of them. Where the result is not
    the mean to within rounding, `expected` says what it is instead.

    ```python
    class Mine(ddpkit.GradientSync):
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
    """

    communicates = True

    def __init__(self, sync: "GradientSync", trained: Mapping[str, nn.Parameter]) -> None:
        super().__init__(trained)
        self._sync = sync
        self._used: dict[str, bool] = {}

    # --- running --------------------------------------------------------------------------------------------------

    def start_average(self, tensor: Tensor) -> Tensor:
        """Starts averaging a contiguous tensor over the ranks, as a node of the graph; `wait` gives the result."""
        sync = self._sync
        if sync.world_size == 1:
            return tensor
        averages = sync.comm.averages(tensor.device)
        scaled = (
            tensor if averages else tensor * (1 / sync.world_size)
        )  # before adding, as `GradientSync.all_reduce` does
        group = dist.group.WORLD.group_name  # type: ignore[union-attr]
        return functional_collectives().all_reduce(scaled, "avg" if averages else "sum", group)  # type: ignore[no-any-return]

    def wait(self, started: Tensor) -> Tensor:
        """The average that `start_average` has begun."""
        return started if self._sync.world_size == 1 else functional_collectives().wait_tensor(started)

    def trace(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], tensors: Sequence[Tensor]
    ) -> Tensor | None:
        """Starts all averages, then brings each to its place."""
        started = [
            self.start_average(torch.zeros_like(p) if gradient is None else gradient.contiguous())
            for p, gradient in zip(parameters, gradients, strict=True)
        ]
        for place, average in zip(tensors, started, strict=True):
            place.copy_(self.wait(average))
        return None

    @cached_property
    def for_each(self) -> "AfterGradients":
        """Copies them to the same places; nothing is averaged before the last micro-batch."""
        return AfterGradients(self.trained, self.places)

    def present(self, used: Sequence[bool]) -> list[bool]:
        """Alike on all ranks, lest their optimizers do different things."""
        del used
        known = self._used or self._sync.used
        return [known.get(name, True) for name in self.trained]

    # --- compiling and checking -----------------------------------------------------------------------------------

    def before_compiling(self, *, first: bool, several: bool) -> None:
        """Waits until all ranks have come to compile the same.

        Raises:
            InputError: some train other parameters, or have been given several micro-batches where others have not.
            RankDisagreementError: some rank does not come.
        """
        strategy = f"strategy={self._sync.name}"
        everyone = exchange(
            "compile the step",
            [several, zlib.crc32(" ".join(self.trained).encode())],
            PATIENT_TIMEOUT.total_seconds() if first else self._sync.timeout,
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
        """Asks which parameters have a gradient on any rank (one collective); warns of those that have none on this one."""
        self._used = self._used_anywhere(dict(zip(self.trained, used, strict=True)))
        self._sync.used |= self._used

    @torch.no_grad()
    def _used_anywhere(self, used: dict[str, bool]) -> dict[str, bool]:
        if self._sync.world_size == 1:
            return used
        flags = torch.tensor(list(used.values()), dtype=torch.int32, device=next(iter(self.trained.values())).device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        anywhere = dict(zip(used, map(bool, flags.tolist()), strict=True))
        for name, elsewhere in anywhere.items():
            if elsewhere and not used[name]:
                warnings.warn(
                    f"Parameter {name!r} has no gradient on rank {self._sync.rank} but has one elsewhere: it counts as zero "
                    "here.",
                    stacklevel=5,
                )
        return anywhere

    @torch.no_grad()
    def expected(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The mean over the ranks, by one collective for each parameter outside of a graph."""
        averages = [
            torch.zeros_like(p) if gradient is None else gradient.clone()
            for p, gradient in zip(self.trained.values(), gradients, strict=True)
        ]
        for average in averages:
            self._sync.all_reduce(average)
        return list(averages)

    @torch.no_grad()
    def stand_in(self) -> None:
        """Adds zeros to the other ranks' gradients, and leaves everything as it was."""
        nothing: list[Tensor | None] = [None] * len(self.trained)
        tensors = self.tensors()
        before = [tensor.clone() for tensor in tensors]
        self.expected(nothing)
        self.run(nothing)
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
