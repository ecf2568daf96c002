"""Small collectives of the training loop, which the host waits for no longer than the timeout."""

import pickle
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ddpkit.ranks import phase
from ddpkit.ranks.group import Environment

POLL = 5e-5  # seconds between looks at a collective on the device
_FIRST = 0.9  # share of the timeout after which this module speaks, before NCCL's own watchdog ends the process without a word


class Gather:
    """Gathers a few numbers from every rank; what is sent at one step can be read at the next, without waiting.

    On a GPU the result is copied to the host on a stream of its own: on the training stream, reading the numbers of one step
    would wait for the next step, which is under way, and the host could never run ahead of the device.

    Args:
        here: where this process stands.
        timeout: seconds that the host waits for the others; on CPUs as long as the process group says.

    Attributes:
        device: where the collectives want their tensors.
    """

    def __init__(self, here: Environment, timeout: float) -> None:
        self.device = here.device if here.backend == "nccl" else torch.device("cpu")
        self._size, self._timeout = here.world_size, timeout
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pending: tuple[Tensor, Tensor, Any, Any, float, Any] | None = None

    def send(self, values: Tensor, note: Any = None) -> None:
        """Starts gathering `values` `[k]` float64, with the same `k` on every rank; `note` comes back with the result."""
        assert self._pending is None
        everyone, work = values[None], None
        if self._size > 1:
            everyone = values.new_empty((self._size, len(values)))
            work = dist.all_gather(list(everyone.unbind()), values, async_op=True)
        computed = None if self._side is None else torch.cuda.current_stream(self.device).record_event()
        self._pending = values, everyone, work, computed, time.monotonic(), note

    def receive(self) -> tuple[np.ndarray, Any] | None:
        """The gather under way, `[ranks, k]`, with its note; None where nothing was sent.

        Raises:
            torch.distributed.DistError: the device has not ended it within the timeout.
            RuntimeError: of the process group, where ranks are missing.
        """
        if self._pending is None:
            return None
        values, everyone, work, computed, sent, note = self._pending
        self._pending = None
        if self._side is None:
            if work is not None:
                with phase.waiting("the other ranks' numbers"):
                    work.wait()
            return everyone.numpy(), note
        # `work.wait()` gives the memory that NCCL works in back to the training stream, which has not waited for NCCL: so it
        # comes after the host has seen the end of the gather.
        with phase.waiting("the device and the other ranks' numbers"):
            while work is not None and not work.is_completed():
                if time.monotonic() - sent > _FIRST * self._timeout:
                    raise dist.DistError(  # type: ignore[attr-defined]
                        f"A small all-gather has not ended after {time.monotonic() - sent:.0f} s "
                        f"(train.timeout={self._timeout:g})"
                    )
                time.sleep(POLL)
        del values  # which NCCL has read
        with torch.cuda.stream(self._side):
            self._side.wait_event(computed)
            if work is not None:
                work.wait()
            return everyone.cpu().numpy(), note

    def numbers(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """`[ranks, k]`: every rank's numbers, now.

        Raises:
            as `receive`.
        """
        self.send(torch.as_tensor(np.asarray(values, dtype=np.float64)).to(self.device))
        arrived = self.receive()
        assert arrived is not None
        return np.asarray(arrived[0])

    def objects(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank; values that can be pickled."""
        if self._size == 1:
            return [value]
        packed = np.frombuffer(pickle.dumps(value), dtype=np.uint8)
        length = int(self.numbers([len(packed)]).max())
        padded = np.zeros(-(-length // 8) * 8, dtype=np.uint8)
        padded[: len(packed)] = packed
        return [pickle.loads(row.tobytes()) for row in self.numbers(padded.view(np.float64))]  # noqa: S301  (of our own ranks)
