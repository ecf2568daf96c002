"""NequIP: equivariant message passing."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ddpkit.errors import InputError
from ddpkit.models.config import PotentialConfig
from ddpkit.models.graph import without_ghosts
from ddpkit.models.irreps import Features, Irreps
from ddpkit.models.kernels import KERNELS, Kernels, kernels_on
from ddpkit.models.layers import Layer, features_with_ghosts, groups_of
from ddpkit.models.local import Local
from ddpkit.models.mlp import MLP
from ddpkit.models.potential import Edges, Potential
from ddpkit.models.reference import ReferenceConvolution


class NequIP(Potential):
    """NequIP (S. Batzner et al., Nature Communications 13, 2453 (2022)), as published in `nequip` 0.19.

    Args:
        species: chemical symbols.
        l_max: highest degree of tensors.
        parity: features of both parities; only those of the spherical harmonics where False.
        num_layers: convolutions.
        num_features: channels of each degree (of each parity), or one number for all.
        type_embedding_dim: width of the species' embedding.
        radial_depth: hidden layers of the radial MLPs.
        radial_width: their width.
        readout_depth: hidden layers of the readout.
        readout_width: their width; the number of scalar features where None.
        readout_nonlinearity: their nonlinearity; None for a linear readout.
        self_connection: weighted by the species' embedding, from the second layer on.
        kernels: what computes the convolution: "ddpkit", "e3nn" (slow), or on NVIDIA GPUs "cuda" (up to l_max 4) or
            "openequivariance" (on a CPU, where such models may be loaded, "ddpkit" computes). "auto" is "cuda" where that can be
            made, else "ddpkit". See `ddpkit.models.kernels.KERNELS`.
        shared: `avg_num_neighbors` and the other fields of `PotentialConfig`.

    Attributes:
        kernels: what computes the convolution on GPUs; "auto" no longer.
        portable: settings that say how the same is computed, with values that need no GPU.
    """

    message_passing = True
    portable: ClassVar[dict[str, Any]] = {"kernels": "ddpkit"}

    def __init__(
        self,
        species: Sequence[str],
        *,
        l_max: int = 1,
        parity: bool = False,
        num_layers: int = 4,
        num_features: int | Sequence[int] = 32,
        type_embedding_dim: int = 32,
        radial_depth: int = 1,
        radial_width: int = 128,
        readout_depth: int = 0,
        readout_width: int | None = None,
        readout_nonlinearity: str | None = "silu",
        self_connection: bool = True,
        kernels: str = "auto",
        **shared: Any,
    ) -> None:
        config = PotentialConfig(species=species, l_max=l_max, **shared)
        super().__init__(config)
        if num_layers < 1:
            raise InputError(f"num_layers is {num_layers}: NequIP has at least one layer")
        features = [num_features] * (l_max + 1) if isinstance(num_features, int) else list(num_features)
        if len(features) != l_max + 1:
            raise InputError(
                f"num_features has {len(features)} entries: give one number, or one for each of {l_max + 1} degrees"
            )
        dtype = self.dtype
        choice = Kernels(kernels, l_max, dtype)
        self.kernels = choice.name
        self.embedding = torch.nn.Parameter(torch.randn(len(species), type_embedding_dim, dtype=dtype))
        hidden = {(l, p): features[l] for l in range(l_max + 1) for p in ((1, -1) if parity else ((-1) ** l,))}
        irreps: Irreps = {(0, 1): type_embedding_dim}
        self.layers = torch.nn.ModuleList()
        for n in range(num_layers):
            layer = Layer(
                irreps,
                {(0, 1): features[0]} if n == num_layers - 1 else hidden,
                type_embedding_dim,
                [config.num_bessels, *[radial_width] * radial_depth],
                choice,
                self_connection=self_connection and n > 0,
            )
            self.layers.append(layer)
            irreps = layer.irreps_out
        if readout_width is None:
            readout_width = features[0]
        self.readout = MLP([features[0], *[readout_width] * readout_depth, 1], readout_nonlinearity, dtype=dtype)
        # nequip's Bessel functions carry this factor for old models' sake
        self.radial_factor = 2 * math.pi / self.r_max**2

    def kernels_of(self, device: torch.device) -> str:
        """What computes the convolution on a device."""
        return self.kernels if KERNELS[self.kernels].runs_on(device) else "ddpkit"

    def reference_kernels(self) -> dict[int, torch.nn.Module]:
        """For the `memo` of `copy.deepcopy`: by the id of each layer's kernel, the reference that replaces it in the copy."""
        kernels = [cast("Layer", layer).kernel for layer in self.layers]
        return {id(k): ReferenceConvolution(k.irreps_in, k.l_max, k.irreps_out, k.dtype) for k in kernels}

    def for_inference(self) -> Local:
        """A copy of the model for `ddpkit.inference`, on the kernels that run on every device and on any graph."""
        local = super().for_inference()
        for layer in cast("NequIP", local.potential).layers:
            layer.kernel = cast("Layer", layer).convolution
        return local

    def exchange_width(self) -> int:
        """The widest row of features that layers need from other ranks: the first knows the ghosts' species."""
        later = [cast("Layer", layer).linear_in for layer in list(self.layers)[1:]]
        return max((linear.width for linear in later), default=0)

    def atomic_energies(self, edges: Edges) -> Tensor:
        """`[atoms]` energies in units of the species' scales, before shifts."""
        radial = self.radial_factor * edges.radial
        norm = (edges.species @ self.inverse_sqrt_neighbors).unsqueeze(1)
        layers = [cast("Layer", layer) for layer in self.layers]
        kernels = kernels_on(radial.device, [(layer.kernel, layer.convolution) for layer in layers])
        shared = kernels[0].prepare(kernels, edges, norm)
        groups = groups_of(without_ghosts(edges.species, edges.graph))
        x: Features = {(0, 1): (edges.species @ self.embedding).unsqueeze(1)}
        for layer, kernel in zip(layers, kernels, strict=True):
            mixed = layer.linear_in(x)
            if layer is not layers[0]:  # before, all there is to know of ghosts is their species
                mixed = features_with_ghosts(mixed, edges.graph)
            x = layer(x, mixed, radial, kernel, shared, self.embedding, groups)
        return self.readout(x[0, 1].squeeze(1)).squeeze(1)
