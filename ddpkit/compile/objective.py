"""What a training step differentiates: a model and its criterion."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ddpkit.batch import Batch
from ddpkit.compile.snapshot import Snapshot
from ddpkit.errors import InputError
from ddpkit.torch_private import pytree

Criterion = Callable[[Any, Any], Any]
F = TypeVar("F")

_SHOWN = ("energy", "forces", "stress")  # outputs of a model that are compared with eager


def loss_of(output: Any) -> Tensor:
    """The loss in what a criterion returned."""
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise InputError('The criterion must return the loss as a 0-d tensor, or a dict with it under "loss".')
    return loss


def differentiable(output: Any) -> Tensor:
    """The loss in what a criterion returned, before its backward pass."""
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


class State:
    """The tensors that some objects hold: what compiled code is given beside the batch.

    Args:
        snapshot: of the objects.
        trained: parameters by name.

    Attributes:
        names: of the tensors; those that are trained come first.
        trained: how many are.
        rewritten: paths of what the objects themselves change when they are called, tensors apart.

    Raises:
        InputError: none of the objects holds one of the trained parameters.
    """

    def __init__(self, snapshot: Snapshot, trained: Mapping[str, Tensor]) -> None:
        number = {id(tensor): n for n, tensor in enumerate(trained.values())}
        self.names, self.trained = list(trained), len(trained)
        self.rewritten: set[str] = set()
        self._snapshot = snapshot
        homes: dict[int, tuple[Any, Any]] = {}
        self._places: list[tuple[Any, Any, int]] = []
        for place in snapshot.places:
            n = number.setdefault(id(place.tensor), len(number))
            if n == len(self.names):
                self.names.append(place.path.removeprefix("model."))
            homes.setdefault(n, (place.home, place.key))
            self._places.append((place.home, place.key, n))
        for n, name in enumerate(self.names):
            if n not in homes:
                raise InputError(
                    f"The optimizer trains {name!r}, which neither the model nor the criterion holds, so compiled code would "
                    "take it for a constant: make the criterion a torch.nn.Module that has it as a parameter, or train with "
                    "compile=False."
                )
        self._homes = [homes[n] for n in range(len(self.names))]

    def tensors(self) -> list[Tensor]:
        """The tensors as they are now."""
        return [home[key] for home, key in self._homes]

    def call(self, values: Sequence[Tensor], function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function of the objects with other tensors in the places of theirs, and leaves the objects as they were.

        What the objects replace is changed in place in the tensors given instead.

        Args:
            values: in the order of `names`.
            function: what to call.
            arguments: of the function.

        Raises:
            InputError: the objects count their calls.
        """
        before = [(path, form, home, _copy(home)) for path, form, home in self._snapshot.homes]
        try:
            for home, key, n in self._places:
                home[key] = values[n]
            result = function(*arguments)
            self._carry_out(values)
            for path, form, home, old in before:
                self._note_rewritten(path + form, home, old)
            return result
        finally:
            for _, _, home, old in before:
                _restore(home, old)

    def _carry_out(self, values: Sequence[Tensor]) -> None:
        """Where a tensor has been replaced, brings the new value into the one that was there."""
        for home, key, n in self._places:
            now = home[key] if isinstance(home, list) or key in home else values[n]
            if now is values[n]:
                continue
            if not isinstance(now, Tensor) or now.shape != values[n].shape or now.dtype != values[n].dtype:
                raise InputError(
                    f"The model cannot be compiled: when called, it replaces {self.names[n]!r} by something of another shape or "
                    "type: let it change the tensor in place (copy_), or train with compile=False."
                )
            values[n].copy_(now.detach())

    def _note_rewritten(self, form: str, home: Any, old: Any) -> None:
        """Takes down what else has been changed."""
        now, then = (dict(enumerate(x)) if isinstance(x, list) else x for x in (home, old))
        changed = [(form.format(k), then.get(k), x) for k, x in now.items() if k not in then or x is not then[k]]
        for where, one, two in changed:
            if isinstance(two, Tensor) and isinstance(one, Tensor):
                continue
            if type(one) in (int, float) and type(two) in (int, float) and one != two:
                raise InputError(
                    f"The model cannot be compiled: it counts in {where!r} whenever it is called, which compiled code would not: "
                    "make that a buffer and change it in place, or train with compile=False."
                )
            self.rewritten.add(where)

    def changes(self, before: Sequence[Tensor]) -> dict[str, Tensor]:
        """By how much those that are not trained have changed, by name."""
        now = zip(self.names[self.trained :], self.tensors()[self.trained :], before, strict=True)
        return {name: tensor.detach() - old for name, tensor, old in now if tensor.dtype is not torch.bool}

    @contextmanager
    def undisturbed(self, others: Sequence[Tensor] = ()) -> Iterator[list[Tensor]]:
        """Puts back what happens inside to the objects, their parameters apart, and to other tensors.

        Yields:
            Copies of the tensors that are not trained.
        """
        homes = [(home, _copy(home)) for _, _, home in self._snapshot.homes]
        tensors = [*self.tensors()[self.trained :], *others]
        before = [t.detach().clone() for t in tensors]
        try:
            yield before[: len(self.names) - self.trained]
        finally:
            for home, old in homes:
                _restore(home, old)
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)


def _copy(home: Any) -> Any:
    return list(home) if isinstance(home, list) else dict(home.items())


def _restore(home: Any, old: Any) -> None:
    if isinstance(home, list):
        home[:] = old
        return
    for key in [key for key in home.keys() if key not in old]:  # noqa: SIM118  (a ScriptModule's does not iterate)
        del home[key]
    for key, value in old.items():
        if key not in home or home[key] is not value:
            home[key] = value
