"""Batches made ahead of the step, in the background."""

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Protocol

import torch

from ddpkit.batch import Batch
from ddpkit.data.batching import collate
from ddpkit.data.prepared import PreparedSet
from ddpkit.data.sampler import GlobalStep


class Steps(Protocol):
    """What a loader draws from: `Sampler` or `Sweep`."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps in each epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[GlobalStep]:
        """The steps of an epoch."""


_Item = tuple[GlobalStep, list[Batch]]


class Loader:
    """This rank's batches, on the device, with the counts of the global batch in them.

    A thread reads, finds neighbours and collates ahead of the step; on CUDA it also pins the memory, and the copy is
    asynchronous.

    Args:
        frames: the set.
        sampler: which frames make up each step.
        species: the model's chemical symbols.
        r_max: cutoff in Å.
        device: where batches go.
        prefetch: steps made ahead.
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
    ) -> None:
        self.frames, self.sampler, self.species, self.r_max = frames, sampler, tuple(species), r_max
        self.device, self.prefetch = torch.device(device), prefetch

    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch."""
        return self.sampler.steps_per_epoch

    def epoch(self, epoch: int, start: int = 0) -> Generator[_Item]:
        """The steps of an epoch, from step `start` on; closing the iterator ends the thread.

        Raises:
            InputError: what collating raised in the thread, when its batch is asked for.
        """
        items: queue.Queue[_Item | BaseException | None] = queue.Queue(self.prefetch)
        closed = threading.Event()

        def work() -> None:
            last: BaseException | None = None
            try:
                for step in self.sampler.epoch(epoch, start):
                    if not _put(items, (step, self._batches(step)), closed):
                        return
            except BaseException as error:  # noqa: BLE001  (raised where the batch is asked for)
                last = error
            _put(items, last, closed)

        thread = threading.Thread(target=work, name="ddpkit-loader", daemon=True)
        thread.start()
        try:
            while True:
                item = items.get()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                step, batches = item
                yield step, [batch.to(self.device, non_blocking=True) for batch in batches]
        finally:
            closed.set()
            thread.join()

    def _batches(self, step: GlobalStep) -> list[Batch]:
        totals = {
            "frames_total": torch.tensor(step.frames, dtype=torch.float64),
            "atoms_total": torch.tensor(step.atoms, dtype=torch.float64),
        }
        if step.stresses is not None:
            totals["stress_total"] = torch.tensor(step.stresses, dtype=torch.float64)
        batches = []
        for part in step.micro_batches:
            batch = collate([self.frames.frame(int(i)) for i in part], self.species, self.r_max).replace(**totals)
            batches.append(batch.pin_memory() if self.device.type == "cuda" else batch)
        return batches


def _put(
    items: "queue.Queue[_Item | BaseException | None]", item: _Item | BaseException | None, closed: threading.Event
) -> bool:
    """Waits for room until the reader has gone."""
    while not closed.is_set():
        try:
            items.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False
