"""Strategies of gradient synchronisation."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

from ddpkit.errors import InputError
from ddpkit.sync.base import GradientSync as GradientSync
from ddpkit.sync.base import SyncStats as SyncStats

STRATEGIES = {
    "standard": "ddpkit.sync.standard.StandardSync",
    "custom": "ddpkit.sync.flat.FlatSync",
    "overlap": "ddpkit.sync.overlap.OverlapSync",
    "ingraph": "ddpkit.sync.ingraph.InGraphSync",
    "none": "ddpkit.sync.none.NoSync",
}

Strategy = str | type[GradientSync] | Callable[..., GradientSync]


def find_strategy(strategy: Strategy) -> Callable[..., GradientSync]:
    """The class, or whatever makes the instance, that a strategy's name stands for.

    Args:
        strategy: `standard`, `custom`, `overlap`, `ingraph`, `none`; an import path such as `"mypackage.MySync"`; or a callable.

    Raises:
        InputError: it cannot be found or is not a strategy.
    """
    if not isinstance(strategy, str):
        found: Any = strategy
    else:
        path = STRATEGIES.get(strategy, strategy)
        home, _, name = path.rpartition(".")
        if not home:
            raise InputError(
                f"Strategy {strategy!r} is unknown: use {', '.join(STRATEGIES)} or an import path such as mypackage.MySync."
            )
        try:
            found = getattr(import_module(home), name)
        except (ImportError, AttributeError) as error:
            raise InputError(f"Strategy {strategy!r} cannot be imported ({error}): check the path.") from error
    if isinstance(found, type) and not issubclass(found, GradientSync):
        raise InputError(f"{found.__name__} is no strategy: derive it from ddpkit.GradientSync.")
    if not callable(found):
        raise InputError(f"Strategy {strategy!r} is neither a class nor a callable: give the class of the strategy.")
    return found  # type: ignore[no-any-return]


def make_sync(strategy: Strategy, module: nn.Module, **options: Any) -> GradientSync:
    """Attaches a strategy to a module.

    All ranks call it, in the same order where there are several. It verifies that they hold the same model, and gives all of them
    rank 0's parameters and buffers.

    Args:
        strategy: a name, an import path, a class or a callable (see `find_strategy`).
        module: any module.
        options: the strategy's own; `comm`, `timeout` and `check_every` are common to all.

    Raises:
        InputError: an unknown strategy, or options it does not take.
        RankDisagreementError: on all ranks, where their models differ.
    """
    make = find_strategy(strategy)
    kind = make.func if isinstance(make, partial) else make
    if isinstance(kind, type) and not getattr(kind, "plain_loop", True):
        raise InputError(
            f"strategy={strategy} is part of the compiled step and has no synchronize() of its own: use ddpkit.make_step(...)."
        )
    _refuse_unknown(kind, options)
    sync = make(module, **options)
    if not isinstance(sync, GradientSync):
        raise InputError(f"Strategy {strategy!r} made a {type(sync).__name__}: derive it from ddpkit.GradientSync.")
    return sync


def _refuse_unknown(make: Any, options: dict[str, Any]) -> None:
    """Turns a misspelt option into one sentence."""
    import inspect

    accepted = inspect.signature(make).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted):
        return
    names = [p.name for p in accepted][1:]
    for option in options:
        if option not in names:
            raise InputError(
                f"{getattr(make, '__name__', make)} has no option {option!r}: it takes {', '.join(names)}."
            )
