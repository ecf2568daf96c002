"""What every strategy of gradient synchronisation has in common."""

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ddpkit.capture.recording import as_one
from ddpkit.errors import InputError
from ddpkit.ranks.launchers import place
from ddpkit.ranks.watch import Watch
from ddpkit.sync import agreement
from ddpkit.sync.after import AfterGradients
from ddpkit.sync.comm import make_comm
from ddpkit.sync.guard import Guard
from ddpkit.sync.modules import Modules

Acts = Literal["after backward", "during backward", "in graph"]


@dataclass(frozen=True)
class SyncStats:
    """What the last `synchronize()` did.

    Attributes:
        calls: how many times `synchronize()` has communicated so far.
        bytes: handed to collectives by this rank (the payload, flags included).
        collectives: number of collectives.
        seconds: from its start to its end; on a GPU, the device's time.
    """

    calls: int
    bytes: int
    collectives: int
    seconds: float


class GradientSync:
    """Base of all strategies: after `synchronize()` every `.grad` is the mean over ranks, on every rank.

    Making one verifies that all ranks hold the same model and copies rank 0's parameters and buffers to all. A strategy of your
    own overrides at most two methods:

    - `reduce()`: average the gradients of `self.parameters` over the ranks. Called by `synchronize()`.
    - `attach()`: optional; set up what `reduce()` needs. Called once, at the end of the constructor.

    Both may use `self.all_reduce(tensor)`, which averages a tensor in place and does the counting for `stats`.

    ```python
    class Plain(ddpkit.GradientSync):
        def reduce(self):
            for parameter in self.parameters.values():
                self.all_reduce(parameter.grad)
    ```

    One that acts while autograd runs, by hooks or a wrapper, or between micro-batches, says so: `acts = "during backward"`. One
    that acts inside the compiled step (`acts = "in graph"`) overrides `after_gradients()` instead of `reduce()`; see
    `ddpkit.AverageInGraph`. Options of its own are arguments of its constructor, which hands on the others; those that ranks must
    choose alike are added to `agreed_options`. What it keeps from step to step, such as the residual of a compression, goes into
    checkpoints by `state_dict()` and `load_state_dict()`.

    Args:
        module: any module; its parameters are what is synchronised.
        others: further modules with trained parameters, such as a criterion with learned weights. Their parameters are treated
            as the model's; `parameters` has them as `ClassName.parameter`.
        comm: `"torch"` or `"mpi"`; which ones a strategy serves is in its `comms`.
        timeout: seconds after which a rank that waits inside `synchronize()` gives up and says who is missing.
        check_every: compare checksums of all parameters over the ranks every so many `synchronize()` (0: never).

    Attributes:
        used: where it acts in the graph, which parameters have a gradient on any rank, as last known.

    Raises:
        InputError: options that do not go together, or no process group under a launcher.
        RankDisagreementError: on all ranks, where their models differ.
    """

    name: ClassVar[str]  # what messages call it; the class's name unless given
    comms: ClassVar[tuple[str, ...]] = ("torch",)  # what it can communicate through
    acts: ClassVar[Acts] = "after backward"  # in `synchronize()`, while autograd runs, or as part of the compiled step
    averages: ClassVar[bool] = True  # whether ranks are to stay alike

    def __init_subclass__(cls, **options: Any) -> None:
        """Names the class.

        Raises:
            InputError: it does not say when it acts, or says it in another way.
        """
        super().__init_subclass__(**options)
        if "name" not in vars(cls):
            cls.name = cls.__name__
        if old := [flag for flag in ("separable", "plain_loop") if flag in vars(cls)]:
            raise InputError(
                f"{cls.__name__} sets {old[0]}, which is no longer asked for: say when it acts instead, "
                'acts = "during backward" for hooks and wrappers, acts = "in graph" for what is part of the compiled step.'
            )
        if cls.acts not in get_args(Acts):
            raise InputError(
                f"{cls.__name__} sets acts = {cls.acts!r}: use one of {', '.join(map(repr, get_args(Acts)))}."
            )

    def __init__(
        self,
        module: nn.Module,
        *others: nn.Module,
        comm: str = "torch",
        timeout: float = 600.0,
        check_every: int = 0,
    ) -> None:
        if comm not in self.comms:
            raise InputError(f"{type(self).__name__} communicates through {' or '.join(self.comms)}, not comm={comm}.")
        if not timeout > 0 or check_every < 0:
            raise InputError(f"timeout={timeout} must be positive and check_every={check_every} not negative.")
        _require_process_group()
        self._module = module
        self._modules = Modules(module, *others)
        self._paused = False
        self._calls = 0
        self._check_every = check_every
        self._seconds = 0.0
        self._sent = 0, 0
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self.used: dict[str, bool] = {}
        self.comm = make_comm(comm, timedelta(seconds=timeout))
        self.rank, self.world_size = self.comm.rank, self.comm.world_size
        self.timeout = timeout
        self._watch = Watch(timeout, aborts=comm == "mpi") if self.world_size > 1 else None
        description = [*self._describe(), *agreement.describe(self._modules)]
        if self._watch is not None:
            with self._watch.waiting(0):
                agreement.barrier(timeout)
                agreement.verify(description)
                agreement.broadcast(self._modules)
        self._cuda = any(p.is_cuda for _, p in self._modules.named_parameters())
        self._guard = Guard(self._modules, averaged=self.averages and self.world_size > 1, look=self._look_back)
        self.attach()

    @property
    def module(self) -> nn.Module:
        """What is called in the forward pass: the module itself unless the strategy wraps it."""
        return self._module

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters of all modules by name, shared ones once."""
        return {name: p for name, p in self._modules.named_parameters() if p.requires_grad}

    @property
    def separable(self) -> bool:
        """Whether a clock on the host or the device's stream can tell compute from communication."""
        return self.acts == "after backward"

    @property
    def agreed_options(self) -> dict[str, object]:
        """What ranks must have chosen alike; for a strategy to extend by its own."""
        return {"check_every": self._check_every}

    def _describe(self) -> agreement.Description:
        kind = type(self)
        return [
            (
                "strategy",
                f"{kind.__module__}.{kind.__qualname__}",
                {"comm": type(self.comm).__name__, **self.agreed_options},
            )
        ]

    def attach(self) -> None:
        """Sets up what `reduce()` needs; for a strategy to override."""

    def reduce(self) -> None:
        """Averages the gradients over the ranks; for a strategy to override."""
        if self.acts == "in graph":
            raise InputError(
                f"strategy={self.name} averages inside the compiled step: use ddpkit.make_step(..., strategy={self.name!r}, "
                "compile=True)."
            )
        raise NotImplementedError(f"{type(self).__name__} must override reduce().")

    @torch.no_grad()
    def all_reduce(self, tensor: Tensor) -> None:
        """Averages a contiguous tensor of any shape over the ranks, in place. On a GPU, the host does not wait."""
        if self.world_size > 1 and not self.comm.averages(tensor.device):
            tensor.mul_(1 / self.world_size)  # before adding, as DistributedDataParallel and NCCL do
        as_one(self._communicate, [tensor])

    def _communicate(self, tensors: list[Tensor]) -> None:
        """The collective on one tensor as it is, waited for as the device waits; a recording repeats all of it."""
        work = self.comm.all_reduce(tensors[0])
        if work is not None:
            work.wait()

    # --- compiled steps -------------------------------------------------------------------------------------------

    def after_gradients(
        self, trained: Mapping[str, nn.Parameter], *, optimizer: Optimizer, clip_norm: float | None
    ) -> AfterGradients:
        """What follows the gradients in a compiled step: where they are written, or what the graph does with them.

        Called when the step is made, and for each state of model and criterion that code is compiled for, frozen and unfrozen
        parameters included: several times with the same parameters, too. By default each gradient is written to a tensor of its
        own, which becomes `.grad`, and `synchronize()` averages.

        Args:
            trained: the parameters that are trained now, by name.
            optimizer: will step them.
            clip_norm: upper bound of the norm of the global gradient.

        Raises:
            InputError: this cannot be done for these parameters, or with this optimizer.
        """
        del optimizer, clip_norm
        if self.acts == "in graph":
            raise InputError(f"{type(self).__name__} acts in the graph, so it must override after_gradients().")
        return AfterGradients(trained)

    def graph_form(self, optimizer: Optimizer) -> Hashable:
        """What `AfterGradients.trace` depends on beside the parameters: where it changes, a new graph is traced."""
        del optimizer
        return ()

    # --- recorded steps -------------------------------------------------------------------------------------------

    def recordable_average(self) -> Callable[[], None] | None:
        """What `synchronize()` does with gradients where `after_gradients` puts them, as device work alone: it neither waits for
        the device nor depends on what the host knows, so that it can be recorded and replayed; None where there is no such thing.
        """
        return _nothing if self.acts == "in graph" else None

    def around_recorded(self) -> AbstractContextManager[None]:
        """Around each replay of a step that holds `recordable_average()`: what the host does in `synchronize()`."""
        return self._around_graph() if self.acts == "in graph" else self._around_step()

    def traffic(self) -> tuple[int, int]:
        """Bytes and collectives of a step, for `stats`; for a strategy in the graph to override."""
        parameters = self.parameters.values()
        return sum(p.nbytes for p in parameters), len(parameters)

    def around_backward(self) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a step, for strategies that communicate meanwhile."""
        return self._around_graph() if self.acts == "in graph" else nullcontext()

    @contextmanager
    def _around_graph(self) -> Iterator[None]:
        """Around each compiled step: what `synchronize()` is for other strategies."""
        with self._around_step():
            yield
        if self.world_size > 1:
            self._sent = self.traffic()

    @contextmanager
    def _around_step(self) -> Iterator[None]:
        """Around a step that communicates inside: counts it, and says who is missing."""
        self._calls += 1
        with nullcontext() if self._watch is None else self._watch.waiting(self._calls, computes=True):
            yield
            if self._watch is not None and self._check_every and self._calls % self._check_every == 0:
                agreement.compare_parameters(self._modules, self._calls)
        self.comm.reset()

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What this rank's strategy keeps from step to step; for a strategy to override. Checkpoints hold it for each rank.

        ```python
        def state_dict(self):
            return {"residuals": self.residuals}

        def load_state_dict(self, state):
            for name, residual in state["residuals"].items():
                self.residuals[name].copy_(residual)
        ```

        Returns:
            Tensors, numbers, strings and None, in dicts, lists and tuples; by default nothing.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict()` returned; for a strategy to override together with that.

        Called after `attach()`, before the first step and after compiled code was made. Compiled and recorded code holds on to
        tensors, so write into those that exist (`copy_`).

        Args:
            state: of the same rank, tensors on the CPU. Where another number of ranks saved it: as `reshard_state` returned it.

        Raises:
            InputError: by default, where there is something to go on from.
        """
        if state:
            raise InputError(
                f"strategy={self.name} keeps nothing from step to step, but the checkpoint holds {', '.join(map(repr, state))} "
                "of the strategy that wrote it: use that one."
            )

    def reshard_state(self, states: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """What this rank goes on from where another number of ranks saved; for a strategy to override that can tell.

        ```python
        def reshard_state(self, states):  # residuals whose mean over the ranks is as before
            first, *others = (state["residuals"] for state in states)
            return {"residuals": {name: sum((s[name] for s in others), r) / len(states) for name, r in first.items()}}
        ```

        Args:
            states: what `state_dict()` returned on each of the ranks that saved, in their order.

        Raises:
            InputError: by default.
        """
        raise InputError(
            f"strategy={self.name} has kept a state for each of {len(states)} ranks, and {self.world_size} are to go on from the "
            f"checkpoint: resume on {len(states)}, or override {type(self).__name__}.reshard_state()."
        )

    # --- a step ---------------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Makes every `.grad` the mean over ranks; does nothing inside `no_sync()`.

        All ranks must call it equally often, after `backward()` and before `optimizer.step()`.

        Raises:
            RankDisagreementError: ranks do different things, or one of them did not arrive within `timeout`.
            NonFiniteGradientError: a gradient is NaN or infinite on some rank.
        """
        if self._paused:
            return
        self._calls += 1
        start = self._now()
        if self._watch is None:
            self.reduce()
        else:
            with self._watch.waiting(self._calls):
                self.reduce()
                if self._check_every and self._calls % self._check_every == 0:
                    agreement.compare_parameters(self._modules, self._calls)
        self._end(start)
        self._sent = self.comm.bytes, self.comm.collectives
        self.comm.reset()  # what the next backward pass sends belongs to the next call

    def begin_batch(self) -> None:
        """Counts a batch of this rank, for `meet` to compare."""
        if self._watch is not None:
            self._watch.begin_batch()

    def elsewhere(self, what: str) -> AbstractContextManager[None]:
        """Around other collectives, in words: `meet` on another rank then knows where this one waits."""
        return nullcontext() if self._watch is None else self._watch.elsewhere(what)

    def meet(self, what: str) -> None:
        """Waits for the other ranks at the end of a loop, and says which of them has not come to the end of its own.

        A rank with fewer batches than the others would else go on while they wait for it. All ranks must call it. Where
        they call `begin_batch()` before each batch, it is found out also if they wait outside of `synchronize()`.

        Args:
            what: the place, in words: `"the end of epoch 3"`.

        Raises:
            RankDisagreementError: a rank waits in a `synchronize()` that this one does not make, has made another number of
                them, or did not come within `timeout`.
        """
        if self._watch is not None:
            self._watch.meet(what, self._calls)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, gradients add up on each rank and nothing is communicated."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @property
    def stats(self) -> SyncStats:
        """What the last `synchronize()` did. On a GPU, reading waits for it to end."""
        if self._events is not None:
            self._events[1].synchronize()
            self._seconds = self._events[0].elapsed_time(self._events[1]) / 1e3
            self._events = None
        return SyncStats(self._calls, *self._sent, self._seconds)

    def close(self) -> None:
        """Lets go of the module and of the optimizers: removes hooks, ends the watch. The gradients stay as they are."""
        self._guard.close()
        if self._watch is not None:
            self._watch.close()

    def _look_back(self) -> None:
        """Raises what is known to be wrong with the gradients and nobody has looked at yet."""

    def _now(self) -> "float | torch.cuda.Event":
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _end(self, start: "float | torch.cuda.Event") -> None:
        end = self._now()
        if isinstance(start, float) and isinstance(end, float):
            self._seconds = end - start
        elif isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            self._events = start, end


def _nothing() -> None:
    """What is left to average after a graph that has."""


def _require_process_group() -> None:
    """Refuses to train several ranks side by side that do not know of each other."""
    if dist.is_initialized():
        return
    try:
        here = place()
    except InputError as error:
        raise InputError(f"There is no process group (ddpkit.init_process_group() makes one): {error}") from None
    if here.world_size > 1:
        raise InputError(
            f"{here.said}, but there is no process group, so the ranks would train apart: call ddpkit.init_process_group() first."
        )
