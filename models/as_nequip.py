"""Our models as models of the `nequip` and `nequip-allegro` packages: the way back from `from_nequip`."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ddpkit.errors import InputError
from ddpkit.models.allegro import Allegro, PathWeights
from ddpkit.models.convert import energy_layers, pairs
from ddpkit.models.layers import Layer
from ddpkit.models.mlp import MLP
from ddpkit.models.nequip import NequIP
from ddpkit.models.potential import Potential

_FOLDED = "ddpkit.models.nequip_builder.AllegroModel"


def to_nequip(model: torch.nn.Module) -> torch.nn.Module:
    """The same model as a module of `nequip` 0.19 or `nequip-allegro` 0.8, for their calculators and training.

    Energies, forces and stress are the same but for rounding, and `from_nequip` of the result has the same weights, bit for bit.
    `save_nequip` writes what `nequip-package` and `nequip-compile` take.

    Those packages compute geometry in torch's default dtype, which they set to float64 for the process; so does this function.

    Args:
        model: an `Allegro` or a `NequIP`. One with `precision="mixed"` becomes a model in float32, which computes likewise;
            so does one with `precision="float32"`, whose geometry is in float64 from then on. Its `kernels` do not matter: theirs
            are chosen by `nequip-compile --modifiers`.

    Returns:
        Their `GraphModel`, with weights of its own, on the same device and in the same mode (training or evaluation).

    Raises:
        InputError: those packages have no such model, or are not installed.
    """
    potential = _potential(model)
    configuration = nequip_configuration(potential)
    target, arguments = configuration.pop("_target_"), configuration
    with _their_packages():
        from hydra.utils import get_method
        from lightning.pytorch.utilities.seed import isolate_rng
        from nequip.utils.global_state import global_state_initialized, set_global_state

        if not global_state_initialized():
            with isolate_rng():
                set_global_state(allow_tf32=bool(torch.backends.cuda.matmul.allow_tf32))
        with torch.device("cpu"):
            module: torch.nn.Module = get_method(target)(**arguments)
    _fill(module, potential)
    return module.to(potential.inverse_sqrt_neighbors.device).train(model.training)


def save_nequip(model: torch.nn.Module, path: str | Path) -> None:
    """Writes the same model as a checkpoint that `nequip-package build`, `nequip-compile` and `NequIPCalculator` take.

    Where it is read ddpkit must be installed; a package or compiled model that is made of it needs no ddpkit.

    Args:
        model: as in `to_nequip`.
        path: of the file; the packages expect it to end in `.ckpt`.

    Raises:
        InputError: those packages have no such model, or are not installed, or the file cannot be written.
    """
    potential = _potential(model)
    module = to_nequip(potential)
    with _their_packages():
        import lightning
        from nequip.utils import get_current_code_versions

        versions = get_current_code_versions(verbose=False)
    configuration = nequip_configuration(potential)
    sizes = {"train": 1, "val": 0, "test": 0, "predict": 0}
    trainer = "nequip.train.NequIPLightningModule"
    example = {
        "_target_": "ddpkit.models.nequip_builder.Example",
        "species": list(potential.species),
        "r_max": potential.r_max,
    }
    info = {
        "versions": versions,
        "data": example,
        "trainer": {},
        "global_options": {},
        "runs": [],
        "training_module": {"_target_": trainer, "model": configuration},
    }
    weights = {f"model.sole_model.{name}": value.cpu() for name, value in module.state_dict().items()}
    checkpoint = {
        "pytorch-lightning_version": lightning.__version__,
        "hparams_name": "kwargs",
        "hyper_parameters": {"model": configuration, "num_datasets": sizes, "info_dict": info},
        "state_dict": {"run_stage": torch.zeros(1, dtype=torch.int64), **weights},
        "epoch": 0,
        "global_step": 0,
        "loops": {},
    }
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            torch.save(checkpoint, file)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): give another path.") from error


def _potential(model: torch.nn.Module) -> Potential:
    if type(model) not in (Allegro, NequIP):
        raise _refuse(f"a {type(model).__name__}")
    assert isinstance(model, Potential)
    return model


def _refuse(what: str) -> InputError:
    return InputError(
        f"{what} has no counterpart in nequip: give an Allegro or a NequIP that could have been built there"
    )


@contextmanager
def _their_packages() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"to_nequip needs the packages nequip and nequip-allegro, of which {error.name} is missing: "
            "pip install nequip nequip-allegro"
        ) from error


def nequip_configuration(model: Potential) -> dict[str, Any]:
    """What builds a model of this shape in `nequip`, as its configuration files have it: `_target_` and arguments."""
    shape = _allegro(model) if isinstance(model, Allegro) else _nequip(cast("NequIP", model))
    return {**_common(model), **shape}


def _common(model: Potential) -> dict[str, Any]:
    odd = [name for name in model.species if not name.isalnum()]
    if odd:
        raise _refuse(f"the species name {odd[0]!r}, which is not made of letters and digits,")
    species, roots = model.species, model.radial_basis.roots
    common: dict[str, Any] = {
        "seed": 1,
        "model_dtype": "float64" if model.dtype == torch.float64 else "float32",
        "type_names": list(species),
        "r_max": model.r_max,
        "l_max": model.spherical_harmonics.l_max,
        "avg_num_neighbors": _by_species(model, [_neighbours(x) for x in model.inverse_sqrt_neighbors]),
    }
    for name in ("shifts", "scales"):
        values = getattr(model, name)
        common[f"per_type_energy_{name}"] = dict(zip(species, values.tolist(), strict=True))
        common[f"per_type_energy_{name}_trainable"] = isinstance(values, torch.nn.Parameter)
    if model.inverse_cutoffs is not None:
        table = model.inverse_cutoffs.double().reciprocal().clamp(max=model.r_max).tolist()
        common["per_edge_type_cutoff"] = {
            a: dict(zip(species, row, strict=True)) for a, row in zip(species, table, strict=True)
        }
    if model.zbl:
        from ase.data import chemical_symbols

        common["pair_potential"] = {
            "_target_": "nequip.nn.pair_potential.ZBL",
            "units": "metal",
            "chemical_species": [chemical_symbols[int(z)] for z in model.charges],
            "polynomial_cutoff_p": model.zbl_cutoff_p,
        }
    radial = {
        "num_bessels": roots.numel(),
        "bessel_trainable": isinstance(roots, torch.nn.Parameter),
        "polynomial_cutoff_p": model.polynomial_cutoff_p,
    }
    if isinstance(model, Allegro):
        embed = {"_target_": "allegro.nn.TwoBodyBesselScalarEmbed", **radial}
        return {**common, "radial_chemical_embed": embed}
    return {**common, **radial}


def _by_species(model: Potential, values: list[float]) -> float | dict[str, float]:
    return values[0] if len(set(values)) == 1 else dict(zip(model.species, values, strict=True))


def _neighbours(factor: Tensor) -> float:
    """The average number of neighbours whose inverse square root is `factor`, to the last bit: checkpoints hold that number."""
    wanted = factor.item()
    near = wanted**-2
    below = above = near
    for _ in range(8):
        for candidate in (below, above):
            if torch.tensor(1 / math.sqrt(candidate), dtype=factor.dtype).item() == wanted:
                return candidate
        below, above = math.nextafter(below, 0), math.nextafter(above, math.inf)
    return near


def _hidden(mlp: MLP, name: str, *, of: str = "hidden_layers_") -> dict[str, Any]:
    """Depth, width and nonlinearity of an MLP, as arguments that begin with `name`."""
    widths = [weight.shape[1] for weight in mlp.weights[:-1]]
    facts: dict[str, Any] = {f"{name}_{of}depth": len(widths), f"{name}_nonlinearity": mlp.nonlinearity}
    return {**facts, f"{name}_{of}width": widths[0]} if widths else facts


def _allegro(model: Allegro) -> dict[str, Any]:
    products = [cast("PathWeights", product) for product in model.products]
    latents = [cast("MLP", latent) for latent in model.latents]
    features = {irrep for product in products for irrep in product.irreps[0]}
    embedded = model.scalar_embed.weights[-1].shape[1]
    mlps = (model.radial_linear, model.tensor_embed, model.scalar_embed, model.readout, *latents)
    arguments = {
        "_target_": "allegro.model.AllegroModel",
        "parity": any(p != (-1) ** l for l, p in features),
        "num_layers": len(products),
        "num_scalar_features": model.num_scalar_features,
        "num_tensor_features": model.num_tensor_features,
        "radial_chemical_embed_dim": 2 * model.centre_embedding.shape[1],
        **_hidden(model.scalar_embed, "scalar_embed_mlp"),
        **_hidden(latents[0], "allegro_mlp"),
        **_hidden(model.readout, "readout_mlp"),
        "tp_path_channel_coupling": products[0].weights.shape[0] > 1 or model.num_tensor_features == 1,
        "forward_normalize": all(_normalises_forward(mlp) for mlp in mlps),
    }
    if embedded != model.num_scalar_features:
        arguments |= {"_target_": _FOLDED, "scalar_embed_output_dim": embedded}
    return arguments


def _normalises_forward(mlp: MLP) -> bool:
    """Whether its first layer is scaled by the fan-in and has no gain; where both ways scale alike either will do."""
    return all(
        math.isclose(alpha, (1 if n == 0 or mlp.nonlinearity is None else math.sqrt(2)) / math.sqrt(weight.shape[0]))
        for n, (alpha, weight) in enumerate(zip(mlp.alphas, mlp.weights, strict=True))
    )


def _nequip(model: NequIP) -> dict[str, Any]:
    layers = [cast("Layer", layer) for layer in model.layers]
    scalars = model.readout.weights[0].shape[0]
    hidden = layers[0].irreps_out if len(layers) > 1 else {(0, 1): scalars}
    for layer in layers[:-1]:
        hidden = {**hidden, **layer.irreps_out}
    l_max = model.spherical_harmonics.l_max
    features = [hidden.get((l, (-1) ** l), hidden.get((l, -((-1) ** l)), 1)) for l in range(l_max + 1)]
    radial = _hidden(layers[0].radial, "radial_mlp", of="")
    del radial["radial_mlp_nonlinearity"]  # theirs has none but SiLU, as ours
    return {
        "_target_": "nequip.model.NequIPGNNModel",
        "parity": any(p != (-1) ** l for l, p in hidden),
        "num_layers": len(layers),
        "num_features": features,
        "type_embed_num_features": model.embedding.shape[1],
        **radial,
        **_hidden(model.readout, "readout_mlp"),
        "convnet_sc": len(layers) > 1 and layers[1].self_connection is not None,
    }


def _fill(module: torch.nn.Module, model: Potential) -> None:
    """Puts the weights of our model into theirs."""
    layers = energy_layers(module)
    try:
        shared = pairs(model, layers)
    except InputError as error:
        raise _refuse(f"a {type(model).__name__} of this shape") from error
    for ours, theirs, places in shared:
        flat = ours.detach().reshape(-1).to(theirs)
        target = theirs.data.view(-1)
        target[slice(None) if places is None else places] = flat
        if isinstance(theirs, torch.nn.Parameter):
            theirs.requires_grad_(ours.requires_grad)
    _fill_norms(module, model)


def _fill_norms(module: torch.nn.Module, model: Potential) -> None:
    """Every sum over neighbours of theirs has the constants for itself."""
    is_norm: Callable[[Any], bool] = lambda part: type(part).__name__ == "AvgNumNeighborsNorm"  # noqa: E731
    for norm in filter(is_norm, module.modules()):
        constant: Tensor = norm.norm_const  # type: ignore[assignment]
        own = model.inverse_sqrt_neighbors.to(constant)
        constant.copy_((own if constant.numel() > 1 else own[:1]).reshape(constant.shape))
