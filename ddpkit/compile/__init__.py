"""Compiled training on forces: whole steps, and models that autograd can go through.

Loads the compiler on first use. What a batch passes, module by module:

1. `gradients` (a whole step) or `forces` (a model alone) takes it, and runs the code that is looked up for it.
2. `situations`: the state that model and criterion are in; `snapshot` tells states apart, and `state` holds their tensors.
3. `variants`: the code of that state that serves the batch, by its form (`layout`) and its sizes (`conditions`).

Where there is no code yet, `graph` traces the `objective` (model and criterion) with all its `outputs`, and compiles the trace
by the `backend` that is chosen: `inductor` (with `kernels`, for CPUs) or `public`. `cache` keeps the code on disk and `digest`
tells codes apart. `stored` keeps what has been checked, so that a later start does not trace, and `identity` tells what that
depends on. `parity` compares the code with eager code before it is used. `lines` and `script` name the line of the model that a
message is about.
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
