"""torch's own DistributedDataParallel."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpkit.errors import InputError
from ddpkit.sync.base import GradientSync
from ddpkit.sync.flat import FlatSync
from ddpkit.torch_private import count_buckets, count_gradient_hooks


class StandardSync(GradientSync):
    """Torch's `DistributedDataParallel`: gradients are all-reduced in buckets during the backward pass.

    Call `sync.module`, the wrapper, instead of the model. The wrapper's limits hold here too: it needs
    `find_unused_parameters=True` if a parameter may be unused, and it ignores parameters that were frozen when it was made.

    Args:
        module: any module with trainable parameters; this one is wrapped.
        others: further modules with trained parameters, whose gradients `synchronize()` averages.
        comm: `"torch"`.
        timeout: seconds that ddpkit's own collectives wait for other ranks. The wrapper's wait as long as the process group says
            (`ddpkit.init_process_group(timeout=...)`).
        check_every: as in `GradientSync`.
        reduce_dtype: None, or `"bfloat16"` to send float32 gradients in half the bytes.
        options: those of `DistributedDataParallel` (`bucket_cap_mb`, `find_unused_parameters`, `static_graph` ...).
    """

    name = "standard"
    acts = "during backward"

    def __init__(
        self,
        module: nn.Module,
        *others: nn.Module,
        comm: str = "torch",
        timeout: float = 600.0,
        check_every: int = 0,
        reduce_dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if reduce_dtype not in (None, "bfloat16", torch.bfloat16):
            raise InputError(f"reduce_dtype={reduce_dtype} is not for standard: use bfloat16 or leave it out.")
        self._options, self._compressed = options, reduce_dtype is not None
        self._wrapper: DistributedDataParallel | None = None
        self._called = False
        self._beside: FlatSync | None = None
        self._others = others
        super().__init__(module, *others, comm=comm, timeout=timeout, check_every=check_every)

    @property
    def module(self) -> nn.Module:
        """The wrapper, which must be called instead of the module."""
        return self._module if self._wrapper is None else self._wrapper

    @property
    def agreed_options(self) -> dict[str, object]:
        """What ranks must have chosen alike."""
        plain = {name: value for name, value in self._options.items() if isinstance(value, bool | int | float | str)}
        return super().agreed_options | {"compressed": self._compressed} | plain

    def attach(self) -> None:
        """Wraps the module, where there are other ranks."""
        if self.world_size == 1:
            return
        if self._others:
            self._beside = _Beside(
                self._module,
                *self._others,
                timeout=self.timeout,
                reduce_dtype="bfloat16" if self._compressed else None,
                check_finite=False,
            )
        self._sent_parameters = [p for p in self._module.parameters() if p.requires_grad]
        self._frozen = [(name, p) for name, p in self._module.named_parameters() if not p.requires_grad]
        if not self._sent_parameters:
            return
        device = self._sent_parameters[0].device
        try:
            self._wrapper = DistributedDataParallel(
                self._module, device_ids=[device] if device.type == "cuda" else None, **self._options
            )
        except TypeError as error:
            raise InputError(f"DistributedDataParallel refuses its options: {error}.") from error
        if self._compressed:
            self._wrapper.register_comm_hook(self.world_size, _send_bfloat16)
        # On the wrapper, not on the module, which users copy and pickle.
        self._handle = self._wrapper.register_forward_pre_hook(self._note_call)

    def reduce(self) -> None:
        """Averages the further modules' gradients; the wrapper has averaged the model's during the backward pass."""
        if self.world_size > 1:
            self._refuse_unfrozen()
        if self._wrapper is not None:
            self._note_wrapper()
        if self._beside is not None:
            self._beside.reduce()
            self.comm.bytes += self._beside.comm.bytes
            self.comm.collectives += self._beside.comm.collectives
            self._beside.comm.reset()

    def recordable_average(self) -> Callable[[], None] | None:
        """Nothing where there are no other ranks, nor hooks to be called; the wrapper communicates in a backward pass alone."""
        if self.world_size > 1 or type(self).reduce is not StandardSync.reduce:
            return None
        return None if count_gradient_hooks(self.parameters.values()) else self.reduce

    def _note_call(self, wrapper: DistributedDataParallel, batch: Any) -> None:
        """Notes that a forward pass came through the wrapper whose backward pass communicates."""
        del batch
        self._called = self._called or (wrapper.require_backward_grad_sync and torch.is_grad_enabled())

    def _refuse_unfrozen(self) -> None:
        if unfrozen := [name for name, p in self._frozen if p.requires_grad]:
            raise InputError(
                f"Parameter {unfrozen[0]!r} was frozen when make_sync() wrapped the model, so DistributedDataParallel never "
                "averages it: unfreeze it before, or use strategy=custom."
            )

    def _note_wrapper(self) -> None:
        """Counts what the wrapper has sent."""
        if not self._called:
            raise InputError(
                "No forward pass since the last synchronize() came through the DistributedDataParallel wrapper: call "
                "sync.module(batch) on every rank, with the last micro-batch outside of no_sync()."
            )
        self._called = False
        self.comm.bytes = sum(p.numel() * (2 if self._compressed else p.element_size()) for p in self._sent_parameters)
        self.comm.collectives = self._buckets()

    def _buckets(self) -> int:
        assert self._wrapper is not None
        return count_buckets(self._wrapper)

    @contextmanager
    def around_backward(self) -> Iterator[None]:
        """Where the wrapper communicates: if that fails, says which ranks are missing."""
        with (
            nullcontext()
            if self._watch is None or self._paused
            else self._watch.waiting(self._calls + 1, computes=True)
        ):
            yield

    def no_sync(self) -> Any:
        """Inside, gradients add up on each rank and nothing is communicated. The forward pass belongs inside as well."""
        return super().no_sync() if self._wrapper is None else _Both(super().no_sync(), self._wrapper.no_sync())

    def close(self) -> None:
        """Removes the hook."""
        super().close()
        if self._wrapper is not None:
            self._handle.remove()
        if self._beside is not None:
            self._beside.close()


class _Beside(FlatSync):
    """For what is trained beside the model: its parameters are left out, and it may well be that nothing has a gradient."""

    def _chosen(self) -> list[tuple[str, nn.Parameter]]:
        wrapped = set(self._module.parameters())
        return [(name, p) for name, p in super()._chosen() if p not in wrapped]

    def _refuse_empty(self) -> None:
        """Leaves None."""


def _send_bfloat16(world_size: int, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Sends a bucket at half the width (torch's own hook of this kind insists on NCCL)."""
    buffer = bucket.buffer()
    wire = (buffer / world_size).to(torch.bfloat16)
    work = dist.all_reduce(wire, async_op=True)
    return work.get_future().then(lambda sent: buffer.copy_(sent.value()[0]))  # type: ignore[union-attr, no-any-return]


class _Both:
    """Two context managers as one."""

    def __init__(self, outer: Any, inner: Any) -> None:
        self._outer, self._inner = outer, inner

    def __enter__(self) -> None:
        self._outer.__enter__()
        self._inner.__enter__()

    def __exit__(self, *error: object) -> None:
        self._inner.__exit__(*error)
        self._outer.__exit__(*error)
