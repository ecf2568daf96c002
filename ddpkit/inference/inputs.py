"""What an exported model is called with: the atoms of one rank and their edges."""

from typing import NamedTuple

import torch
from torch import Tensor

from ddpkit.batch import neighbour_table

SMALLEST = 2
"""Compiled code holds for sizes from here on: a compiler takes 0 and 1 for constants."""


class Inputs(NamedTuple):
    """The arguments of an exported model, in their order. Every size that varies is at least `SMALLEST`.

    Atoms that a rank owns come first, then ghosts (copies of atoms that others own); without ranks, all are owned.
    """

    vectors: Tensor  # [edges, 3] float64, Å: from centre to neighbour
    species: Tensor  # [all] int64, index into the model's species
    centre: Tensor  # [edges] int64, ascending, < owned
    neighbour: Tensor  # [edges] int64, < all
    outgoing: Tensor  # [owned, most] int64: the edges of each centre, padded with `edges`
    incoming: (
        Tensor | None
    )  # [all, most_in] int64: the edges of each neighbour, likewise; None where no messages are passed

    def arguments(self) -> tuple[Tensor, ...]:
        """Those that the model takes."""
        return tuple(x.contiguous() for x in self if x is not None)

    def sizes(self) -> dict[str, int]:
        """Numbers of edges, owned atoms and all atoms, and of entries of the two tables."""
        return {
            "edges": self.vectors.shape[0],
            "owned": self.outgoing.shape[0],
            "all": self.species.shape[0],
            "outgoing": self.outgoing.numel(),
            "incoming": 0 if self.incoming is None else self.incoming.numel(),
        }


def inputs_of(
    vectors: Tensor,
    species: Tensor,
    centre: Tensor,
    neighbour: Tensor,
    owned: int,
    *,
    message_passing: bool,
    beyond: float,
) -> Inputs:
    """Makes the tables, and pads what is too small.

    Where there are fewer than two owned atoms or two edges, two atoms of the first species are put after the owned ones (before
    the ghosts), and an edge from each to the other, longer than the cutoff, after the edges. So the first rows of what the model
    computes are what they were. (Whoever exchanges rows between ranks leaves those of these two atoms where they are.)

    Args:
        vectors: `[edges, 3]`, Å.
        species: `[all]`.
        centre: `[edges]`, ascending.
        neighbour: `[edges]`.
        owned: number of owned atoms.
        message_passing: whether the model takes `incoming`.
        beyond: length of edges that pad, Å; more than the cutoff.
    """
    if owned < SMALLEST or centre.shape[0] < SMALLEST:
        both = torch.arange(owned, owned + 2, device=centre.device)
        species = torch.cat((species[:owned], species.new_zeros(2), species[owned:]))
        neighbour = torch.cat((torch.where(neighbour < owned, neighbour, neighbour + 2), both.flip(0)))
        centre = torch.cat((centre, both))
        step = vectors.new_zeros(2, 3)
        step[0, 0], step[1, 0] = beyond, -beyond
        vectors = torch.cat((vectors, step))
        owned += 2
    outgoing = _table(centre, owned)
    incoming = _table(neighbour, species.shape[0]) if message_passing else None
    return Inputs(vectors, species, centre, neighbour, outgoing, incoming)


def _table(ends: Tensor, atoms: int) -> Tensor:
    most = int(torch.bincount(ends, minlength=atoms).max())
    return neighbour_table(ends, atoms, max(most, SMALLEST))


def random_inputs(
    owned: int, ghosts: int, most: int, *, species: int, r_max: float, message_passing: bool, seed: int, device: str
) -> Inputs:
    """Atoms with neighbours drawn at random, at distances from a third of the cutoff to a little beyond it.

    Args:
        owned: number of owned atoms, at least 2.
        ghosts: number of ghosts.
        most: most neighbours of an atom, which the first one has.
        species: number of species.
        r_max: cutoff, Å.
        message_passing: whether the model takes `incoming`.
        seed: of the draws.
        device: where the tensors lie.
    """
    draw = torch.Generator().manual_seed(seed)
    counts = torch.randint(2, most + 1, (owned,), generator=draw)
    counts[0] = most
    centre = torch.repeat_interleave(torch.arange(owned), counts)
    edges = centre.shape[0]
    neighbour = torch.randint(0, owned + ghosts, (edges,), generator=draw)
    direction = torch.nn.functional.normalize(torch.randn(edges, 3, generator=draw, dtype=torch.float64))
    length = r_max * (0.35 + 0.7 * torch.rand(edges, 1, generator=draw, dtype=torch.float64))
    made = inputs_of(
        direction * length,
        torch.randint(0, species, (owned + ghosts,), generator=draw),
        centre,
        neighbour,
        owned,
        message_passing=message_passing,
        beyond=2 * r_max,
    )
    return made._replace(**{name: x.to(device) for name, x in made._asdict().items() if x is not None})
