"""Strategies of gradient synchronisation."""

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

from ddpkit.errors import InputError
from ddpkit.sync.after import AfterGradients as AfterGradients
from ddpkit.sync.after import AverageInGraph as AverageInGraph
from ddpkit.sync.base import Acts as Acts
from ddpkit.sync.base import GradientSync as GradientSync
from ddpkit.sync.base import SyncStats as SyncStats
from ddpkit.sync.modules import Modules

STRATEGIES = {
    "standard": "ddpkit.sync.standard.StandardSync",
    "custom": "ddpkit.sync.flat.FlatSync",
    "overlap": "ddpkit.sync.overlap.OverlapSync",
    "ingraph": "ddpkit.sync.ingraph.InGraphSync",
    "none": "ddpkit.sync.none.NoSync",
    "emulated": "ddpkit.sync.emulated.EmulatedSync",
}

Strategy = str | type[GradientSync] | Callable[..., GradientSync]


def find_strategy(strategy: Strategy) -> Callable[..., GradientSync]:
    """The class, or whatever makes the instance, that a strategy's name stands for.

    Args:
        strategy: `standard`, `custom`, `overlap`, `ingraph`, `none`; an import path such as `"mypackage.MySync"`; or a callable.

    Raises:
        InputError: it cannot be imported or is not a strategy.
    """
    if not isinstance(strategy, str):
        kind: Any = strategy
    else:
        path = STRATEGIES.get(strategy, strategy)
        home, _, name = path.rpartition(".")
        if not home:
            raise InputError(
                f"Strategy {strategy!r} is unknown: use {', '.join(STRATEGIES)} or an import path such as mypackage.MySync."
            )
        try:
            kind = getattr(import_module(home), name)
        except (ImportError, AttributeError) as error:
            raise InputError(f"Strategy {strategy!r} cannot be imported ({error}): check the path.") from error
    if isinstance(kind, type) and not issubclass(kind, GradientSync):
        raise InputError(f"{kind.__name__} is no strategy: derive it from ddpkit.GradientSync.")
    if not callable(kind):
        raise InputError(f"Strategy {strategy!r} is neither a class nor a callable: give the class of the strategy.")
    return kind  # type: ignore[no-any-return]


def acts_of(strategy: Strategy) -> Acts:
    """When a strategy acts (see `GradientSync.acts`); of a callable that is no class, only what it makes could tell."""
    make: Any = find_strategy(strategy)
    while isinstance(make, partial):
        make = make.func
    return getattr(make, "acts", GradientSync.acts)  # type: ignore[no-any-return]


def make_sync(strategy: Strategy, module: nn.Module, *others: nn.Module, **options: Any) -> GradientSync:
    """Attaches a strategy to a module, and to further ones with trained parameters.

    All ranks must call it, and in the same order if they make several strategies. It verifies that all ranks hold the same model,
    and copies rank 0's parameters and buffers to all of them.

    Args:
        strategy: a name, an import path, a class or a callable (see `find_strategy`).
        module: any module.
        others: further modules with trained parameters, such as a criterion with learned weights.
        options: the strategy's own; `comm`, `timeout` and `check_every` are common to all.

    Raises:
        InputError: an unknown strategy, or options it does not take.
        RankDisagreementError: on all ranks, where their models differ.
    """
    if acts_of(strategy) == "in graph":
        raise InputError(
            f"strategy={name_of(strategy)} is part of the compiled step and has no synchronize() of its own: use "
            "ddpkit.make_step(...)."
        )
    return attach(strategy, module, *others, **options)


def attach(strategy: Strategy, module: nn.Module, *others: nn.Module, **options: Any) -> GradientSync:
    """`make_sync`, also of strategies that act in the compiled step alone."""
    make = find_strategy(strategy)
    kind = make.func if isinstance(make, partial) else make
    _refuse_unknown(kind, options)
    if others:
        _refuse_others(make, len(others))
    sync = make(module, *others, **options)
    if not isinstance(sync, GradientSync):
        raise InputError(f"Strategy {strategy!r} made a {type(sync).__name__}: derive it from ddpkit.GradientSync.")
    known = set(sync.parameters.values())
    for name, parameter in Modules(module, *others).named_parameters():
        if others and parameter.requires_grad and parameter not in known:
            raise InputError(
                f"{type(sync).__name__} leaves out {name!r} of the further modules: hand them on in its constructor, "
                "super().__init__(module, *others, **options)."
            )
    return sync


def takes_option(strategy: Strategy, option: str) -> bool:
    """Whether a strategy has an option of this name that its partial, if it is one, has not set."""
    make: Any = find_strategy(strategy)
    if isinstance(make, partial):
        return option not in make.keywords and takes_option(make.func, option)
    for kind in make.__mro__ if isinstance(make, type) else ():
        if "__init__" in vars(kind):
            accepted = inspect.signature(vars(kind)["__init__"]).parameters
            if option in accepted or not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
                return option in accepted
    return not isinstance(make, type) and option in inspect.signature(make).parameters


def _refuse_others(make: Any, count: int) -> None:
    """Says of a strategy without a place for further modules what it lacks."""
    accepted = inspect.signature(make).parameters.values()
    needed = [p for p in accepted if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(needed) != 1 + count and not any(p.kind is p.VAR_POSITIONAL for p in accepted):
        raise InputError(
            f"{name_of(make)} takes no further modules beside the model: let its constructor take them and hand them on, "
            "def __init__(self, module, *others, **options): super().__init__(module, *others, **options)."
        )


def name_of(strategy: Strategy) -> str:
    """A strategy in messages: as it was given, or what its class is called."""
    make: Any = strategy
    while isinstance(make, partial):
        make = make.func
    return make if isinstance(make, str) else str(getattr(make, "__name__", None) or type(make).__name__)


def _refuse_unknown(make: Any, options: dict[str, Any]) -> None:
    """Turns a misspelt option into one sentence."""
    accepted = inspect.signature(make).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted):
        return
    names = [p.name for p in accepted if p.kind is not inspect.Parameter.VAR_POSITIONAL][1:]
    for option in options:
        if option not in names:
            raise InputError(f"{name_of(make)} has no option {option!r}: it takes {', '.join(names)}.")
