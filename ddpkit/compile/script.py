"""TorchScript while tracing: it takes sizes as plain numbers, so that what is traced through it holds for one batch only."""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch

from ddpkit.torch_private import SCRIPTED, ScriptMethod, type_of_script


def remedy(called: Collection[str]) -> str:
    """What TorchScript in a model is in the way, and what helps.

    Args:
        called: as `as_python` yields it.
    """
    return (
        f"there is TorchScript in it ({min(called)}): make it without torch.jit.script (e3nn 0.4, as in MACE: call "
        "e3nn.set_optimization_defaults(jit_script_fx=False) before the model is built or loaded), or train with compile=False"
    )


@contextlib.contextmanager
def as_python() -> Iterator[set[str]]:
    """Inside, functions that `torch.jit.script` made are called as the Python functions they were made of.

    Yields:
        The names of TorchScript that is called and has no Python left: scripted modules, and what was loaded from a file.
    """
    called: set[str] = set()
    function = torch.jit.ScriptFunction
    call_function = function.__call__
    call_method: Any = None if ScriptMethod is None else ScriptMethod.__call__

    def python(self: Any, *arguments: Any, **options: Any) -> Any:
        source = getattr(self, SCRIPTED, None)
        if source is not None:
            return source(*arguments, **options)
        called.add(self.name)
        return call_function(self, *arguments, **options)

    def noted(self: Any, *arguments: Any, **options: Any) -> Any:
        called.add(type_of_script(self.owner))
        return call_method(self, *arguments, **options)

    function.__call__ = python  # type: ignore[assignment, method-assign]
    if ScriptMethod is not None:
        ScriptMethod.__call__ = noted
    try:
        yield called
    finally:
        function.__call__ = call_function  # type: ignore[method-assign]
        if ScriptMethod is not None:
            ScriptMethod.__call__ = call_method
