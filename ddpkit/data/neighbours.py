"""Neighbour lists."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddpkit.data.frame import Frame
from ddpkit.errors import InputError

TOUCHING = 1e-3  # Å; between atoms that are closer, an edge has no direction


NeighbourList = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]
"""Centre `[edges]`, neighbour `[edges]` and shift `[edges, 3]` in Å: what `neighbour_list` returns."""


def neighbour_list(frame: Frame, r_max: float) -> NeighbourList:
    """Every ordered pair of atoms closer than the cutoff, periodic images included.

    Cells smaller than the cutoff, mixed periodicity and atoms outside the cell are fine; an atom neighbours its own images, not
    itself. One thread; the order is canonical (by centre, then neighbour, then image), so that the same frame gives the same bits
    everywhere.

    Args:
        frame: the configuration.
        r_max: cutoff in Å.

    Raises:
        InputError: the cutoff is not positive, positions are not finite, or atoms lie on top of one another.

    Returns:
        centre `[edges]`, sorted; neighbour `[edges]`; and shift `[edges, 3]` in Å, so that
        `positions[neighbour] + shift - positions[centre]` is the edge vector.
    """
    centre, neighbour, images = _sorted_pairs(frame, r_max)
    if images is None:
        return centre, neighbour, np.zeros((len(centre), 3))
    assert frame.cell is not None
    return centre, neighbour, shifts(images, frame.cell)


def shifts(images: NDArray[Any], cell: NDArray[np.float64]) -> NDArray[np.float64]:
    """`[edges, 3]` in Å, of the cells `[edges, 3]` that neighbours are in, counted along the lattice vectors."""
    found: NDArray[np.float64] = images.astype(np.float64) @ cell
    return found


class KeptList(NamedTuple):
    """A neighbour list in integers as short as they can be.

    Attributes:
        degree: `[atoms]` how many neighbours each atom has.
        neighbour: `[edges]` these, atom by atom.
        images: `[edges, 3]` the cells that they are in; None where all are in one.
    """

    degree: NDArray[Any]
    neighbour: NDArray[Any]
    images: NDArray[Any] | None


class KeptLists:
    """Neighbour lists of frames that are met again, kept in memory in a fifth of their size or less.

    Args:
        r_max: cutoff in Å.
        limit: bytes, about; lists beyond it are found each time.
    """

    def __init__(self, r_max: float, limit: int = 512 << 20) -> None:
        self.r_max, self._left = r_max, limit
        self._kept: dict[int, KeptList] = {}

    def of(self, number: int, frame: Callable[[int], Frame]) -> KeptList:
        """What `neighbour_list` finds in a frame.

        Args:
            number: of the frame.
            frame: gives a frame by its number, where its list is not known yet.
        """
        kept = self._kept.get(number)
        if kept is None:
            one = frame(number)
            centre, neighbour, images = _sorted_pairs(one, self.r_max)
            degree = np.bincount(centre, minlength=len(one))
            kept = KeptList(_narrow(degree), _narrow(neighbour), None if images is None else _narrow(images))
            size = _OVERHEAD + sum(x.nbytes for x in kept if x is not None)
            if size <= self._left:
                self._kept[number] = kept
                self._left -= size
        return kept


_INTEGERS = (np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64)
_OVERHEAD = 500  # bytes of the objects that hold a list


def _sorted_pairs(frame: Frame, r_max: float) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32] | None]:
    """Centre and neighbour of each edge, and the cell that the neighbour is in; None for that where all are in one."""
    pairs, images = _search(frame, r_max, "PS")
    pairs = pairs.astype(np.int64)
    if frame.cell is None or not frame.pbc.any():
        order = np.argsort(pairs[:, 0] * len(frame) + pairs[:, 1])
        return pairs[order, 0], pairs[order, 1], None
    order = np.lexsort((images[:, 2], images[:, 1], images[:, 0], pairs[:, 1], pairs[:, 0]))
    return pairs[order, 0], pairs[order, 1], images[order]


def _narrow(values: NDArray[Any]) -> NDArray[Any]:
    """Integers in the shortest type that holds them."""
    least, most = values.min(initial=0), values.max(initial=0)
    return values.astype(next(t for t in _INTEGERS if np.iinfo(t).min <= least and most <= np.iinfo(t).max))


def check_cutoff(r_max: float) -> None:
    """Refuses what is no cutoff.

    Raises:
        InputError: it is not positive and finite.
    """
    if not 0 < r_max < float("inf"):
        raise InputError(f"r_max={r_max} Å is no cutoff: give a positive number")


class Counts(NamedTuple):
    """What is counted of a frame's edges."""

    edges: int
    isolated: int  # atoms without any
    most: int  # neighbours of the atom that has most


def count_edges(frame: Frame, r_max: float, closest: float = TOUCHING) -> Counts:
    """Counts edges without making a list of them.

    Args:
        frame: the configuration.
        r_max: cutoff in Å.
        closest: atoms that are closer than this, in Å, are refused.

    Raises:
        InputError: as for `neighbour_list`.
    """
    pairs = _search(frame, r_max, "P", closest)[0]
    degree = np.bincount(pairs[:, 0].astype(np.int64), minlength=len(frame))
    return Counts(len(pairs), int((degree == 0).sum()), int(degree.max(initial=0)))


def _search(frame: Frame, r_max: float, quantities: str, closest: float = TOUCHING) -> tuple[NDArray[Any], ...]:
    from vesin import NeighborList

    check_cutoff(r_max)
    if not np.isfinite(frame.positions).all():
        raise InputError(f"{frame.name or 'a frame'} has positions that are NaN or infinite: repair or remove it")
    periodic = frame.cell is not None and bool(frame.pbc.any())
    *found, distances = NeighborList(cutoff=r_max, full_list=True, n_threads=1).compute(
        points=np.ascontiguousarray(frame.positions),
        box=np.ascontiguousarray(frame.cell) if periodic else np.zeros((3, 3)),
        periodic=frame.pbc if periodic else False,
        quantities=f"{quantities}d",
    )
    if len(distances) and distances.min() < closest:
        a, b = found[0][distances.argmin()].tolist()
        who = f"atoms {a} and {b} lie" if a != b else f"atom {a} and its own image lie"
        raise InputError(
            f"in {frame.name or 'a frame'}, {who} on top of one another ({distances.min():.2g} Å apart; atoms are "
            "counted from 0): "
            "repair or remove it"
        )
    return tuple(found)
