"""Allegro: strictly local, equivariant."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ddpkit.errors import InputError
from ddpkit.models import reference
from ddpkit.models.config import PotentialConfig
from ddpkit.models.geometry import wigner_3j
from ddpkit.models.graph import at_centre, at_neighbour, is_literal, pad, sum_to_centre, unpad, without_ghosts
from ddpkit.models.irreps import Irrep
from ddpkit.models.mlp import MLP, uniform
from ddpkit.models.potential import Edges, Potential


def layer_irreps(edge: Sequence[Irrep], track: Sequence[Irrep], num_layers: int) -> list[list[Irrep]]:
    """The irreps of the tensor features before the first layer and after each.

    After the last layer only scalars are read, and before it only what can still become something that is read is kept.

    Args:
        edge: irreps of the spherical harmonics.
        track: irreps that features may have.
        num_layers: at least 1.
    """
    irreps = [list(edge)]
    for layer in range(num_layers):
        wanted = [(0, 1)] if layer == num_layers - 1 else track
        irreps.append([ir for ir in wanted if any(_couples(a, b, ir) for a in irreps[-1] for b in edge)])
    for layer in range(num_layers - 1, -1, -1):
        irreps[layer] = [a for a in irreps[layer] if any(_couples(a, b, c) for b in edge for c in irreps[layer + 1])]
    return irreps


def _couples(a: Irrep, b: Irrep, c: Irrep) -> bool:
    return a[1] * b[1] == c[1] and abs(a[0] - b[0]) <= c[0] <= a[0] + b[0]


def _offsets(irreps: Sequence[Irrep]) -> list[int]:
    offsets = [0]
    for l, _ in irreps:
        offsets.append(offsets[-1] + 2 * l + 1)
    return offsets


class PathWeights(torch.nn.Module):
    """The tensor product of Allegro, seen as a map from what the edges of a centre share to a matrix.

    Every edge of a centre is multiplied with the same tensors A of its surroundings. So contract those with the
    weighted Clebsch-Gordan coefficients first,

        M[channel, atom, i, k] = sum_j A[channel, atom, j] sum_p w[channel, p] C_p[i, j, k],

    and a layer maps an edge's features x to x M.

    Args:
        irreps_in: of the features.
        irreps_edge: of the surroundings.
        irreps_out: of the features after the layer.
        channels: number of channels.
        coupled: weights of their own for every channel.
        dtype: of weights and coefficients.
    """

    coefficients: Tensor

    def __init__(
        self,
        irreps_in: Sequence[Irrep],
        irreps_edge: Sequence[Irrep],
        irreps_out: Sequence[Irrep],
        channels: int,
        *,
        coupled: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.channels = channels
        at_i, at_j, at_k = _offsets(irreps_in), _offsets(irreps_edge), _offsets(irreps_out)
        self.shape = (at_i[-1], at_j[-1], at_k[-1])
        self.irreps = (list(irreps_in), list(irreps_edge), list(irreps_out))
        self.paths = [
            (i, j, k)
            for k, c in enumerate(irreps_out)
            for i, a in enumerate(irreps_in)
            for j, b in enumerate(irreps_edge)
            if _couples(a, b, c)
        ]
        coefficients = torch.zeros(len(self.paths), *self.shape, dtype=torch.float64, device="cpu")
        for p, (i, j, k) in enumerate(self.paths):
            l1, l2, l3 = irreps_in[i][0], irreps_edge[j][0], irreps_out[k][0]
            block = math.sqrt(2 * l3 + 1) * wigner_3j(l1, l2, l3)
            coefficients[p, at_i[i] : at_i[i + 1], at_j[j] : at_j[j + 1], at_k[k] : at_k[k + 1]] = block
        # [paths, j, i, k]: j is contracted, i and k stay
        coefficients = coefficients.transpose(1, 2).flatten(1)
        self.register_buffer("coefficients", coefficients.to(dtype), persistent=False)
        self.weights = uniform(channels if coupled else 1, len(self.paths), dtype=dtype)

    def forward(self, surroundings: Tensor) -> Tensor:
        """`[channels, atoms, j]` -> `[channels, atoms, i, k]`."""
        i, j, k = self.shape
        weighted = (self.weights @ self.coefficients).reshape(-1, j, i * k).expand(self.channels, j, i * k)
        return torch.bmm(surroundings, weighted).reshape(self.channels, -1, i, k)


class Allegro(Potential):
    """Allegro (A. Musaelian et al., Nature Communications 14, 579 (2023)), as published in `nequip-allegro` 0.8.

    Nothing nonlinear acts on the tensor features of an edge, and each layer multiplies them with tensors that all edges
    of a centre share. So the features are never built: after t layers they are those of the edge's own harmonics times
    a matrix of its centre, P_t = M_1 ... M_t (`PathWeights`), of which the scalars that an edge needs are one column.

    Args:
        species: chemical symbols.
        l_max: highest degree of tensors.
        parity: allow features of both parities (full O(3)); only those of the spherical harmonics where False.
        num_layers: tensor product layers.
        num_scalar_features: scalar features of an edge in each layer.
        num_tensor_features: channels of the tensor features.
        embed_dim: width of the radial-chemical embedding.
        scalar_embed_depth: hidden layers of the two-body MLP.
        scalar_embed_width: their width.
        scalar_embed_dim: its output; `num_scalar_features` where None, as `nequip-allegro` has it.
        scalar_embed_nonlinearity: its nonlinearity.
        mlp_depth: hidden layers of the MLP in each layer.
        mlp_width: their width.
        mlp_nonlinearity: their nonlinearity.
        readout_depth: hidden layers of the readout.
        readout_width: their width.
        readout_nonlinearity: their nonlinearity; None for a linear readout.
        path_channel_coupling: weights of the tensor products differ between channels.
        forward_normalize: MLP weights keep the variance of activations; of derivatives where False.
        shared: `avg_num_neighbors` and the other fields of `PotentialConfig`.
    """

    harmonic_degree: Tensor

    def __init__(
        self,
        species: Sequence[str],
        *,
        l_max: int = 2,
        parity: bool = True,
        num_layers: int = 2,
        num_scalar_features: int = 64,
        num_tensor_features: int = 64,
        embed_dim: int = 32,
        scalar_embed_depth: int = 2,
        scalar_embed_width: int = 64,
        scalar_embed_dim: int | None = 128,
        scalar_embed_nonlinearity: str | None = "silu",
        mlp_depth: int = 2,
        mlp_width: int = 256,
        mlp_nonlinearity: str | None = "silu",
        readout_depth: int = 1,
        readout_width: int = 128,
        readout_nonlinearity: str | None = None,
        path_channel_coupling: bool = True,
        forward_normalize: bool = True,
        **shared: Any,
    ) -> None:
        config = PotentialConfig(species=species, l_max=l_max, **shared)
        super().__init__(config)
        if num_layers < 1:
            raise InputError(f"num_layers is {num_layers}: Allegro has at least one layer")
        if embed_dim % 2:
            raise InputError(
                f"embed_dim is {embed_dim}: give an even number, half for the centre and half for the neighbour"
            )
        dtype, scalars, channels = self.dtype, num_scalar_features, num_tensor_features
        self.num_scalar_features = scalars
        self.num_tensor_features = channels
        self.num_degrees = l_max + 1
        edge = [(l, (-1) ** l) for l in range(l_max + 1)]
        track = [(l, p) for l in range(l_max + 1) for p in (1, -1)] if parity else edge
        degree = torch.zeros(l_max + 1, (l_max + 1) ** 2, dtype=dtype, device="cpu")
        for l in range(l_max + 1):
            degree[l, l * l : (l + 1) ** 2] = 1
        self.register_buffer("harmonic_degree", degree, persistent=False)

        def mlp(dims: list[int], nonlinearity: str | None, forward: bool = forward_normalize) -> MLP:
            return MLP(dims, nonlinearity, forward_normalize=forward, dtype=dtype)

        if scalar_embed_dim is None:
            scalar_embed_dim = scalars
        weights = channels * self.num_degrees
        self.centre_embedding = torch.nn.Parameter(torch.randn(len(species), embed_dim // 2, dtype=dtype))
        self.neighbour_embedding = torch.nn.Parameter(torch.randn(len(species), embed_dim // 2, dtype=dtype))
        self.radial_linear = mlp([config.num_bessels, embed_dim], None)
        self.scalar_embed = mlp(
            [embed_dim, *[scalar_embed_width] * scalar_embed_depth, scalar_embed_dim], scalar_embed_nonlinearity
        )
        self.tensor_embed = mlp([scalar_embed_dim, weights], None)
        self.first_linear = mlp([scalar_embed_dim, scalars + weights], None, True)
        irreps = layer_irreps(edge, track, num_layers)
        self.products = torch.nn.ModuleList()
        self.latents = torch.nn.ModuleList()
        for layer in range(num_layers):
            last = layer == num_layers - 1
            self.products.append(
                PathWeights(
                    irreps[layer], edge, irreps[layer + 1], channels, coupled=path_channel_coupling, dtype=dtype
                )
            )
            dims = [scalars * (layer + 1) + channels, *[mlp_width] * mlp_depth, scalars + (0 if last else weights)]
            self.latents.append(mlp(dims, mlp_nonlinearity))
        self.readout = mlp([scalars * (num_layers + 1), *[readout_width] * readout_depth, 1], readout_nonlinearity)

    def atomic_energies(self, edges: Edges) -> Tensor:
        """`[atoms]` energies in units of the species' scales, before shifts."""
        if is_literal():
            return reference.allegro(self, edges)
        graph, degrees, channels = edges.graph, self.num_degrees, self.num_tensor_features
        kinds = (
            at_centre(edges.species @ self.centre_embedding, graph),
            at_neighbour(edges.species @ self.neighbour_embedding, graph),
        )
        embedding = torch.cat(kinds, 1) * self.radial_linear(edges.radial)
        matrices = self.scalar_embed.matrices()
        hidden = self.scalar_embed.hidden(embedding, matrices)
        # the embedding ends in a matrix and these start with one: multiply the matrices, not the edges
        both = torch.cat((self.first_linear.matrices()[0], self.tensor_embed.matrices()[0]), 1)
        weights = degrees * channels
        first, around, own = (hidden @ (matrices[-1] @ both)).split((self.num_scalar_features, weights, weights), 1)
        scalars = [first]
        harmonics = pad(edges.harmonics, graph)
        own = pad(own, graph)
        norm = (without_ghosts(edges.species, graph) @ self.inverse_sqrt_neighbors).unsqueeze(1)
        chain = None
        for product, module in zip(self.products, self.latents, strict=True):
            latent = cast("MLP", module)
            surroundings = self._surroundings(pad(around, graph), harmonics) * norm
            matrix = product(surroundings)
            chain = matrix if chain is None else chain @ matrix
            invariants = unpad(self._invariants(chain[..., 0], own, harmonics), graph)
            matrices = latent.matrices()
            hidden = latent.hidden(torch.cat((*scalars, invariants), 1), matrices)
            if latent is not self.latents[-1]:
                new, around = (hidden @ matrices[-1]).split((self.num_scalar_features, weights), 1)
                scalars.append(new)
        energies = self._readout(scalars, hidden, matrices[-1])
        total = sum_to_centre(energies, graph) * norm * math.sqrt(0.5)
        return total.squeeze(1)

    def _readout(self, scalars: list[Tensor], hidden: Tensor, matrix: Tensor) -> Tensor:
        """`[edges, 1]` energies from the scalars of all layers, the last of which are `hidden @ matrix`."""
        if self.readout.nonlinearity is not None:
            return self.readout(torch.cat((*scalars, hidden @ matrix), 1))
        earlier, last = self.readout.matrices()[0].split((len(scalars) * self.num_scalar_features, matrix.shape[1]))
        return torch.cat(scalars, 1) @ earlier + hidden @ (matrix @ last)

    def _surroundings(self, weights: Tensor, harmonics: Tensor) -> Tensor:
        """The sum over the edges of each centre of their weighted harmonics.

        Args:
            weights: `[atoms, most, degrees * channels]`.
            harmonics: `[atoms, most, j]`.

        Returns:
            `[channels, atoms, j]`.
        """
        every = weights.transpose(1, 2) @ harmonics
        every = every.reshape(every.shape[0], self.num_degrees, self.num_tensor_features, -1)
        return (every * self.harmonic_degree.unsqueeze(1)).sum(1).transpose(0, 1)

    def _invariants(self, column: Tensor, weights: Tensor, harmonics: Tensor) -> Tensor:
        """The scalars of every edge: its own weighted harmonics times a column of its centre's matrix.

        Args:
            column: `[channels, atoms, i]`.
            weights: `[atoms, most, degrees * channels]`.
            harmonics: `[atoms, most, i]`.

        Returns:
            `[atoms, most, channels]`.
        """
        spread = column.permute(1, 2, 0).unsqueeze(2) * self.harmonic_degree.t().unsqueeze(2)
        every = harmonics @ spread.flatten(2)
        return (weights * every).unflatten(2, (self.num_degrees, self.num_tensor_features)).sum(2)
