"""Which sizes of a batch vary from step to step, and which of them are one and the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpkit.batch import DIMS, SIZES, Batch, Dim
from ddpkit.errors import InputError
from ddpkit.torch_private import pytree

_SMALLEST = 5  # what is smaller counts dimensions of space or ends of an edge, unless it is seen to vary

pytree.register_dataclass(Batch)


@dataclass(slots=True)
class Flat:
    """A batch taken apart.

    Attributes:
        batch: as it was given.
        leaves: its tensors and plain values.
        structure: how they make it up.
    """

    batch: Any
    leaves: list[Any]
    structure: pytree.TreeSpec

    @classmethod
    def of(cls, batch: Any) -> "Flat":
        """Takes a batch apart."""
        return cls(batch, *pytree.tree_flatten(batch))

    def tensors(self) -> list[Tensor]:
        """Its tensors, contiguous."""
        return [leaf.contiguous() for leaf in self.leaves if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class TensorLeaf:
    """A tensor of a batch."""

    dtype: torch.dtype
    device: torch.device
    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class Layout:
    """The form of a batch.

    Attributes:
        structure: how the leaves make up a batch.
        leaves: a `TensorLeaf` for a tensor, the name of a size for an integer that varies, else a constant.
        names: of the sizes that vary.
        is_known: whether what varies is known and not inferred.
    """

    structure: pytree.TreeSpec
    leaves: tuple[Any, ...]
    names: tuple[str, ...]
    is_known: bool

    @classmethod
    def of(cls, batches: Sequence[Any]) -> "Layout":
        """The form that some batches have in common.

        In a `Batch` it is known what each size means. In any other batch, sizes vary together if they are the same in all of
        `batches`; with one batch to go by, every size from 5 on is taken to vary, with several those that did.

        Args:
            batches: pytrees of one structure.

        Raises:
            InputError: a batch holds something that is no pytree of tensors and plain values.
        """
        flat = [pytree.tree_flatten(batch) for batch in batches]
        structure = flat[0][1]
        columns = list(zip(*(leaves for leaves, _ in flat), strict=True))
        is_known = isinstance(batches[0], Batch)
        if is_known:
            names = [path[0].name for path, _ in pytree.tree_flatten_with_path(batches[0])[0]]  # type: ignore[attr-defined]
            leaves = [_known(name, column[0]) for name, column in zip(names, columns, strict=True)]
        else:
            leaves = [_inferred(column) for column in columns]
        dims = [dim for leaf in leaves for dim in (leaf.dims if isinstance(leaf, TensorLeaf) else (leaf,))]
        varying = dict.fromkeys(dim for dim in dims if isinstance(dim, Size))
        return cls(structure, tuple(leaves), tuple(varying), is_known)

    def sizes(self, leaves: Sequence[Any], structure: pytree.TreeSpec) -> dict[str, int] | None:
        """The sizes of a batch by name; None if it is of another form.

        Args:
            leaves: the batch, flattened.
            structure: likewise.
        """
        if structure != self.structure:
            return None
        sizes: dict[str, int] = {}
        for form, leaf in zip(self.leaves, leaves, strict=True):
            if isinstance(form, TensorLeaf):
                if not isinstance(leaf, Tensor) or leaf.dtype != form.dtype or leaf.device != form.device:
                    return None
                shape: tuple[int, ...] = leaf.shape
                if len(shape) != len(form.dims):
                    return None
                for dim, size in zip(form.dims, shape, strict=True):
                    if (sizes.setdefault(dim, size) if isinstance(dim, str) else dim) != size:
                        return None
            elif isinstance(form, Size):
                if type(leaf) is not int or sizes.setdefault(form, leaf) != leaf:
                    return None
            elif type(form) is not type(leaf) or form != leaf:
                return None
        return sizes

    def fill(self, sizes: Mapping[str, Any], tensors: Sequence[Tensor]) -> Any:
        """A batch of this form.

        Args:
            sizes: by name.
            tensors: its tensors, in order.
        """
        rest = iter(tensors)
        leaves = [
            next(rest) if isinstance(leaf, TensorLeaf) else sizes[leaf] if isinstance(leaf, Size) else leaf
            for leaf in self.leaves
        ]
        return pytree.tree_unflatten(leaves, self.structure)

    def form(self) -> str:
        """What does not depend on how large the sizes are that vary."""
        numbers: dict[Any, Any] = {name: f"size {number}" for number, name in enumerate(self.names)}

        def kind(leaf: Any) -> Any:
            if isinstance(leaf, TensorLeaf):
                return str(leaf.dtype), leaf.device.type, [numbers.get(dim, dim) for dim in leaf.dims]
            return numbers[leaf] if isinstance(leaf, Size) else leaf

        return f"{self.structure} {[kind(leaf) for leaf in self.leaves]}"

    def same_form(self, other: "Layout") -> bool:
        """Whether batches of both could be told to have one form, but for what varies."""

        def kind(leaf: Any) -> Any:
            if isinstance(leaf, TensorLeaf):
                return leaf.dtype, leaf.device, len(leaf.dims)
            return int if isinstance(leaf, Size) or type(leaf) is int else leaf

        return self.structure == other.structure and [*map(kind, self.leaves)] == [*map(kind, other.leaves)]


class Size(str):
    """The name of a size that varies."""

    __slots__ = ()


def _known(name: str, leaf: Any) -> Any:
    """A field of a `Batch`."""
    if isinstance(leaf, Tensor):
        dims = tuple(Size(dim) if isinstance(dim, str) else dim for dim in DIMS[name])
        return TensorLeaf(leaf.dtype, leaf.device, dims)
    return Size(SIZES[name]) if name in SIZES else leaf


def _inferred(column: Sequence[Any]) -> Any:
    """The same leaf of every example batch."""
    first = column[0]
    if isinstance(first, Tensor):
        dims = tuple(_dim([leaf.shape[d] for leaf in column]) for d in range(first.dim()))
        return TensorLeaf(first.dtype, first.device, dims)
    if type(first) is int:
        return _dim(column)
    if not isinstance(first, bool | float | str | torch.dtype | torch.device | None):
        raise InputError(
            f"A batch holds a {type(first).__name__}, which cannot be taken apart: give batches of dicts, lists and tensors "
            "(PyG's batch.to_dict(), for a module that calls the model with Data.from_dict), or register its class with "
            "torch.utils._pytree.register_dataclass."
        )
    return first


def _dim(history: Sequence[int]) -> Dim:
    """A size by what it was in each example."""
    varies = len(set(history)) > 1 if len(history) > 1 else history[0] >= _SMALLEST
    return Size("n" + "_".join(map(str, history))) if varies else history[0]


def sizes_of(layout: Layout, batch: Any) -> dict[str, int]:
    """The sizes of a batch that is of this form."""
    leaves, structure = pytree.tree_flatten(batch)
    sizes = layout.sizes(leaves, structure)
    assert sizes is not None
    return sizes


def describe(sizes: dict[str, int]) -> str:
    """Sizes in words."""
    known = {"most": "at most {} neighbours of an atom"}
    return ", ".join(
        str(size) if name.startswith("n") else known.get(name, f"{{}} {name}").format(size)
        for name, size in sizes.items()
    )
