"""The models written down literally: what their fast kernels are checked against.

Every formula is computed as it stands in the papers, edge by edge and path by path, with operations that PyTorch differentiates:
nothing here has a derivative written by hand, changes the order of products, or pads.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self, cast

import torch
from torch import Tensor

from ddpkit.models.convolution import Convolution
from ddpkit.models.geometry import wigner_3j
from ddpkit.models.graph import at_centre, at_neighbour, sum_to_centre
from ddpkit.models.irreps import Features, Irrep
from ddpkit.models.potential import Edges

if TYPE_CHECKING:
    from ddpkit.models.allegro import Allegro, PathWeights
    from ddpkit.models.layers import SelfConnection
    from ddpkit.models.mlp import MLP


class ReferenceConvolution(Convolution):
    """The convolution of NequIP: for every path a message along every edge, then their sum."""

    @classmethod
    def prepare(cls, layers: Sequence[Self], edges: Edges, norm: Tensor) -> tuple[Edges, Tensor]:
        """The edges and the factor of the features."""
        del layers
        return edges, norm

    def forward(self, x: Features, hidden: Tensor, matrix: Tensor, shared: tuple[Edges, Tensor]) -> Features:
        """Features of the neighbours -> features of the centres."""
        edges, norm = shared
        out: dict[Irrep, list[Tensor]] = {irrep: [] for irrep in self.irreps_out}
        weights = iter(
            (hidden @ matrix).split([self.irreps_in[a] for a, paths in self.paths.items() for _ in paths], 1)
        )
        for a, paths in self.paths.items():
            near = at_neighbour(x[a] * norm.unsqueeze(2), edges.graph)
            for l, c in paths:
                coefficients = math.sqrt(2 * c[0] + 1) * wigner_3j(a[0], l, c[0]).to(near)
                coupled = torch.einsum("ej,ijk->eik", edges.harmonics[:, l * l : (l + 1) ** 2], coefficients)
                message = torch.einsum("eiu,eik,eu->eku", near, coupled, next(weights))
                out[c].append(sum_to_centre(message, edges.graph))
        return {irrep: torch.cat(parts, 2) for irrep, parts in out.items()}


def self_connection(layer: "SelfConnection", x: Features, embedding: Tensor) -> Features:
    """The tensor product of each atom's features with its embedding.

    Args:
        layer: its weights.
        x: features `[atoms, 2 l + 1, channels]`.
        embedding: `[atoms, embed_dim]`.
    """
    blocks = layer.weight.split([a * b for a, b in layer.shapes], 1)
    out = {}
    for irrep, (a, b), block in zip(layer.irreps, layer.shapes, blocks, strict=True):
        width = layer.weight.shape[0]
        weight = block.reshape(width, a, b) / math.sqrt(a * width)
        out[irrep] = torch.einsum("nia,nt,tab->nib", x[irrep], embedding, weight)
    return out


def allegro(model: "Allegro", edges: Edges) -> Tensor:
    """`[atoms]` energies of Allegro, with the tensor features of every edge built.

    Args:
        model: its modules.
        edges: species, radial basis and harmonics.
    """
    graph, degrees, channels, width = (
        edges.graph,
        model.num_degrees,
        model.num_tensor_features,
        model.num_scalar_features,
    )
    centre = at_centre(edges.species @ model.centre_embedding, graph)
    neighbour = at_neighbour(edges.species @ model.neighbour_embedding, graph)
    embedded = model.scalar_embed(torch.cat((centre, neighbour), 1) * model.radial_linear(edges.radial))
    scalars, around = model.first_linear(embedded).split((width, degrees * channels), 1)
    features = _weighted(model.tensor_embed(embedded), edges.harmonics, degrees)
    norm = (edges.species @ model.inverse_sqrt_neighbors).unsqueeze(1)
    for product, latent in zip(model.products, model.latents, strict=True):
        surroundings = sum_to_centre(_weighted(around, edges.harmonics, degrees), graph) * norm.unsqueeze(2)
        features = _product(cast("PathWeights", product), features, at_centre(surroundings, graph))
        new = cast("MLP", latent)(torch.cat((scalars, features[:, :, 0]), 1))
        scalars = torch.cat((scalars, new[:, :width]), 1)
        around = new[:, width:]
    return (sum_to_centre(model.readout(scalars), graph) * norm * math.sqrt(0.5)).squeeze(1)


def _weighted(weights: Tensor, harmonics: Tensor, degrees: int) -> Tensor:
    """`[edges, degrees * channels]` and `[edges, (l_max + 1)^2]` -> `[edges, channels, (l_max + 1)^2]`."""
    by_degree = weights.unflatten(1, (degrees, -1))
    parts = [by_degree[:, l, :, None] * harmonics[:, None, l * l : (l + 1) ** 2] for l in range(degrees)]
    return torch.cat(parts, 2)


def _product(layer: "PathWeights", x: Tensor, y: Tensor) -> Tensor:
    """The weighted sum over paths of the tensor product of x `[edges, channels, i]` and y `[edges, channels, j]`."""
    starts_i, starts_j, starts_k = (_starts(irreps) for irreps in layer.irreps)
    out = x.new_zeros(*x.shape[:2], starts_k[-1])
    parts = []
    for p, (i, j, k) in enumerate(layer.paths):
        a, b, c = (irreps[n] for irreps, n in zip(layer.irreps, (i, j, k), strict=True))
        coefficients = math.sqrt(2 * c[0] + 1) * wigner_3j(a[0], b[0], c[0]).to(x)
        left, right = x[:, :, starts_i[i] : starts_i[i + 1]], y[:, :, starts_j[j] : starts_j[j + 1]]
        value = torch.einsum("eci,ecj,ijk->eck", left, right, coefficients) * layer.weights[:, p, None]
        parts.append(torch.nn.functional.pad(value, (starts_k[k], starts_k[-1] - starts_k[k + 1])))
    return out + sum(parts)


def _starts(irreps: Sequence[Irrep]) -> list[int]:
    starts = [0]
    for l, _ in irreps:
        starts.append(starts[-1] + 2 * l + 1)
    return starts
