"""A model and further modules with trained parameters, seen as one."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

from torch import Tensor, nn

from ddpkit.errors import InputError

T = TypeVar("T", bound=Tensor)


class Named(Protocol):
    """What has parameters and buffers with names: a module, or several."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Each parameter once."""

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Each buffer once."""


class Modules:
    """A model and further modules: each tensor once, and under a name of its own.

    The model's tensors have the names that the model gives them; those of a further module have its class before them, and a
    number where that is taken: `LearnedWeights.scale`, `LearnedWeights_2.scale`. A tensor that several modules hold has the
    name that it has in the first of them.

    Attributes:
        given: the parameters by name, as they were when this was made.

    Raises:
        InputError: one of the others is no module.
    """

    def __init__(self, model: nn.Module, *others: nn.Module) -> None:
        self._prefixed = [("", model)]
        taken = {name for name, _ in model.named_children()}
        for other in others:
            if not isinstance(other, nn.Module):
                what = getattr(other, "__name__", None) or type(other).__name__
                raise InputError(
                    f"{what} was given after the model, where further modules with trained parameters belong "
                    "(torch.nn.Module): give options by their names."
                )
            kind = name = type(other).__name__
            number = 1
            while name in taken:
                number += 1
                name = f"{kind}_{number}"
            taken.add(name)
            self._prefixed.append((f"{name}.", other))
        self.given = list(self.named_parameters())

    def changes(self) -> list[str]:
        """Names of parameters that are no longer there, or have come since and are trained."""
        now = list(self.named_parameters())
        held, known = {p for _, p in now}, {p for _, p in self.given}
        lost = [name for name, p in self.given if p not in held]
        return list(dict.fromkeys(lost + [name for name, p in now if p.requires_grad and p not in known]))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Each parameter once, the model's first."""
        return _once((prefix + name, p) for prefix, module in self._prefixed for name, p in module.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Each buffer once, the model's first."""
        return _once((prefix + name, b) for prefix, module in self._prefixed for name, b in module.named_buffers())


def _once(named: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """Each tensor under the first of its names."""
    seen: set[Tensor] = set()
    for name, tensor in named:
        if tensor not in seen:
            seen.add(tensor)
            yield name, tensor
