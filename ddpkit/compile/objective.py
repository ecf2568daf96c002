"""What a training step differentiates: a model and its criterion."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ddpkit.batch import Batch
from ddpkit.errors import InputError
from ddpkit.torch_private import pytree

Criterion = Callable[[Any, Any], Any]

_SHOWN = ("energy", "forces", "stress")  # outputs of a model that are compared with eager


def loss_of(output: Any) -> Tensor:
    """The loss `[]` in what a criterion returned."""
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise InputError('The criterion must return the loss as a 0-d tensor, or a dict with it under "loss".')
    return loss


def differentiable(output: Any) -> Tensor:
    """The loss `[]` in what a criterion returned, before its backward pass."""
    loss = loss_of(output)
    if not loss.requires_grad:
        raise InputError("The loss does not depend on any parameter that is trained: see what is frozen or detached.")
    return loss


def apart(batch: Any) -> Any:
    """The batch in containers of its own: some models write their output into the dict that they are given, over the targets."""
    return batch if isinstance(batch, Tensor | Batch) else pytree.tree_map(lambda leaf: leaf, batch)


def total(outputs: Sequence[Any]) -> Any:
    """Sums the criterion's outputs of several micro-batches, leaf by leaf."""
    if len(outputs) == 1:
        return outputs[0]
    return pytree.tree_map(lambda *leaves: sum(leaves[1:], start=leaves[0]), *outputs)


class Objective:
    """Model and criterion as one function of a batch.

    Args:
        model: called with a batch.
        criterion: called with the model's output and the batch.
    """

    def __init__(self, model: nn.Module, criterion: Criterion) -> None:
        self.model, self.criterion = model, criterion

    def __call__(self, batch: Any) -> tuple[Any, dict[str, Tensor]]:
        """What the criterion returned, and what the model did."""
        output = self.model(apart(batch))
        named = output if isinstance(output, Mapping) else {}
        shown = {name: named[name] for name in _SHOWN if isinstance(named.get(name), Tensor)}
        return self.criterion(output, batch), shown
