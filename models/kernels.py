"""Convolutions of NequIP computed by other packages: e3nn, the reference, and OpenEquivariance, CUDA kernels.

Both take features in e3nn's flat layout, so they are slower around the edges than `ddpkit.models.nequip.Convolution`;
OpenEquivariance keeps nothing of the size of edges times paths.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from e3nn import o3
from torch import Tensor

from ddpkit.errors import InputError
from ddpkit.models.graph import Graph, at_neighbour, sum_to_centre
from ddpkit.models.irreps import Features, Irrep, Irreps, Paths


class FlatConvolution(torch.nn.Module):
    """The sum over neighbours of the weighted tensor product of their features with the harmonics of the edge.

    Args:
        irreps_in: of the features.
        l_max: of the harmonics.
        paths: for each irrep of the features, where its products go.
        irreps_out: of the result.
        dtype: of features and weights.
    """

    def __init__(
        self, irreps_in: Irreps, l_max: int, paths: dict[Irrep, Paths], irreps_out: Irreps, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.irreps_in = list(irreps_in)
        self.irreps_out = irreps_out
        order = [(c, a, l) for c in irreps_out for a in paths for l, d in paths[a] if d == c]
        instructions = [
            (self.irreps_in.index(a), l, order.index((c, a, l)), "uvu", True) for a in paths for l, c in paths[a]
        ]
        self._build(
            o3.Irreps([(mul, ir) for ir, mul in irreps_in.items()]),
            o3.Irreps.spherical_harmonics(l_max),
            o3.Irreps([(irreps_in[a], c) for c, a, _ in order]),
            instructions,
            dtype,
        )

    @abstractmethod
    def _build(self, features: Any, harmonics: Any, out: Any, instructions: list[Any], dtype: torch.dtype) -> None:
        """Makes the tensor product."""

    @abstractmethod
    def _compute(self, x: Tensor, harmonics: Tensor, weights: Tensor, graph: Graph, by_neighbour: Tensor) -> Tensor:
        """`[atoms, irreps]` of the neighbours -> `[atoms, irreps]` of the centres."""

    def forward(
        self,
        x: Features,
        weights: Tensor,
        norm: Tensor,
        harmonics: Tensor,
        graph: Graph,
        by_neighbour: Tensor,
    ) -> Features:
        """Features of the neighbours -> features of the centres.

        Args:
            x: features.
            weights: `[edges, sum of paths * channels]`, by irrep, then path.
            norm: `[atoms, 1]`, multiplies the features.
            harmonics: `[edges, (l_max + 1)^2]`.
            graph: the edges.
            by_neighbour: `[edges]`, the edges sorted by neighbour (`order_by_neighbour`).
        """
        flat = torch.cat([x[ir].transpose(1, 2).flatten(1) for ir in self.irreps_in], 1) * norm
        out = self._compute(flat, harmonics, weights, graph, by_neighbour)
        sizes = [mul * (2 * ir[0] + 1) for ir, mul in self.irreps_out.items()]
        return {
            ir: block.reshape(-1, mul, 2 * ir[0] + 1).transpose(1, 2)
            for (ir, mul), block in zip(self.irreps_out.items(), out.split(sizes, 1), strict=True)
        }


class E3nnConvolution(FlatConvolution):
    """The convolution as e3nn computes it: a message for every edge, then their sum."""

    def _build(self, features: Any, harmonics: Any, out: Any, instructions: list[Any], dtype: torch.dtype) -> None:
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # e3nn's constants take it
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

    def _build(self, features: Any, harmonics: Any, out: Any, instructions: list[Any], dtype: torch.dtype) -> None:
        if not torch.cuda.is_available():
            raise InputError("kernels=openequivariance needs an NVIDIA GPU: leave kernels out to compute on a CPU")
        try:
            import openequivariance as oeq
        except ImportError as error:
            raise InputError("kernels=openequivariance needs that package: pip install openequivariance") from error
        kind = oeq.torch_to_oeq_dtype(dtype)
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


KERNELS: dict[str, Callable[..., FlatConvolution]] = {
    "e3nn": E3nnConvolution,
    "openequivariance": OpenEquivarianceConvolution,
}
