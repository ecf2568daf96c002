"""Which parameters a step trains, and that they stay the same ones."""

import itertools
import operator
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ddpkit.compile.snapshot import Snapshot
from ddpkit.errors import InputError
from ddpkit.sync.modules import Modules
from ddpkit.torch_private import members

_KIND = operator.attrgetter("requires_grad", "dtype", "is_cuda")
_AGAIN = "make the step again (ddpkit.make_step)"


class OptimizerParameters(nn.Module):
    """Parameters that nothing but the optimizer is known to hold."""


def beside(model: nn.Module, criterion: Any, optimizer: Optimizer) -> list[nn.Module]:
    """Modules that hold what the optimizer trains and the model does not have: those of the criterion, and one for the rest.

    Raises:
        InputError: the optimizer holds a tensor that is no `torch.nn.Parameter`.
    """
    known = set(model.parameters())
    wanted = {p for group in optimizer.param_groups for p in group["params"]}
    holders = []
    for module in Snapshot({"criterion": criterion}).modules:
        own = set(module.parameters()) - known
        if own & wanted:
            holders.append(module)
            known |= own
    rest = OptimizerParameters()
    for g, group in enumerate(optimizer.param_groups):
        for n, p in enumerate(group["params"]):
            if p in known:
                continue
            if not isinstance(p, nn.Parameter):
                raise InputError(
                    f"Number {n} in group {g} of the optimizer is a plain tensor of shape {tuple(p.shape)}: make it a "
                    "torch.nn.Parameter."
                )
            rest.register_parameter(f"group_{g}_number_{n}", p)
            known.add(p)
    return [*holders, rest] if any(True for _ in rest.parameters()) else holders


class Trained:
    """The parameters of a model, of further modules and of an optimizer.

    Args:
        optimizer: steps them.
        modules: the model, and further modules.

    Attributes:
        names: of all parameters, frozen ones included.
        parameters: in the same order.
    """

    def __init__(self, optimizer: Optimizer, *modules: nn.Module) -> None:
        self._optimizer, self._roots = optimizer, modules
        self._modules = Modules(*modules)
        named = dict(self._modules.named_parameters())
        self.names, self.parameters = list(named), list(named.values())
        self._kinds = [*map(_KIND, self.parameters)]
        self._remember()

    def require_same(self) -> None:
        """Refuses parameters that came, went or changed their kind. It costs some microseconds.

        Raises:
            InputError: names one.
        """
        if [*map(len, self._sized)] != self._lengths or not all(map(operator.is_, self._objects, self._now())):
            self._compare()
            self._remember()
        kinds = [*map(_KIND, self.parameters)]
        if kinds == self._kinds:
            return
        for name, (_, *old), (_, *new) in zip(self.names, self._kinds, kinds, strict=True):
            if new != old:
                raise InputError(
                    f"The dtype or device of parameter {name!r} has changed since the step was made: {_AGAIN}."
                )
        if not any(trained for trained, *_ in kinds):
            raise InputError("All parameters are frozen (requires_grad=False): there is nothing to train.")
        self._kinds = kinds

    def _remember(self) -> None:
        modules = dict.fromkeys(module for root in self._roots for module in root.modules())
        groups = self._optimizer.param_groups
        parts: list[dict[str, Any]] = [part for m in modules for part in members(m)]
        self._read: list[Callable[[], Iterable[Any]]] = [part.values for part in parts if len(part)]
        self._read += [group["params"].__iter__ for group in groups]
        self._sized: list[Any] = [groups, *(group["params"] for group in groups), *parts]
        self._lengths = [*map(len, self._sized)]
        self._objects = [*self._now()]

    def _now(self) -> Iterable[Any]:
        return itertools.chain.from_iterable(map(operator.call, self._read))

    def _compare(self) -> None:
        before, now = dict(zip(self.names, self.parameters, strict=True)), dict(self._modules.named_parameters())
        for name, parameter in now.items():
            if name not in before:
                raise InputError(f"Parameter {name!r} has been added since the step was made: {_AGAIN}.")
            if parameter is not before[name]:
                raise InputError(f"Parameter {name!r} has been replaced since the step was made: {_AGAIN}.")
        if gone := [name for name in before if name not in now]:
            raise InputError(f"Parameter {gone[0]!r} has been removed since the step was made: {_AGAIN}.")
        known = set(self.parameters)
        for g, group in enumerate(self._optimizer.param_groups):
            for n, parameter in enumerate(group["params"]):
                if parameter not in known:
                    raise InputError(
                        f"Number {n} in group {g} of the optimizer, of shape {tuple(parameter.shape)}, has been added since the "
                        f"step was made, and neither the model nor the criterion had it then: {_AGAIN}."
                    )
