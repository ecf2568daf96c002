"""The kernels of NequIP's convolution: those of other packages, and the choice between all of them.

Those of other packages (e3nn, and the CUDA kernels of OpenEquivariance) take features in e3nn's flat layout, so they are slower
around the edges than `BlockConvolution`. OpenEquivariance keeps nothing of the size of edges times paths.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from e3nn import o3
from torch import Tensor

from ddpkit.errors import InputError
from ddpkit.models.convolution import BlockConvolution, Convolution
from ddpkit.models.cuda_convolution import CudaConvolution
from ddpkit.models.graph import Graph, at_neighbour, sum_to_centre
from ddpkit.models.irreps import Features, Irreps
from ddpkit.models.potential import Edges


class FlatSurroundings(NamedTuple):
    """What the convolutions of all layers share."""

    norm: Tensor  # [atoms, 1]
    harmonics: Tensor  # [edges, (l_max + 1)^2]
    graph: Graph
    by_neighbour: Tensor  # [edges], the edges sorted by neighbour


class FlatConvolution(Convolution):
    """A kernel of another package, with features in e3nn's flat layout. Subclasses make the tensor product and apply it."""

    def __init__(self, irreps_in: Irreps, l_max: int, irreps_out: Irreps, dtype: torch.dtype) -> None:
        super().__init__(irreps_in, l_max, irreps_out, dtype)
        inputs = list(irreps_in)
        order = [(c, a, l) for c in self.irreps_out for a in self.paths for l, d in self.paths[a] if d == c]
        self._build(
            o3.Irreps([(mul, ir) for ir, mul in irreps_in.items()]),
            o3.Irreps.spherical_harmonics(l_max),
            o3.Irreps([(irreps_in[a], c) for c, a, _ in order]),
            [(inputs.index(a), l, order.index((c, a, l)), "uvu", True) for a in self.paths for l, c in self.paths[a]],
        )

    @abstractmethod
    def _build(self, features: Any, harmonics: Any, out: Any, instructions: list[Any]) -> None:
        """Makes the tensor product of e3nn's irreps `features` and `harmonics`, by e3nn's instructions."""

    @abstractmethod
    def _compute(self, x: Tensor, harmonics: Tensor, weights: Tensor, graph: Graph, by_neighbour: Tensor) -> Tensor:
        """`[atoms, irreps]` of the neighbours -> `[atoms, irreps]` of the centres."""

    @classmethod
    def prepare(cls, layers: Sequence[Self], edges: Edges, norm: Tensor) -> FlatSurroundings:
        """Harmonics, graph, and the order of its transpose."""
        del layers
        return FlatSurroundings(norm, edges.harmonics, edges.graph, order_by_neighbour(edges.graph)[0])

    def forward(self, x: Features, hidden: Tensor, matrix: Tensor, shared: FlatSurroundings) -> Features:
        """Features of the neighbours -> features of the centres."""
        norm, harmonics, graph, by_neighbour = shared
        flat = torch.cat([x[ir].transpose(1, 2).flatten(1) for ir in self.irreps_in], 1) * norm
        out = self._compute(flat, harmonics, hidden @ matrix, graph, by_neighbour)
        sizes = [mul * (2 * ir[0] + 1) for ir, mul in self.irreps_out.items()]
        return {
            ir: block.reshape(-1, mul, 2 * ir[0] + 1).transpose(1, 2)
            for (ir, mul), block in zip(self.irreps_out.items(), out.split(sizes, 1), strict=True)
        }


class E3nnConvolution(FlatConvolution):
    """The convolution as e3nn computes it: a message for every edge, then their sum."""

    def _build(self, features: Any, harmonics: Any, out: Any, instructions: list[Any]) -> None:
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)  # e3nn's constants take it
        try:
            with torch.device("cpu"):
                self.product = o3.TensorProduct(
                    features, harmonics, out, instructions, shared_weights=False, internal_weights=False
                )
        finally:
            torch.set_default_dtype(default)

    def _compute(self, x: Tensor, harmonics: Tensor, weights: Tensor, graph: Graph, by_neighbour: Tensor) -> Tensor:
        del by_neighbour
        return sum_to_centre(self.product(at_neighbour(x, graph), harmonics, weights), graph)


class OpenEquivarianceConvolution(FlatConvolution):
    """The convolution in CUDA kernels of the package `openequivariance` (V. Bharadwaj et al., arXiv 2501.13986).

    Its deterministic kernels: they add the edges of an atom before they write, where the others add every edge to memory. They
    read the transpose of the graph off the graph itself, which must therefore be symmetric, with edges sorted by centre, then
    neighbour, as `collate` makes them (`order_by_neighbour`).
    """

    @staticmethod
    def runs_on(device: torch.device) -> bool:
        """On NVIDIA GPUs alone."""
        return device.type == "cuda"

    @classmethod
    def prepare(cls, layers: Sequence[Self], edges: Edges, norm: Tensor) -> FlatSurroundings:
        """As every flat kernel, but NaN where the graph is not symmetric: the kernels would silently compute something else."""
        del layers
        order, is_symmetric = order_by_neighbour(edges.graph)
        return FlatSurroundings(norm.where(is_symmetric, math.nan), edges.harmonics, edges.graph, order)

    def _build(self, features: Any, harmonics: Any, out: Any, instructions: list[Any]) -> None:
        if not torch.cuda.is_available():
            raise InputError("kernels=openequivariance needs an NVIDIA GPU: leave kernels out to compute on a CPU")
        try:
            import openequivariance as oeq
        except ImportError as error:
            raise InputError("kernels=openequivariance needs that package: pip install openequivariance") from error
        kind = oeq.torch_to_oeq_dtype(self.dtype)
        problem = oeq.TPProblem(
            features,
            harmonics,
            out,
            instructions,
            irrep_dtype=kind,
            weight_dtype=kind,
            shared_weights=False,
            internal_weights=False,
        )
        try:
            self.product = oeq.TensorProductConv(problem, torch_op=True, deterministic=True)
            self.product.ddpkit_scratch = ("workspace_buffer",)
        except ImportError as error:  # what the package raises where its extension was not built
            raise InputError(
                f"openequivariance could not build its extension ({str(error).splitlines()[0]}): it needs nvcc and a C++ compiler"
            ) from error
        except Exception as error:
            why = " ".join(str(error).split())[:200]
            raise InputError(
                f"openequivariance cannot make its kernels for this model on this GPU ({torch.cuda.get_device_name()}: {why}): "
                "use kernels=ddpkit"
            ) from error

    def _compute(self, x: Tensor, harmonics: Tensor, weights: Tensor, graph: Graph, by_neighbour: Tensor) -> Tensor:
        out: Tensor = self.product(x, harmonics, weights, graph.centre, graph.neighbour, by_neighbour)
        return out


def order_by_neighbour(graph: Graph) -> tuple[Tensor, Tensor]:
    """The edges sorted by neighbour `[edges]`, and whether these are the edges' ends exchanged, one by one `[]`."""
    order = torch.argsort(graph.neighbour, stable=True)
    turned = graph.centre.index_select(0, order) == graph.neighbour
    return order, (turned & (graph.neighbour.index_select(0, order) == graph.centre)).all()


KERNELS: dict[str, type[Convolution]] = {
    "ddpkit": BlockConvolution,
    "cuda": CudaConvolution,
    "e3nn": E3nnConvolution,
    "openequivariance": OpenEquivarianceConvolution,
}


def fastest(l_max: int) -> str:
    """The key of the kernels that are fastest on GPUs, of those that can be made here."""
    return "cuda" if CudaConvolution.can_be_made(l_max) else "ddpkit"


class Kernels:
    """Makes the kernels of a model's layers. Layers that are alike share one, and its memory.

    Args:
        name: key of `KERNELS`, or "auto" for the `fastest`.
        l_max: of the harmonics.
        dtype: of features and weights.

    Attributes:
        name: key of `KERNELS`.

    Raises:
        InputError: no kernel has this name.
    """

    def __init__(self, name: str, l_max: int, dtype: torch.dtype) -> None:
        if name not in ("auto", *KERNELS):
            raise InputError(f"kernels {name!r} is unknown: choose one of auto, {', '.join(KERNELS)}")
        self.name, self.l_max, self.dtype = fastest(l_max) if name == "auto" else name, l_max, dtype
        self._made: dict[Any, Convolution] = {}

    def make(self, irreps_in: Irreps, irreps_out: Irreps) -> tuple[Convolution, Convolution]:
        """The chosen kernel, and the one that runs on every device, which may be the same.

        Raises:
            InputError: the chosen kernel cannot be made here.
        """
        everywhere = self._make(BlockConvolution, irreps_in, irreps_out)
        return self._make(KERNELS[self.name], irreps_in, irreps_out), everywhere

    def _make(self, kind: type[Convolution], irreps_in: Irreps, irreps_out: Irreps) -> Convolution:
        key = kind, tuple(irreps_in.items()), tuple(irreps_out.items())
        if key not in self._made:
            self._made[key] = kind(irreps_in, self.l_max, irreps_out, self.dtype)
        return self._made[key]


def kernels_on(device: torch.device, made: Sequence[tuple[Convolution, Convolution]]) -> list[Convolution]:
    """The kernels that compute on a device: the chosen ones where they run, else those that run on every device.

    Args:
        device: of the batch.
        made: of each layer, what `Kernels.make` returned.
    """
    return [chosen if chosen.runs_on(device) else everywhere for chosen, everywhere in made]
