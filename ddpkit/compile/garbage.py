"""Python's garbage collector, paused while a graph is made."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Inside, the garbage collector is off; afterwards it is as it was before.

    A trace and its lowering make millions of small objects, and nearly all of them live until the code is there: the collector
    would walk through them again and again, for a tenth of the time that both take, and find little. Tensors are freed all the
    same when the last name of them goes. What runs a model with values is best left outside: cycles of autograd's may hold its
    tensors.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
