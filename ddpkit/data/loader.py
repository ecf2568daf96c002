"""Batches made ahead of the step, in the background."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ddpkit.batch import Batch
from ddpkit.data.batching import collate
from ddpkit.data.neighbours import KeptLists
from ddpkit.data.prepared import PreparedSet
from ddpkit.data.sampler import GlobalStep
from ddpkit.packing import pack, to_device
from ddpkit.padding import own_sizes, pad


class Steps(Protocol):
    """What a loader draws from: `Sampler` or `Sweep`."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps in each epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[GlobalStep]:
        """The steps of an epoch."""


@dataclass(frozen=True)
class _Made:
    """The batches of a step.

    Attributes:
        step: which.
        batches: its micro-batches.
        buffers: that they are packed into, if they are.
        copied: happens when all are on the device, if they have to be copied there.
    """

    step: GlobalStep
    batches: list[Batch]
    buffers: list[Tensor] = field(default_factory=list)
    copied: torch.cuda.Event | None = None


class Loader:
    """This rank's batches, on the device, with the counts of the global batch in them.

    A thread reads, finds neighbours (those of a frame that is met again are kept), collates and pads ahead of the step. For a GPU
    it packs each batch into one page-locked buffer; the copy of the next step's batches goes on beside the step on a stream of
    its own, and the host waits for none.

    Args:
        frames: the set.
        sampler: which frames make up each step, and what its batches are filled up to.
        species: the model's chemical symbols.
        r_max: cutoff in Å.
        device: where batches go.
        prefetch: steps made ahead.
        epochs: of the run. At the end of an epoch but the last, the thread goes on with the next one.
    """

    def __init__(
        self,
        frames: PreparedSet,
        sampler: Steps,
        species: Sequence[str],
        r_max: float,
        *,
        device: torch.device | str = "cpu",
        prefetch: int = 4,
        epochs: int = 0,
    ) -> None:
        self.frames, self.sampler, self.species, self.r_max = frames, sampler, tuple(species), r_max
        self.device, self.prefetch, self.epochs = torch.device(device), prefetch, epochs
        self._lists = KeptLists(r_max)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._ahead: tuple[int, _Worker] | None = None  # between epochs: the one to come, and what makes its batches

    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch."""
        return self.sampler.steps_per_epoch

    def epoch(self, epoch: int, start: int = 0) -> Generator[tuple[GlobalStep, list[Batch]]]:
        """The steps of an epoch, from step `start` on; closing the iterator ends the thread.

        Raises:
            InputError: what collating raised in the thread, when its batch is asked for.
        """
        worker = self._worker_at(epoch, start)
        ended = False
        following: list[_Item] = []  # the next one, if it has been made
        try:
            while True:
                item = following.pop() if following else self._sent(worker.items.get())
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    ended = True
                    return
                if not worker.items.empty():
                    following.append(self._sent(worker.items.get()))
                yield item.step, self._arrived(item)
        finally:
            if ended and epoch + 1 < self.epochs:
                self._ahead = epoch + 1, worker
            else:
                worker.close()

    def close(self) -> None:
        """Ends the thread that makes batches of an epoch that nobody has asked for yet, if there is one."""
        if self._ahead is not None:
            self._ahead[1].close()
            self._ahead = None

    def _worker_at(self, epoch: int, start: int) -> "_Worker":
        """What makes the batches of an epoch from a step on: the one that has gone on with it, or a new one."""
        if self._ahead is not None and (epoch, start) == (self._ahead[0], 0):
            worker, self._ahead = self._ahead[1], None
            return worker
        self.close()
        return _Worker(self._make, self.sampler, epoch, start, self.epochs, self.prefetch)

    def _make(self, step: GlobalStep) -> _Made:
        totals = {
            "frames_total": torch.tensor(step.frames, dtype=torch.float64),
            "atoms_total": torch.tensor(step.atoms, dtype=torch.float64),
        }
        if step.stresses is not None:
            totals["stress_total"] = torch.tensor(step.stresses, dtype=torch.float64)
        batches = []
        for part in step.micro_batches:
            batch = self._collate(part.tolist()).replace(**totals)
            if step.is_padded:
                batch = pad(batch, step.capacity or own_sizes(batch), self.r_max)
            batches.append(batch)
        if self._stream is None:
            return _Made(step, batches)
        packed = [pack(batch, pin=True) for batch in batches]
        return _Made(step, [batch for _, batch in packed], [buffer for buffer, _ in packed])

    def _collate(self, numbers: list[int]) -> Batch:
        frames = [self.frames.frame(number) for number in numbers]
        return collate(
            frames, self.species, self.r_max, lists=lambda place: self._lists.of(numbers[place], frames[place])
        )

    def _sent(self, item: "_Item") -> "_Item":
        """The same with batches on the device, once `copied` has happened."""
        if self._stream is None or not isinstance(item, _Made):
            return item
        with torch.cuda.stream(self._stream):
            on_device = [to_device(*pair, self.device) for pair in zip(item.buffers, item.batches, strict=True)]
            copied = self._stream.record_event()
        return _Made(item.step, [batch for _, batch in on_device], [buffer for buffer, _ in on_device], copied)

    def _arrived(self, made: _Made) -> list[Batch]:
        """The batches of a step, whose copies what is launched from now on waits for."""
        if made.copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(made.copied)
            for buffer in made.buffers:
                buffer.record_stream(current)  # its memory belongs to the other stream
        return made.batches


_Item = _Made | BaseException | None
"""The batches of a step, what was raised in their place, or None at the end of an epoch."""


class _Worker:
    """A thread that makes the batches of an epoch from a step on, and of the epochs after it.

    Args:
        make: makes the batches of a step.
        sampler: gives the steps.
        epoch, start: where to begin.
        epochs: of the run; `epoch` alone where it is no smaller.
        prefetch: steps made ahead.

    Attributes:
        items: what was made, in order.
    """

    def __init__(
        self,
        make: Callable[[GlobalStep], _Made],
        sampler: Steps,
        epoch: int,
        start: int,
        epochs: int,
        prefetch: int,
    ) -> None:
        self.items: queue.Queue[_Item] = queue.Queue(prefetch)
        self._closed = threading.Event()

        def work() -> None:
            try:
                for number in range(epoch, max(epoch + 1, epochs)):
                    for step in sampler.epoch(number, start if number == epoch else 0):
                        if not self._put(make(step)):
                            return
                    self._put(None)
            except BaseException as error:  # noqa: BLE001  (raised where the batch is asked for)
                self._put(error)

        self._thread = threading.Thread(target=work, name="ddpkit-loader", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        self._thread.join()

    def _put(self, item: _Item) -> bool:
        """Waits for room until the reader has gone; whether there is one."""
        while not self._closed.is_set():
            try:
                self.items.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
