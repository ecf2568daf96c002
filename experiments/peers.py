"""The original packages, `nequip` and `nequip-allegro`, imported from there, as peers of a benchmark."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ddpkit
from ddpkit.batch import Batch
from ddpkit.errors import InputError

KERNELS = {
    ("openequivariance", "NequIP"): "enable_OpenEquivariance",
    ("cuequivariance", "NequIP"): "enable_CuEquivariance",
    ("cuequivariance", "Allegro"): "enable_CuEquivarianceContracter",
}


class Peer(nn.Module):
    """A model of the original package that speaks the model contract.

    What it takes is made of each batch once, before it is timed.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._data: dict[int, dict[str, Tensor]] = {}
        self._kept: list[Batch] = []  # so that no other gets the identity of one of them

    def prepare(self, batch: Batch) -> None:
        """Makes of a batch what the package takes."""
        self._data[id(batch)] = peer_input(batch)
        self._kept.append(batch)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The contract's outputs for a batch that has been prepared."""
        data = self._data[id(batch)]
        out = self.module(dict(data))
        result = {"energy": out["total_energy"].squeeze(1).double(), "forces": out["forces"].double()}
        if "cell" in data:
            result["stress"] = out["stress"].double()
        return result


def peer_input(batch: Batch) -> dict[str, Tensor]:
    """A batch as the original packages take it."""
    data = {
        "pos": batch.positions.clone(),  # of which they ask derivatives
        "edge_index": batch.edge_index,
        "atom_types": batch.species,
        "batch": batch.frame,
        "num_atoms": torch.bincount(batch.frame, minlength=batch.num_frames),
    }
    if batch.cell is not None:
        # an edge's shift in units of the lattice vectors
        of_edge = batch.frame[batch.edge_index[0]]
        shift = torch.linalg.solve(batch.cell.transpose(1, 2)[of_edge], batch.edge_shift.unsqueeze(2))
        data |= {"cell": batch.cell, "edge_cell_shift": shift.squeeze(2).round()}
    return data


def peer_model(spec: dict[str, Any], species: Sequence[str], precision: str, *, compile: bool) -> nn.Module:  # noqa: A002
    """The same model in `nequip` or `nequip-allegro`.

    Raises:
        InputError: the package is missing.
    """
    try:
        from allegro.model import AllegroModel
        from nequip.model import NequIPGNNModel
        from nequip.utils.global_state import set_global_state
    except ImportError as error:
        raise InputError(
            "--peer nequip needs the packages nequip and nequip-allegro: pip install 'ddpkit[nequip]'."
        ) from error
    set_global_state(allow_tf32=bool(torch.backends.cuda.matmul.allow_tf32))
    shared = {
        "seed": 1,
        "model_dtype": "float64" if precision == "float64" else "float32",
        "compile_mode": "compile" if compile else "eager",
        "type_names": list(species),
        "r_max": spec["r_max"],
        "l_max": spec["l_max"],
        "parity": spec["parity"],
        "num_layers": spec["num_layers"],
        "avg_num_neighbors": 30.0,
        "per_type_energy_shifts": 0.0,
        "per_type_energy_scales": 1.0,
    }
    if spec.get("zbl"):
        zbl = {"_target_": "nequip.nn.pair_potential.ZBL", "units": "metal", "chemical_species": list(species)}
        shared["pair_potential"] = zbl
    radial = {"num_bessels": spec["num_bessels"], "polynomial_cutoff_p": spec["polynomial_cutoff_p"]}
    if spec["_target_"].endswith("NequIP"):
        model: nn.Module = NequIPGNNModel(
            **shared,
            **radial,
            num_features=spec["num_features"],
            type_embed_num_features=spec["type_embedding_dim"],
            radial_mlp_depth=spec["radial_depth"],
            radial_mlp_width=spec["radial_width"],
        )
        return model
    model = AllegroModel(
        **shared,
        radial_chemical_embed={"_target_": "allegro.nn.TwoBodyBesselScalarEmbed", **radial},
        radial_chemical_embed_dim=spec["embed_dim"],
        scalar_embed_mlp_hidden_layers_depth=spec["scalar_embed_depth"],
        scalar_embed_mlp_hidden_layers_width=spec["scalar_embed_width"],
        num_scalar_features=spec["num_scalar_features"],
        num_tensor_features=spec["num_tensor_features"],
        allegro_mlp_hidden_layers_depth=spec["mlp_depth"],
        allegro_mlp_hidden_layers_width=spec["mlp_width"],
        readout_mlp_hidden_layers_depth=spec["readout_depth"],
        readout_mlp_hidden_layers_width=spec["readout_width"],
        readout_mlp_nonlinearity=None,
    )
    return model  # noqa: RET504  (which gives it a type)


def with_kernels(model: nn.Module, kernels: str, kind: str) -> nn.Module:
    """The model with other kernels.

    Args:
        model: of `peer_model`.
        kernels: `openequivariance` or `cuequivariance`.
        kind: `NequIP` or `Allegro`.

    Raises:
        InputError: the package has no such kernels for it, or they cannot be loaded.
    """
    from nequip.model import modify

    modifier = KERNELS.get((kernels, kind))
    if modifier is None:
        raise InputError(
            f"--peer-kernels {kernels}: the original package has no such kernels for {kind}; leave it out."
        )
    try:
        return modify(model, [{"modifier": modifier}])
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(
            f"--peer-kernels {kernels} cannot be used here ({type(error).__name__}: {why}): leave it out."
        ) from error


def optimizer(model: nn.Module) -> torch.optim.AdamW:
    """What both train with: fused where there is a GPU."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, fused=trained[0].is_cuda)


class PlainStep:
    """A step as the original package's trainer takes it: `loss.backward()`, then the optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._criterion = ddpkit.EnergyForcesLoss()
        self._optimizer = optimizer(model)

    def __call__(self, batch: Batch) -> None:
        """Trains on a batch."""
        self._optimizer.zero_grad()
        self._criterion(self._model(batch), batch)["loss"].backward()
        self._optimizer.step()
