"""How many elements the tensors of compiled code have, which indices of 32 bits must be able to tell apart.

Code for GPUs is compiled with such indices where the example's sizes allow them. For larger sizes, code that is compiled as it
runs is made anew; code that was compiled ahead would silently read and write the wrong places.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ddpkit.errors import InputError

ADDRESSABLE = 2**31 - 1  # elements of one tensor
_MANY = 10**8


def elements_of(exported: torch.export.ExportedProgram) -> list[dict[str, int]]:
    """How many elements the tensors of a traced model have for each edge, owned atom, atom, and entry of either table.

    Args:
        exported: a model for inference, traced with the tensors of `Inputs`.

    Returns:
        Numbers of elements by the names of `Inputs.sizes()`; no tensor has more than the largest of these sums.

    Raises:
        InputError: a tensor grows faster than any of them.
    """
    growths, largest = _growths(exported), dict[tuple[str, ...], dict[str, int]]()
    for expression, name in {expression: name for name, expression in _numbers_of_elements(exported)}.items():
        found = _told(expression, growths)
        if found is None:
            raise InputError(
                f"A tensor of the model ({name}) grows as {expression}, faster than atoms, edges and tables of neighbours do: "
                "compute it in parts."
            )
        before = largest.setdefault(tuple(found), found)
        largest[tuple(found)] = {key: max(before[key], count) for key, count in found.items()}
    return list(largest.values())


def fullness(elements: Sequence[Mapping[str, int]], sizes: Mapping[str, int]) -> float:
    """How many times as many elements as can be addressed the largest tensor has.

    Args:
        elements: by `elements_of`.
        sizes: `Inputs.sizes()`.
    """
    counts = (sum(count * sizes[name] for name, count in of_tensor.items()) for of_tensor in elements)
    return max(counts, default=0) / ADDRESSABLE


@dataclass(frozen=True)
class _Growth:
    """One of `Inputs.sizes()`, in symbols: their product. `least` are symbols that are never smaller."""

    name: str
    factors: tuple[Any, ...]
    least: tuple[Any, ...] = ()

    @property
    def many(self) -> int:
        return int(_MANY ** len(self.factors))


def _growths(exported: torch.export.ExportedProgram) -> list[_Growth]:
    """Tables first: what grows with a table is told by its entries and rows."""
    values = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    vectors, species, _, _, outgoing, *incoming = (values[name] for name in exported.graph_signature.user_inputs)

    def symbols(*sizes: Any) -> tuple[Any, ...]:
        return tuple(size.node.expr for size in sizes)

    every = symbols(species.shape[0])
    return [
        *(_Growth("incoming", symbols(*table.shape)) for table in incoming),
        _Growth("outgoing", symbols(*outgoing.shape), least=every),
        _Growth("edges", symbols(vectors.shape[0])),
        _Growth("all", every),
        _Growth("owned", symbols(outgoing.shape[0]), least=every),
    ]


def _numbers_of_elements(exported: torch.export.ExportedProgram) -> Iterator[tuple[str, Any]]:
    """Of each tensor whose size varies: the name of what makes it, and an expression."""
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        for tensor in value if isinstance(value, tuple | list) else (value,):
            count: Any = tensor.numel() if isinstance(tensor, Tensor) else 0
            if not isinstance(count, int):
                yield node.name, count.node.expr


def _told(expression: Any, growths: Sequence[_Growth]) -> dict[str, int] | None:
    """Factors of sizes whose sum is no less than an expression; None if it grows faster."""
    symbols = {symbol for growth in growths for symbol in growth.factors}
    left, found = set(expression.free_symbols), {}
    for growth in growths:
        if growth.factors[-1] in left:
            sizes = dict.fromkeys(symbols, 2) | dict.fromkeys((*growth.factors, *growth.least), _MANY)
            found[growth.name] = math.ceil(int(expression.subs(sizes)) / growth.many)
            left.discard(growth.factors[-1])
    for values in product((2, 10 * _MANY), repeat=len(symbols)):
        sizes = dict(zip(symbols, values, strict=True))
        if any(sizes[symbol] < sizes[growth.factors[0]] for growth in growths for symbol in growth.least):
            continue  # there are no fewer atoms than owned ones
        told = (
            found[growth.name] * math.prod(sizes[s] for s in growth.factors)
            for growth in growths
            if growth.name in found
        )
        if int(expression.subs(sizes)) > sum(told) + _MANY:  # what does not grow is no matter
            return None
    return found
