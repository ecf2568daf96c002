"""The convolution of NequIP in CUDA kernels that are written out for its irreps (`ddpkit.models.cuda_source`).

Weights of edges (`hidden @ matrix`, 3,616 numbers an edge in `nequip_xl`) are computed for a part of the edges at a time, and
again for each derivative: no array has the size of edges times paths.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
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

LAUNCH: dict[str, Callable[..., None]] = {"cuda": nvrtc.launch}
"""By the type of a device, what launches a kernel there."""

REAL = {torch.float32: "float", torch.float64: "double"}
_products: dict[str, Product] = {}


class Places(NamedTuple):
    """Where edges begin and end."""

    neighbour: Tensor  # [edges]
    start: Tensor  # [atoms + 1] the first edge of each centre
    incoming: Tensor  # [atoms, most] edges by neighbour, padded with the number of edges


class CudaSurroundings(NamedTuple):
    """What the convolutions of all layers share."""

    norm: Tensor  # [atoms, 1]
    harmonics: Tensor  # [edges, (l_max + 1)^2]
    places: Places
    leaf: bool  # as in `Edges`


class CudaConvolution(Convolution):
    """The convolution in CUDA kernels of this package: the same bits every time, and nothing of the size of edges times paths.

    Raises:
        InputError: harmonics beyond l = 4, which are more than a warp has lanes.
    """

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
        """Harmonics, and where the edges of each atom begin."""
        del layers
        graph = edges.graph
        assert graph.incoming is not None
        ends = graph.outgoing.listed.sum(1).cumsum(0)
        start = torch.cat((ends.new_zeros(1), ends))
        return CudaSurroundings(norm, edges.harmonics, Places(graph.neighbour, start, graph.incoming.rows), edges.leaf)

    def forward(self, x: Features, hidden: Tensor, matrix: Tensor, shared: CudaSurroundings) -> Features:
        """Features of the neighbours -> features of the centres."""
        flat = torch.cat([x[a].flatten(1) for a in self.paths], 1) * shared.norm
        out = _Convolve.apply(self.key, shared.places, shared.leaf, flat, hidden, matrix, shared.harmonics)
        pieces = out.split([mul * (2 * c[0] + 1) for c, mul in self.irreps_out.items()], 1)
        return {
            c: piece.reshape(-1, 2 * c[0] + 1, mul)
            for (c, mul), piece in zip(self.irreps_out.items(), pieces, strict=True)
        }


class _Convolve(torch.autograd.Function):
    """df/dg of `ddpkit.models.cuda_source`, with weights `hidden @ matrix`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, key: str, places: Places, leaf: bool, x: Tensor, hidden: Tensor, matrix: Tensor, y: Tensor
    ) -> Tensor:
        ctx.key, ctx.places, ctx.leaf = key, places, leaf
        ctx.save_for_backward(x, hidden, matrix, y)
        out: Tensor = convolve(key, x, hidden, matrix, y, *places)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, hidden, matrix, y = ctx.saved_tensors
        by_matrix, by_y = (ctx.needs_input_grad[3 + n] and is_asked_for(ctx, n) for n in (2, 3))
        if ctx.leaf:
            y = y.detach()
        return None, None, None, *_Gradient.apply(ctx.key, ctx.places, by_matrix, by_y, g, x, hidden, matrix, y)


class _Gradient(torch.autograd.Function):
    """The derivatives of `_Convolve` by its four factors, times g."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        key: str,
        places: Places,
        by_matrix: bool,
        by_y: bool,
        g: Tensor,
        x: Tensor,
        hidden: Tensor,
        matrix: Tensor,
        y: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.key, ctx.places = key, places
        ctx.save_for_backward(g, x, hidden, matrix, y)
        ctx.set_materialize_grads(False)
        dx, dhidden, dmatrix, dy = gradient(key, g.contiguous(), x, hidden, matrix, y, *places, by_matrix, by_y)
        return dx, dhidden, dmatrix if by_matrix else None, dy if by_y else None

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, by_x: Tensor | None, by_hidden: Tensor | None, by_matrix: Tensor | None, by_y: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        g, x, hidden, matrix, y = ctx.saved_tensors
        if by_matrix is not None:
            raise NotImplementedError("kernels=cuda has no derivatives of gradients by the weights: use kernels=ddpkit")
        tangents = [
            torch.zeros_like(v) if by is None else by.contiguous()
            for v, by in ((x, by_x), (hidden, by_hidden), (y, by_y))
        ]
        wants_y = ctx.needs_input_grad[8]
        dg, dx, dhidden, dmatrix, dy = second(
            ctx.key, g.contiguous(), x, hidden, matrix, y, *tangents, *ctx.places, wants_y
        )
        return None, None, None, None, dg, dx, dhidden, dmatrix, dy if wants_y else None


@torch.library.custom_op("ddpkit::convolve", mutates_args=())
def convolve(
    key: str, x: Tensor, hidden: Tensor, matrix: Tensor, y: Tensor, neighbour: Tensor, start: Tensor, incoming: Tensor
) -> Tensor:
    """`[atoms, features]` -> `[atoms, outputs]`."""
    del incoming
    product = _products[key]
    out = x.new_zeros((len(start) - 1, product.outputs))
    for begin, end in _parts(len(neighbour), product.weights):
        weights = hidden[begin:end] @ matrix
        _launch("convolve", key, x, weights, y, neighbour, start, begin, end, out)
    return out


@torch.library.custom_op("ddpkit::convolve_gradient", mutates_args=())
def gradient(
    key: str,
    g: Tensor,
    x: Tensor,
    hidden: Tensor,
    matrix: Tensor,
    y: Tensor,
    neighbour: Tensor,
    start: Tensor,
    incoming: Tensor,
    by_matrix: bool,
    by_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The derivatives by x, hidden, matrix and y, times g; of the last two those that are asked for."""
    product, edges = _products[key], len(neighbour)
    of_edges = x.new_empty((edges, product.features))
    dhidden, dmatrix = torch.empty_like(hidden), matrix.new_zeros(matrix.shape if by_matrix else 0)
    parts_of_y = y.new_empty((_warps(product) if by_y else 0, *y.shape))
    for begin, end in _parts(edges, product.weights):
        rows = hidden[begin:end]
        weights = rows @ matrix
        by_weights = torch.empty_like(weights)
        outputs = (g, of_edges, by_weights, *([parts_of_y] if by_y else []))
        name = "gradient_y" if by_y else "gradient"
        _launch(name, key, x, weights, y, neighbour, start, begin, end, *outputs)
        torch.mm(by_weights, matrix.T, out=dhidden[begin:end])
        if by_matrix:
            dmatrix.addmm_(rows.T, by_weights)
    return _collected(key, of_edges, incoming), dhidden, dmatrix, parts_of_y.sum(0) if by_y else y.new_empty(0)


@torch.library.custom_op("ddpkit::convolve_second", mutates_args=())
def second(
    key: str,
    g: Tensor,
    x: Tensor,
    hidden: Tensor,
    matrix: Tensor,
    y: Tensor,
    xt: Tensor,
    hidden_t: Tensor,
    yt: Tensor,
    neighbour: Tensor,
    start: Tensor,
    incoming: Tensor,
    by_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The derivatives by g, x, hidden, matrix and y of what `gradient` returns for x, hidden and y, times xt, hidden_t and yt."""
    product, edges = _products[key], len(neighbour)
    dg = torch.zeros_like(g)
    of_edges = x.new_empty((edges, product.features))
    dhidden, dmatrix = torch.empty_like(hidden), torch.zeros_like(matrix)
    parts_of_y = y.new_empty((_warps(product) if by_y else 0, *y.shape))
    for begin, end in _parts(edges, 2 * product.weights):
        rows, rows_t = hidden[begin:end], hidden_t[begin:end]
        weights, weights_t = rows @ matrix, rows_t @ matrix
        by_weights, by_weights_t = torch.empty_like(weights), torch.empty_like(weights)
        outputs = (g, xt, weights_t, yt, dg, of_edges, by_weights, by_weights_t, *([parts_of_y] if by_y else []))
        name = "second_y" if by_y else "second"
        _launch(name, key, x, weights, y, neighbour, start, begin, end, *outputs)
        torch.mm(by_weights, matrix.T, out=dhidden[begin:end])
        dmatrix.addmm_(rows.T, by_weights).addmm_(rows_t.T, by_weights_t)
    dy = parts_of_y.sum(0) if by_y else y.new_empty(0)
    return dg, _collected(key, of_edges, incoming), dhidden, dmatrix, dy


@convolve.register_fake
def _(
    key: str, x: Tensor, hidden: Tensor, matrix: Tensor, y: Tensor, neighbour: Tensor, start: Tensor, incoming: Tensor
) -> Tensor:
    del hidden, matrix, y, neighbour, start
    return x.new_empty((incoming.shape[0], _products[key].outputs))


@gradient.register_fake
def _(
    key: str,
    g: Tensor,
    x: Tensor,
    hidden: Tensor,
    matrix: Tensor,
    y: Tensor,
    neighbour: Tensor,
    start: Tensor,
    incoming: Tensor,
    by_matrix: bool,
    by_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del key, g, neighbour, start, incoming
    dmatrix = torch.empty_like(matrix) if by_matrix else matrix.new_empty(0)
    return torch.empty_like(x), torch.empty_like(hidden), dmatrix, torch.empty_like(y) if by_y else y.new_empty(0)


@second.register_fake
def _(
    key: str,
    g: Tensor,
    x: Tensor,
    hidden: Tensor,
    matrix: Tensor,
    y: Tensor,
    xt: Tensor,
    hidden_t: Tensor,
    yt: Tensor,
    neighbour: Tensor,
    start: Tensor,
    incoming: Tensor,
    by_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    del key, xt, hidden_t, yt, neighbour, start, incoming
    dy = torch.empty_like(y) if by_y else y.new_empty(0)
    return torch.empty_like(g), torch.empty_like(x), torch.empty_like(hidden), torch.empty_like(matrix), dy


@lru_cache(maxsize=64)
def _text(key: str, real: str) -> str:
    return cuda_source.source(_products[key], real)


def _warps(product: Product) -> int:
    return sum(cuda_source.warps(term) for term in product.terms)


def _parts(edges: int, weights: int) -> Iterator[tuple[int, int]]:
    step = max(PART // max(weights, 1), 1)
    for begin in range(0, edges, step):
        yield begin, min(begin + step, edges)


def _launch(
    name: str,
    key: str,
    x: Tensor,
    weights: Tensor,
    y: Tensor,
    neighbour: Tensor,
    start: Tensor,
    begin: int,
    end: int,
    *more: Tensor,
) -> None:
    real, atoms = REAL[x.dtype], len(start) - 1
    warps = cuda_source.WARPS[real]
    grid = (-(-atoms // warps), _warps(_products[key]))
    arguments = [x, weights, y, neighbour, start, atoms, begin, end, len(neighbour), *more]
    LAUNCH[x.device.type](_text(key, real), name, grid, 32 * warps, arguments)


def _collected(key: str, of_edges: Tensor, incoming: Tensor) -> Tensor:
    """The sum over the edges of each neighbour."""
    edges, width = of_edges.shape
    atoms, most = incoming.shape
    out = of_edges.new_empty((atoms, width))
    grid = (atoms, -(-width // 256))
    if atoms and edges:
        text = _text(key, REAL[of_edges.dtype])
        LAUNCH[of_edges.device.type](text, "collect", grid, 256, [of_edges, incoming, most, edges, width, out])
    return out if edges else out.zero_()
