"""The model of a training file of `nequip`, as keys of ours."""

from collections.abc import Mapping, Sequence
from typing import Any

from ase.data import atomic_numbers

from ddpkit.errors import InputError
from ddpkit.experiments.nequip_file import NONE, Section

NEQUIP, PRESET = "nequip.model.NequIPGNNModel", "nequip.model.PresetNequIPGNNModel"
ALLEGRO, FOLDED = "allegro.model.AllegroModel", "ddpkit.models.nequip_builder.AllegroModel"
_MODIFY = "nequip.model.modify"
_OTHER = f"{NONE}: the converted model is another one"
_PRESET = {"parity": False, "type_embed_num_features": 32, "radial_mlp_depth": 1, "radial_mlp_width": 128}
_PRESETS: dict[str, dict[str, Any]] = {
    "S": {"num_layers": 2, "l_max": 1, "num_features": [128, 64]},
    "M": {"num_layers": 4, "l_max": 2, "num_features": [128, 64, 32]},
    "L": {"num_layers": 6, "l_max": 3, "num_features": [128, 64, 32, 32]},
    "XL": {"num_layers": 6, "l_max": 4, "num_features": [320, 96, 64, 32, 32]},
}
_GATES = {"e": "silu", "o": "tanh"}
# what our models have in one way only
_FIXED: dict[str, Any] = {
    "convnet_resnet": False,
    "convnet_nonlinearity_type": "gate",
    "convnet_nonlinearity_scalars": _GATES,
    "convnet_nonlinearity_gates": _GATES,
    "learnable_shift": False,
    "categorical_graph_field_embed": None,
    "weight_individual_irreps": True,
    "do_derivatives": True,
}
# statistics of the training data that nequip gives a model, and what becomes of those that ours does not compute alike
_SAME = "<training_data_stats:num_neighbors_mean>", "<training_data_stats:per_type_forces_rms>"
_STATISTICS = {
    "per_type_num_neighbors_mean": "is computed by ddpkit-run as one number for all species",
    "per_atom_energy_mean": "is fitted by ddpkit-run in its place, one number for each species, by least squares",
    "forces_rms": "is computed by ddpkit-run for each species",
}


def run_settings(model: Section, symbols: Mapping[str, str]) -> dict[str, Any]:
    """`model`, and the keys of a run that stand below the model in nequip: `seed`, `precision`, `compile`.

    Args:
        model: `training_module.model`.
        symbols: the element of each type of atom that the data's mapping names.

    Raises:
        InputError: the model is none of those that have a counterpart.
    """
    wrappers = []
    while (target := model.take("_target_")) == _MODIFY:
        wrappers.append(model)
        model = model.section("model")
    kernels = _kernels(wrappers, has_kernels=target in (NEQUIP, PRESET))
    if target not in (NEQUIP, PRESET, ALLEGRO, FOLDED):
        raise InputError(
            f"{model.key('_target_')}={target} has no counterpart in ddpkit: convert a file with {NEQUIP} or {ALLEGRO} (trained "
            "weights are brought over by ddpkit.models.from_nequip)."
        )
    run = {"seed": model.take("seed", 1), "precision": _precision(model), "compile": _compiles(model)}
    shared = _shared(model, symbols)
    own = _allegro(model, target) if target in (ALLEGRO, FOLDED) else {**_nequip(model, target), "kernels": kernels}
    for key, only in _FIXED.items():
        if (value := model.take(key, only)) != only:
            model.tell(key, _OTHER, value=value)
    for key in model:
        raise InputError(
            f"{model.key(key)} is no argument of {target.rpartition('.')[2]} in nequip 0.19 or nequip-allegro 0.8: bring the "
            "file up to these versions."
        )
    return {**run, "model": {**own, **shared}}


def _kernels(wrappers: Sequence[Section], *, has_kernels: bool) -> str:
    """What computes the convolutions, as the modifiers of a model ask for."""
    kernels = "auto"
    for wrapper in wrappers:
        for modifier in wrapper.sections("modifiers"):
            name = modifier.take("modifier")
            if name == "enable_OpenEquivariance" and has_kernels:
                kernels = "openequivariance"
            else:
                modifier.tell("modifier", value=name)
            modifier.close()
        wrapper.close()
    return kernels


def _precision(model: Section) -> str:
    dtype = model.take("model_dtype", "float32")
    names = {"float32": "mixed", "float64": "float64"}  # nequip computes geometry and sums in float64
    if dtype not in names:
        raise InputError(f"{model.key('model_dtype')}={dtype} is unknown to nequip: write float32 or float64.")
    return names[dtype]


def _compiles(model: Section) -> bool:
    mode = model.take("compile_mode", "eager")
    if mode not in ("eager", "compile"):
        raise InputError(f"{model.key('compile_mode')}={mode} is unknown to nequip: write eager or compile.")
    return bool(mode == "compile")


def _shared(model: Section, symbols: Mapping[str, str]) -> dict[str, Any]:
    """What both models have."""
    types = model.take("type_names")
    if not isinstance(types, list) or not types:
        raise InputError(f"{model.key('type_names')} is missing: give the list of types of atoms.")
    types = [str(name) for name in types]
    species = [symbols.get(name, name) for name in types]
    for name, symbol in zip(types, species, strict=True):
        if symbol not in atomic_numbers or species.count(symbol) > 1:
            raise InputError(
                f"{model.key('type_names')} has the type {name}, which is not the only one of a chemical element: ddpkit tells "
                "types of atoms by their element."
            )
    r_max = model.number("r_max")
    if r_max is None:
        raise InputError(f"{model.key('r_max')} is missing: give the cutoff in Å.")
    shared: dict[str, Any] = {"species": species, "r_max": float(r_max)}
    if (cutoffs := model.take("per_edge_type_cutoff")) is not None:
        shared["cutoffs"] = _cutoffs(Section(cutoffs, model.key("per_edge_type_cutoff"), []), types, float(r_max))
    if "avg_num_neighbors" not in model:
        raise InputError(f"{model.key('avg_num_neighbors')} is missing: nequip 0.19 needs it.")
    for name, key, without in (
        ("avg_num_neighbors", "avg_num_neighbors", None),
        ("shifts", "per_type_energy_shifts", 0.0),
        ("scales", "per_type_energy_scales", 1.0),
    ):
        value = _per_species(model, key, types, without)
        if value is not None:
            shared[name] = value
    for name in ("shifts", "scales"):
        shared[f"{name}_trainable"] = bool(model.take(f"per_type_energy_{name}_trainable", False))
    return {**shared, **_nuclei(model, species)}


def _per_species(model: Section, key: str, types: Sequence[str], without: float | None) -> float | list[float] | None:
    """One number, or one for each type; None: ddpkit-run computes it from the data."""
    value = model.take(key)
    if value is None:
        return without
    if isinstance(value, str) and value.startswith("<training_data_stats:"):
        name = value.removeprefix("<training_data_stats:").removesuffix(">")
        if value not in _SAME:
            model.tell(key, _STATISTICS.get(name, f"{NONE}: ddpkit-run computes its own value"), value=value)
        return None
    if isinstance(value, dict) and {str(name) for name in value} == set(types):
        value = {str(name): number for name, number in value.items()}
        return [float(value[name]) for name in types]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise InputError(f"{model.key(key)} is neither a number nor one number for each of type_names: correct the file.")


def _cutoffs(table: Section, types: Sequence[str], r_max: float) -> list[list[float]]:
    """Those of pairs that nequip's table leaves out are `r_max`."""
    cutoffs = []
    for centre in types:
        row = table.take(centre, r_max)
        row = row if isinstance(row, dict) else dict.fromkeys(types, row)
        cutoffs.append([float(row.get(name, r_max)) for name in types])
        for name in row.keys() - set(types):
            raise InputError(f"{table.key(centre)}.{name} is none of type_names: correct the file.")
    for name in table:
        raise InputError(f"{table.key(name)} is none of type_names: correct the file.")
    return cutoffs


def _nuclei(model: Section, species: Sequence[str]) -> dict[str, Any]:
    """The repulsion of nuclei."""
    if (value := model.take("pair_potential")) is None:
        return {"zbl": False}
    pair = Section(value, model.key("pair_potential"), model.remarks)
    if (target := pair.take("_target_")) != "nequip.nn.pair_potential.ZBL":
        pair.tell("_target_", _OTHER, value=target)
        pair.close()
        return {"zbl": False}
    if (units := pair.take("units", "metal")) != "metal":
        pair.tell("units", f"{NONE}, which computes in eV and Å: convert the labels of the data to these", value=units)
    nuclei = [str(name) for name in pair.take("chemical_species", species)]
    settings = {"zbl": True if nuclei == list(species) else nuclei, "zbl_cutoff_p": pair.take("polynomial_cutoff_p", 6)}
    pair.close()
    return settings


def _radial(section: Section) -> dict[str, Any]:
    return {
        "num_bessels": section.take("num_bessels", 8),
        "bessel_trainable": bool(section.take("bessel_trainable", False)),
        "polynomial_cutoff_p": section.take("polynomial_cutoff_p", 6),
    }


def _readout(model: Section, depth: int, width: int | None) -> dict[str, Any]:
    return {
        "readout_depth": model.take("readout_mlp_hidden_layers_depth", depth),
        "readout_width": model.take("readout_mlp_hidden_layers_width", width),
        "readout_nonlinearity": model.take("readout_mlp_nonlinearity", "silu"),
    }


def _nequip(model: Section, target: str) -> dict[str, Any]:
    preset: dict[str, Any] = {}
    if target == PRESET:
        size = str(model.take("preset")).upper()
        if size not in _PRESETS:
            raise InputError(f"{model.key('preset')}={size} is unknown to nequip: use one of {', '.join(_PRESETS)}.")
        preset = {**_PRESET, **_PRESETS[size]}
    features = model.take("num_features", preset.get("num_features", 32))
    return {
        "_target_": "ddpkit.models.NequIP",
        "l_max": model.take("l_max", preset.get("l_max", 1)),
        "parity": bool(model.take("parity", preset.get("parity", True))),
        "num_layers": model.take("num_layers", preset.get("num_layers", 4)),
        "num_features": features,
        "type_embedding_dim": model.take("type_embed_num_features", preset.get("type_embed_num_features"))
        or (features[0] if isinstance(features, list) else features),
        "radial_depth": model.take("radial_mlp_depth", preset.get("radial_mlp_depth", 1)),
        "radial_width": model.take("radial_mlp_width", preset.get("radial_mlp_width", 128)),
        **_readout(model, 0, None),
        "self_connection": bool(model.take("convnet_sc", True)),
        **_radial(model),
    }


def _allegro(model: Section, target: str) -> dict[str, Any]:
    embed = model.section("radial_chemical_embed")
    if (name := embed.take("_target_")) != "allegro.nn.TwoBodyBesselScalarEmbed":
        raise InputError(
            f"{embed.key('_target_')}={name} has no counterpart in ddpkit: use allegro.nn.TwoBodyBesselScalarEmbed."
        )
    radial = _radial(embed)
    embed.close()
    if "l_max" not in model:
        raise InputError(f"{model.key('l_max')} is missing: nequip-allegro 0.8 needs it.")
    scalars = model.take("num_scalar_features", 64)
    embedded = model.take("scalar_embed_output_dim") if target == FOLDED else None
    return {
        "_target_": "ddpkit.models.Allegro",
        "l_max": model.take("l_max"),
        "parity": bool(model.take("parity", True)),
        "num_layers": model.take("num_layers", 2),
        "num_scalar_features": scalars,
        "num_tensor_features": model.take("num_tensor_features", 16),
        "embed_dim": model.take("radial_chemical_embed_dim") or scalars,
        "scalar_embed_depth": model.take("scalar_embed_mlp_hidden_layers_depth", 1),
        "scalar_embed_width": model.take("scalar_embed_mlp_hidden_layers_width", 64),
        "scalar_embed_dim": embedded or scalars,
        "scalar_embed_nonlinearity": model.take("scalar_embed_mlp_nonlinearity", "silu"),
        "mlp_depth": model.take("allegro_mlp_hidden_layers_depth", 1),
        "mlp_width": model.take("allegro_mlp_hidden_layers_width", 64),
        "mlp_nonlinearity": model.take("allegro_mlp_nonlinearity", "silu"),
        **_readout(model, 1, 32),
        "path_channel_coupling": bool(model.take("tp_path_channel_coupling", True)),
        "forward_normalize": bool(model.take("forward_normalize", True)),
        **radial,
    }
