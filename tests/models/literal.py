"""Allegro and NequIP as their papers write them: a loop over atoms and edges, one tensor product after another.

They read the weights of a fast model and share none of its code. Slow, in float64, for frames without pair cutoffs and ZBL.
"""

import math

import torch
import torch.nn.functional as F
from e3nn import o3
from e3nn.math import normalize2mom


def edge_basis(model, batch):
    """Bessel functions with their envelope `[edges, bessels]`, and harmonics `[edges, 2 l + 1]` by degree."""
    centre, neighbour = batch.edge_index
    vectors = batch.positions[neighbour] + batch.edge_shift - batch.positions[centre]
    x = vectors.norm(dim=1, keepdim=True) / model.r_max
    p = model.polynomial_cutoff_p
    envelope = 1 - (p + 1) * (p + 2) / 2 * x**p + p * (p + 2) * x ** (p + 1) - p * (p + 1) / 2 * x ** (p + 2)
    bessel = torch.sin(math.pi * x * model.radial_basis.roots) / (math.pi * x)
    harmonics = [
        o3.spherical_harmonics(l, vectors, normalize=True, normalization="component")
        for l in range(model.spherical_harmonics.l_max + 1)
    ]
    return bessel * envelope * (x < 1), harmonics


def perceptron(mlp, x):
    """Matrices of variance one, scaled by their fan-in, with SiLU between them."""
    for n, weight in enumerate(mlp.weights):
        inside = n > 0 and mlp.nonlinearity is not None
        x = (F.silu(x) if inside else x) @ weight * math.sqrt((2 if inside else 1) / weight.shape[0])
    return x


def product(a, l1, b, l2, l3):
    """Couples `[channels, 2 l1 + 1]` and `[..., 2 l2 + 1]` to `[channels, 2 l3 + 1]`."""
    coupling = o3.wigner_3j(l1, l2, l3, dtype=a.dtype) * math.sqrt(2 * l3 + 1)
    return torch.einsum("ijk,ui,uj->uk", coupling, a, b.expand(len(a), -1))


def total(model, batch, atomic):
    shifts, scales = model.shifts[batch.species], model.scales[batch.species]
    return torch.zeros(batch.num_frames, dtype=torch.float64).index_add(0, batch.frame, shifts + scales * atomic)


def allegro(model, batch, irreps):
    """Energies `[frames]`. `irreps`: of the tensor features before the first layer and after each."""
    (centre, neighbour), (radial, harmonics) = batch.edge_index, edge_basis(model, batch)
    degrees, channels, scalars = len(harmonics), model.num_tensor_features, model.num_scalar_features
    energies = []
    for i in range(len(batch.species)):
        edges = (centre == i).nonzero()[:, 0].tolist()
        norm = model.inverse_sqrt_neighbors[batch.species[i]]
        latent, around, tensors = {}, {}, {}
        for e in edges:
            kinds = model.centre_embedding[batch.species[i]], model.neighbour_embedding[batch.species[neighbour[e]]]
            two_body = perceptron(model.scalar_embed, torch.cat(kinds) * perceptron(model.radial_linear, radial[e]))
            first = perceptron(model.first_linear, two_body)
            latent[e], around[e] = [first[:scalars]], first[scalars:].reshape(degrees, channels, 1)
            own = perceptron(model.tensor_embed, two_body).reshape(degrees, channels, 1)
            tensors[e] = {(l, p): own[l] * harmonics[l][e] for l, p in irreps[0]}
        for n, (layer, mlp) in enumerate(zip(model.products, model.latents, strict=True)):
            shared = [norm * sum(around[e][l] * harmonics[l][e] for e in edges) for l in range(degrees)]
            paths = [
                (a, l, c)
                for c in irreps[n + 1]
                for a in irreps[n]
                for l in range(degrees)
                if a[1] * (-1) ** l == c[1] and abs(a[0] - l) <= c[0] <= a[0] + l
            ]
            for e in edges:
                new = dict.fromkeys(irreps[n + 1], 0)
                for number, (a, l, c) in enumerate(paths):
                    weight = layer.weights[:, number, None]
                    new[c] = new[c] + weight * product(tensors[e][a], a[0], shared[l], l, c[0])
                tensors[e] = new
                out = perceptron(mlp, torch.cat((*latent[e], new[0, 1][:, 0])))
                latent[e].append(out[:scalars])
                around[e] = out[scalars:].reshape(-1, channels, 1)
        terms = [perceptron(model.readout, torch.cat(latent[e]))[0] for e in edges]
        energies.append(norm * math.sqrt(0.5) * sum(terms))
    return total(model, batch, torch.stack(energies))


def mix(weight, irreps_in, irreps_out, x):
    """Mixes the channels of each irrep by one flat list of weights."""
    shared = [ir for ir in irreps_in if ir in irreps_out]
    blocks = weight.split([irreps_in[ir] * irreps_out[ir] for ir in shared])
    return {
        ir: torch.einsum("uv,um->vm", w.reshape(irreps_in[ir], -1), x[ir]) / math.sqrt(irreps_in[ir])
        for ir, w in zip(shared, blocks, strict=True)
    }


def gated(gate, x):
    """Even scalars through SiLU, odd ones through tanh, both of second moment one; the rest times such scalars."""
    active = {1: normalize2mom(F.silu), -1: normalize2mom(torch.tanh)}
    scalars = {ir: active[ir[1]](value) for ir, value in x.items() if ir[0] == 0}
    gates = list(scalars[gate.gate].split([gate.irreps.get(gate.gate, 0), *gate.gated.values()]))
    scalars[gate.gate] = gates.pop(0)
    return {ir: scalars[ir] if ir[0] == 0 else x[ir] * gates[list(gate.gated).index(ir)] for ir in gate.irreps}


def nequip(model, batch):
    """Energies `[frames]`."""
    (centre, neighbour), (radial, harmonics) = batch.edge_index, edge_basis(model, batch)
    radial = radial * 2 * math.pi / model.r_max**2
    features = [{(0, 1): model.embedding[z][:, None]} for z in batch.species]
    irreps = {(0, 1): model.embedding.shape[1]}
    for layer in model.layers:
        conv, gate = layer.convolution, layer.gate
        paths = [(a, l, c) for a, listed in conv.paths.items() for l, c in listed]
        mixed = [mix(layer.linear_in.weight, irreps, irreps, x) for x in features]
        updated = []
        for i, z in enumerate(batch.species):
            norm, sums = model.inverse_sqrt_neighbors[batch.species], [0] * len(paths)
            for e in (centre == i).nonzero()[:, 0].tolist():
                j = neighbour[e]
                weights = perceptron(layer.radial, radial[e]).split([irreps[a] for a, _, _ in paths])
                for n, (a, l, c) in enumerate(paths):
                    message = product(mixed[j][a], a[0], harmonics[l][e], l, c[0])
                    sums[n] = sums[n] + norm[j] * weights[n][:, None] * message
            summed = {
                c: torch.cat([s for s, path in zip(sums, paths, strict=True) if path[2] == c]) for c in conv.irreps_out
            }
            out = mix(layer.linear_out.weight, conv.irreps_out, gate.irreps_in, summed)
            if layer.self_connection is not None:
                weight = model.embedding[z] @ layer.self_connection.weight / math.sqrt(model.embedding.shape[1])
                for ir, value in mix(weight, irreps, gate.irreps_in, features[i]).items():
                    out[ir] = out[ir] + value
            updated.append(gated(gate, out))
        features, irreps = updated, layer.irreps_out
    return total(model, batch, torch.stack([perceptron(model.readout, x[0, 1][:, 0])[0] for x in features]))
