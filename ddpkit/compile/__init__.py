"""Compiled training on forces: whole steps, and models that autograd can go through.

Loads the compiler on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpkit.compile.forces import CompiledForces as CompiledForces
    from ddpkit.compile.forces import compile_forces as compile_forces

__all__ = ["CompiledForces", "compile_forces"]


def __getattr__(name: str) -> Any:
    """Loads a public name."""
    if name not in __all__:
        raise AttributeError(f"module 'ddpkit.compile' has no attribute {name!r}")
    return getattr(import_module("ddpkit.compile.forces"), name)
