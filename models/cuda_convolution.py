"""The convolution of NequIP in CUDA kernels that are written out for its irreps (`ddpkit.models.cuda_source`).

Weights of edges (`hidden @ matrix`, 3,616 numbers an edge in `nequip_xl`) are computed for a part of the edges at a time, and
again for each derivative: none are kept, and `PART` bounds what there is of them at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddpkit import nvrtc
from ddpkit.errors import InputError
from ddpkit.models import cuda_source
from ddpkit.models.convolution import Convolution
from ddpkit.models.cuda_source import Product
from ddpkit.models.irreps import Features, Irreps
from ddpkit.models.potential import Edges
from ddpkit.torch_private import is_asked_for

PART = 1 << 26
"""Numbers in the weights of a part of the edges."""

ROOM = 2048
"""Warps that a large GPU computes at a time, about."""

LAUNCH: dict[str, Callable[..., None]] = {"cuda": nvrtc.launch}
"""By the type of a device, what launches a kernel there."""

REAL = {torch.float32: "float", torch.float64: "double"}
_products: dict[str, Product] = {}


class Places(NamedTuple):
    """Where edges begin and end."""

    neighbour: Tensor  # [edges]
    start: Tensor  # [atoms + 1] the first edge of each centre
    incoming: Tensor  # [atoms, most] edges by neighbour, then the number of edges


class CudaSurroundings(NamedTuple):
    """What the convolutions of all layers share."""

    harmonics: Tensor  # [edges, (l_max + 1)^2], times the neighbour's norm
    places: Places
    leaf: bool  # as in `Edges`


class CudaConvolution(Convolution):
    """The convolution in CUDA kernels of this package: the same bits every time, and no weights of edges are kept.

    Raises:
        InputError: harmonics beyond l = 4, which are more than a warp has lanes.
    """

    @staticmethod
    def can_be_made(l_max: int) -> bool:
        """Whether there is a compiler for these kernels, and harmonics are not beyond l = 4."""
        return (l_max + 1) ** 2 <= cuda_source.LANES and nvrtc.is_available()

    def __init__(self, irreps_in: Irreps, l_max: int, irreps_out: Irreps, dtype: torch.dtype) -> None:
        super().__init__(irreps_in, l_max, irreps_out, dtype)
        if (l_max + 1) ** 2 > cuda_source.LANES:
            raise InputError(f"kernels=cuda goes up to l_max 4, and l_max is {l_max}: use kernels=ddpkit")
        words = [
            [f"{mul}x{l}{'eo'[p < 0]}" for (l, p), mul in irreps.items()] for irreps in (irreps_in, self.irreps_out)
        ]
        self.key = f"{'+'.join(words[0])} x {l_max} -> {'+'.join(words[1])}"
        _products[self.key] = cuda_source.product_of(self.paths, irreps_in, self.irreps_out, l_max)

    @staticmethod
    def runs_on(device: torch.device) -> bool:
        """On NVIDIA GPUs alone."""
        return device.type in LAUNCH

    @classmethod
    def prepare(cls, layers: Sequence[Self], edges: Edges, norm: Tensor) -> CudaSurroundings:
        """Harmonics times norm, and where the edges of each atom begin."""
        del layers
        graph = edges.graph
        assert graph.incoming is not None
        ends = graph.outgoing.listed.sum(1).cumsum(0)
        start = torch.cat((ends.new_zeros(1), ends))
        # once for all layers, instead of the features of each
        harmonics = edges.harmonics * norm.index_select(0, graph.neighbour)
        return CudaSurroundings(harmonics, Places(graph.neighbour, start, graph.incoming.rows), edges.leaf)

    def forward(self, x: Features, hidden: Tensor, matrix: Tensor, shared: CudaSurroundings) -> Features:
        """Features of the neighbours -> features of the centres."""
        features = [x[a] for a in self.paths]
        parts = _Convolve.apply(self.key, shared.places, shared.leaf, *features, hidden, matrix, shared.harmonics)
        return dict(zip(self.irreps_out, parts, strict=True))


class _Convolve(torch.autograd.Function):
    """df/dg of `ddpkit.models.cuda_source`, with weights `hidden @ matrix`.

    Takes the features of each irrep `[atoms, components, channels]`, hidden, matrix and harmonics; returns the output of each
    irrep likewise.
    """

    @staticmethod
    def forward(ctx: Any, key: str, places: Places, leaf: bool, *factors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.key, ctx.places, ctx.leaf = key, places, leaf
        ctx.save_for_backward(*factors)
        return tuple(convolve(key, list(factors), list(places)))

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *others, y = ctx.saved_tensors
        last = len(others)
        by_matrix, by_y = (ctx.needs_input_grad[3 + n] and is_asked_for(ctx, n) for n in (last - 1, last))
        if ctx.leaf:
            y = y.detach()
        return None, None, None, *_Gradient.apply(ctx.key, ctx.places, by_matrix, by_y, len(g), *g, *others, y)


class _Gradient(torch.autograd.Function):
    """The derivatives of `_Convolve` by its factors, times g."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, key: str, places: Places, by_matrix: bool, by_y: bool, outputs: int, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.key, ctx.places, ctx.outputs = key, places, outputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        g, factors = _contiguous(tensors[:outputs]), list(tensors[outputs:])
        *rest, dmatrix, dy = gradient(key, g, factors, list(places), by_matrix, by_y)
        return *rest, dmatrix if by_matrix else None, dy if by_y else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *by: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        g, factors = ctx.saved_tensors[: ctx.outputs], list(ctx.saved_tensors[ctx.outputs :])
        *others, by_matrix, by_y = by
        if by_matrix is not None:
            raise NotImplementedError("kernels=cuda has no derivatives of gradients by the weights: use kernels=ddpkit")
        given = zip([*factors[:-2], factors[-1]], [*others, by_y], strict=True)
        tangents = [torch.zeros_like(v) if one is None else one.contiguous() for v, one in given]
        wants_y = ctx.needs_input_grad[-1]
        *rest, dy = second(ctx.key, _contiguous(g), factors, tangents, list(ctx.places), wants_y)
        return *[None] * 5, *rest, dy if wants_y else None


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.contiguous() for x in tensors]


@torch.library.custom_op("ddpkit::convolve", mutates_args=())
def convolve(key: str, factors: list[Tensor], places: list[Tensor]) -> list[Tensor]:
    """Of each irrep `[atoms, components, channels]` -> the same of the output.

    Args:
        key: of a `CudaConvolution`.
        factors: features of each irrep `[atoms, components, channels]`, hidden `[edges, width]`, matrix `[width, weights]`,
            harmonics `[edges, ...]`.
        places: as in `Places`.
    """
    *x, hidden, matrix, y = factors
    product, edges = _products[key], len(y)
    out = [y.new_zeros(shape) for shape in _shapes(product, len(places[1]) - 1)]
    for part in _parts(edges, product.weights):
        _launch("convolve", key, x, hidden[part] @ matrix, y, places, part, *out)
    return out


@torch.library.custom_op("ddpkit::convolve_gradient", mutates_args=())
def gradient(
    key: str, g: list[Tensor], factors: list[Tensor], places: list[Tensor], by_matrix: bool, by_y: bool
) -> list[Tensor]:
    """The derivatives of `convolve` by its factors, times g; of the last two those that are asked for."""
    *x, hidden, matrix, y = factors
    product, edges = _products[key], len(y)
    of_edges = y.new_empty((edges, product.features))
    dhidden, dmatrix = hidden.new_empty(hidden.shape), matrix.new_zeros(matrix.shape if by_matrix else 0)
    of_warps = y.new_empty((_warps(product) if by_y else 0, *y.shape))
    for part in _parts(edges, product.weights):
        weights = hidden[part] @ matrix
        by_weights = torch.empty_like(weights)
        name, more = ("gradient_y", [of_warps]) if by_y else ("gradient", [])
        _launch(name, key, x, weights, y, places, part, *g, of_edges, by_weights, *more)
        torch.mm(by_weights, matrix.T, out=dhidden[part])
        if by_matrix:
            dmatrix.addmm_(hidden[part].T, by_weights)
    dx = _collected(key, of_edges, x, places[2])
    return [*dx, dhidden, dmatrix, of_warps.sum(0) if by_y else y.new_empty(0)]


@torch.library.custom_op("ddpkit::convolve_second", mutates_args=())
def second(
    key: str, g: list[Tensor], factors: list[Tensor], tangents: list[Tensor], places: list[Tensor], by_y: bool
) -> list[Tensor]:
    """The derivatives by g and the factors of what `gradient` returns for features, hidden and harmonics, times tangents."""
    *x, hidden, matrix, y = factors
    *xt, hidden_t, yt = tangents
    product, edges = _products[key], len(y)
    dg = [torch.zeros_like(part) for part in g]
    of_edges = y.new_empty((edges, product.features))
    dhidden, dmatrix = hidden.new_empty(hidden.shape), matrix.new_zeros(matrix.shape)
    of_warps = y.new_empty((_warps(product) if by_y else 0, *y.shape))
    for part in _parts(edges, 2 * product.weights):
        weights, weights_t = hidden[part] @ matrix, hidden_t[part] @ matrix
        by_weights, by_weights_t = torch.empty_like(weights), torch.empty_like(weights)
        name, more = ("second_y", [of_warps]) if by_y else ("second", [])
        outputs = (*dg, of_edges, by_weights, by_weights_t, *more)
        _launch(name, key, x, weights, y, places, part, *g, *xt, weights_t, yt, *outputs)
        torch.mm(by_weights, matrix.T, out=dhidden[part])
        dmatrix.addmm_(hidden[part].T, by_weights).addmm_(hidden_t[part].T, by_weights_t)
    dx = _collected(key, of_edges, x, places[2])
    return [*dg, *dx, dhidden, dmatrix, of_warps.sum(0) if by_y else y.new_empty(0)]


@convolve.register_fake
def _(key: str, factors: list[Tensor], places: list[Tensor]) -> list[Tensor]:
    return [factors[0].new_empty(shape) for shape in _shapes(_products[key], places[2].shape[0])]


@gradient.register_fake
def _(
    key: str, g: list[Tensor], factors: list[Tensor], places: list[Tensor], by_matrix: bool, by_y: bool
) -> list[Tensor]:
    del key, g, places
    return _like(factors, by_matrix=by_matrix, by_y=by_y)


@second.register_fake
def _(
    key: str, g: list[Tensor], factors: list[Tensor], tangents: list[Tensor], places: list[Tensor], by_y: bool
) -> list[Tensor]:
    del key, tangents, places
    return [*(torch.empty_like(part) for part in g), *_like(factors, by_matrix=True, by_y=by_y)]


def _shapes(product: Product, atoms: int) -> list[tuple[int, int, int]]:
    """Of the output of each irrep."""
    return [(atoms, components, channels) for components, channels in product.outputs]


def _like(factors: list[Tensor], *, by_matrix: bool, by_y: bool) -> list[Tensor]:
    """Contiguous, as the kernels write them."""
    wanted = [True] * (len(factors) - 2) + [by_matrix, by_y]
    return [f.new_empty(f.shape if is_wanted else 0) for f, is_wanted in zip(factors, wanted, strict=True)]


_TRAINING = ("convolve", "gradient", "gradient_y", "second", "collect")


@lru_cache(maxsize=512)
def _text(key: str, name: str, real: str) -> str:
    return cuda_source.source(_products[key], name, real)


def _texts(real: str) -> list[str]:
    """What training calls of all convolutions of this process."""
    return [_text(key, name, real) for key in _products for name in _TRAINING]


def _warps(product: Product) -> int:
    return sum(cuda_source.warps(term) for term in product.terms)


@lru_cache(maxsize=512)
def _sizes(key: str, real: str) -> tuple[int, int, float]:
    """Warps of a block, and of an atom, and how many of those that take longest would be as much work as all of an atom's."""
    terms = _products[key].terms
    work = [cuda_source.warps(term) * term.width * term.components for term in terms]
    longest = max((term.width * term.components for term in terms), default=1)
    return cuda_source.warps_of_block(_products[key], real), _warps(_products[key]), sum(work) / longest


def _parts(edges: int, weights: int) -> Iterator[slice]:
    step = max(PART // max(weights, 1), 1)
    for begin in range(0, edges, step):
        yield slice(begin, min(begin + step, edges))


def _launch(
    name: str, key: str, x: list[Tensor], weights: Tensor, y: Tensor, places: list[Tensor], part: slice, *more: Tensor
) -> None:
    neighbour, start, incoming = places
    real, atoms = REAL[y.dtype], len(start) - 1
    warps, of_atom, work = _sizes(key, real)
    # Where one warp had all edges of the atom that has most, would it go on when all others are done?
    share = ROOM * incoming.shape[1] > work * (part.stop - part.start)
    grid = (atoms if share else -(-atoms // warps), of_atom)
    given = [*x, weights, y, neighbour, start, atoms, part.start, part.stop, len(neighbour), int(share), *more]
    arguments = [a.contiguous() if isinstance(a, Tensor) else a for a in given]  # what is written to is so already
    LAUNCH[y.device.type](_text(key, name, real), name, grid, 32 * warps, arguments, partial(_texts, real))


def _collected(key: str, of_edges: Tensor, x: list[Tensor], incoming: Tensor) -> list[Tensor]:
    """The sum over the edges of each neighbour, without the padded table that `ddpkit.models.graph.sum_rows` makes eagerly."""
    edges, (atoms, most) = len(of_edges), incoming.shape
    if not (atoms and edges):
        return [part.new_zeros(part.shape) for part in x]
    out = [part.new_empty(part.shape) for part in x]
    grid = (atoms, cuda_source.blocks_of_columns(_products[key]))
    text = _text(key, "collect", REAL[of_edges.dtype])
    arguments = [of_edges, incoming.contiguous(), most, edges, *out]
    LAUNCH[of_edges.device.type](text, "collect", grid, cuda_source.COLUMNS, arguments)
    return out
