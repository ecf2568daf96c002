"""What a training step differentiates: a model and its criterion."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ddpkit.batch import Batch
from ddpkit.errors import InputError

Criterion = Callable[[Any, Any], Any]

_SHOWN = ("energy", "forces", "stress")  # outputs of a model that are compared with eager


def loss_of(output: Any) -> Tensor:
    """The loss in what a criterion returned."""
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise InputError('The criterion must return the loss as a 0-d tensor, or a dict with it under "loss".')
    return loss


def apart(batch: Any) -> Any:
    """The batch in containers of its own: some models write their output into the dict that they are given, over the targets."""
    return batch if isinstance(batch, Tensor | Batch) else pytree.tree_map(lambda leaf: leaf, batch)


def total(outputs: Sequence[Any]) -> Any:
    """Sums the criterion's outputs of several micro-batches, leaf by leaf."""
    if len(outputs) == 1:
        return outputs[0]
    return pytree.tree_map(lambda *leaves: sum(leaves[1:], start=leaves[0]), *outputs)


class Objective(nn.Module):
    """Model and criterion as one module.

    Args:
        model: called with a batch.
        criterion: called with the model's output and the batch. What it holds as a module is read at every step; what it holds
            otherwise is part of the compiled code.
    """

    def __init__(self, model: nn.Module, criterion: Criterion) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion

    def forward(self, batch: Any) -> tuple[Any, dict[str, Tensor]]:
        """What the criterion returned, and what the model did."""
        output = self.model(apart(batch))
        named = output if isinstance(output, Mapping) else {}
        shown = {name: named[name] for name in _SHOWN if isinstance(named.get(name), Tensor)}
        return self.criterion(output, batch), shown


class State:
    """Parameters and buffers of a module, found once.

    Attributes:
        names: of the tensors; those that are trained come first.
        trained: how many are.
    """

    def __init__(self, module: nn.Module, trained: Sequence[nn.Parameter]) -> None:
        wanted = {id(p) for p in trained}
        everything = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        first = {name: t for name, t in everything.items() if id(t) in wanted}
        rest = {name: t for name, t in everything.items() if id(t) not in wanted}
        self.names = [*first, *rest]
        self.trained = len(first)
        self._module = module
        self._homes = [_home(module, name) for name in self.names]
        name_of = {id(tensor): name for name, tensor in everything.items()}
        # Every place once: a shared tensor has several, a shared module has one under several names.
        self._places = [
            (f"{path}.{last}" if path else last, name_of[id(tensor)])
            for path, owner in module.named_modules()
            for last, tensor in (*owner._parameters.items(), *owner._buffers.items())  # noqa: SLF001  (as `_home`)
            if tensor is not None
        ]

    def call(self, values: Mapping[str, Tensor], *arguments: Any) -> Any:
        """Calls the module with other tensors in the places of its own.

        Args:
            values: by the names in `names`.
            arguments: of the module.
        """
        everywhere = {place: values[name] for place, name in self._places}
        # Not by its own ties: where a module has two names, it would leave a tensor of ours in it (torch 2.13).
        return functional_call(self._module, everywhere, arguments, tie_weights=False)

    def tensors(self) -> list[Tensor]:
        """The tensors as they are now."""
        return [home[name] for home, name in self._homes]

    def moved(self, before: Sequence[Tensor]) -> dict[str, Tensor]:
        """By how much those that are not trained have changed, by name."""
        now = zip(self.names[self.trained :], self.tensors()[self.trained :], before, strict=True)
        return {name: tensor.detach() - old for name, tensor, old in now if tensor.dtype is not torch.bool}


def _home(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    return (owner._parameters if last in owner._parameters else owner._buffers), last  # noqa: SLF001  (no public way by name that is as fast)


@contextmanager
def undisturbed(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Puts back what happens to tensors inside; yields copies of them."""
    before = [t.detach().clone() for t in tensors]
    try:
        yield before
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
