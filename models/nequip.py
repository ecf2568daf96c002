"""NequIP: equivariant message passing."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from e3nn.math import normalize2mom
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddpkit.errors import InputError
from ddpkit.models.geometry import wigner_3j
from ddpkit.models.graph import Graph, pad, pad_rows, sum_rows, unpad_rows
from ddpkit.models.irreps import Features, Irrep, Irreps, Paths, product_irreps
from ddpkit.models.kernels import KERNELS
from ddpkit.models.mlp import MLP, silu
from ddpkit.models.potential import Edges, Potential, Precision

Kernels = Literal["ddpkit", "e3nn", "openequivariance"]

BLOCK = 16  # atoms of one species that are multiplied at once


class Linear(torch.nn.Module):
    """Mixes the channels of each irrep, as e3nn's `Linear` does, without biases.

    All weights are one parameter: a layer that reads only some of the irreps leaves none without a gradient.
    """

    def __init__(self, irreps_in: Irreps, irreps_out: Irreps, dtype: torch.dtype) -> None:
        super().__init__()
        self.irreps = [ir for ir in irreps_in if ir in irreps_out]
        self.shapes = [(irreps_in[ir], irreps_out[ir]) for ir in self.irreps]
        self.weight = torch.nn.Parameter(torch.randn(sum(a * b for a, b in self.shapes), dtype=dtype))

    def forward(self, x: Features) -> Features:
        """Features -> features."""
        blocks = self.weight.split([a * b for a, b in self.shapes])
        return {
            ir: x[ir] @ (block.reshape(shape) * (1 / math.sqrt(shape[0])))
            for ir, shape, block in zip(self.irreps, self.shapes, blocks, strict=True)
        }


class Groups(NamedTuple):
    """Atoms in blocks of one species each."""

    atoms: Tensor  # [blocks, BLOCK] atoms, padded with the number of atoms
    slot: Tensor  # [atoms] where in the flattened `atoms` an atom stands
    present: Tensor  # [present] species that there are blocks of
    species: Tensor  # [blocks] place in `present`


def groups_of(one_hot: Tensor) -> Groups:
    """Blocks of atoms of one species.

    On a CPU there are as many as are needed. Elsewhere, and in a trace, their number depends on the numbers of atoms and species
    alone, so that nothing waits for the device.

    Args:
        one_hot: `[atoms, species]`.
    """
    exact = _on_cpu(one_hot)
    present = torch.arange(one_hot.shape[1], device=one_hot.device)
    if exact:
        present = one_hot.any(0).nonzero().squeeze(1)
    member = one_hot.index_select(1, present).to(torch.int64)
    atoms, species = member.shape
    seen = member.cumsum(0)
    last = ((member.sum(0) + BLOCK - 1) // BLOCK).cumsum(0)
    first = torch.cat((last.new_zeros(1), last[:-1]))
    slot = ((first * BLOCK + seen - 1) * member).sum(1)
    blocks = int(last[-1]) if exact else (atoms + BLOCK - 1) // BLOCK + species
    table = slot.new_full((blocks * BLOCK,), atoms).scatter(0, slot, torch.arange(atoms, device=slot.device))
    number = torch.arange(blocks, device=slot.device)
    of_block = (number.unsqueeze(1) >= last).sum(1).clamp(max=species - 1)
    return Groups(table.reshape(blocks, BLOCK), slot, present, of_block)


class SelfConnection(torch.nn.Module):
    """Mixes the channels of each irrep with weights that depend linearly on the embedding of the atom's species.

    Weights and embeddings of the species are contracted first, so that the cost for atoms does not depend on the
    embedding's width; atoms are then multiplied in blocks of one species.
    """

    def __init__(self, irreps_in: Irreps, embed_dim: int, irreps_out: Irreps, dtype: torch.dtype) -> None:
        super().__init__()
        self.irreps = [ir for ir in irreps_in if ir in irreps_out]
        self.weights = torch.nn.ParameterList(
            [
                torch.nn.Parameter(torch.randn(embed_dim, irreps_in[ir], irreps_out[ir], dtype=dtype))
                for ir in self.irreps
            ]
        )

    def forward(self, x: Features, embedding: Tensor, groups: Groups) -> Features:
        """Features -> features.

        Args:
            x: features.
            embedding: `[species, embed_dim]`.
            groups: the atoms by species.
        """
        out = {}
        embedding = embedding.index_select(0, groups.present)
        for ir, weight in zip(self.irreps, self.weights, strict=True):
            embed_dim, channels_in, channels_out = weight.shape
            scaled = embedding * (1 / math.sqrt(channels_in * embed_dim))
            per_species = (scaled @ weight.flatten(1)).index_select(0, groups.species)
            rows = pad_rows(x[ir], groups.slot, groups.atoms)
            width = rows.shape[2]
            rows = torch.bmm(rows.flatten(1, 2), per_species.reshape(-1, channels_in, channels_out))
            out[ir] = unpad_rows(rows.reshape(-1, BLOCK, width, channels_out), groups.slot, groups.atoms)
        return out


class Places(NamedTuple):
    """Where the convolution finds things, for features that take a number of paths."""

    neighbour: Tensor  # [atoms, most] the neighbour of each padded edge; 0 where there is none
    incoming: Tensor  # [atoms, most] padded edges whose neighbour is the atom, padded with `atoms * most`
    weight: (
        Tensor  # [atoms * paths * most] rows of the edges' weights [edges * paths, channels]; 0 where there is no edge
    )
    edge: Tensor  # [edges * paths] the transpose: rows of [atoms * paths * most, channels]


def places_of(graph: Graph, paths: int) -> Places:
    """Index tables of the convolution."""
    edges, (atoms, most) = graph.centre.shape[0], graph.outgoing.shape
    none = graph.outgoing >= edges
    edge = graph.outgoing.masked_fill(none, 0)
    neighbour = torch.cat((graph.neighbour, graph.neighbour.new_zeros(1))).index_select(0, graph.outgoing.reshape(-1))
    neighbour = neighbour.reshape(graph.outgoing.shape)
    slot = torch.cat((graph.slot, graph.slot.new_full((1,), atoms * most)))
    incoming = slot.index_select(0, graph.incoming.reshape(-1)).reshape(graph.incoming.shape)
    path = torch.arange(paths, device=edge.device)
    weight = edge.unsqueeze(1) * paths + path.reshape(1, -1, 1)
    back = graph.slot + (graph.centre * (paths - 1) * most)
    return Places(neighbour, incoming, weight.reshape(-1), (back.unsqueeze(1) + path * most).reshape(-1))


class _Messages(torch.autograd.Function):
    """out[n, p, k, u] = sum over edges e of n, and i, of z[n, p, i, e, k] w[e, p, u] x[neighbour of e, i, u].

    Linear in each of x, w and z, so that its derivatives are sums of the same kind. Edges are padded by centre; where
    there is no edge, z is zero, and what w and x hold does not matter. Only the three factors are kept for the
    derivatives.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, z: Tensor, *places: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, w, z, *places)
        parts = []
        for at, z_part in _parts(Places(*places), z, x):
            product = _weights(w, z_part, at) * _neighbours(x, z_part, at)
            parts.append(torch.bmm(_matrix(z_part).transpose(1, 2), _matrix(product)))
        return _join(parts).reshape(*z.shape[:2], z.shape[4], x.shape[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w, z, *places = ctx.saved_tensors
        return *_MessagesGradient.apply(grad, x, w, z, *places), *[None] * len(places)


class _MessagesGradient(torch.autograd.Function):
    """The derivatives of `_Messages` by x, w and z, times grad."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, w: Tensor, z: Tensor, *places: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.save_for_backward(grad, x, w, z, *places)
        ctx.set_materialize_grads(False)
        parts = []
        for at, z_part, grad_part in _parts(Places(*places), z, x, grad.contiguous()):
            wide, near = _weights(w, z_part, at), _neighbours(x, z_part, at)
            flat = grad_part.flatten(0, 1)
            pulled = torch.bmm(_matrix(z_part), flat).reshape(*z_part.shape[:4], flat.shape[2])
            for_z = torch.bmm(_matrix(wide * near), flat.transpose(1, 2)).reshape(z_part.shape)
            parts.append((_over_paths(pulled, wide), _over_components(pulled, near), for_z))
        for_x, for_w, for_z = (_join(part) for part in zip(*parts, strict=True))
        at = Places(*places)
        return _to_neighbours(for_x, at), _to_edges(for_w, w, at), for_z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_x: Tensor | None, by_w: Tensor | None, by_z: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad, x, w, z, *places = ctx.saved_tensors
        # what is absent is zero: cheap beside a case for each
        by_x = torch.zeros_like(x) if by_x is None else by_x
        by_w = torch.zeros_like(w) if by_w is None else by_w
        by_z = torch.zeros_like(z) if by_z is None else by_z.contiguous()
        parts = []
        for at, z_part, grad_part, by_z_part in _parts(Places(*places), z, x, grad.contiguous(), by_z):
            wide, near = _weights(w, z_part, at), _neighbours(x, z_part, at)
            wide_1, near_1 = _weights(by_w, z_part, at), _neighbours(by_x, z_part, at)
            matrix, matrix_1, flat = _matrix(z_part), _matrix(by_z_part), grad_part.flatten(0, 1)
            product = _matrix(torch.addcmul(wide * near_1, wide_1, near))
            for_grad = torch.bmm(matrix.transpose(1, 2), product)
            for_grad = torch.baddbmm(for_grad, matrix_1.transpose(1, 2), _matrix(wide * near))
            for_z = torch.bmm(product, flat.transpose(1, 2)).reshape(z_part.shape)
            pulled = torch.bmm(matrix, flat).reshape(*z_part.shape[:4], flat.shape[2])
            pulled_1 = torch.bmm(matrix_1, flat).reshape(*z_part.shape[:4], flat.shape[2])
            for_x = _over_paths(pulled_1, wide, _over_paths(pulled, wide_1))
            for_w = _over_components(pulled_1, near, _over_components(pulled, near_1))
            parts.append((for_grad, for_x, for_w, for_z))
        for_grad, for_x, for_w, for_z = (_join(part) for part in zip(*parts, strict=True))
        at = Places(*places)
        for_grad = for_grad.reshape(grad.shape)
        return for_grad, _to_neighbours(for_x, at), _to_edges(for_w, w, at), for_z, *[None] * len(places)


CACHE = 1 << 18  # numbers in the largest array of a part: what a core's cache holds beside the others


def _parts(at: Places, z: Tensor, x: Tensor, *others: Tensor) -> Iterator[tuple[Any, ...]]:
    """Runs over atoms whose arrays stay in a CPU's cache; all atoms at once on other devices, and in a trace."""
    atoms, paths, width, most = z.shape[:4]
    if not _on_cpu(z) or not z.numel():
        yield at, z, *others
        return
    step = max(1, CACHE // (paths * most * width * x.shape[2]))
    for first in range(0, atoms, step):
        last = min(first + step, atoms)
        part = at._replace(
            neighbour=at.neighbour[first:last],
            weight=at.weight[first * paths * most : last * paths * most],
        )
        yield part, z[first:last], *(other[first:last] for other in others)


def _on_cpu(x: Tensor) -> bool:
    """Whether operations run one by one on a CPU, whose cache arrays should stay in; a trace wants few instead."""
    # Tracing, with proxies or fake tensors, goes through a dispatch mode; eager code has none.
    eager = torch._C._len_torch_dispatch_stack() == 0  # noqa: SLF001  (torch has no public word for it)
    return x.device.type == "cpu" and eager and not torch.compiler.is_compiling()


def _plus(a: Tensor, b: Tensor | None) -> Tensor:
    return a if b is None else a + b


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _matrix(x: Tensor) -> Tensor:
    """`[atoms, paths, i, most, columns]` -> `[atoms * paths, i * most, columns]`."""
    return x.flatten(2, 3).flatten(0, 1)


def _weights(w: Tensor, z: Tensor, at: Places) -> Tensor:
    """`[edges, paths * channels]` -> `[atoms, paths, 1, most, channels]`."""
    atoms, paths, _, most = z.shape[:4]
    rows = w.reshape(w.shape[0] * paths, w.shape[1] // paths).index_select(0, at.weight)
    return rows.reshape(atoms, paths, 1, most, rows.shape[1])


def _neighbours(x: Tensor, z: Tensor, at: Places) -> Tensor:
    """`[atoms, i, channels]` -> `[atoms, 1, i, most, channels]`."""
    atoms, _, width, most = z.shape[:4]
    row = at.neighbour.unsqueeze(1) * width + torch.arange(width, device=x.device).unsqueeze(1)
    return x.flatten(0, 1).index_select(0, row.reshape(-1)).reshape(atoms, 1, width, most, x.shape[2])


def _to_neighbours(x: Tensor, at: Places) -> Tensor:
    """The transpose of `_neighbours`: `[atoms, i, most, channels]` -> `[atoms, i, channels]`."""
    return sum_rows(x.transpose(1, 2).flatten(0, 1), at.incoming)


def _to_edges(x: Tensor, w: Tensor, at: Places) -> Tensor:
    """The transpose of `_weights`: `[atoms, paths, most, channels]` -> `[edges, paths * channels]`."""
    return x.flatten(0, 2).index_select(0, at.edge).reshape(w.shape)


def _over_paths(x: Tensor, wide: Tensor, total: Tensor | None = None) -> Tensor:
    """sum_p x[n, p, i, e, u] wide[n, p, 1, e, u], added to total."""
    if not _on_cpu(x):
        return _plus((x * wide).sum(1), total)
    for path in range(x.shape[1]):
        total = x[:, path] * wide[:, path] if total is None else torch.addcmul(total, x[:, path], wide[:, path])
    assert total is not None
    return total


def _over_components(x: Tensor, near: Tensor, total: Tensor | None = None) -> Tensor:
    """sum_i x[n, p, i, e, u] near[n, 1, i, e, u], added to total."""
    if not _on_cpu(x):
        return _plus((x * near).sum(2), total)
    for i in range(x.shape[2]):
        total = x[:, :, i] * near[:, :, i] if total is None else torch.addcmul(total, x[:, :, i], near[:, :, i])
    assert total is not None
    return total


class Coupling(torch.nn.Module):
    """Spherical harmonics coupled to matrices that take features of one irrep to those that its paths lead to.

    z[p, i, k] = sum_j C_p[i, j, k] Y_j, with sqrt(2 l + 1) times the Wigner 3j symbols as C; k runs up to the widest of
    the paths.

    Args:
        irrep: of the features.
        paths: of the product.
        l_max: of the harmonics.
        dtype: of the coefficients.
    """

    coefficients: Tensor

    def __init__(self, irrep: Irrep, paths: Paths, l_max: int, dtype: torch.dtype) -> None:
        super().__init__()
        widest = max(2 * c[0] + 1 for _, c in paths)
        width = 2 * irrep[0] + 1
        coefficients = torch.zeros((l_max + 1) ** 2, len(paths), width, widest, dtype=torch.float64, device="cpu")
        for p, (l, c) in enumerate(paths):
            block = math.sqrt(2 * c[0] + 1) * wigner_3j(irrep[0], l, c[0])
            coefficients[l * l : (l + 1) ** 2, p, :, : 2 * c[0] + 1] = block.transpose(0, 1)
        self.shape = (len(paths), width, widest)
        self.register_buffer("coefficients", coefficients.flatten(1).to(dtype), persistent=False)

    def forward(self, harmonics: Tensor) -> Tensor:
        """`[atoms, most, (l_max + 1)^2]` -> `[atoms, paths, i, most, k]`."""
        z = (harmonics @ self.coefficients).unflatten(2, self.shape)
        return z.permute(0, 2, 3, 1, 4).contiguous()


class Convolution(torch.nn.Module):
    """The sum over an atom's neighbours of the tensor product of their features with the harmonics of the edge,
    weighted by functions of the edge's length.

    The harmonics are coupled with the Clebsch-Gordan coefficients first (`Coupling`): that needs no channels and serves
    every layer.

    Args:
        irreps_in: of the features.
        l_max: of the harmonics.
        irreps_out: those that paths may lead to.
    """

    def __init__(self, irreps_in: Irreps, l_max: int, irreps_out: Irreps) -> None:
        super().__init__()
        self.irreps_in = irreps_in
        self.paths: dict[Irrep, Paths] = {}
        for a in irreps_in:
            paths = tuple(
                (l, c) for l in range(l_max + 1) for c in product_irreps(a, (l, (-1) ** l)) if c in irreps_out
            )
            if paths:
                self.paths[a] = paths
        self.sizes = [irreps_in[a] * len(paths) for a, paths in self.paths.items()]
        channels = {
            c: sum(irreps_in[a] for a, paths in self.paths.items() for _, d in paths if d == c) for c in irreps_out
        }
        self.irreps_out: Irreps = {c: mul for c, mul in channels.items() if mul}
        for n, paths in enumerate(self.paths.values()):
            self.register_buffer(f"rows_{n}", torch.tensor(self._rows(paths), device="cpu"), persistent=False)

    def _rows(self, paths: Paths) -> list[int]:
        """Of the flattened `[paths, k]`, the rows that are filled: by irrep, then component, then path."""
        widest = max(2 * c[0] + 1 for _, c in paths)
        return [
            p * widest + k
            for c in self.irreps_out
            for k in range(2 * c[0] + 1)
            for p, (_, d) in enumerate(paths)
            if d == c
        ]

    def forward(self, x: Features, weights: Sequence[Tensor], surroundings: "Surroundings") -> Features:
        """Features of the neighbours -> features of the centres.

        Args:
            x: features.
            weights: for each irrep that has paths, `[edges, paths * channels]`.
            surroundings: coupled harmonics and tables.
        """
        parts: dict[Irrep, list[Tensor]] = {c: [] for c in self.irreps_out}
        for n, ((a, paths), weight) in enumerate(zip(self.paths.items(), weights, strict=True)):
            out = _Messages.apply(x[a], weight, surroundings.coupled[a, paths], *surroundings.places[len(paths)])
            counts = {c: sum(d == c for _, d in paths) for c in self.irreps_out}
            filled = out.flatten(1, 2).index_select(1, getattr(self, f"rows_{n}"))
            sizes = [count * (2 * c[0] + 1) for c, count in counts.items()]
            for (c, count), piece in zip(counts.items(), filled.split(sizes, 1), strict=True):
                if count:
                    parts[c].append(piece.reshape(-1, 2 * c[0] + 1, count * out.shape[3]))
        return {c: torch.cat(part, 2) for c, part in parts.items()}


class Surroundings(NamedTuple):
    """What all convolutions share."""

    coupled: dict[tuple[Irrep, Paths], Tensor]
    places: dict[int, Places]


class Gate(torch.nn.Module):
    """Scalars through a nonlinearity, and the other irreps times such scalars, as in e3nn's `Gate`.

    Even scalars pass through SiLU and odd ones through tanh, both normalised to second moment one.
    """

    def __init__(self, irreps: Irreps, gate: Irrep) -> None:
        super().__init__()
        self.irreps = irreps
        self.gate = gate
        self.gated = {ir: mul for ir, mul in irreps.items() if ir[0] > 0}
        self.irreps_in = dict(
            sorted({ir: mul for ir, mul in irreps.items() if ir[0] == 0}.items(), key=lambda x: -x[0][1])
        )
        if self.gated:
            self.irreps_in[gate] = self.irreps_in.get(gate, 0) + sum(self.gated.values())
        self.irreps_in = dict(sorted({**self.irreps_in, **self.gated}.items(), key=_e3nn_order))
        self.factors = {parity: second_moment_factor(f) for parity, f in _ACTIVATIONS.items()}

    def _activate(self, x: Tensor, parity: int) -> Tensor:
        return _ACTIVATIONS[parity](x) * self.factors[parity]

    def forward(self, x: Features) -> Features:
        """Features -> features."""
        own = self.irreps.get(self.gate, 0)
        gates = self._activate(x[self.gate][:, :, own:], self.gate[1]) if self.gated else None
        out = {}
        for ir, mul in self.irreps.items():
            if ir[0] == 0:
                out[ir] = self._activate(x[ir][:, :, :mul], ir[1])
        if gates is not None:
            for (ir, _), gate in zip(self.gated.items(), gates.split(list(self.gated.values()), 2), strict=True):
                out[ir] = x[ir] * gate
        return out


_ACTIVATIONS: dict[int, Callable[[Tensor], Tensor]] = {1: silu, -1: torch.tanh}


def second_moment_factor(f: Callable[[Tensor], Tensor]) -> float:
    """What f is multiplied with so that the mean of f(z)^2 is one for normal z, as e3nn has it."""
    with torch.device("cpu"):
        normalised = normalize2mom(f)
    return 1.0 if normalised._is_id else float(normalised.cst)  # noqa: SLF001  (e3nn leaves factors of almost one out)


def _e3nn_order(item: tuple[Irrep, int]) -> tuple[int, int]:
    """e3nn sorts irreps as 0e, 0o, 1o, 1e, 2e, 2o ..."""
    (l, p), _ = item
    return l, -p * (-1) ** l


class Layer(torch.nn.Module):
    """One convolution with its self-connection and gate.

    Args:
        irreps_in: features of the last layer.
        irreps_out: features wanted; those that no path leads to are left out.
        l_max: of the harmonics.
        embed_dim: width of the species' embedding.
        radial_dims: widths of the radial MLP up to its last hidden layer.
        self_connection: whether there is one.
        kernels: of the convolution.
        dtype: of the weights.
    """

    def __init__(
        self,
        irreps_in: Irreps,
        irreps_out: Irreps,
        l_max: int,
        embed_dim: int,
        radial_dims: Sequence[int],
        *,
        self_connection: bool,
        kernels: Kernels,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        reached = {c for a in irreps_in for l in range(l_max + 1) for c in product_irreps(a, (l, (-1) ** l))}
        self.irreps_out = {ir: mul for ir, mul in irreps_out.items() if ir in reached}
        self.gate = Gate(self.irreps_out, (0, 1) if (0, 1) in reached else (0, -1))
        conv_out = self.gate.irreps_in
        self.linear_in = Linear(irreps_in, irreps_in, dtype)
        self.convolution = Convolution(irreps_in, l_max, conv_out)
        self.kernel = None
        if kernels != "ddpkit":
            self.kernel = KERNELS[kernels](irreps_in, l_max, self.convolution.paths, self.convolution.irreps_out, dtype)
        self.radial = MLP([*radial_dims, sum(self.convolution.sizes)], "silu", dtype=dtype)
        self.linear_out = Linear(self.convolution.irreps_out, conv_out, dtype)
        self.self_connection = SelfConnection(irreps_in, embed_dim, conv_out, dtype) if self_connection else None

    def forward(
        self, x: Features, embedding: Tensor, norm: Tensor, edges: Edges, surroundings: Surroundings, groups: Groups
    ) -> Features:
        """Features -> features.

        Args:
            x: features.
            embedding: of the species.
            norm: `[atoms, 1, 1]`, one over the square root of the average number of neighbours.
            edges: the edges.
            surroundings: their coupled harmonics.
            groups: the atoms by species.
        """
        normed = {ir: value * norm for ir, value in self.linear_in(x).items()}
        matrices = self.radial.matrices()
        hidden = self.radial.hidden(edges.radial, matrices)
        weights = [hidden @ matrix for matrix in matrices[-1].split(self.convolution.sizes, 1)]
        if self.kernel is None:
            out = self.linear_out(self.convolution(normed, weights, surroundings))
        else:
            out = self.linear_out(self.kernel(normed, weights, edges.harmonics, edges.graph))
        if self.self_connection is not None:
            for ir, value in self.self_connection(x, embedding, groups).items():
                out[ir] = out[ir] + value
        return self.gate(out)


class NequIP(Potential):
    """NequIP (S. Batzner et al., Nature Communications 13, 2453 (2022)), as published in `nequip` 0.19.

    Args:
        species: chemical symbols.
        r_max: cutoff, Å.
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
        kernels: what computes the convolution: "ddpkit", "e3nn" (the reference, slow), or "openequivariance" on NVIDIA GPUs.
        others: see `Potential`.
    """

    def __init__(
        self,
        species: Sequence[str],
        *,
        avg_num_neighbors: float | Sequence[float],
        r_max: float = 6.0,
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
        kernels: Kernels = "ddpkit",
        num_bessels: int = 8,
        bessel_trainable: bool = False,
        polynomial_cutoff_p: float = 6,
        shifts: float | Sequence[float] = 0.0,
        scales: float | Sequence[float] = 1.0,
        shifts_trainable: bool = False,
        scales_trainable: bool = False,
        cutoffs: Sequence[Sequence[float]] | None = None,
        precision: Precision = "mixed",
        zbl: bool | Sequence[str] = False,
        zbl_cutoff_p: float = 6,
    ) -> None:
        super().__init__(
            species,
            r_max=r_max,
            l_max=l_max,
            num_bessels=num_bessels,
            bessel_trainable=bessel_trainable,
            polynomial_cutoff_p=polynomial_cutoff_p,
            avg_num_neighbors=avg_num_neighbors,
            shifts=shifts,
            scales=scales,
            shifts_trainable=shifts_trainable,
            scales_trainable=scales_trainable,
            cutoffs=cutoffs,
            precision=precision,
            zbl=zbl,
            zbl_cutoff_p=zbl_cutoff_p,
        )
        if num_layers < 1:
            raise InputError(f"num_layers is {num_layers}: NequIP has at least one layer")
        features = [num_features] * (l_max + 1) if isinstance(num_features, int) else list(num_features)
        if len(features) != l_max + 1:
            raise InputError(
                f"num_features has {len(features)} entries: give one number, or one for each of {l_max + 1} degrees"
            )
        if kernels not in get_args(Kernels):
            raise InputError(f"kernels {kernels!r} is unknown: choose one of {', '.join(get_args(Kernels))}")
        dtype = self.dtype
        self.embedding = torch.nn.Parameter(torch.randn(len(species), type_embedding_dim, dtype=dtype))
        hidden = {(l, p): features[l] for l in range(l_max + 1) for p in ((1, -1) if parity else ((-1) ** l,))}
        irreps: Irreps = {(0, 1): type_embedding_dim}
        self.layers = torch.nn.ModuleList()
        for n in range(num_layers):
            layer = Layer(
                irreps,
                {(0, 1): features[0]} if n == num_layers - 1 else hidden,
                l_max,
                type_embedding_dim,
                [num_bessels, *[radial_width] * radial_depth],
                self_connection=self_connection and n > 0,
                kernels=kernels,
                dtype=dtype,
            )
            self.layers.append(layer)
            irreps = layer.irreps_out
        own = [cast("Layer", layer) for layer in self.layers]
        keys = sorted({key for layer in own if layer.kernel is None for key in layer.convolution.paths.items()})
        self.coupling_keys = keys
        self.couplings = torch.nn.ModuleList([Coupling(ir, paths, l_max, dtype) for ir, paths in keys])
        if readout_width is None:
            readout_width = features[0]
        self.readout = MLP([features[0], *[readout_width] * readout_depth, 1], readout_nonlinearity, dtype=dtype)
        # nequip's Bessel functions carry this factor for old models' sake
        self.radial_factor = 2 * math.pi / self.r_max**2

    def atomic_energies(self, edges: Edges) -> Tensor:
        """`[atoms]` energies in units of the species' scales, before shifts."""
        edges = edges._replace(radial=self.radial_factor * edges.radial)
        norm = (edges.species @ self.inverse_sqrt_neighbors).reshape(-1, 1, 1)
        harmonics = pad(edges.harmonics, edges.graph)
        surroundings = Surroundings(
            {key: coupling(harmonics) for key, coupling in zip(self.coupling_keys, self.couplings, strict=True)},
            {n: places_of(edges.graph, n) for n in sorted({len(paths) for _, paths in self.coupling_keys})},
        )
        groups = groups_of(edges.species)
        x: Features = {(0, 1): (edges.species @ self.embedding).unsqueeze(1)}
        for layer in self.layers:
            x = layer(x, self.embedding, norm, edges, surroundings, groups)
        return self.readout(x[0, 1].squeeze(1)).squeeze(1)
