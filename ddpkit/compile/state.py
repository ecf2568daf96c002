"""The tensors that model and criterion hold, as inputs of compiled code."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ddpkit.compile.snapshot import Snapshot
from ddpkit.errors import InputError


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
        """By how much those that are not trained have changed, by name.

        Left out is what an object says of its attributes in `ddpkit_scratch`: memory that its kernels write to before they read.
        """
        now = zip(
            self.names[self.trained :],
            self._homes[self.trained :],
            self.tensors()[self.trained :],
            before,
            strict=True,
        )
        return {
            name: tensor.detach() - old
            for name, (home, key), tensor, old in now
            if tensor.dtype is not torch.bool and not _is_scratch(home, key)
        }

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


def _is_scratch(home: Any, key: Any) -> bool:
    return isinstance(home, dict) and key in home.get("ddpkit_scratch", ())


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
