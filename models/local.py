"""Potentials as modules for inference: the atoms of one rank."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpkit.models.graph import graph_from

if TYPE_CHECKING:
    from ddpkit.models.potential import Potential


class Local(torch.nn.Module):
    """What a potential computes for the atoms of one rank, called with the tensors of `ddpkit.inference.inputs.Inputs`.

    Args:
        potential: in evaluation mode, without trained parameters.

    Attributes:
        message_passing: whether it takes `incoming`.
        exchange_width: the widest row that its layers exchange between ranks; 0 where they exchange none.
    """

    def __init__(self, potential: "Potential") -> None:
        super().__init__()
        self.potential = potential
        self.message_passing = potential.message_passing
        self.exchange_width = potential.exchange_width()

    def forward(
        self,
        vectors: Tensor,
        species: Tensor,
        centre: Tensor,
        neighbour: Tensor,
        outgoing: Tensor,
        incoming: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Energies of the owned atoms `[owned]`, eV, and slopes `[edges, 3]`, eV/Å, both float64."""
        graph = graph_from(centre, neighbour, outgoing, incoming, everyone=species.shape[0])
        return self.potential.of_rank(vectors, species, graph)
