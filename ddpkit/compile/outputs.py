"""What a traced function returns beside tensors, which are all that a tracer takes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from ddpkit.torch_private import pytree

F = TypeVar("F")


@dataclass(frozen=True)
class Tree:
    """An output without its tensors, which come out of compiled code one after another.

    Attributes:
        structure: how the leaves make it up.
        is_tensor: which leaves are tensors.
        constants: the others.
    """

    structure: pytree.TreeSpec
    is_tensor: list[bool]
    constants: list[Any]

    @classmethod
    def of(cls, output: Any) -> "tuple[Tree, list[Tensor]]":
        """Takes an output apart: its form, and its tensors."""
        leaves, structure = pytree.tree_flatten(output)
        constants = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        return cls(structure, is_tensor, constants), [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def fill(self, tensors: Iterator[Tensor]) -> Any:
        """An output of this form, with the next of the tensors."""
        constants = iter(self.constants)
        leaves = [next(tensors) if tensor else next(constants) for tensor in self.is_tensor]
        return pytree.tree_unflatten(leaves, self.structure)


class WithFacts(Generic[F]):
    """A function to trace, of whose results the tracer takes the tensors alone.

    Args:
        function: returns tensors to trace, and facts.

    Attributes:
        facts: that the last call has returned.
    """

    def __init__(self, function: Callable[..., tuple[Sequence[Tensor | None], F]]) -> None:
        self._function = function
        self.facts: F

    def __call__(self, *arguments: Any) -> Sequence[Tensor | None]:
        """Returns the tensors."""
        tensors, self.facts = self._function(*arguments)
        return tensors
