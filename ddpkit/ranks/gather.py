"""Small collectives of the training loop, which the host waits for no longer than the timeout."""

import pickle
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ddpkit.ranks import phase
from ddpkit.ranks.device import wait_for_event
from ddpkit.ranks.group import Environment

# From one tensor into one, which is one launch on a GPU; before torch 2.13 it bears another name.
_PIECE = 2**21  # numbers of an object that travel at once: 16 MiB
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Sent:
    """A gather under way, with what the device works in: that lives until the gather has ended."""

    values: Tensor
    everyone: Tensor
    on_host: Tensor
    work: Any
    ended: torch.cuda.Event | None
    since: float
    note: Any


class Gather:
    """Gathers a few numbers from every rank. What is sent can be read some steps later, in the order in which it was sent.

    On a GPU the result is copied to the host on a stream of its own, as soon as it is known: on the training stream, reading the
    numbers of one step would wait for the next step, which is under way, and the host could never run ahead of the device.

    Args:
        here: where this process stands.
        timeout: seconds that the host waits for the others; on CPUs as long as the process group says.

    Attributes:
        device: where the collectives want their tensors.
        ended: on a GPU, when the gather that was received last had ended on it; None on CPUs.
    """

    def __init__(self, here: Environment, timeout: float) -> None:
        self.device = here.device if here.backend == "nccl" else torch.device("cpu")
        self.ended: torch.cuda.Event | None = None
        self._size, self._is_first, self._timeout = here.world_size, here.is_first, timeout
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._under_way: deque[Sent] = deque()

    def __len__(self) -> int:
        return len(self._under_way)

    @property
    def oldest(self) -> Any:
        """The note of what `receive` gives next; None where nothing is under way."""
        return self._under_way[0].note if self._under_way else None

    def send(self, values: Tensor, note: Any = None) -> None:
        """Starts gathering `values` `[k]` float64, with the same `k` on every rank; `note` comes back with the result."""
        self._under_way.append(self._start(values, note))

    def receive(self) -> tuple[np.ndarray, Any] | None:
        """The oldest gather under way, `[ranks, k]`, with its note; None where nothing is.

        Raises:
            torch.distributed.DistError: the device has not ended it within the timeout.
            RuntimeError: of the process group, where ranks are missing.
        """
        if not self._under_way:
            return None
        sent = self._under_way.popleft()
        return self._end(sent), sent.note

    def now(self) -> torch.cuda.Event | None:
        """On a GPU, when all that has been launched so far will have ended; None on CPUs."""
        if self._side is None:
            return None
        return torch.cuda.current_stream(self.device).record_event(torch.cuda.Event(enable_timing=True))

    def _start(self, values: Tensor, note: Any = None) -> Sent:
        everyone, work, since = values[None], None, time.monotonic()
        if self._size > 1:
            everyone = values.new_empty((self._size, len(values)))
            work = _all_gather(everyone.view(-1), values, async_op=True)
        if self._side is None:
            return Sent(values, everyone, everyone, work, None, since, note)
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            if work is not None:
                work.wait()  # of this stream; it lets go of the memory that NCCL works in, which `Sent` keeps
            on_host = torch.empty(everyone.shape, dtype=everyone.dtype, pin_memory=True)
            on_host.copy_(everyone, non_blocking=True)
            ended = self.now()
        return Sent(values, everyone, on_host, work, ended, since, note)

    def _end(self, sent: Sent) -> np.ndarray:
        """What a gather has brought, waited for where it has not ended."""
        if sent.ended is None:
            if sent.work is not None:
                with phase.waiting("the other ranks' numbers"):
                    sent.work.wait()
        else:
            wait_for_event(sent.ended, sent.since, self._timeout, "A small all-gather")
        self.ended = sent.ended
        return np.asarray(sent.on_host.numpy())

    def numbers(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """`[ranks, k]`: every rank's numbers, now, whatever else is under way.

        Raises:
            as `receive`.
        """
        return self._end(self._start(torch.as_tensor(np.asarray(values, dtype=np.float64)).to(self.device)))

    def objects(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank; values that can be pickled."""
        return self._objects(value, keep=True)

    def objects_on_first(self, value: Any) -> list[Any]:
        """The same on rank 0, and nothing on the others; values that may be large."""
        return self._objects(value, keep=self._is_first)

    def _objects(self, value: Any, *, keep: bool) -> list[Any]:
        if self._size == 1:
            return [value]
        packed = np.frombuffer(pickle.dumps(value), dtype=np.uint8)
        length = -(-int(self.numbers([len(packed)]).max()) // 8)
        padded = np.zeros(8 * length, dtype=np.uint8)
        padded[: len(packed)] = packed
        pieces = []
        for piece in np.split(padded.view(np.float64), range(_PIECE, length, _PIECE)):
            everyone = self.numbers(piece)
            if keep:
                pieces.append(everyone)
        rows = zip(*pieces, strict=True)
        return [pickle.loads(b"".join(part.tobytes() for part in row)) for row in rows]  # noqa: S301  (of our own ranks)
