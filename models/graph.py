"""Sums over edges and gathers from atoms that are each other's transpose.

PyTorch differentiates a gather into a scatter, which on a GPU adds in whatever order its threads arrive. Here every sum
runs over the rows of a table instead, in its fixed order, and every derivative of a sum is a gather and the other way
round, to any order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpkit.batch import Batch
from ddpkit.torch_private import dispatch_modes


class Algorithms(NamedTuple):
    """Which of several algorithms for the same is taken. `algorithms` chooses, here and nowhere else.

    Attributes:
        literal: formulas as they stand, in plain operations that PyTorch differentiates (`ddpkit.models.reference`).
        sums_by_product: rows are summed by a matrix product with ones and zeros; else multiplied with these and added.
        exact_tables: tables have the rows that a batch needs; else as many as its numbers of atoms and edges allow.
        in_cache: convolutions go over parts whose arrays fit a core's cache, path by path; else over everything at once.
    """

    literal: bool = False
    sums_by_product: bool = False
    exact_tables: bool = False
    in_cache: bool = False


LITERAL = Algorithms(literal=True)
EAGER_ON_CPU = Algorithms(sums_by_product=True, exact_tables=True, in_cache=True)
EAGER_ON_GPU = Algorithms(sums_by_product=True)  # to read the exact sizes of tables, the host would wait for the device
TRACED = Algorithms()  # on every device: a compiler sums while it gathers, and wants few operations

_given: Algorithms | None = None


@contextmanager
def computing_by(given: Algorithms) -> Iterator[None]:
    """Inside, models compute by these algorithms, whatever `algorithms` would choose.

    With `TRACED`, eager code computes by the algorithms of compiled code: the difference that is left is the compiler's.
    """
    global _given  # noqa: PLW0603  (what is inside is called by one thread)
    before, _given = _given, given
    try:
        yield
    finally:
        _given = before


def algorithms(device: torch.device) -> Algorithms:
    """The algorithms for tensors of a device: `TRACED` in a trace, and eager ones otherwise."""
    if _given is not None:
        return _given
    if not is_eager():
        return TRACED
    return EAGER_ON_CPU if device.type == "cpu" else EAGER_ON_GPU


def is_literal() -> bool:
    """Whether formulas are computed as they stand."""
    return _given is not None and _given.literal


class Table(NamedTuple):
    """For each row of one thing, rows of another, padded to a table."""

    rows: Tensor  # [n, most], padded with the number of the other's rows
    gather: Tensor  # the same, padded with 0: what can be gathered
    listed: Tensor  # [n, most] bool, where it is not padding


def table_of(rows: Tensor, number: int) -> Table:
    """The table that lists `rows` `[n, most]`, padded with `number`."""
    listed = rows < number
    return Table(rows, rows.masked_fill(~listed, 0), listed)


class Graph(NamedTuple):
    """The edges of a batch, seen from both ends.

    Where a system is divided among ranks, the atoms of a rank are centres, and neighbours may be ghosts as well, copies of atoms
    of other ranks: they follow the rank's own, in everything that has a row for each atom.
    """

    centre: Tensor  # [edges] int64, sorted
    neighbour: Tensor  # [edges] int64
    outgoing: Table  # [atoms, most] edges whose centre is the atom
    incoming: Table | None  # [atoms and ghosts, most] edges whose neighbour it is; None where no derivative needs it
    slot: Tensor  # [edges] where in the flattened `outgoing` an edge stands
    incoming_slot: Tensor | None  # [edges] where in the flattened `incoming`
    everyone: int | None = None  # number of atoms and ghosts where the system is divided among ranks

    @property
    def atoms(self) -> int:
        """Number of atoms that are centres."""
        return self.outgoing.rows.shape[0]


def graph_of(batch: Batch) -> Graph:
    """The graph of a batch; traceable where the batch holds its neighbour tables."""
    batch = batch.with_neighbours()
    assert batch.neighbours is not None
    return graph_from(batch.edge_index[0], batch.edge_index[1], batch.neighbours, batch.incoming)


def graph_from(
    centre: Tensor, neighbour: Tensor, neighbours: Tensor, incoming: Tensor | None, everyone: int | None = None
) -> Graph:
    """The graph of edges and their tables.

    Args:
        centre: `[edges]`, sorted.
        neighbour: `[edges]`.
        neighbours: `[atoms, most]` the edges of each centre, padded with the number of edges.
        incoming: `[atoms and ghosts, most]` the edges of each neighbour, likewise.
        everyone: number of atoms and ghosts where the system is divided among ranks.
    """
    edges, most = centre.shape[0], neighbours.shape[1]
    outgoing = table_of(neighbours, edges)
    counts = outgoing.listed.sum(1)
    empty_before = torch.arange(neighbours.shape[0], device=centre.device) * most - (counts.cumsum(0) - counts)
    slot = torch.arange(edges, device=centre.device) + empty_before.index_select(0, centre)
    if incoming is None:
        return Graph(centre, neighbour, outgoing, None, slot, None, everyone)
    incoming_slot = slot.new_zeros(edges + 1).scatter(
        0, incoming.reshape(-1), torch.arange(incoming.numel(), device=slot.device)
    )[:edges]
    return Graph(centre, neighbour, outgoing, table_of(incoming, edges), slot, incoming_slot, everyone)


def without_ghosts(x: Tensor, graph: Graph) -> Tensor:
    """`[atoms and ghosts, ...]` -> `[atoms, ...]`: the rows of the centres."""
    return x if graph.everyone is None else x[: graph.atoms]


BLOCK = 8


class Blocks(NamedTuple):
    """The edges at one end of each atom in blocks of a few, because a table as wide as the most neighbours is mostly padding."""

    rows: Table  # [blocks, BLOCK] edges
    of_atom: Table  # [atoms, most blocks] the blocks of an atom
    slot: Tensor  # [edges] where in the flattened `rows` an edge stands


def blocks_of(table: Table, ends: Tensor, slot: Tensor, *, exact: bool) -> Blocks:
    """Blocks of the rows of a table of edges.

    Args:
        table: `[atoms, most]`, edges at an atom.
        ends: `[edges]` the atom.
        slot: `[edges]` where in the flattened table an edge stands.
        exact: make as many blocks as are needed (`Algorithms.exact_tables`). Otherwise their number depends on the numbers of
            atoms and edges alone, so that nothing waits for the device; some are empty.
    """
    edges, (atoms, most) = ends.shape[0], table.rows.shape
    counts = (table.listed.sum(1) + BLOCK - 1) // BLOCK
    last = counts.cumsum(0)
    first = last - counts
    slot = slot + (first * BLOCK - torch.arange(atoms, device=slot.device) * most).index_select(0, ends)
    number = int(last[-1]) if exact else (edges + (BLOCK - 1) * atoms) // BLOCK
    if isinstance(number, int):  # and not the size of a trace, which has edges
        number = min(number, edges)
    rows = slot.new_full((number * BLOCK,), edges).scatter(0, slot, torch.arange(edges, device=slot.device))
    block = first.unsqueeze(1) + torch.arange((most + BLOCK - 1) // BLOCK, device=slot.device)
    of_atom = block.masked_fill(block >= last.unsqueeze(1), number)
    return Blocks(table_of(rows.reshape(number, BLOCK), edges), table_of(of_atom, number), slot)


class _Take(torch.autograd.Function):
    """`x[index]`, for x `[rows, ...]` and index `[n]`; `table` lists for each row the places where index names it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, table: Table | None) -> Tensor:  # type: ignore[override]
        ctx.index, ctx.table = index, table
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _Total.apply(grad, ctx.index, ctx.table), None, None


class _Total(torch.autograd.Function):
    """The transpose of `_Take`: for each row of `table` the sum of the rows of x `[n, ...]` that it lists."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, table: Table) -> Tensor:  # type: ignore[override]
        ctx.index, ctx.table = index, table
        return sum_rows(x, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _Take.apply(grad, ctx.index, ctx.table), None, None


class _Pad(torch.autograd.Function):
    """Rows of x `[edges, ...]` laid out by centre `[atoms, most, ...]`, zero where the table is padded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor, table: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(slot, table)
        return gather_rows(x, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        slot, table = ctx.saved_tensors
        return _Unpad.apply(grad, slot, table), None, None


class _Unpad(torch.autograd.Function):
    """The transpose of `_Pad`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor, table: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(slot, table)
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]).index_select(0, slot)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        slot, table = ctx.saved_tensors
        return _Pad.apply(grad, slot, table), None, None


def gather_rows(x: Tensor, table: Tensor) -> Tensor:
    """`x[table]`, zero where the table is padded with the number of rows."""
    padded = torch.cat((x, x.new_zeros((1, *x.shape[1:]))))
    return padded.index_select(0, table.reshape(-1)).reshape(*table.shape, *x.shape[1:])


def sum_rows(x: Tensor, table: Table) -> Tensor:
    """For each row of `table` the sum of the rows of x `[n, ...]` that it lists, in a fixed order."""
    flat = x.flatten(1)
    rows = flat.index_select(0, table.gather.reshape(-1)).reshape(*table.gather.shape, flat.shape[1])
    if algorithms(x.device).sums_by_product:
        total = torch.bmm(table.listed.to(x.dtype).unsqueeze(1), rows).squeeze(1)
    else:
        total = (rows * table.listed.to(x.dtype).unsqueeze(2)).sum(1)
    return total.reshape(table.gather.shape[0], *x.shape[1:])


def is_eager() -> bool:
    """Whether operations run one by one, and are not being traced."""
    # Tracing, with proxies or fake tensors, goes through a dispatch mode; eager code has none.
    eager = dispatch_modes() == 0
    return eager and not torch.compiler.is_compiling()


def at_centre(x: Tensor, graph: Graph) -> Tensor:
    """`[atoms, ...]` -> `[edges, ...]`: the centre's row for each edge."""
    if is_literal():
        return x.index_select(0, graph.centre)
    return _Take.apply(x, graph.centre, graph.outgoing)


def at_neighbour(x: Tensor, graph: Graph) -> Tensor:
    """`[atoms, ...]` -> `[edges, ...]`: the neighbour's row for each edge."""
    if is_literal():
        return x.index_select(0, graph.neighbour)
    return _Take.apply(x, graph.neighbour, graph.incoming)


def sum_to_centre(x: Tensor, graph: Graph) -> Tensor:
    """`[edges, ...]` -> `[atoms, ...]`: the sum over the edges whose centre is the atom."""
    if is_literal():
        return x.new_zeros((graph.atoms, *x.shape[1:])).index_add(0, graph.centre, x)
    return _Total.apply(x, graph.centre, graph.outgoing)


def sum_to_neighbour(x: Tensor, graph: Graph) -> Tensor:
    """`[edges, ...]` -> `[atoms, ...]`: the sum over the edges whose neighbour is the atom."""
    if is_literal():
        return x.new_zeros((graph.atoms, *x.shape[1:])).index_add(0, graph.neighbour, x)
    assert graph.incoming is not None
    return _Total.apply(x, graph.neighbour, graph.incoming)


def pad_rows(x: Tensor, slot: Tensor, table: Tensor) -> Tensor:
    """`[n, ...]` -> `[*table.shape, ...]`: `x[table]`, zero where it is padded.

    Args:
        x: rows.
        slot: `[n]`, where in the flattened table a row stands, once.
        table: `[rows, columns]`.
    """
    return _Pad.apply(x, slot, table)


def unpad_rows(x: Tensor, slot: Tensor, table: Tensor) -> Tensor:
    """`[*table.shape, ...]` -> `[n, ...]`: the transpose of `pad_rows`."""
    return _Unpad.apply(x, slot, table)


def pad(x: Tensor, graph: Graph) -> Tensor:
    """`[edges, ...]` -> `[atoms, most, ...]`: edges by centre, zero where the table is padded."""
    return pad_rows(x, graph.slot, graph.outgoing.rows)


def unpad(x: Tensor, graph: Graph) -> Tensor:
    """`[atoms, most, ...]` -> `[edges, ...]`."""
    return unpad_rows(x, graph.slot, graph.outgoing.rows)
