"""Which code a process has compiled: two runs with the same digest ran the same code, however often it was compiled."""

import hashlib
import re
from collections.abc import Iterator
from typing import Any

_kernels: list[Any] = []


def note(kernel: Any) -> None:
    """Takes down a graph that Inductor has compiled."""
    _kernels.append(kernel)


def digest() -> str | None:
    """Twelve hexadecimal digits over the generated code and the variants that were timed and chosen.

    None without any, and with `compiler=public`, where torch keeps the code to itself. A variant is chosen when a kernel runs for
    the first time, so ask when steps have been made.
    """
    # In the order of the text: shapes may be compiled in another order.
    texts = sorted(text for kernel in _kernels for text in _texts(kernel))
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12] if texts else None


def _texts(kernel: Any) -> Iterator[str]:
    source = getattr(kernel, "source_code", None)
    if not isinstance(source, str):
        return
    # Comments hold the paths of a cache and the order of tracing.
    yield re.sub(r"^\s*(#|//).*\n", "", source, flags=re.MULTILINE)
    module = getattr(getattr(kernel, "current_callable", None), "__globals__", {})
    for name, value in sorted(module.items()):
        launchers = getattr(value, "launchers", None)
        if launchers:
            yield f"{name}: " + ", ".join(str(getattr(launcher, "config", launcher)) for launcher in launchers)
