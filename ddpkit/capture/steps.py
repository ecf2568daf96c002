"""Training steps from recordings: which one holds for a step, when to make one, when to run the step as it is.

A step is recorded when a batch of its sizes has come before, so that the first one has run as it is: optimizers have made
their state by then, and communicators exist. A recording holds for these sizes, for one state of model and criterion and for
one place of all tensors in memory; one that updates the parameters also for all settings of the optimizer. Whatever else
changes is read by the device at every replay. Where ranks communicate inside a recording, all of them must decide alike: that
is so if the sizes are those of one plan (`planned`), because everything else that is asked here is the same on all ranks by
what the strategies verify.
"""

import operator
import time
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddpkit.batch import Batch
from ddpkit.capture.backward import BackwardGradients
from ddpkit.capture.recording import make
from ddpkit.compile.gradients import CompiledGradients
from ddpkit.compile.outputs import Tree
from ddpkit.errors import RecordingError
from ddpkit.ranks.agree import exchange, name_ranks
from ddpkit.ranks.device import wait_for_event
from ddpkit.sync.base import GradientSync
from ddpkit.sync.guard import before_step
from ddpkit.torch_private import copy_all, hooks_of, note_step, pytree, version_of
from ddpkit.trained import Trained
from ddpkit.update import Update

MOST = 32  # recordings that are kept
STEADY = 20  # steps that the optimizer's settings must have stood for before its update is recorded
_FIELDS = operator.attrgetter(*(field.name for field in fields(Batch)))
_VALUES = operator.methodcaller("values")
_CONSTANTS = (int, float, str, type(None))
_REMEMBERED = 1024  # forms of batches
AHEAD = 8  # replays that the host may be ahead of the device


class RecordedSteps:
    """Runs steps from recordings where it can.

    Args:
        trained: the parameters.
        gradients: brings gradients by compiled code; `BackwardGradients` where the strategy acts during the backward pass.
        sync: the strategy.
        update: clips and steps.
        optimizer: what `update` steps.

    Attributes:
        count: steps that were run from recordings.
        made: recordings made so far.
        seconds: that making them took.
    """

    def __init__(
        self,
        trained: Trained,
        gradients: CompiledGradients | BackwardGradients,
        sync: GradientSync,
        update: Update,
        optimizer: Optimizer,
    ) -> None:
        self._trained, self._gradients, self._sync, self._update = trained, gradients, sync, update
        self._optimizer = optimizer
        self._device = trained.parameters[0].device
        self._pool: Any = None  # of the first recording, and again once all are closed
        self._recorded: OrderedDict[Hashable, _Piece] = OrderedDict()
        self._deadline = Deadline(self._device, sync.timeout)
        self._forms = Forms()
        self._stepped: weakref.WeakSet[Any] = weakref.WeakSet()  # situations that have seen a step as it is
        self._situation: Hashable = None  # of this step
        self._ready: set[Hashable] = set()  # forms and situations that steps can be recorded for
        self._values: list[Any] = []  # of the optimizer's settings, as last seen
        self._is_fixed = False  # whether none of these can change in place
        self._settings: Hashable = None
        self._steps_alike = 0
        self._held: list[Any] = []  # by the optimizer for its parameters
        self._of_optimizer: list[Tensor] = []  # the tensors of that
        self._memory: list[int] = []
        self._on_host: list[Tensor] = []  # of model and criterion, such as handles of kernels
        self._versions: list[int] = []  # of these
        self._places: tuple[int | None, ...] = ()  # of the gradients at the last update outside of their recording
        self._refused = False
        self.count = self.made = 0
        self.seconds = 0.0
        _all.add(self)

    # --- a step ---------------------------------------------------------------------------------------------------

    def run(self, batches: Sequence[Any], *, planned: bool) -> Any:
        """Runs a step from recordings; returns the criterion's output, or None where the step has to be run as it is.

        Args:
            batches: its micro-batches.
            planned: whether all ranks run batches of the same sizes at this step.
        """
        if self._refused:
            return None
        steady = self._are_settings_steady() and self._update.decides_on_device and not self._has_hooks()
        given = Given.of(batches)
        form = self._forms.number(given, planned=planned)  # what was not planned, other ranks have not seen
        self._situation = self._gradients.situation
        if form is None or len(batches) > MOST:
            return None
        average = self._sync.recordable_average() if planned or self._sync.world_size == 1 else None
        if average is None and self._sync.acts == "in graph":
            return None
        self._forget_if_moved()
        where = form, self._situation
        if where not in self._ready:
            if not self._is_ready(batches):
                return None
            self._note_ready(where)
        try:
            if average is None:
                output = self._run_apart(where, given, batches, updates=steady)
            else:
                output = self._run_together(where, given, average, updates=steady)
        except RecordingError as error:
            self._give_up(error)
            return None
        self._deadline.begin()
        self.count += 1
        return output

    def _is_ready(self, batches: Sequence[Any]) -> bool:
        """Whether there is code for the batches, and a step has run as it is since model and criterion last changed."""
        return self._situation in self._stepped and self._gradients.holds_for(batches)

    def _note_ready(self, where: Hashable) -> None:
        if len(self._ready) >= _REMEMBERED:
            self._ready.clear()
        self._ready.add(where)

    def _give_up(self, error: RecordingError) -> None:
        """Lets go of all recordings, and makes no more.

        Raises:
            RecordingError: that one, on a CPU: a part of the step has been made.
        """
        if self._device.type != "cuda":
            raise error
        self._refused = True
        self.close()
        warnings.warn(f"{error}. Steps run without recordings from now on.", stacklevel=5)

    def note_plain(self) -> None:
        """Called after a step that was run as it is."""
        if not self._refused:
            self._stepped.add(self._situation)

    def _run_together(self, where: Hashable, given: "Given", average: Callable[[], None], *, updates: bool) -> Any:
        """Gradients, average and update from one recording; the update after it where that cannot be recorded."""

        def body(batches: Sequence[Any]) -> tuple[Any, Tensor | None]:
            output, norm = self._gradients(batches)
            average()
            if norm is not None:
                self._update.note(norm)
            elif updates:
                self._update.on_device()
            return output, self._update.grad_norm if updates or norm is not None else None

        piece = self._piece(("step", where, updates and self._settings), body, given)
        with self._sync.around_recorded():
            if not piece.is_made:
                self._record_together(piece, given)
            output, norm = self._run_piece(piece, given, steps=updates)
        self._finish(norm)
        return output

    def _record_together(self, piece: "_Piece", given: "Given") -> None:
        """Records on all ranks or on none: NCCL waits for ever where some capture a collective and others do not.

        Raises:
            RecordingError: on all ranks, where it was raised on one.
        """
        error: RecordingError | None = None
        try:
            self._record(piece, given)
        except RecordingError as raised:
            error = raised
        if self._sync.averages and self._sync.world_size > 1:
            remedy = "say planned=True on all ranks or on none, with batches of the same sizes"
            told = exchange("record a step", error and str(error), self._sync.timeout, remedy)
            failed = [rank for rank, text in enumerate(told) if text is not None]
            if failed and error is None:
                error = RecordingError(f"On {name_ranks(failed)}: {told[failed[0]]}")
        if error is not None:
            raise error

    def _record(self, piece: "_Piece", given: "Given") -> None:
        self._require_here(given)
        self._deadline.wait()  # to record, torch waits for the device without a bound
        began = time.perf_counter()
        piece.record()
        self.seconds += time.perf_counter() - began

    def _run_apart(self, where: Hashable, given: "Given", batches: Sequence[Any], *, updates: bool) -> Any:
        """Gradients from a recording, then the average, then the update from another one."""
        if isinstance(self._gradients, BackwardGradients):
            output = self._run_in_backward(self._gradients, batches)
        else:
            piece = self._piece(("gradients", where), self._gradients, given)
            output, _ = self._run_piece(piece, given, steps=False)
        self._sync.synchronize()

        def body(_: Sequence[Any]) -> Tensor:
            self._update.on_device()
            return self._update.grad_norm

        norm = None
        places = tuple(None if p.grad is None else p.grad.data_ptr() for p in self._trained.parameters)
        before, self._places = self._places, places
        if updates and places == before:  # a strategy of the user's may bring them to other places at every step
            try:
                nothing = Given.of([])
                norm = self._run_piece(
                    self._piece(("update", self._settings, places), body, nothing), nothing, steps=True
                )
            except RecordingError as error:  # the average has been made, and other ranks may be able to
                self._give_up(error)
        self._finish(norm)
        return output

    def _run_in_backward(self, gradients: BackwardGradients, batches: Sequence[Any]) -> Any:
        """Each micro-batch from a recording, inside of the strategy's forward and backward pass."""
        runs = []
        for batch in batches:
            given = Given.of([batch])
            piece = self._piece(("gradients", Forms.form(given), self._situation), gradients, given)
            # Before the strategy communicates: what fails here is run as it is, on this rank alone.
            if not piece.is_recorded:
                self._record(piece, given)
            runs.append(partial(self._run_piece, piece, given, steps=False))
        with self._sync.around_backward():
            return gradients.through_backward(runs)

    def _run_piece(self, piece: "_Piece", given: "Given", *, steps: bool) -> Any:
        """Runs a piece, and does what the host does beside the device's work, which a replay leaves out.

        Args:
            piece: a recording.
            given: the batches that it computes gradients of, if it does.
            steps: whether it holds the optimizer's step.
        """
        if not piece.is_made:
            if not piece.is_recorded:
                self._record(piece, given)
            began = time.perf_counter()
            output = piece.run(given)
            self.seconds += time.perf_counter() - began
        else:
            if steps:
                before_step(self._optimizer)
                note_step(self._optimizer)
            output = piece.run(given)
            if given.leaves:
                self._gradients.finish()
        if given.leaves:
            for parameter, gradient in zip(self._trained.parameters, piece.gradients, strict=True):
                parameter.grad = gradient
        return output

    def _finish(self, norm: Tensor | None) -> None:
        """Updates, where no recording has."""
        if norm is None:
            self._update()
        else:
            self._update.grad_norm = norm

    # --- which recording ------------------------------------------------------------------------------------------

    def _are_settings_steady(self) -> bool:
        """Whether the optimizer's settings have stood for a while: a recording holds for their values."""
        groups = self._optimizer.param_groups
        values = [value for group in groups for key, value in group.items() if key != "params"]
        if self._is_fixed and len(values) == len(self._values) and all(map(operator.is_, values, self._values)):
            self._steps_alike += 1
            return self._steps_alike >= STEADY
        self._values, self._is_fixed = values, all(map(self._cannot_change, values))
        settings = tuple(
            tuple((key, _value(value, self._device)) for key, value in group.items() if key != "params")
            for group in groups
        )
        self._steps_alike = self._steps_alike + 1 if settings == self._settings else 0
        self._settings = settings
        return self._steps_alike >= STEADY

    def _cannot_change(self, value: Any) -> bool:
        """Whether a setting, as long as it is this object, is what it was, or is read by the device."""
        if isinstance(value, Tensor):
            return value.device == self._device
        return all(map(self._cannot_change, value)) if isinstance(value, tuple) else isinstance(value, _CONSTANTS)

    def _has_hooks(self) -> bool:
        """Whether somebody wants to be called at each step of the optimizer: a replay calls nobody."""
        return any(hook is not before_step for hook in hooks_of(self._optimizer))

    def _forget_if_moved(self) -> None:
        """Lets go of recordings once a tensor lies elsewhere, or one on the host has changed: they go on with what was."""
        held = [*chain.from_iterable(map(_VALUES, self._optimizer.state.values()))]
        if len(held) != len(self._held) or not all(map(operator.is_, held, self._held)):
            self._held, self._of_optimizer = held, [x for x in held if isinstance(x, Tensor)]
        memory = [*map(Tensor.data_ptr, self._gradients.tensors()), *map(Tensor.data_ptr, self._of_optimizer)]
        if memory != self._memory:
            self._memory = memory
            self._on_host = [x for _, x in self._gradients.named_tensors() if x.device != self._device]
            self.close()
        versions = [*map(version_of, self._on_host)]
        if versions != self._versions:
            self._versions = versions
            self.close()

    def _piece(self, key: Hashable, body: Callable[[Sequence[Any]], Any], given: "Given") -> "_Piece":
        """The recording for a key, made by its first run."""
        if key not in self._recorded:
            if self._pool is None and self._device.type == "cuda":
                self._pool = torch.cuda.graph_pool_handle()
            self._recorded[key] = _Piece(body, given, self._trained.parameters, self._device, self._pool)
            self.made += 1
        self._recorded.move_to_end(key)
        if len(self._recorded) > MOST:
            _, oldest = self._recorded.popitem(last=False)
            oldest.close()
        return self._recorded[key]

    def _require_here(self, given: "Given") -> None:
        """Refuses batches on the host, which a recording would take for numbers that never change.

        Raises:
            RecordingError: names a tensor.
        """
        for x in given.leaves:
            if isinstance(x, Tensor) and x.device != self._device:
                raise RecordingError(
                    f"The step cannot be recorded: a tensor of the batch, of shape {tuple(x.shape)}, lies on {x.device} and the "
                    f"parameters on {self._device}: move it there"
                )

    def close(self) -> None:
        """Lets go of all recordings. On a GPU it comes before communicators are destroyed."""
        for piece in self._recorded.values():
            piece.close()
        self._recorded.clear()
        self._ready.clear()
        # A pool that no graph uses any longer, but some tensor does (cuBLAS's workspace), is refused to further graphs.
        self._pool = None


class Given(NamedTuple):
    """The batches of a step, taken apart.

    Attributes:
        leaves: all that they hold.
        structure: how they are put together of that; the number of batches where each is a `ddpkit.Batch`.
    """

    leaves: list[Any]
    structure: Any

    @classmethod
    def of(cls, batches: Sequence[Any]) -> Self:
        """Takes batches apart."""
        if all(type(batch) is Batch for batch in batches):  # at every step, so without a walk through a tree
            return cls([value for batch in batches for value in _FIELDS(batch)], len(batches))
        return cls(*pytree.tree_flatten(list(batches)))

    def filled(self, leaves: Sequence[Any]) -> Sequence[Any]:
        """Batches of the same structure that hold other leaves."""
        if isinstance(self.structure, int):
            each = len(fields(Batch))
            return [Batch(*leaves[n * each : (n + 1) * each]) for n in range(self.structure)]
        return pytree.tree_unflatten(leaves, self.structure)  # type: ignore[no-any-return]


class Forms:
    """Numbers for what batches are but for the values of their tensors: sizes, dtypes, and what is no tensor."""

    def __init__(self) -> None:
        self._numbers: OrderedDict[Hashable, int] = OrderedDict()
        self._next = 0

    def number(self, given: Given, *, planned: bool) -> int | None:
        """The number of a form; None where it is met for the first time, or for the first time in long."""
        form = planned, self.form(given)
        number = self._numbers.pop(form, None)
        self._numbers[form] = self._next if number is None else number
        if number is None:
            self._next += 1
            if len(self._numbers) > _REMEMBERED:
                self._numbers.popitem(last=False)
        return number

    @staticmethod
    def form(given: Given) -> Hashable:
        """What batches are but for the values of their tensors."""
        kinds = [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in given.leaves]
        return given.structure, *kinds


class _Piece:
    """A recording with its own copy of the batches.

    Args:
        body: called with that copy; returns a tree of tensors.
        given: batches of the sizes that it is for.
        parameters: whose gradients it may bring.
        device: of the work.
        pool: memory that recordings share.

    Attributes:
        is_recorded: whether it is taken down, as far as that is possible without running it.
        is_made: whether it has run.
        gradients: what `.grad` of each parameter was after it was taken down.
    """

    def __init__(
        self,
        body: Callable[[Sequence[Any]], Any],
        given: Given,
        parameters: Sequence[nn.Parameter],
        device: torch.device,
        pool: Any,
    ) -> None:
        self._tensors = [n for n, leaf in enumerate(given.leaves) if isinstance(leaf, Tensor)]
        copies, self._places = _copies([given.leaves[n] for n in self._tensors])
        own = [*given.leaves]
        groups: dict[torch.dtype, list[int]] = {}  # a copy of several tensors takes one launch for each dtype
        for n, copy in zip(self._tensors, copies, strict=True):
            own[n] = copy
            groups.setdefault(copy.dtype, []).append(n)
        self._inputs = [(numbers, [own[n] for n in numbers]) for numbers in groups.values()]
        self._memory = _memory_of(copies[0]) if self._places else None
        batches = given.filled(own)
        self.gradients: list[Tensor | None] = []

        def record() -> list[Tensor]:
            self._form, tensors = Tree.of(body(batches))
            self.gradients = [p.grad for p in parameters]
            self._packing, packed = _pack(tensors)
            return packed

        self._recording = make(record, device, pool)
        self.is_recorded = self.is_made = False

    def record(self) -> None:
        """Takes it down.

        Raises:
            RecordingError: that cannot be.
        """
        self._recording.record()
        self.is_recorded = True

    def run(self, given: Given) -> Any:
        """Runs it on other batches of the same sizes; returns what the body did, in memory of its own."""
        leaves = given.leaves
        if self._memory is not None and _places([leaves[n] for n in self._tensors]) == self._places:
            self._memory.copy_(_memory_of(leaves[self._tensors[0]]))
        else:
            for numbers, own in self._inputs:
                copy_all(own, [leaves[n] for n in numbers])
        results = [result.clone() for result in self._recording.run()]
        self.is_made = True
        return self._form.fill(iter(_unpack(self._packing, results)))

    def close(self) -> None:
        """Lets go of it."""
        self._recording.close()


def _places(tensors: Sequence[Tensor]) -> list[int]:
    """Where in the memory of the first of them tensors begin, and how large that is, in bytes."""
    storage = tensors[0].untyped_storage()
    begin = storage.data_ptr()
    return [*(place - begin for place in map(Tensor.data_ptr, tensors)), storage.nbytes()]


def _memory_of(tensor: Tensor) -> Tensor:
    """`[bytes]` uint8, the whole memory that a tensor lies in."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())  # type: ignore[call-overload]


def _copies(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Copies of tensors. Where the tensors fill one piece of memory, as a loader packs a batch, the copies lie alike in another
    one, and their places are returned too: one copy of all its bytes is a copy of all tensors.
    """
    places = _places(tensors) if tensors and all(x.layout is torch.strided for x in tensors) else [0]
    used = sum(x.nbytes for x in tensors)
    if not 0 < used <= places[-1] <= 2 * used or not all(
        x.is_contiguous() and 0 <= place <= places[-1] - x.nbytes for x, place in zip(tensors, places, strict=False)
    ):
        return [x.clone(memory_format=torch.contiguous_format) for x in tensors], []
    storage = _memory_of(tensors[0]).clone().untyped_storage()
    copies = [x.new_empty(0).set_(storage, x.storage_offset(), x.shape, x.stride()) for x in tensors]  # type: ignore[call-overload]
    return copies, places


def _pack(tensors: Sequence[Tensor]) -> tuple[list[list[int]], list[Tensor]]:
    """Scalars of one dtype in one tensor, so that few have to be copied: which went where, and the tensors."""
    scalars: dict[torch.dtype, list[int]] = {}
    for n, tensor in enumerate(tensors):
        if tensor.dim() == 0:
            scalars.setdefault(tensor.dtype, []).append(n)
    groups = [*scalars.values()]
    packed = [torch.stack([tensors[n] for n in group]) for group in groups]
    rest = [n for n, tensor in enumerate(tensors) if tensor.dim()]
    return [*groups, rest], [*packed, *(tensors[n] for n in rest)]


def _unpack(packing: list[list[int]], packed: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that `_pack` was given."""
    *groups, rest = packing
    tensors = dict(zip(rest, packed[len(groups) :], strict=True))
    for group, scalars in zip(groups, packed, strict=False):
        tensors.update(zip(group, scalars.unbind(), strict=True))
    return [tensors[n] for n in range(len(tensors))]


def _value(value: Any, device: torch.device) -> Hashable:
    """A setting by its value; a tensor on the device by its identity, since the device reads it."""
    if isinstance(value, list | tuple):
        return tuple(_value(item, device) for item in value)
    if isinstance(value, Tensor):
        return _Itself(value) if value.device == device else (value.shape, tuple(value.reshape(-1).tolist()))
    return value if isinstance(value, Hashable) else _Itself(value)


class _Itself:
    """Something by its identity, which nothing else gets as long as this lives."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


class Deadline:
    """Bounds replays in time: watchdogs of communicators see what the host starts, and not what a replay does.

    Args:
        device: of the replays; nothing is watched on a CPU.
        timeout: seconds that one may take.
    """

    def __init__(self, device: torch.device, timeout: float) -> None:
        self._device, self._timeout = device, timeout
        self._events: deque[tuple[torch.cuda.Event, float]] = deque()

    def begin(self) -> None:
        """Called after each replay: waits for one that is `AHEAD` back, no longer than the timeout.

        Raises:
            torch.distributed.DistError: it has not ended by then.
        """
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._events.append((event, time.monotonic()))
        self.wait(AHEAD)

    def wait(self, keep: int = 0) -> None:
        """Waits for all replays but the last `keep`.

        Raises:
            as `begin`.
        """
        while len(self._events) > keep:
            oldest, began = self._events.popleft()
            wait_for_event(oldest, began, self._timeout, "A replayed step")


_all: "weakref.WeakSet[RecordedSteps]" = weakref.WeakSet()


def close_all() -> None:
    """Lets go of all recordings of this process: `ddpkit.ranks.group.shutdown` does before communicators are destroyed."""
    for steps in list(_all):
        steps.close()
