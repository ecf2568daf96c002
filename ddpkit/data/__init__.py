"""Frames in, batches out: the prepared set on disk, neighbour lists, sampling, loading, and the sets that are made here.

The public names load on first use: reading and labelling need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpkit.data.ase_files import read_ase as read_ase
    from ddpkit.data.batching import collate as collate
    from ddpkit.data.builtin import generate as generate
    from ddpkit.data.builtin import generated as generated
    from ddpkit.data.capacities import Capacities as Capacities
    from ddpkit.data.capacities import Capacity as Capacity
    from ddpkit.data.capacities import choose_capacities as choose_capacities
    from ddpkit.data.facts import Statistics as Statistics
    from ddpkit.data.facts import statistics as statistics
    from ddpkit.data.frame import Frame as Frame
    from ddpkit.data.loader import Loader as Loader
    from ddpkit.data.neighbours import neighbour_list as neighbour_list
    from ddpkit.data.parts import split as split
    from ddpkit.data.prepared import PreparedSet as PreparedSet
    from ddpkit.data.prepared import write_prepared as write_prepared
    from ddpkit.data.preparing import prepare as prepare
    from ddpkit.data.sampler import GlobalStep as GlobalStep
    from ddpkit.data.sampler import Sampler as Sampler
    from ddpkit.data.sampler import Sweep as Sweep

_HOME = {
    "Capacities": "ddpkit.data.capacities",
    "Capacity": "ddpkit.data.capacities",
    "Frame": "ddpkit.data.frame",
    "GlobalStep": "ddpkit.data.sampler",
    "Loader": "ddpkit.data.loader",
    "PreparedSet": "ddpkit.data.prepared",
    "Sampler": "ddpkit.data.sampler",
    "Statistics": "ddpkit.data.facts",
    "Sweep": "ddpkit.data.sampler",
    "choose_capacities": "ddpkit.data.capacities",
    "collate": "ddpkit.data.batching",
    "generate": "ddpkit.data.builtin",
    "generated": "ddpkit.data.builtin",
    "prepare": "ddpkit.data.preparing",
    "neighbour_list": "ddpkit.data.neighbours",
    "read_ase": "ddpkit.data.ase_files",
    "split": "ddpkit.data.parts",
    "statistics": "ddpkit.data.facts",
    "write_prepared": "ddpkit.data.prepared",
}

__all__ = sorted(_HOME)  # noqa: PLE0605  (names load lazily)


def __getattr__(name: str) -> Any:
    """Loads a public name from the module that defines it."""
    if name not in _HOME:
        raise AttributeError(f"module 'ddpkit.data' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
