"""Batches made ahead of the step, in the background."""

import atexit
import queue
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpkit.batch import Batch
from ddpkit.data.assembly import Assembler, Layout, Memory
from ddpkit.data.makers import Makers, Steps, Work
from ddpkit.data.prepared import PreparedSet
from ddpkit.data.sampler import GlobalStep
from ddpkit.packing import unpack


@dataclass(frozen=True)
class _Made:
    """The batches of a step.

    Attributes:
        step: which.
        memory: that each of its micro-batches lies in.
        layouts: how.
        copied: happens when all are on the device, if they have to be copied there.
    """

    step: GlobalStep
    memory: list[Tensor]
    layouts: list[Layout]
    copied: torch.cuda.Event | None = None


class Loader:
    """This rank's batches, on the device, with the counts of the global batch in them.

    They are made ahead of the step: read, their neighbours found (those of a frame that is met again are kept), collated and
    filled up, in processes of their own or in a thread. For a GPU each lies in one page-locked piece of memory; the copy of the
    next step's batches goes on beside the step on a stream of its own, and the host waits for none. What makes a batch does not
    change a bit of it.

    Args:
        frames: the set.
        sampler: which frames make up each step, and what its batches are filled up to.
        species: the model's chemical symbols.
        r_max: cutoff in Å.
        device: where batches go.
        prefetch: steps made ahead.
        epochs: of the run. At the end of an epoch but the last, batches of the next one are made.
        workers: processes that make batches; 0: a thread of this one does, which competes with the step for Python's lock.
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
        workers: int = 0,
    ) -> None:
        self.frames, self.sampler, self.species, self.r_max = frames, sampler, tuple(species), r_max
        self.device, self.prefetch, self.epochs, self.workers = torch.device(device), prefetch, epochs, workers
        self._assembler = Assembler(frames, species, r_max)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        # epoch and step that nobody has asked for yet, and what makes them
        self._ahead: tuple[tuple[int, int], _Ahead] | None = None

    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch."""
        return self.sampler.steps_per_epoch

    def example(self) -> list[Batch]:
        """The batches of the first step of all.

        Raises:
            InputError: as `epoch`.
        """
        made = self._sent(self._make(next(self.sampler.epoch(0))))
        assert isinstance(made, _Made)
        return self._arrived(made)

    def begin(self, epoch: int, start: int = 0) -> None:
        """Begins to make the batches of an epoch, from a step on, for which `epoch` is going to be called."""
        self.close()
        self._ahead = (epoch, start), self._begun(epoch, start)

    def epoch(self, epoch: int, start: int = 0) -> Generator[tuple[GlobalStep, list[Batch]]]:
        """The steps of an epoch, from step `start` on; closing the iterator ends what makes them.

        Raises:
            InputError: what was wrong with a frame, when its batch is asked for; or a process that makes batches was killed.
        """
        ahead = self._taken(epoch, start)
        ended = False
        following: list[_Item] = []  # the next one, if it has been made
        try:
            while True:
                item = following.pop() if following else self._sent(ahead.items.get())
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    ended = True
                    return
                if not ahead.items.empty():
                    following.append(self._sent(ahead.items.get()))
                yield item.step, self._arrived(item)
        finally:
            if ended and epoch + 1 < self.epochs:
                self._ahead = (epoch + 1, 0), ahead
            else:
                ahead.close()

    def close(self) -> None:
        """Gives up what is made ahead for an epoch that nobody has asked for yet, if that is so."""
        if self._ahead is not None:
            self._ahead[1].close()
            self._ahead = None

    def _taken(self, epoch: int, start: int) -> "_Ahead":
        """What makes the batches of an epoch from a step on: what has begun with it, or another one."""
        if self._ahead is None or self._ahead[0] != (epoch, start):
            self.begin(epoch, start)
        assert self._ahead is not None
        (_, ahead), self._ahead = self._ahead, None
        return ahead

    def _begun(self, epoch: int, start: int) -> "_Ahead":
        work = Work(self.frames.path, self.species, self.r_max, self.sampler, epoch, start, self.epochs)
        if not self.workers:
            return _Ahead(work, lambda epoch, start: map(self._make, self.sampler.epoch(epoch, start)), self.prefetch)
        makers = Makers(work, self.workers)

        def received(_: int, start: int) -> Iterator[_Made]:
            for _ in range(start, self.sampler.steps_per_epoch):
                memory: list[Tensor] = []
                step, layouts = makers.receive(self._allocator(memory))
                yield _Made(step, memory, layouts)

        return _Ahead(work, received, self.prefetch, makers)

    def _make(self, step: GlobalStep) -> _Made:
        memory: list[Tensor] = []
        allocate = self._allocator(memory)
        layouts = [self._assembler.make(step, part.tolist(), allocate) for part in step.micro_batches]
        return _Made(step, memory, layouts)

    def _allocator(self, memory: list[Tensor]) -> Callable[[int], Memory]:
        """What adds memory for so many bytes to the list, page-locked for a GPU."""
        pin = self._stream is not None and torch.cuda.is_available()

        def allocate(size: int) -> Memory:
            memory.append(torch.empty(size, dtype=torch.uint8, pin_memory=pin))
            return memory[-1].numpy()

        return allocate

    def _sent(self, item: "_Item") -> "_Item":
        """The same with batches on the device, once `copied` has happened."""
        if self._stream is None or not isinstance(item, _Made):
            return item
        with torch.cuda.stream(self._stream):
            memory = [one.to(self.device, non_blocking=True) for one in item.memory]
            copied = self._stream.record_event()
        return _Made(item.step, memory, item.layouts, copied)

    def _arrived(self, made: _Made) -> list[Batch]:
        """The batches of a step, whose copies what is launched from now on waits for."""
        if made.copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(made.copied)
            for memory in made.memory:
                memory.record_stream(current)  # it belongs to the other stream
        return [unpack(*pair) for pair in zip(made.memory, made.layouts, strict=True)]


_Item = _Made | BaseException | None
"""The batches of a step, what was raised in their place, or None at the end of an epoch."""


class _Ahead:
    """A thread that brings the batches of an epoch from a step on, and of the epochs after it.

    Args:
        work: says which.
        made: makes or receives the batches of an epoch, from a step on.
        prefetch: steps brought ahead.
        makers: the processes that it receives them from.

    Attributes:
        items: what was brought, in order.
    """

    def __init__(
        self, work: Work, made: Callable[[int, int], Iterator[_Made]], prefetch: int, makers: Makers | None = None
    ) -> None:
        self.items: queue.Queue[_Item] = queue.Queue(prefetch)
        self._closed, self._makers = threading.Event(), makers

        def bring() -> None:
            try:
                for epoch, start in work.numbered():
                    for item in made(epoch, start):
                        if not self._put(item):
                            return
                    self._put(None)
            except BaseException as error:  # noqa: BLE001  (raised where the batch is asked for)
                self._put(error)

        self._thread = threading.Thread(target=bring, name="ddpkit-loader", daemon=True)
        self._thread.start()
        _under_way.add(self)

    def close(self) -> None:
        """Ends it; may be called again."""
        _under_way.discard(self)
        self._closed.set()
        if self._makers is not None:
            self._makers.kill()
        self._thread.join()
        if self._makers is not None:
            self._makers.wait()

    def _put(self, item: _Item) -> bool:
        """Waits for room until the reader has gone; whether there is one."""
        while not self._closed.is_set():
            try:
                self.items.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False


_under_way: "weakref.WeakSet[_Ahead]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Where Python ends, it stops threads wherever they are: with a lock that its end waits for, or in C++ code, which aborts."""
    for ahead in list(_under_way):
        ahead.close()
