"""Rows of atoms that other ranks own, as two operators of torch that are each other's derivative.

Where a system is divided among ranks, each rank has atoms of its own and, after them, ghosts: copies of atoms that others own.
A model that passes messages knows the features of its own atoms, and needs those of the ghosts before the next layer:

    torch.ops.ddpkit.from_owners(Tensor rows, SymInt all) -> Tensor    [owned, width] -> [all, width]
    torch.ops.ddpkit.to_owners(Tensor rows, SymInt owned) -> Tensor    [all, width] -> [owned, width]

The first fills the ghosts' rows with those of their owners; the second, its transpose, adds the ghosts' rows to their owners'.
All ranks call them equally often, whatever they own. As operators they are nodes of compiled code, and what carries them out is
chosen when that runs: here the exchange of `exchanging`, and without one copies, which is right where there are no ghosts. A
program without Python, such as LAMMPS, registers operators of the same names and schemas (`SCHEMAS`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

from ddpkit.errors import InputError

SCHEMAS = {
    "ddpkit::from_owners": "(Tensor rows, SymInt all) -> Tensor",
    "ddpkit::to_owners": "(Tensor rows, SymInt owned) -> Tensor",
}


class Exchange(Protocol):
    """What carries rows between ranks. Both functions are collective; what they return shares no memory with `rows`, which
    compiled code overwrites as soon as they have returned.
    """

    def from_owners(self, rows: Tensor, number: int) -> Tensor:
        """`[owned, width]` -> `[number, width]`: the same rows, then those of the ghosts, from their owners."""

    def to_owners(self, rows: Tensor, number: int) -> Tensor:
        """`[all, width]` -> `[number, width]`: the rows of this rank's atoms plus those of all their ghosts."""


class _OneRank:
    """The exchange of a rank without ghosts."""

    def from_owners(self, rows: Tensor, number: int) -> Tensor:
        """See `Exchange`."""
        return self._copy(rows, number)

    def to_owners(self, rows: Tensor, number: int) -> Tensor:
        """See `Exchange`."""
        return self._copy(rows, number)

    @staticmethod
    def _copy(rows: Tensor, number: int) -> Tensor:
        if rows.shape[0] != number:
            raise InputError(
                f"{rows.shape[0]} rows were to be exchanged for {number}, but this process has no exchange between ranks: "
                "compute inside ddpkit.inference.exchange.exchanging(...), or without ghosts."
            )
        return rows.clone()


class Mirrored:
    """An exchange within one rank, whose ghosts are copies of its own atoms.

    Args:
        owner: `[ghosts]`, the atom that each ghost is a copy of.
    """

    def __init__(self, owner: Tensor) -> None:
        self.owner = owner

    def from_owners(self, rows: Tensor, number: int) -> Tensor:
        """See `Exchange`."""
        del number
        return torch.cat((rows, rows.index_select(0, self.owner)))

    def to_owners(self, rows: Tensor, number: int) -> Tensor:
        """See `Exchange`."""
        return rows[:number].index_add(0, self.owner, rows[number:])


_exchange: ContextVar[Exchange] = ContextVar("exchange", default=_OneRank())  # noqa: B039  (it has no state)


@contextmanager
def exchanging(exchange: Exchange) -> Iterator[None]:
    """Inside, the operators of this thread are carried out by `exchange`.

    On a GPU autograd runs derivatives in a thread of its own: turn that off (`torch.autograd.set_multithreading_enabled`).
    """
    before = _exchange.set(exchange)
    try:
        yield
    finally:
        _exchange.reset(before)


_raised: ContextVar[list[Exception] | None] = ContextVar("raised", default=None)


@contextmanager
def passing_errors_on() -> Iterator[None]:
    """Inside, compiled code raises what an exchange has raised. Torch makes a RuntimeError of it; before 2.13 it goes on without
    the rows, until something fails for lack of them (tests/torch/lost_errors.py).
    """
    raised: list[Exception] = []
    before = _raised.set(raised)
    try:
        yield
    except RuntimeError as error:
        if not raised:
            raise
        raise raised.pop() from error
    else:
        if raised:
            raise raised.pop()
    finally:
        _raised.reset(before)


def _exchanged(name: str, rows: Tensor, number: int) -> Tensor:
    try:
        return getattr(_exchange.get(), name)(rows.contiguous(), number)
    except Exception as error:
        if (raised := _raised.get()) is not None:
            raised.append(error)
        raise


@torch.library.custom_op("ddpkit::from_owners", mutates_args=(), schema=SCHEMAS["ddpkit::from_owners"])
def from_owners(rows: Tensor, number: int) -> Tensor:
    """`[owned, width]` -> `[number, width]`: rows of this rank's atoms -> those of all atoms, ghosts included.

    Raises:
        InputError: there are ghosts, and no exchange.
    """
    return _exchanged("from_owners", rows, number)


@torch.library.custom_op("ddpkit::to_owners", mutates_args=(), schema=SCHEMAS["ddpkit::to_owners"])
def to_owners(rows: Tensor, number: int) -> Tensor:
    """`[all, width]` -> `[number, width]`: the transpose of `from_owners`.

    Raises:
        InputError: there are ghosts, and no exchange.
    """
    return _exchanged("to_owners", rows, number)


def _remember(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    del output
    ctx.number = inputs[0].shape[0]


for _operator, _transpose in ((from_owners, to_owners), (to_owners, from_owners)):
    _operator.register_fake(lambda rows, number: rows.new_empty((number, rows.shape[1])))
    _operator.register_autograd(
        lambda ctx, grad, transpose=_transpose: (transpose(grad.contiguous(), ctx.number), None),
        setup_context=_remember,
    )
