"""Work spread over processes, results in order."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from ddpkit.errors import InputError
from ddpkit.ranks.cores import of_job, take_all_of_job

T = TypeVar("T")
R = TypeVar("R")

ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables that keep numerical libraries to so many threads."""


def cores() -> int:
    """Cores that worker processes may use: while one rank works the others wait, so all that the job has on this host."""
    return len(of_job())


def _begin() -> None:
    """Prepares a worker: it may use any core of the job, and ends with the process that started it, however that ends."""
    take_all_of_job()
    starter = multiprocessing.parent_process()
    assert starter is not None

    def follow() -> None:
        starter.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def _one_thread() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def ordered_map(function: Callable[[T], R], tasks: Iterable[T], processes: int) -> Iterator[R]:
    """`map(function, tasks)` in that many fresh processes of one thread each.

    Results come in the order of the tasks; a few tasks for each process are under way at a time, so that memory is bounded by
    what the tasks hold. With `processes=0` the work is done in this process.

    Raises:
        InputError: a negative number of processes.
    """
    if processes < 0:
        raise InputError(f"{processes} processes cannot work: give 0 (this one alone) or more")
    if processes == 0:
        yield from map(function, tasks)
        return
    with (
        _one_thread(),
        ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_begin) as pool,
    ):
        waiting: deque[Future[R]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            # Cancelled one by one, they could all be gone when the pool's thread begins to wait for a result: it hung.
            pool.shutdown(cancel_futures=True)
