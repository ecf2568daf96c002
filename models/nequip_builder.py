"""What a checkpoint for `nequip` names and `nequip` does not have. It is imported from there, by name."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from allegro.model import AllegroModel as PublishedAllegro
from allegro.nn import Allegro_Module, TwoBodySphericalHarmonicTensorEmbed
from nequip.data import AtomicDataDict, from_dict
from nequip.data.transforms import NeighborListTransform
from nequip.model import model_builder
from nequip.nn import ScalarMLP


@model_builder  # type: ignore[untyped-decorator]
def AllegroModel(*, scalar_embed_output_dim: int, **arguments: Any) -> torch.nn.Module:  # noqa: N802  (as in allegro.model)
    """The published model, but with the width of the two-body embedding for itself, which was an argument of earlier releases.

    Args:
        scalar_embed_output_dim: outputs of the two-body MLP; the published builder takes `num_scalar_features`.
        arguments: of `allegro.model.AllegroModel`.
    """
    model: Any = PublishedAllegro(**arguments)
    network, field = model.func, AtomicDataDict.EDGE_EMBEDDING_KEY
    forward = arguments["forward_normalize"]
    network.scalar_embed_mlp = ScalarMLP(
        output_dim=scalar_embed_output_dim,
        hidden_layers_depth=arguments["scalar_embed_mlp_hidden_layers_depth"],
        hidden_layers_width=arguments.get("scalar_embed_mlp_hidden_layers_width"),
        nonlinearity=arguments["scalar_embed_mlp_nonlinearity"],
        bias=False,
        forward_weight_init=forward,
        field=field,
        out_field=field,
        irreps_in=network.radial_chemical_embed.irreps_out,
    )
    network.tensor_embed = TwoBodySphericalHarmonicTensorEmbed(
        irreps_edge_sh=network.tensor_embed.irreps_out[AtomicDataDict.EDGE_ATTRS_KEY],
        num_tensor_features=arguments["num_tensor_features"],
        forward_weight_init=forward,
        irreps_in=network.scalar_embed_mlp.irreps_out,
    )
    network.allegro = Allegro_Module(
        num_layers=arguments["num_layers"],
        num_scalar_features=arguments["num_scalar_features"],
        num_tensor_features=arguments["num_tensor_features"],
        tensor_track_allowed_irreps=network.allegro.tensor_track_allowed_irreps,
        avg_num_neighbors=arguments["avg_num_neighbors"],
        type_names=arguments["type_names"],
        latent_kwargs={
            "hidden_layers_depth": arguments["allegro_mlp_hidden_layers_depth"],
            "hidden_layers_width": arguments.get("allegro_mlp_hidden_layers_width"),
            "nonlinearity": arguments["allegro_mlp_nonlinearity"],
            "bias": False,
            "forward_weight_init": forward,
        },
        tp_path_channel_coupling=arguments["tp_path_channel_coupling"],
        irreps_in=network.tensor_embed.irreps_out,
    )
    embedded = network.allegro.irreps_out[field]
    for part in (*list(network)[4:], network, model):
        for irreps in (part.irreps_in, part.irreps_out):
            if field in irreps:
                irreps[field] = embedded
    return model


class Example:
    """A crystal of all species for `nequip-package` and `nequip-compile`, which trace a model with a frame of its training data.

    It has what they call of a datamodule.

    Args:
        species: names of the types.
        r_max: cutoff, Å.
        train_dataloader: what they pass; the frame is one.
    """

    def __init__(self, species: Sequence[str], r_max: float, train_dataloader: dict[str, Any] | None = None) -> None:
        del train_dataloader
        self._types, self._r_max = len(species), r_max

    def prepare_data(self) -> None:
        """Nothing to download."""

    def setup(self, stage: str) -> None:
        """Nothing to read."""

    def teardown(self, stage: str) -> None:
        """Nothing to close."""

    def train_dataloader(self) -> Iterator[dict[str, torch.Tensor]]:
        """One frame: a cubic lattice with half the cutoff for its constant, somewhat disturbed."""
        edge = max(2, math.ceil(self._types ** (1 / 3)))
        sites = np.array(list(itertools.product(range(edge), repeat=3)), dtype=float)
        disturbed = sites + np.random.default_rng(1).uniform(-0.1, 0.1, sites.shape)
        frame = {
            "pos": disturbed * self._r_max / 2,
            "atom_types": np.arange(len(sites)) % self._types,
            "cell": np.eye(3) * edge * self._r_max / 2,
            "pbc": (True, True, True),
        }
        data = NeighborListTransform(r_max=self._r_max)(from_dict(frame))
        yield AtomicDataDict.batched_from_list([data])
