"""The convolution of NequIP: what it is, and the kernel that computes it here."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddpkit.models.geometry import wigner_3j
from ddpkit.models.graph import Blocks, Graph, algorithms, blocks_of, pad_rows, sum_rows, table_of
from ddpkit.models.irreps import Features, Irrep, Irreps, Paths, product_irreps
from ddpkit.models.potential import Edges


class Convolution(torch.nn.Module):
    """The sum over an atom's neighbours of the tensor product of their features with the harmonics of the edge, weighted by
    functions of the edge's length (S. Batzner et al., Nature Communications 13, 2453 (2022), Methods, Convolutions).

    A path p leads from an irrep a of the features, with the harmonics of a degree l, to an irrep c. For every path,

        out[n, p, k, u] = sum over e, i, j of sqrt(2 c + 1) C[i, j, k] Y_l[e, j] x_a[neighbour of e, i, u] w[e, p, u]

    with e the edges of n, the Wigner 3j symbols C of the degrees (a, l, c), weights w and channels u. Features x are multiplied
    with `norm` first. Paths to the same irrep are concatenated along u.

    This class lists the paths. Each subclass is a kernel that computes the sum. A new kernel has `prepare` and `forward` and
    stands in `ddpkit.models.kernels.KERNELS`: `NequIP(kernels=...)` then takes its name, and before training it is compared with
    `ddpkit.models.reference.ReferenceConvolution`.

    Args:
        irreps_in: of the features.
        l_max: of the harmonics.
        irreps_out: those that paths may lead to.
        dtype: of features and weights.

    Attributes:
        paths: of each irrep of the features that has some.
        sizes: for each of those irreps, its columns of the weights: paths times channels.
        irreps_out: those that paths lead to, with their channels.
    """

    def __init__(self, irreps_in: Irreps, l_max: int, irreps_out: Irreps, dtype: torch.dtype) -> None:
        super().__init__()
        self.irreps_in = irreps_in
        self.l_max = l_max
        self.dtype = dtype
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

    @staticmethod
    def runs_on(device: torch.device) -> bool:
        """Whether this kernel runs on a device; where it does not, `BlockConvolution` computes."""
        del device
        return True

    @classmethod
    @abstractmethod
    def prepare(cls, layers: Sequence[Self], edges: Edges, norm: Tensor) -> Any:
        """What the convolutions of all layers share in a step.

        Args:
            layers: the kernel of each layer.
            edges: harmonics `[edges, (l_max + 1)^2]` and the graph.
            norm: `[atoms, 1]`, multiplies the features of the neighbours.
        """

    @abstractmethod
    def forward(self, x: Features, hidden: Tensor, matrix: Tensor, shared: Any) -> Features:
        """Features of the neighbours -> features of the centres.

        Args:
            x: features.
            hidden: `[edges, width]`; weights are `hidden @ matrix`.
            matrix: `[width, sum of sizes]`; columns by irrep, then path, then channel.
            shared: what `prepare` returned.
        """


class Term(NamedTuple):
    """Sizes of what the features of one irrep contribute to a convolution."""

    paths: int
    width: int  # components of the features
    widest: int  # most components of what the paths lead to
    channels: int


class Places(NamedTuple):
    """Index tables of the convolution. Edges stand in blocks, each of one centre."""

    blocks: Blocks  # by centre
    centre: Tensor  # [blocks] the centre; any atom where a block is empty
    neighbour: Tensor  # [blocks, BLOCK] the neighbour; any atom where the block has no edge
    incoming: Blocks  # places in the flattened `blocks`, by neighbour
    weight: dict[int, Tensor]  # by number of paths, [blocks, paths, BLOCK]: rows of weights [edges * paths, channels]
    edge: dict[int, Tensor]  # by number of paths, [edges * paths]: the transpose
    leaf: bool  # as in `Edges`


class Surroundings(NamedTuple):
    """What the convolutions of all layers share."""

    coupled: dict[tuple[Irrep, Paths], Tensor]  # by irrep and paths, [blocks, paths, k, BLOCK, i]
    places: Places
    norm: Tensor  # [atoms, 1]


class BlockConvolution(Convolution):
    """The convolution in blocks of edges of one centre, with derivatives of the first and second order written by hand.

    The harmonics are coupled with the Clebsch-Gordan coefficients first (`Coupling`): that needs no channels and serves
    every layer.
    """

    def __init__(self, irreps_in: Irreps, l_max: int, irreps_out: Irreps, dtype: torch.dtype) -> None:
        super().__init__(irreps_in, l_max, irreps_out, dtype)
        self.couplings = torch.nn.ModuleList([Coupling(a, p, l_max, dtype) for a, p in self.paths.items()])
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
        """The columns of what `_Messages` returns that hold a component of a path's irrep: by irrep, then component."""
        columns: dict[tuple[Irrep, int], list[int]] = {(c, k): [] for c in self.irreps_out for k in range(2 * c[0] + 1)}
        first = 0
        for term, paths in zip(self.terms, self.paths.values(), strict=True):
            for p, (_, c) in enumerate(paths):
                for k in range(2 * c[0] + 1):
                    start = first + (p * term.widest + k) * term.channels
                    columns[c, k] += range(start, start + term.channels)
            first += term.paths * term.widest * term.channels
        return [column for part in columns.values() for column in part]

    @classmethod
    def prepare(cls, layers: Sequence[Self], edges: Edges, norm: Tensor) -> Surroundings:
        """Coupled harmonics and index tables."""
        couplings: dict[tuple[Irrep, Paths], torch.nn.Module] = {}
        for layer in layers:
            couplings |= zip(layer.paths.items(), layer.couplings, strict=True)
        places = places_of(edges.graph, sorted({len(paths) for _, paths in couplings}), leaf=edges.leaf)
        harmonics = pad_rows(edges.harmonics, places.blocks.slot, places.blocks.rows.rows)
        return Surroundings({key: couplings[key](harmonics) for key in sorted(couplings)}, places, norm)

    def forward(self, x: Features, hidden: Tensor, matrix: Tensor, shared: Surroundings) -> Features:
        """Features of the neighbours -> features of the centres."""
        weights = [hidden @ part for part in matrix.split(self.sizes, 1)]
        flat = torch.cat([x[a].flatten(1) for a in self.paths], 1) * shared.norm
        coupled = [shared.coupled[key] for key in self.paths.items()]
        out = _Messages.apply(self.terms, shared.places, flat, *weights, *coupled)
        sizes = [mul * (2 * c[0] + 1) for c, mul in self.irreps_out.items()]
        pieces = _Columns.apply(out, self.filled, self.place).split(sizes, 1)
        return {
            c: piece.reshape(-1, 2 * c[0] + 1, mul)
            for (c, mul), piece in zip(self.irreps_out.items(), pieces, strict=True)
        }


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


def places_of(graph: Graph, numbers_of_paths: Iterable[int], *, leaf: bool) -> Places:
    """Index tables of the convolution."""
    exact = algorithms(graph.centre.device).exact_tables
    blocks = blocks_of(graph.outgoing, graph.centre, graph.slot, exact=exact)
    assert graph.incoming is not None
    assert graph.incoming_slot is not None
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
        leaf,
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
        if ctx.places.leaf:
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


CACHE = 1 << 18  # numbers in the largest array of a run, which a core's cache holds beside the others


class _Run(NamedTuple):
    """Some of the blocks."""

    blocks: slice
    places: Places  # centre, neighbour and weight of these blocks


def _runs(terms: tuple[Term, ...], places: Places) -> Iterator[_Run]:
    """Runs over blocks whose arrays stay in a core's cache (`Algorithms.in_cache`), or one over all."""
    blocks, length = places.neighbour.shape
    if not algorithms(places.neighbour.device).in_cache:
        yield _Run(slice(None), places)
        return
    step = max(1, CACHE // (length * max(t.paths * t.width * t.channels for t in terms)))
    for first in range(0, max(blocks, 1), step):
        part = slice(first, first + step)
        weight = {paths: rows[part] for paths, rows in places.weight.items()}
        yield _Run(part, places._replace(centre=places.centre[part], neighbour=places.neighbour[part], weight=weight))


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
    if not algorithms(x.device).in_cache:
        return _plus((x * wide).sum(1), total)
    for path in range(x.shape[1]):
        total = x[:, path] * wide[:, path] if total is None else torch.addcmul(total, x[:, path], wide[:, path])
    assert total is not None
    return total


def _over_components(x: Tensor, near: Tensor, total: Tensor | None = None) -> Tensor:
    """sum_i x[n, p, e, i, u] near[n, 1, e, i, u], added to total."""
    if not algorithms(x.device).in_cache:
        return _plus((x * near).sum(3), total)
    for i in range(x.shape[3]):
        part, factor = x[:, :, :, i], near[:, :, :, i]
        total = part * factor if total is None else torch.addcmul(total, part, factor)
    assert total is not None
    return total


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
