"""NequIP: equivariant message passing."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, cast, get_args

import torch
from e3nn.math import normalize2mom
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddpkit.errors import InputError
from ddpkit.models import reference
from ddpkit.models.geometry import wigner_3j
from ddpkit.models.graph import Blocks, Graph, blocks_of, is_eager, is_literal, pad_rows, sum_rows, table_of, unpad_rows
from ddpkit.models.irreps import Features, Irrep, Irreps, Paths, product_irreps
from ddpkit.models.kernels import KERNELS, FlatConvolution, order_by_neighbour
from ddpkit.models.mlp import MLP, silu
from ddpkit.models.potential import Edges, Potential, Precision

Kernels = Literal["ddpkit", "e3nn", "openequivariance"]

GROUP = 16  # atoms of one species that are multiplied at once


class Linear(torch.nn.Module):
    """Mixes the channels of each irrep, as e3nn's `Linear` does, without biases.

    All weights are one parameter: a layer that reads only some of the irreps leaves none without a gradient.
    """

    scale: Tensor

    def __init__(self, irreps_in: Irreps, irreps_out: Irreps, dtype: torch.dtype) -> None:
        super().__init__()
        self.irreps = [ir for ir in irreps_in if ir in irreps_out]
        self.shapes = [(irreps_in[ir], irreps_out[ir]) for ir in self.irreps]
        self.weight = torch.nn.Parameter(torch.randn(sum(a * b for a, b in self.shapes), dtype=dtype))
        scale = [torch.full((a * b,), 1 / math.sqrt(a), dtype=dtype, device="cpu") for a, b in self.shapes]
        self.register_buffer("scale", torch.cat(scale), persistent=False)

    def forward(self, x: Features) -> Features:
        """Features -> features."""
        blocks = (self.weight * self.scale).split([a * b for a, b in self.shapes])
        return {
            ir: x[ir] @ block.reshape(shape) for ir, shape, block in zip(self.irreps, self.shapes, blocks, strict=True)
        }


class Groups(NamedTuple):
    """Atoms in blocks of one species each."""

    atoms: Tensor  # [blocks, GROUP] atoms, padded with the number of atoms
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
    last = ((member.sum(0) + GROUP - 1) // GROUP).cumsum(0)
    first = torch.cat((last.new_zeros(1), last[:-1]))
    slot = ((first * GROUP + seen - 1) * member).sum(1)
    blocks = int(last[-1]) if exact else (atoms + GROUP - 1) // GROUP + species
    table = slot.new_full((blocks * GROUP,), atoms).scatter(0, slot, torch.arange(atoms, device=slot.device))
    number = torch.arange(blocks, device=slot.device)
    of_block = (number.unsqueeze(1) >= last).sum(1).clamp(max=species - 1)
    return Groups(table.reshape(blocks, GROUP), slot, present, of_block)


class SelfConnection(torch.nn.Module):
    """Mixes the channels of each irrep with weights that depend linearly on the embedding of the atom's species.

    Weights and embeddings of the species are contracted first, so that the cost for atoms does not depend on the
    embedding's width; atoms are then multiplied in blocks of one species.
    """

    scale: Tensor

    def __init__(self, irreps_in: Irreps, embed_dim: int, irreps_out: Irreps, dtype: torch.dtype) -> None:
        super().__init__()
        self.irreps = [ir for ir in irreps_in if ir in irreps_out]
        self.shapes = [(irreps_in[ir], irreps_out[ir]) for ir in self.irreps]
        self.weight = torch.nn.Parameter(torch.randn(embed_dim, sum(a * b for a, b in self.shapes), dtype=dtype))
        scale = [
            torch.full(((2 * ir[0] + 1) * a,), 1 / math.sqrt(a * embed_dim), dtype=dtype, device="cpu")
            for ir, (a, _) in zip(self.irreps, self.shapes, strict=True)
        ]
        self.register_buffer("scale", torch.cat(scale), persistent=False)

    def forward(self, x: Features, embedding: Tensor, groups: Groups) -> Features:
        """Features -> features.

        Args:
            x: features.
            embedding: `[species, embed_dim]`.
            groups: the atoms by species.
        """
        widths = [2 * ir[0] + 1 for ir in self.irreps]
        sizes_in = [width * a for width, (a, _) in zip(widths, self.shapes, strict=True)]
        sizes_out = [width * b for width, (_, b) in zip(widths, self.shapes, strict=True)]
        per_species = embedding.index_select(0, groups.present) @ self.weight
        matrices = per_species.index_select(0, groups.species).split([a * b for a, b in self.shapes], 1)
        flat = torch.cat([x[ir].flatten(1) for ir in self.irreps], 1) * self.scale
        rows = pad_rows(flat, groups.slot, groups.atoms).split(sizes_in, 2)
        products = [
            torch.bmm(part.reshape(-1, GROUP * width, a), matrix.reshape(-1, a, b)).reshape(-1, GROUP, width * b)
            for part, matrix, width, (a, b) in zip(rows, matrices, widths, self.shapes, strict=True)
        ]
        out = unpad_rows(torch.cat(products, 2), groups.slot, groups.atoms).split(sizes_out, 1)
        return {
            ir: part.reshape(-1, width, b)
            for ir, part, width, (_, b) in zip(self.irreps, out, widths, self.shapes, strict=True)
        }


class Term(NamedTuple):
    """What the features of one irrep contribute to a convolution: sizes."""

    paths: int
    width: int  # components of the features
    widest: int  # most components of what the paths lead to
    channels: int


class Places(NamedTuple):
    """Where the convolution finds things. Edges stand in blocks, each of one centre."""

    blocks: Blocks  # by centre
    centre: Tensor  # [blocks] the centre; any atom where a block is empty
    neighbour: Tensor  # [blocks, BLOCK] the neighbour; any atom where there is no edge
    incoming: Blocks  # places in the flattened `blocks`, by neighbour
    weight: dict[int, Tensor]  # by number of paths, [blocks, paths, BLOCK]: rows of weights [edges * paths, channels]
    edge: dict[int, Tensor]  # by number of paths, [edges * paths]: the transpose
    apart: bool  # whether nobody can ask for second derivatives by the harmonics


def places_of(graph: Graph, numbers_of_paths: Iterable[int], *, apart: bool) -> Places:
    """Index tables of the convolution."""
    exact = _on_cpu(graph.centre)
    blocks = blocks_of(graph.outgoing, graph.centre, graph.slot, exact=exact)
    incoming = blocks_of(graph.incoming, graph.neighbour, graph.incoming_slot, exact=exact)
    edge = blocks.rows.gather
    # what is padded stays padded: one past the last place
    places = edge.shape[0] * edge.shape[1]
    slot = torch.cat((blocks.slot, blocks.slot.new_full((1,), places)))
    of_slots = slot.index_select(0, incoming.rows.rows.reshape(-1)).reshape(incoming.rows.rows.shape)
    by_neighbour = incoming._replace(rows=table_of(of_slots, places))
    weight, back = {}, {}
    length = edge.shape[1]
    for paths in numbers_of_paths:
        path = torch.arange(paths, device=edge.device)
        weight[paths] = edge.unsqueeze(1) * paths + path.reshape(1, -1, 1)
        block = torch.div(blocks.slot, length, rounding_mode="floor")
        start = blocks.slot + block * ((paths - 1) * length)
        back[paths] = (start.unsqueeze(1) + path * length).reshape(-1)
    return Places(
        blocks,
        graph.centre.index_select(0, edge[:, 0]),
        graph.neighbour.index_select(0, edge.reshape(-1)).reshape(edge.shape),
        by_neighbour,
        weight,
        back,
        apart,
    )


class _Messages(torch.autograd.Function):
    """out[n, p, k, u] = sum over edges e of n, and i, of z[p, k, e, i] w[e, p, u] x[neighbour of e, i, u] for every term.

    Linear in each of x, w and z, so that its derivatives are sums of the same kind. Where a block has no edge, z is zero, and
    what w and x hold does not matter. Only the three factors are kept for the derivatives.

    Takes x `[atoms, sum of width * channels]`, then for each term w `[edges, paths * channels]`, then for each term z
    `[blocks, paths, widest, BLOCK, width]`; returns `[atoms, sum of paths * widest * channels]`.
    """

    @staticmethod
    def forward(ctx: Any, terms: tuple[Term, ...], places: Places, x: Tensor, *wz: Tensor) -> Tensor:  # type: ignore[override]
        ctx.terms, ctx.places = terms, places
        ctx.save_for_backward(x, *wz)
        w, z = wz[: len(terms)], wz[len(terms) :]
        runs = []
        for run in _runs(terms, places):
            out = []
            for n, near in enumerate(_neighbours(terms, x, run)):
                product = _weights(terms[n], w[n], run) * near
                out.append(_columns(terms[n], torch.bmm(_matrix(z[n][run.blocks]), _rows(product))))
            runs.append(torch.cat(out, 1))
        return sum_rows(_join(runs), places.blocks.of_atom)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *wz = ctx.saved_tensors
        if ctx.places.apart:
            first = len(ctx.terms)
            wz = [*wz[:first], *(z.detach() for z in wz[first:])]
        return None, None, *_MessagesGradient.apply(ctx.terms, ctx.places, grad, x, *wz)


class _MessagesGradient(torch.autograd.Function):
    """The derivatives of `_Messages` by x, w and z, times grad."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, terms: tuple[Term, ...], places: Places, grad: Tensor, x: Tensor, *wz: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.terms, ctx.places = terms, places
        ctx.save_for_backward(grad, x, *wz)
        ctx.set_materialize_grads(False)
        w, z = wz[: len(terms)], wz[len(terms) :]
        runs = []
        for run in _runs(terms, places):
            parts = []
            for n, (near, flat) in enumerate(zip(_neighbours(terms, x, run), _of_terms(terms, grad, run), strict=True)):
                wide, matrix = _weights(terms[n], w[n], run), _matrix(z[n][run.blocks])
                pulled = torch.bmm(matrix.transpose(1, 2), flat).reshape(*wide.shape[:3], *near.shape[3:])
                for_z = torch.bmm(flat, _rows(wide * near).transpose(1, 2)).reshape(z[n][run.blocks].shape)
                parts.append((_over_paths(pulled, wide), _over_components(pulled, near), for_z))
            runs.append(parts)
        return _collect(terms, places, runs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_x: Tensor | None, *by_wz: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        terms, places = ctx.terms, ctx.places
        grad, x, *wz = ctx.saved_tensors
        # what is absent is zero: cheap beside a case for each
        by_x = torch.zeros_like(x) if by_x is None else by_x
        full = [torch.zeros_like(v) if by is None else by for v, by in zip(wz, by_wz, strict=True)]
        w, z, by_w, by_z = wz[: len(terms)], wz[len(terms) :], full[: len(terms)], full[len(terms) :]
        wants_z = any(ctx.needs_input_grad[-len(terms) :])
        runs, for_grad = [], []
        for run in _runs(terms, places):
            parts, pieces = [], []
            flats, nears = _of_terms(terms, grad, run), _neighbours(terms, x, run)
            for n, (flat, near, near_1) in enumerate(zip(flats, nears, _neighbours(terms, by_x, run), strict=True)):
                wide, wide_1 = _weights(terms[n], w[n], run), _weights(terms[n], by_w[n], run)
                matrix, matrix_1 = _matrix(z[n][run.blocks]), _matrix(by_z[n][run.blocks])
                product = _rows(torch.addcmul(wide * near_1, wide_1, near))
                piece = torch.bmm(matrix, product)
                pieces.append(_columns(terms[n], torch.baddbmm(piece, matrix_1, _rows(wide * near))))
                for_z = None
                if wants_z:
                    for_z = torch.bmm(flat, product.transpose(1, 2)).reshape(z[n][run.blocks].shape)
                shape = (*wide.shape[:3], *near.shape[3:])
                pulled = torch.bmm(matrix.transpose(1, 2), flat).reshape(shape)
                pulled_1 = torch.bmm(matrix_1.transpose(1, 2), flat).reshape(shape)
                for_x = _over_paths(pulled_1, wide, _over_paths(pulled, wide_1))
                for_w = _over_components(pulled_1, near, _over_components(pulled, near_1))
                parts.append((for_x, for_w, for_z))
            for_grad.append(torch.cat(pieces, 1))
            runs.append(parts)
        return None, None, sum_rows(_join(for_grad), places.blocks.of_atom), *_collect(terms, places, runs)


CACHE = 1 << 18  # numbers in the largest array of a run: what a core's cache holds beside the others


class _Run(NamedTuple):
    """Some of the blocks."""

    blocks: slice
    places: Places  # theirs: centre, neighbour, weight


def _runs(terms: tuple[Term, ...], places: Places) -> Iterator[_Run]:
    """Runs over blocks whose arrays stay in a CPU's cache; all at once on other devices, and in a trace."""
    blocks, length = places.neighbour.shape
    if not _on_cpu(places.neighbour):
        yield _Run(slice(None), places)
        return
    step = max(1, CACHE // (length * max(t.paths * t.width * t.channels for t in terms)))
    for first in range(0, max(blocks, 1), step):
        part = slice(first, first + step)
        weight = {paths: rows[part] for paths, rows in places.weight.items()}
        yield _Run(part, places._replace(centre=places.centre[part], neighbour=places.neighbour[part], weight=weight))


def _on_cpu(x: Tensor) -> bool:
    """Whether operations run one by one on a CPU, whose cache arrays should stay in; a trace wants few instead."""
    return x.device.type == "cpu" and is_eager()


def _plus(a: Tensor, b: Tensor | None) -> Tensor:
    return a if b is None else a + b


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _matrix(z: Tensor) -> Tensor:
    """`[blocks, paths, widest, BLOCK, width]` -> `[blocks * paths, widest, BLOCK * width]`."""
    return z.flatten(3, 4).flatten(0, 1)


def _rows(x: Tensor) -> Tensor:
    """`[blocks, paths, BLOCK, width, channels]` -> `[blocks * paths, BLOCK * width, channels]`."""
    return x.flatten(2, 3).flatten(0, 1)


def _columns(term: Term, x: Tensor) -> Tensor:
    """`[blocks * paths, widest, channels]` -> `[blocks, paths * widest * channels]`."""
    return x.reshape(-1, term.paths * term.widest * term.channels)


def _weights(term: Term, w: Tensor, run: _Run) -> Tensor:
    """`[edges, paths * channels]` -> `[blocks, paths, BLOCK, 1, channels]`."""
    rows = run.places.weight[term.paths]
    taken = w.reshape(w.shape[0] * term.paths, term.channels).index_select(0, rows.reshape(-1))
    return taken.reshape(*rows.shape, 1, term.channels)


def _neighbours(terms: tuple[Term, ...], x: Tensor, run: _Run) -> list[Tensor]:
    """`[atoms, sum of width * channels]` -> `[blocks, 1, BLOCK, width, channels]` for each term."""
    neighbour = run.places.neighbour
    taken = x.index_select(0, neighbour.reshape(-1))
    pieces = taken.split([t.width * t.channels for t in terms], 1)
    return [
        piece.reshape(neighbour.shape[0], 1, neighbour.shape[1], t.width, t.channels)
        for t, piece in zip(terms, pieces, strict=True)
    ]


def _of_terms(terms: tuple[Term, ...], grad: Tensor, run: _Run) -> list[Tensor]:
    """`[atoms, sum of paths * widest * channels]` -> `[blocks * paths, widest, channels]` for each term."""
    pieces = grad.index_select(0, run.places.centre).split([t.paths * t.widest * t.channels for t in terms], 1)
    return [piece.reshape(-1, t.widest, t.channels) for t, piece in zip(terms, pieces, strict=True)]


def _collect(terms: tuple[Term, ...], places: Places, runs: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """The derivatives by x, w and z from those of runs: for each term `[blocks, BLOCK, width, channels]`,
    `[blocks, paths, BLOCK, channels]`, and as z or None.
    """
    for_x = _join([torch.cat([part[0].flatten(2) for part in parts], 2).flatten(0, 1) for parts in runs])
    for_x = sum_rows(sum_rows(for_x, places.incoming.rows), places.incoming.of_atom)
    for_w = []
    for n, term in enumerate(terms):
        rows = _join([parts[n][1] for parts in runs]).flatten(0, 2).index_select(0, places.edge[term.paths])
        for_w.append(rows.reshape(-1, term.paths * term.channels))
    for_z = [[parts[n][2] for parts in runs] for n in range(len(terms))]
    return for_x, *for_w, *(None if parts[0] is None else _join(parts) for parts in for_z)


def _over_paths(x: Tensor, wide: Tensor, total: Tensor | None = None) -> Tensor:
    """sum_p x[n, p, e, i, u] wide[n, p, e, 1, u], added to total."""
    if not _on_cpu(x):
        return _plus((x * wide).sum(1), total)
    for path in range(x.shape[1]):
        total = x[:, path] * wide[:, path] if total is None else torch.addcmul(total, x[:, path], wide[:, path])
    assert total is not None
    return total


def _over_components(x: Tensor, near: Tensor, total: Tensor | None = None) -> Tensor:
    """sum_i x[n, p, e, i, u] near[n, 1, e, i, u], added to total."""
    if not _on_cpu(x):
        return _plus((x * near).sum(3), total)
    for i in range(x.shape[3]):
        part, factor = x[:, :, :, i], near[:, :, :, i]
        total = part * factor if total is None else torch.addcmul(total, part, factor)
    assert total is not None
    return total


class Coupling(torch.nn.Module):
    """Spherical harmonics coupled to matrices that take features of one irrep to those that its paths lead to.

    z[p, k, i] = sum_j C_p[i, j, k] Y_j, with sqrt(2 l + 1) times the Wigner 3j symbols as C; k runs up to the widest of
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
        coefficients = torch.zeros((l_max + 1) ** 2, len(paths), widest, width, dtype=torch.float64, device="cpu")
        for p, (l, c) in enumerate(paths):
            block = math.sqrt(2 * c[0] + 1) * wigner_3j(irrep[0], l, c[0])
            coefficients[l * l : (l + 1) ** 2, p, : 2 * c[0] + 1] = block.permute(1, 2, 0)
        self.shape = (len(paths), widest, width)
        self.register_buffer("coefficients", coefficients.flatten(1).to(dtype), persistent=False)

    def forward(self, harmonics: Tensor) -> Tensor:
        """`[blocks, BLOCK, (l_max + 1)^2]` -> `[blocks, paths, k, BLOCK, i]`."""
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
        self.terms = tuple(
            Term(len(paths), 2 * a[0] + 1, max(2 * c[0] + 1 for _, c in paths), irreps_in[a])
            for a, paths in self.paths.items()
        )
        filled = torch.tensor(self._filled(), device="cpu")
        columns = sum(t.paths * t.widest * t.channels for t in self.terms)
        self.register_buffer("filled", filled, persistent=False)
        place = filled.new_full((columns,), len(filled)).scatter(0, filled, torch.arange(len(filled), device="cpu"))
        self.register_buffer("place", place, persistent=False)

    def _filled(self) -> list[int]:
        """Of what `_Messages` returns, the columns that belong to components which there are: by irrep, then component."""
        columns: dict[tuple[Irrep, int], list[int]] = {(c, k): [] for c in self.irreps_out for k in range(2 * c[0] + 1)}
        first = 0
        for term, paths in zip(self.terms, self.paths.values(), strict=True):
            for p, (_, c) in enumerate(paths):
                for k in range(2 * c[0] + 1):
                    start = first + (p * term.widest + k) * term.channels
                    columns[c, k] += range(start, start + term.channels)
            first += term.paths * term.widest * term.channels
        return [column for part in columns.values() for column in part]

    def forward(self, x: Features, weights: Sequence[Tensor], norm: Tensor, surroundings: "Surroundings") -> Features:
        """Features of the neighbours -> features of the centres.

        Args:
            x: features.
            weights: for each irrep that has paths, `[edges, paths * channels]`.
            norm: `[atoms, 1]`, multiplies the features.
            surroundings: coupled harmonics and tables.
        """
        flat = torch.cat([x[a].flatten(1) for a in self.paths], 1) * norm
        coupled = [surroundings.coupled[key] for key in self.paths.items()]
        out = _Messages.apply(self.terms, surroundings.places, flat, *weights, *coupled)
        sizes = [mul * (2 * c[0] + 1) for c, mul in self.irreps_out.items()]
        pieces = _Columns.apply(out, self.filled, self.place).split(sizes, 1)
        return {
            c: piece.reshape(-1, 2 * c[0] + 1, mul)
            for (c, mul), piece in zip(self.irreps_out.items(), pieces, strict=True)
        }


class _Columns(torch.autograd.Function):
    """`x[:, index]` for index without repetition, and zero where index is the number of columns; `back` undoes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(index, back)
        if index.shape[0] > x.shape[1]:
            x = torch.cat((x, x.new_zeros((x.shape[0], 1))), 1)
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        index, back = ctx.saved_tensors
        return _Columns.apply(grad, back, index), None, None


class Surroundings(NamedTuple):
    """What all convolutions share."""

    coupled: dict[tuple[Irrep, Paths], Tensor]
    places: Places


class FlatSurroundings(NamedTuple):
    """What all convolutions by other packages share: the arguments of `FlatConvolution`."""

    harmonics: Tensor
    graph: Graph
    by_neighbour: Tensor


class LiteralSurroundings(NamedTuple):
    """What the convolutions share where the model is computed literally (`reference`)."""

    harmonics: Tensor
    graph: Graph
    species: Tensor


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
        out, gates = {}, None
        for ir in [ir for ir in self.irreps_in if ir[0] == 0]:
            active = self._activate(x[ir], ir[1])
            if ir == self.gate and self.gated:
                own = self.irreps.get(ir, 0)
                parts = active.split([own, *self.gated.values()], 2)
                active, gates = parts[0], parts[1:]
            if ir in self.irreps:
                out[ir] = active
        for ir, gate in zip(self.gated, gates or (), strict=True):
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
        dtype: of the weights.

    Attributes:
        kernel: another package's convolution, which computes in place of our own where it is set.
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
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        reached = {c for a in irreps_in for l in range(l_max + 1) for c in product_irreps(a, (l, (-1) ** l))}
        self.irreps_out = {ir: mul for ir, mul in irreps_out.items() if ir in reached}
        self.gate = Gate(self.irreps_out, (0, 1) if (0, 1) in reached else (0, -1))
        conv_out = self.gate.irreps_in
        self.linear_in = Linear(irreps_in, irreps_in, dtype)
        self.convolution = Convolution(irreps_in, l_max, conv_out)
        self.kernel: FlatConvolution | None = None
        self.radial = MLP([*radial_dims, sum(self.convolution.sizes)], "silu", dtype=dtype)
        self.linear_out = Linear(self.convolution.irreps_out, conv_out, dtype)
        self.self_connection = SelfConnection(irreps_in, embed_dim, conv_out, dtype) if self_connection else None

    def forward(
        self,
        x: Features,
        embedding: Tensor,
        norm: Tensor,
        radial: Tensor,
        surroundings: Surroundings | FlatSurroundings | LiteralSurroundings,
        groups: Groups,
    ) -> Features:
        """Features -> features.

        Args:
            x: features.
            embedding: of the species.
            norm: `[atoms, 1]`, one over the square root of the average number of neighbours.
            radial: `[edges, bessels]`.
            surroundings: harmonics of the edges; which kind chooses what computes the convolution.
            groups: the atoms by species.
        """
        mixed = self.linear_in(x)
        matrices = self.radial.matrices()
        hidden = self.radial.hidden(radial, matrices)
        if isinstance(surroundings, LiteralSurroundings):
            weighted = hidden @ matrices[-1]
            out = self.linear_out(
                reference.convolution(
                    self.convolution, mixed, weighted, norm, surroundings.harmonics, surroundings.graph
                )
            )
        elif isinstance(surroundings, FlatSurroundings):
            assert self.kernel is not None
            out = self.linear_out(self.kernel(mixed, hidden @ matrices[-1], norm, *surroundings))
        else:
            weights = [hidden @ matrix for matrix in matrices[-1].split(self.convolution.sizes, 1)]
            out = self.linear_out(self.convolution(mixed, weights, norm, surroundings))
        if self.self_connection is not None:
            if isinstance(surroundings, LiteralSurroundings):
                added = reference.self_connection(self.self_connection, x, surroundings.species @ embedding)
            else:
                added = self.self_connection(x, embedding, groups)
            for ir, value in added.items():
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
        kernels: what computes the convolution: "ddpkit", "e3nn" (the reference, slow), or "openequivariance" on NVIDIA GPUs
            (on a CPU, where such a model may be moved to, "ddpkit" computes).
        others: see `Potential`.

    Attributes:
        portable: settings that say how the same is computed, with values that need no GPU.
    """

    portable: ClassVar[dict[str, Any]] = {"kernels": "ddpkit"}

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
                dtype=dtype,
            )
            self.layers.append(layer)
            irreps = layer.irreps_out
        self.kernels = kernels
        own = [cast("Layer", layer) for layer in self.layers]
        if kernels != "ddpkit":
            made: dict[Any, FlatConvolution] = {}
            for layer in own:  # those alike share one, and its memory
                parts = layer.convolution.irreps_in, layer.convolution.paths, layer.convolution.irreps_out
                key = tuple(tuple(part.items()) for part in parts)
                if key not in made:
                    made[key] = KERNELS[kernels](parts[0], l_max, parts[1], parts[2], dtype)
                layer.kernel = made[key]
        keys = sorted({key for layer in own for key in layer.convolution.paths.items()})
        self.coupling_keys = keys
        self.couplings = torch.nn.ModuleList([Coupling(ir, paths, l_max, dtype) for ir, paths in keys])
        if readout_width is None:
            readout_width = features[0]
        self.readout = MLP([features[0], *[readout_width] * readout_depth, 1], readout_nonlinearity, dtype=dtype)
        # nequip's Bessel functions carry this factor for old models' sake
        self.radial_factor = 2 * math.pi / self.r_max**2

    def replaced_kernels(self) -> dict[int, None]:
        """For `copy.deepcopy`: what a copy for the reference leaves out."""
        return {id(cast("Layer", layer).kernel): None for layer in self.layers}

    def atomic_energies(self, edges: Edges) -> Tensor:
        """`[atoms]` energies in units of the species' scales, before shifts."""
        radial = self.radial_factor * edges.radial
        norm = (edges.species @ self.inverse_sqrt_neighbors).unsqueeze(1)
        surroundings: Surroundings | FlatSurroundings | LiteralSurroundings
        if is_literal():
            surroundings = LiteralSurroundings(edges.harmonics, edges.graph, edges.species)
        elif self.kernels == "e3nn" or (self.kernels == "openequivariance" and radial.is_cuda):
            order, is_symmetric = order_by_neighbour(edges.graph)
            surroundings = FlatSurroundings(edges.harmonics, edges.graph, order)
            if self.kernels == "openequivariance":  # which would silently compute something else
                norm = norm.where(is_symmetric, math.nan)
        else:
            surroundings = self._surroundings(edges)
        groups = groups_of(edges.species)
        x: Features = {(0, 1): (edges.species @ self.embedding).unsqueeze(1)}
        for layer in self.layers:
            x = layer(x, self.embedding, norm, radial, surroundings, groups)
        return self.readout(x[0, 1].squeeze(1)).squeeze(1)

    def _surroundings(self, edges: Edges) -> Surroundings:
        numbers = sorted({len(paths) for _, paths in self.coupling_keys})
        places = places_of(edges.graph, numbers, apart=edges.apart)
        harmonics = pad_rows(edges.harmonics, places.blocks.slot, places.blocks.rows.rows)
        coupled = {key: coupling(harmonics) for key, coupling in zip(self.coupling_keys, self.couplings, strict=True)}
        return Surroundings(coupled, places)
