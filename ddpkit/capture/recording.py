"""What a body of device work is recorded by and replayed from.

On a GPU that is a CUDA graph: the host calls the body once, and the device then repeats what it was told, with the same memory
and the same Python numbers, for the price of one launch. On a CPU a `Pretended` recording has the same meaning, so that
everything around it can be tested: it keeps the operations with the tensors and numbers of the first call and repeats these.
"""

from collections.abc import Callable
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from ddpkit.errors import RecordingError
from ddpkit.torch_private import (
    DispatchMode,
    functional_collectives,
    looks_at_number,
    starts_collective,
    undo_capture,
)

T = TypeVar("T")
Body = Callable[[], list[Tensor]]


class Recording(Protocol):
    """A body of device work.

    The body reads and writes tensors that stay where they are, and makes no decision on their values. What it returns lies in
    the same memory after every run.
    """

    def record(self) -> None:
        """Takes the body down without running it, where the device can do that; else `run` does when it is called first.

        Raises:
            RecordingError: the body does what cannot be recorded.
        """

    def run(self) -> list[Tensor]:
        """Runs the body. Returns what it returned. `record` comes first.

        Raises:
            as `record`.
        """

    def close(self) -> None:
        """Lets go of the memory. On a GPU it must be called before a communicator that the body uses is destroyed."""


class Cuda:
    """A recording in a CUDA graph.

    Args:
        body: what is recorded.
        pool: memory that graphs share: they run one after another. None for its own.
    """

    def __init__(self, body: Body, pool: Any) -> None:
        self._body, self._pool = body, torch.cuda.graph_pool_handle() if pool is None else pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._results: list[Tensor] = []

    def record(self) -> None:
        """Captures the graph."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        has_begun, why = False, ""
        try:
            # Threads of the loader lock pages of memory meanwhile, which the default mode forbids to all threads.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                has_begun = True
                try:
                    self._results = self._body()
                except Exception as error:
                    why = str(error)
                    raise
        except RuntimeError as error:
            # Where the capture cannot even be ended, torch leaves its own stream in place.
            torch.cuda.set_stream(stream)
            undo_capture(graph, self._pool, has_begun=has_begun)
            # That it cannot be ended says nothing of why the body failed.
            raise RecordingError(f"The step cannot be recorded as a CUDA graph: {why or error}") from error
        self._graph = graph

    def run(self) -> list[Tensor]:
        """Replays the graph."""
        assert self._graph is not None
        self._graph.replay()
        return self._results

    def close(self) -> None:
        """Destroys the graph."""
        if self._graph is not None:
            self._graph.reset()
        self._results = []


class Pretended:
    """The same on any device, operation by operation.

    Args:
        body: what is recorded; it runs as it is recorded.
    """

    def __init__(self, body: Body) -> None:
        self._body = body
        self._operations: list[Callable[[], None]] | None = None
        self._results: list[Tensor] = []

    def record(self) -> None:
        """Leaves that to the first run."""

    def run(self) -> list[Tensor]:
        """Repeats the operations."""
        if self._operations is None:
            with _Tape() as tape:
                self._results = self._body()
            self._operations = tape.operations
        else:
            with torch.no_grad():
                for operation in self._operations:
                    operation()
        return self._results

    def close(self) -> None:
        """Lets go of the tensors."""
        self._operations, self._results = [], []


def make(body: Body, device: torch.device, pool: Any = None) -> Recording:
    """The recording for a device."""
    return Cuda(body, pool) if device.type == "cuda" else Pretended(body)


def as_one(function: Callable[[list[Any]], T], arguments: list[Any]) -> T:
    """Calls a function; in a pretended recording it is one operation, whatever it does inside.

    Args:
        function: of one list, which it may empty. It returns a tensor, or a list or tuple of such.
        arguments: tensors that stay where they are, and plain values.
    """
    tape = _Tape.current
    return function(arguments) if tape is None else tape.take(function, arguments)


class _Tape(DispatchMode):
    """Takes down operations as they run."""

    current: "_Tape | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Callable[[], None]] = []

    def __enter__(self) -> Self:
        super().__enter__()
        _Tape.current = self
        return self

    def __exit__(self, *error: object) -> None:
        _Tape.current = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if looks_at_number(func):
            raise RecordingError(
                f"The step cannot be recorded: it looks at a number that the device computes ({func})."
            )
        results = func(*args, **kwargs)
        if starts_collective(
            func
        ):  # `_keep` reads what a repeated call returns, before the wait that is taken down next
            wait = functional_collectives().wait_tensor
            self._keep(lambda: [wait(tensor) for tensor in _tensors(func(*args, **kwargs))], results)
        else:
            self._keep(lambda: func(*args, **kwargs), results)
        return results

    def take(self, function: Callable[[list[Any]], T], arguments: list[Any]) -> T:
        """Runs a function without looking inside, and takes it down."""
        given = list(arguments)
        self.__exit__(None, None, None)
        try:
            results = function(arguments)
        finally:
            self.__enter__()
        self._keep(lambda: function(list(given)), results)
        return results

    def _keep(self, call: Callable[[], Any], results: Any) -> None:
        tensors = _tensors(results)

        def repeat() -> None:
            for old, new in zip(tensors, _tensors(call()), strict=True):
                if not _is_same_memory(old, new):
                    old.copy_(new)

        self.operations.append(repeat)


def _tensors(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    if isinstance(results, list | tuple):
        return [tensor for result in results for tensor in _tensors(result)]
    return []


def _is_same_memory(one: Tensor, two: Tensor) -> bool:
    return one.data_ptr() == two.data_ptr() and one.shape == two.shape and one.stride() == two.stride()
