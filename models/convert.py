"""Models of the `nequip` and `nequip-allegro` packages, turned into ours, and which of their weights are which of ours."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ddpkit.errors import InputError
from ddpkit.models.allegro import Allegro, PathWeights
from ddpkit.models.irreps import Irrep
from ddpkit.models.layers import Layer, second_moment_factor
from ddpkit.models.mlp import MLP
from ddpkit.models.nequip import NequIP
from ddpkit.models.potential import Potential

_COMMON = {"edge_norm", "per_type_energy_scale_shift", "pair_potential", "total_energy_sum"}
_ALLEGRO = {
    "radial_chemical_embed",
    "scalar_embed_mlp",
    "tensor_embed",
    "allegro",
    "edge_readout",
    "edge_eng_sum",
    "cutoff",
}
_NEQUIP = {"type_embed", "spharm", "bessel_encode", "factor", "per_atom_energy_readout"}


def from_nequip(module: torch.nn.Module) -> Potential:
    """Our model with the weights of an eager model of `nequip` 0.19 or `nequip-allegro` 0.8.

    Args:
        module: what `nequip.model.NequIPGNNModel`, `allegro.model.AllegroModel` or, for trained models, `ModelFromCheckpoint`
            return. A model in float32 becomes one with `precision="mixed"`, which is how those packages compute; one in float64
            becomes `precision="float64"`.

    Returns:
        An `Allegro` or a `NequIP`, on the same device and in the same mode (training or evaluation).

    Raises:
        InputError: the module uses something that our models do not have.
    """
    layers = energy_layers(module)
    for name in ("edge_norm", "per_type_energy_scale_shift"):
        if name not in layers:
            raise _refuse(f"a model without {name}")
    if "allegro" in layers:
        model: Potential = _allegro(layers)
    elif "layer0_convnet" in layers:
        model = _nequip(layers)
    else:
        raise _refuse(f"a model made of {', '.join(layers)}")
    for ours, theirs, places in pairs(model, layers):
        flat = theirs.detach().reshape(-1)
        ours.data.copy_((flat if places is None else flat[places]).reshape(ours.shape))
        if isinstance(ours, torch.nn.Parameter):
            ours.requires_grad_(theirs.requires_grad)
    device = layers["edge_norm"]._rmax_recip.device
    return model.to(device).train(module.training)


def _refuse(what: str) -> InputError:
    return InputError(f"{what} cannot be imported: import models built by NequIPGNNModel or AllegroModel")


class Pair(NamedTuple):
    """Numbers that our model and theirs share: ours, flat, are theirs, flat, at `places`; all in order where that is None."""

    ours: Tensor
    theirs: Tensor
    places: Tensor | None = None


def pairs(model: Potential, layers: dict[str, Any]) -> list[Pair]:
    """All that training changes or a configuration sets, as it stands in both.

    Args:
        model: ours.
        layers: of the same model of theirs, from `energy_layers`.

    Raises:
        InputError: the two are not the same model.
    """
    both = _allegro_pairs if isinstance(model, Allegro) else _nequip_pairs
    return both(cast("Any", model), layers)


def energy_layers(module: torch.nn.Module) -> dict[str, Any]:
    """The named layers of the energy model inside its wrappers."""
    inner: Any = module
    while True:
        if isinstance(inner, torch.nn.ModuleDict) and len(inner) == 1:
            (inner,) = inner.values()
        elif isinstance(getattr(inner, "model", None), torch.nn.Module):
            inner = inner.model
        elif isinstance(getattr(inner, "func", None), torch.nn.Module):
            inner = inner.func
        else:
            break
    layers = dict(inner.named_children())
    if not layers:
        raise _refuse(f"a {type(module).__name__}")
    return layers


def _only(layers: dict[str, Any], known: Iterable[str]) -> None:
    unknown = sorted(set(layers) - set(known))
    if unknown:
        raise _refuse(f"a model with {', '.join(unknown)}")


def _common(layers: dict[str, Any], bessel: Any, norm: Any, weight: Tensor) -> dict[str, Any]:
    """The arguments that all our models share."""
    if type(bessel).__name__ != "BesselEdgeLengthEncoding":
        raise _refuse(f"the radial basis {type(bessel).__name__}")
    if type(bessel.cutoff).__name__ not in ("PolynomialCutoff", "RecursiveScriptModule"):
        raise _refuse(f"the cutoff {type(bessel.cutoff).__name__}")
    edge_norm, scale_shift = layers["edge_norm"], layers["per_type_energy_scale_shift"]
    types = len(scale_shift.type_names)
    arguments: dict[str, Any] = {
        "species": tuple(scale_shift.type_names),
        "r_max": edge_norm.r_max,
        "num_bessels": bessel.num_bessels,
        "bessel_trainable": bessel.trainable,
        "polynomial_cutoff_p": bessel.cutoff.p,
        "avg_num_neighbors": _values(norm.norm_const.double().pow(-2)),
        "precision": {torch.float32: "mixed", torch.float64: "float64"}[weight.dtype],
    }
    for name in ("shifts", "scales"):
        if getattr(scale_shift, f"has_{name}"):
            arguments[name] = _values(getattr(scale_shift, name))
            arguments[f"{name}_trainable"] = getattr(scale_shift, f"{name}_trainable")
    if edge_norm._per_edge_type:
        # the reciprocal of a reciprocal may pass the cutoff by a rounding
        table = edge_norm._rmax_recip.reciprocal().clamp(max=edge_norm.r_max)
        arguments["cutoffs"] = table.reshape(types, types).tolist()
    pair = layers.get("pair_potential")
    if pair is not None:
        if type(pair).__name__ != "ZBL":
            raise _refuse(f"the pair potential {type(pair).__name__}")
        if not math.isclose(float(pair._qqr2exesquare), 0.5 * 14.399645):
            raise _refuse("a ZBL potential in other units than eV and Å (`metal`)")
        from ase.data import chemical_symbols

        arguments["zbl"] = [chemical_symbols[int(z)] for z in pair.atomic_numbers]
        arguments["zbl_cutoff_p"] = pair.cutoff.p
    return arguments


def _values(x: Tensor) -> float | list[float]:
    values = [float(v) for v in x.reshape(-1)]
    return values[0] if len(values) == 1 else values


def _common_pairs(model: Potential, layers: dict[str, Any], bessel: Any, norm: Any) -> list[Pair]:
    edge_norm, scale_shift = layers["edge_norm"], layers["per_type_energy_scale_shift"]
    shared = [
        Pair(model.radial_basis.roots, bessel.bessel_weights),
        _per_species(model.inverse_sqrt_neighbors, norm.norm_const),
    ]
    given = (name for name in ("shifts", "scales") if getattr(scale_shift, f"has_{name}"))
    shared += [_per_species(getattr(model, name), getattr(scale_shift, name)) for name in given]
    if model.inverse_cutoffs is not None:
        shared.append(Pair(model.inverse_cutoffs, edge_norm._rmax_recip))
    return shared


def _per_species(ours: Tensor, theirs: Tensor) -> Pair:
    """Theirs may be one number for all species."""
    return Pair(ours, theirs, torch.zeros_like(ours, dtype=torch.int64) if theirs.numel() == 1 else None)


def _mlp_weights(mlp: Any) -> tuple[list[Tensor], list[float], str | None]:
    """The matrices, their total factor as one number each, and the nonlinearity of a `ScalarMLPFunction`."""
    inner = mlp.mlp
    if type(inner).__name__ == "DeepLinearMLP":
        weights = list(inner.weights)
        return weights, [float(inner.alpha), *[1.0] * (len(weights) - 1)], None
    weights, alphas, names = [], [], set()
    for layer in inner:
        if type(layer).__name__ == "ScalarLinearLayer":
            if layer.bias is not None:
                raise _refuse("an MLP with biases")
            weights.append(layer.weight)
            alphas.append(float(layer.alpha))
        else:
            names.add(type(layer).__name__)
    known = {
        "SiLU": "silu",
        "Mish": "mish",
        "GELU": "gelu",
        "ShiftedSoftplus": "ssp",
        "Tanh": "tanh",
        "Sigmoid": "sigmoid",
        "Softplus": "softplus",
        "Identity": None,
    }
    if len(names) > 1 or not names <= set(known):
        raise _refuse(f"an MLP with {', '.join(sorted(names))}")
    if not weights:
        raise _refuse("an MLP with parametrised weights")
    return weights, alphas, known[names.pop()] if names else None


def _mlp_pairs(ours: MLP, theirs: Any, columns: Tensor | None = None) -> list[Pair]:
    """The weights of a `ScalarMLPFunction`; `columns` orders those of the last matrix."""
    weights, alphas, nonlinearity = _mlp_weights(theirs)
    product = ours.nonlinearity is None
    same = (
        [tuple(w.shape) for w in weights] == [tuple(w.shape) for w in ours.weights]
        and (math.isclose(math.prod(alphas), math.prod(ours.alphas), rel_tol=1e-5))
        and (product or all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(alphas, ours.alphas, strict=True)))
        and (len(weights) == 1 or nonlinearity == ours.nonlinearity)
    )
    if not same:
        raise _refuse("an MLP of another shape or normalisation than the model's other ones")
    both = [Pair(own, weight) for own, weight in zip(ours.weights, weights, strict=True)]
    if columns is not None:
        both[-1] = both[-1]._replace(places=_numbered(weights[-1])[:, columns].reshape(-1))
    return both


def _numbered(x: Tensor) -> Tensor:
    """The place in x, flat, of each of its numbers, in the shape of x."""
    return torch.arange(x.numel()).reshape(x.shape)


def _mlp_shape(mlp: Any) -> tuple[list[int], str | None]:
    """Widths of the hidden layers and the nonlinearity."""
    weights, _, nonlinearity = _mlp_weights(mlp)
    return [w.shape[1] for w in weights[:-1]], nonlinearity


def _normalises_forward(mlp: Any) -> bool:
    weights, alphas, nonlinearity = _mlp_weights(mlp)
    gains = [1.0, *[math.sqrt(2) if nonlinearity else 1.0] * (len(weights) - 1)]
    expected = math.prod(gain / math.sqrt(w.shape[0]) for gain, w in zip(gains, weights, strict=True))
    return math.isclose(math.prod(alphas), expected, rel_tol=1e-5)


def _depth_width(mlp: Any, default_width: int) -> tuple[int, int, str | None]:
    hidden, nonlinearity = _mlp_shape(mlp)
    return len(hidden), hidden[0] if hidden else default_width, nonlinearity


def _irreps(irreps: Any) -> list[Irrep]:
    return [(ir.l, ir.p) for _, ir in irreps]


def _allegro(layers: dict[str, Any]) -> Allegro:
    _only(layers, _COMMON | _ALLEGRO)
    embed = dict(layers["radial_chemical_embed"].named_children())
    if set(embed) != {"bessel_encode", "type_embed"}:
        raise _refuse(f"the radial-chemical embedding {type(layers['radial_chemical_embed']).__name__}")
    bessel, kinds = embed["bessel_encode"], embed["type_embed"]
    core, tensor_embed = layers["allegro"], layers["tensor_embed"]
    edge = _irreps(core.tps[0].irreps_in2)
    l_max = len(edge) - 1
    if edge != [(l, (-1) ** l) for l in range(l_max + 1)]:
        raise _refuse(f"an Allegro with edge harmonics {core.tps[0].irreps_in2}")
    if not (core._env_weighter.weight_individual_irreps and tensor_embed._edge_weighter.weight_individual_irreps):
        raise _refuse("an Allegro with one weight for all degrees")
    track = set(_irreps(core.tensor_track_allowed_irreps))
    full = {(l, p) for l in range(l_max + 1) for p in (1, -1)}
    if track not in (full, set(edge)):
        raise _refuse(f"an Allegro with features {core.tensor_track_allowed_irreps}")
    scalar_embed = layers["scalar_embed_mlp"].mlp_module
    readout = layers["edge_readout"].mlp_module
    scalar_depth, scalar_width, scalar_nonlinearity = _depth_width(scalar_embed, 1)
    mlp_depth, mlp_width, mlp_nonlinearity = _depth_width(core.latents[0], 1)
    readout_depth, readout_width, readout_nonlinearity = _depth_width(readout, 1)
    mlps = [kinds.basis_linear, tensor_embed.env_embed_linear, scalar_embed, readout, *core.latents]
    model = Allegro(
        **_common(layers, bessel, core.avg_num_neighbors_norm, kinds.center_embed.weight),
        l_max=l_max,
        parity=track == full,
        num_layers=core.num_layers,
        num_scalar_features=core.num_scalar_features,
        num_tensor_features=core.num_tensor_features,
        embed_dim=2 * kinds.center_embed.weight.shape[1],
        scalar_embed_depth=scalar_depth,
        scalar_embed_width=scalar_width,
        scalar_embed_dim=_mlp_weights(scalar_embed)[0][-1].shape[1],
        scalar_embed_nonlinearity=scalar_nonlinearity,
        mlp_depth=mlp_depth,
        mlp_width=mlp_width,
        mlp_nonlinearity=mlp_nonlinearity,
        readout_depth=readout_depth,
        readout_width=readout_width,
        readout_nonlinearity=readout_nonlinearity,
        path_channel_coupling=core.tps[0].path_channel_coupling,
        forward_normalize=all(_normalises_forward(mlp) for mlp in mlps),
    )
    for product, theirs in zip(model.products, core.tps, strict=True):
        if cast("PathWeights", product).weights.numel() != theirs.weights.numel():
            raise _refuse("an Allegro with other tensor product paths")
    return model


def _allegro_pairs(model: Allegro, layers: dict[str, Any]) -> list[Pair]:
    embed = dict(layers["radial_chemical_embed"].named_children())
    bessel, kinds, core = embed["bessel_encode"], embed["type_embed"], layers["allegro"]
    scalars, channels, degrees = model.num_scalar_features, model.num_tensor_features, model.num_degrees
    # theirs are ordered by channel, then degree; ours by degree, then channel
    weights = torch.arange(channels * degrees).reshape(channels, degrees).t().reshape(-1)
    with_scalars = torch.cat((torch.arange(scalars), scalars + weights))
    both = [
        *_common_pairs(model, layers, bessel, core.avg_num_neighbors_norm),
        Pair(model.centre_embedding, kinds.center_embed.weight),
        Pair(model.neighbour_embedding, kinds.neighbor_embed.weight),
        *_mlp_pairs(model.radial_linear, kinds.basis_linear),
        *_mlp_pairs(model.scalar_embed, layers["scalar_embed_mlp"].mlp_module),
        *_mlp_pairs(model.tensor_embed, layers["tensor_embed"].env_embed_linear, weights),
        *_mlp_pairs(model.first_linear, core.first_layer_env_embed_projection, with_scalars),
        *_mlp_pairs(model.readout, layers["edge_readout"].mlp_module),
    ]
    for n, (product, latent) in enumerate(zip(model.products, model.latents, strict=True)):
        last = n == core.num_layers - 1
        both.append(Pair(cast("PathWeights", product).weights, core.tps[n].weights))
        both += _mlp_pairs(cast("MLP", latent), core.latents[n], None if last else with_scalars)
    return both


def _nequip(layers: dict[str, Any]) -> NequIP:
    convnets = [layers[name] for name in layers if name.endswith("_convnet")]
    _only(layers, _COMMON | _NEQUIP | {f"layer{n}_convnet" for n in range(len(convnets))})
    embed, bessel = layers["type_embed"], layers["bessel_encode"]
    if getattr(embed, "do_categorical_graph_field_embed", False) or not hasattr(embed, "embed_module"):
        raise _refuse("a NequIP with embeddings of other fields than the species")
    edge = _irreps(layers["spharm"].irreps_edge_sh)
    l_max = len(edge) - 1
    if edge != [(l, (-1) ** l) for l in range(l_max + 1)]:
        raise _refuse(f"a NequIP with edge harmonics {layers['spharm'].irreps_edge_sh}")
    for n, convnet in enumerate(convnets):
        _check_convnet(convnet, first=n == 0)
    wanted: dict[Irrep, int] = {}
    for convnet in convnets[:-1]:
        for mul, ir in convnet.feature_irreps_hidden:
            if wanted.setdefault((ir.l, ir.p), mul) != mul:
                raise _refuse("a NequIP whose layers differ in their features")
    last = {(ir.l, ir.p): mul for mul, ir in convnets[-1].feature_irreps_hidden}
    if set(last) != {(0, 1)}:
        raise _refuse(f"a NequIP whose last layer gives {convnets[-1].feature_irreps_hidden}")
    # a single layer leaves open what other layers would have held
    features = [wanted.get((l, (-1) ** l), 1) for l in range(l_max + 1)]
    if not wanted:
        features[0] = last[0, 1]
    natural = {(l, (-1) ** l): features[l] for l in range(l_max + 1)}
    both = {(l, p): features[l] for l in range(l_max + 1) for p in (1, -1)}
    if wanted and wanted not in (natural, both):
        raise _refuse(f"a NequIP with features {convnets[0].feature_irreps_hidden}")
    if last[0, 1] != features[0]:
        raise _refuse("a NequIP whose last layer has another number of scalars")
    readout = layers["per_atom_energy_readout"].mlp_module
    readout_depth, readout_width, readout_nonlinearity = _depth_width(readout, features[0])
    radial = {tuple(_mlp_shape(convnet.conv.edge_mlp)[0]) for convnet in convnets}
    if len(radial) > 1:
        raise _refuse("a NequIP whose layers differ in their radial MLPs")
    (hidden,) = radial
    norm = convnets[0].conv.avg_num_neighbors_norm
    weight = embed.embed_module.weight
    model = NequIP(
        **_common(layers, bessel, norm, weight),
        l_max=l_max,
        parity=wanted == both and wanted != natural,
        num_layers=len(convnets),
        num_features=features,
        type_embedding_dim=weight.shape[1],
        radial_depth=len(hidden),
        radial_width=hidden[0] if hidden else 1,
        readout_depth=readout_depth,
        readout_width=readout_width,
        readout_nonlinearity=readout_nonlinearity,
        self_connection=len(convnets) > 1 and convnets[1].conv.sc is not None,
    )
    if not math.isclose(layers["factor"].factor, model.radial_factor, rel_tol=1e-9):
        raise _refuse("a NequIP with another factor of its radial basis")
    return model


def _nequip_pairs(model: NequIP, layers: dict[str, Any]) -> list[Pair]:
    convnets = [layers[f"layer{n}_convnet"] for n in range(len(model.layers))]
    both = [
        *_common_pairs(model, layers, layers["bessel_encode"], convnets[0].conv.avg_num_neighbors_norm),
        Pair(model.embedding, layers["type_embed"].embed_module.weight),
        *_mlp_pairs(model.readout, layers["per_atom_energy_readout"].mlp_module),
    ]
    for layer, convnet in zip(model.layers, convnets, strict=True):
        ours, conv = cast("Layer", layer), convnet.conv
        if (ours.self_connection is None) != (conv.sc is None):
            raise _refuse("a NequIP with a self-connection in some layers only")
        if conv.edge_mlp.dims[-1] != sum(ours.convolution.sizes):
            raise _refuse("a NequIP with other tensor product paths")
        for linear, peer in ((ours.linear_in, conv.linear_1), (ours.linear_out, conv.linear_2)):
            blocks = _blocks(linear.irreps, linear.shapes, peer)
            both.append(Pair(linear.weight, peer.weight, torch.cat([block.reshape(-1) for block in blocks])))
        if ours.self_connection is not None:
            connection = ours.self_connection
            shapes = [(a, connection.weight.shape[0], b) for a, b in connection.shapes]
            # theirs are [in, embedding, out]; ours have the embedding first
            blocks = [block.transpose(0, 1).flatten(1) for block in _blocks(connection.irreps, shapes, conv.sc)]
            both.append(Pair(connection.weight, conv.sc.weight, torch.cat(blocks, 1).reshape(-1)))
        both += _mlp_pairs(ours.radial, conv.edge_mlp)
    return both


def _check_convnet(convnet: Any, *, first: bool) -> None:
    if convnet.resnet:
        raise _refuse("a NequIP with residual connections")
    if first and convnet.conv.sc is not None:
        raise _refuse("a NequIP with a learnable shift")
    gate = convnet.equivariant_nonlin
    if type(gate).__name__ != "Gate":
        raise _refuse(f"a NequIP with the nonlinearity {type(gate).__name__}")
    expected: dict[int, Callable[[Tensor], Tensor]] = {1: torch.nn.functional.silu, -1: torch.tanh}
    for activation in (gate.act_scalars, gate.act_gates):
        for (_, ir), act in zip(activation.irreps_in, activation.acts, strict=True):
            if act is not None and not math.isclose(act.cst, second_moment_factor(expected[ir.p]), rel_tol=1e-6):
                raise _refuse("a NequIP with other nonlinearities than SiLU for even and tanh for odd scalars")


def _blocks(irreps: Sequence[Irrep], shapes: Sequence[tuple[int, ...]], theirs: Any) -> list[Tensor]:
    """Places of the weights of each irrep in the flat ones of an e3nn `Linear` or `FullyConnectedTensorProduct`."""
    blocks: dict[Irrep, Tensor] = {}
    first = 0
    irreps_in = theirs.irreps_in if hasattr(theirs, "irreps_in") else theirs.irreps_in1
    for instruction in theirs.instructions:
        i_in = instruction.i_in if hasattr(instruction, "i_in") else instruction.i_in1
        size = math.prod(instruction.path_shape)
        ir = irreps_in[i_in].ir
        if (ir.l, ir.p) in blocks:
            raise _refuse(f"a NequIP with several blocks of {ir}")
        blocks[ir.l, ir.p] = torch.arange(first, first + size).reshape(instruction.path_shape)
        first += size
    if set(blocks) != set(irreps) or any(blocks[ir].shape != s for ir, s in zip(irreps, shapes, strict=True)):
        raise _refuse("a NequIP with other linear maps")
    return [blocks[ir] for ir in irreps]
