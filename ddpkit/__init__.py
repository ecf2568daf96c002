"""Gradient synchronisation for models trained on forces.

The public names load on first use, so that `import ddpkit.analysis` does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpkit.batch import Batch as Batch
    from ddpkit.calculator import Calculator as Calculator
    from ddpkit.compile import compile_forces as compile_forces
    from ddpkit.errors import InputError as InputError
    from ddpkit.inference.export import export as export
    from ddpkit.inference.exported import load_exported as load_exported
    from ddpkit.loss import EnergyForcesLoss as EnergyForcesLoss
    from ddpkit.loss import global_mean as global_mean
    from ddpkit.ranks.group import init_process_group as init_process_group
    from ddpkit.step import make_step as make_step
    from ddpkit.sync import make_sync as make_sync
    from ddpkit.sync.after import AfterGradients as AfterGradients
    from ddpkit.sync.after import AverageInGraph as AverageInGraph
    from ddpkit.sync.base import GradientSync as GradientSync
    from ddpkit.sync.flat import FlatSync as FlatSync
    from ddpkit.sync.ingraph import InGraphSync as InGraphSync
    from ddpkit.sync.none import NoSync as NoSync
    from ddpkit.sync.overlap import OverlapSync as OverlapSync
    from ddpkit.sync.standard import StandardSync as StandardSync

__version__ = "0.2.0"

_HOME = {
    "AfterGradients": "ddpkit.sync.after",
    "AverageInGraph": "ddpkit.sync.after",
    "Batch": "ddpkit.batch",
    "Calculator": "ddpkit.calculator",
    "EnergyForcesLoss": "ddpkit.loss",
    "FlatSync": "ddpkit.sync.flat",
    "GradientSync": "ddpkit.sync.base",
    "InGraphSync": "ddpkit.sync.ingraph",
    "InputError": "ddpkit.errors",
    "NoSync": "ddpkit.sync.none",
    "OverlapSync": "ddpkit.sync.overlap",
    "StandardSync": "ddpkit.sync.standard",
    "compile_forces": "ddpkit.compile",
    "export": "ddpkit.inference.export",
    "global_mean": "ddpkit.loss",
    "init_process_group": "ddpkit.ranks.group",
    "load_exported": "ddpkit.inference.exported",
    "make_step": "ddpkit.step",
    "make_sync": "ddpkit.sync",
}

__all__ = [*sorted(_HOME), "__version__"]  # noqa: PLE0604  (names load lazily)


def __getattr__(name: str) -> Any:
    """Loads a public name from the module that defines it."""
    if name not in _HOME:
        raise AttributeError(f"module 'ddpkit' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
