"""The parts of NequIP's interaction layer: linear maps, self-connection, gate, and the layer itself."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from e3nn.math import normalize2mom
from torch import Tensor

from ddpkit.inference.exchange import from_owners
from ddpkit.models import reference
from ddpkit.models.convolution import Convolution
from ddpkit.models.graph import Graph, algorithms, is_literal, pad_rows, unpad_rows
from ddpkit.models.irreps import Features, Irrep, Irreps, product_irreps
from ddpkit.models.kernels import Kernels
from ddpkit.models.mlp import MLP, silu

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

    @property
    def width(self) -> int:
        """Numbers of an atom in the features it returns."""
        return sum((2 * ir[0] + 1) * b for ir, (_, b) in zip(self.irreps, self.shapes, strict=True))

    def forward(self, x: Features) -> Features:
        """Features -> features."""
        blocks = (self.weight * self.scale).split([a * b for a, b in self.shapes])
        return {
            ir: x[ir] @ block.reshape(shape) for ir, shape, block in zip(self.irreps, self.shapes, blocks, strict=True)
        }


def features_with_ghosts(x: Features, graph: Graph) -> Features:
    """Features of a rank's atoms -> those of its ghosts too, from the ranks that own them."""
    if graph.everyone is None:
        return x
    flat = from_owners(torch.cat([part.flatten(1) for part in x.values()], 1), graph.everyone)
    parts = flat.split([part.shape[1] * part.shape[2] for part in x.values()], 1)
    return {ir: rows.unflatten(1, part.shape[1:]) for (ir, part), rows in zip(x.items(), parts, strict=True)}


class Groups(NamedTuple):
    """Atoms in blocks of one species each."""

    one_hot: Tensor  # [atoms, species]
    atoms: Tensor  # [blocks, GROUP] atoms, padded with the number of atoms
    slot: Tensor  # [atoms] where in the flattened `atoms` an atom stands
    present: Tensor  # [present] species that have blocks
    species: Tensor  # [blocks] place in `present`


def groups_of(one_hot: Tensor) -> Groups:
    """Blocks of atoms of one species.

    There are as many as are needed, or (without `Algorithms.exact_tables`) as the numbers of atoms and species allow.

    Args:
        one_hot: `[atoms, species]`.
    """
    exact = algorithms(one_hot.device).exact_tables
    present = torch.arange(one_hot.shape[1], device=one_hot.device)
    if exact:
        present = one_hot.any(0).nonzero().squeeze(1)
    member = one_hot.index_select(1, present).to(torch.int64)
    atoms, species = member.shape
    seen = member.cumsum(0)
    last = ((member.sum(0) + GROUP - 1) // GROUP).cumsum(0)
    first = torch.cat((last.new_zeros(1), last[:-1]))
    slot = ((first * GROUP + seen - 1) * member).sum(1)
    # of the atoms, and one begun of each species; in one fraction, since a compiler must see that it divides the table's size
    blocks = int(last[-1]) if exact else (atoms + GROUP - 1 + GROUP * species) // GROUP
    table = slot.new_full((blocks * GROUP,), atoms).scatter(0, slot, torch.arange(atoms, device=slot.device))
    number = torch.arange(blocks, device=slot.device)
    of_block = (number.unsqueeze(1) >= last).sum(1).clamp(max=species - 1)
    return Groups(one_hot, table.reshape(blocks, GROUP), slot, present, of_block)


class SelfConnection(torch.nn.Module):
    """Mixes the channels of each irrep with weights that depend linearly on the embedding of the atom's species.

    Weights and embeddings of the species are contracted first, so that the cost for atoms does not depend on the
    embedding's width; atoms are then multiplied in blocks of one species.
    """

    def __init__(self, irreps_in: Irreps, embed_dim: int, irreps_out: Irreps, dtype: torch.dtype) -> None:
        super().__init__()
        self.irreps = [ir for ir in irreps_in if ir in irreps_out]
        self.shapes = [(irreps_in[ir], irreps_out[ir]) for ir in self.irreps]
        self.weight = torch.nn.Parameter(torch.randn(embed_dim, sum(a * b for a, b in self.shapes), dtype=dtype))

    def forward(self, x: Features, embedding: Tensor, groups: Groups) -> Features:
        """Features -> features.

        Args:
            x: features.
            embedding: `[species, embed_dim]`.
            groups: the atoms by species.
        """
        if is_literal():
            return reference.self_connection(self, x, groups.one_hot @ embedding)
        per_species = embedding.index_select(0, groups.present) @ self.weight
        matrices = per_species.index_select(0, groups.species).split([a * b for a, b in self.shapes], 1)
        out = {}
        # each irrep by itself: side by side, they would be copied once more before they are multiplied
        for ir, (a, b), matrix in zip(self.irreps, self.shapes, matrices, strict=True):
            rows = pad_rows(x[ir] * (1 / math.sqrt(a * self.weight.shape[0])), groups.slot, groups.atoms)
            products = torch.bmm(rows.reshape(-1, GROUP * (2 * ir[0] + 1), a), matrix.reshape(-1, a, b))
            out[ir] = unpad_rows(products.reshape(-1, GROUP, 2 * ir[0] + 1, b), groups.slot, groups.atoms)
        return out


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
    """An interaction layer: one convolution with its self-connection and gate (S. Batzner et al., Methods, Interaction block).

    Args:
        irreps_in: features of the last layer.
        irreps_out: features wanted; those that no path leads to are left out.
        embed_dim: width of the species' embedding.
        radial_dims: widths of the radial MLP up to its last hidden layer.
        kernels: makes the convolution.
        self_connection: whether the layer has one.

    Attributes:
        convolution: the kernel that runs on every device.
        kernel: the chosen kernel.
    """

    def __init__(
        self,
        irreps_in: Irreps,
        irreps_out: Irreps,
        embed_dim: int,
        radial_dims: Sequence[int],
        kernels: Kernels,
        *,
        self_connection: bool,
    ) -> None:
        super().__init__()
        dtype = kernels.dtype
        reached = {c for a in irreps_in for l in range(kernels.l_max + 1) for c in product_irreps(a, (l, (-1) ** l))}
        self.irreps_out = {ir: mul for ir, mul in irreps_out.items() if ir in reached}
        self.gate = Gate(self.irreps_out, (0, 1) if (0, 1) in reached else (0, -1))
        conv_out = self.gate.irreps_in
        self.linear_in = Linear(irreps_in, irreps_in, dtype)
        kernel, self.convolution = kernels.make(irreps_in, conv_out)
        self.radial = MLP([*radial_dims, sum(self.convolution.sizes)], "silu", dtype=dtype)
        self.linear_out = Linear(self.convolution.irreps_out, conv_out, dtype)
        self.self_connection = SelfConnection(irreps_in, embed_dim, conv_out, dtype) if self_connection else None
        self.kernel = kernel  # last, as its state in checkpoints

    def forward(
        self,
        x: Features,
        mixed: Features,
        radial: Tensor,
        kernel: Convolution,
        shared: Any,
        embedding: Tensor,
        groups: Groups,
    ) -> Features:
        """Features -> features.

        Args:
            x: features of the centres.
            mixed: `linear_in(x)`, of the neighbours.
            radial: `[edges, bessels]`.
            kernel: computes the convolution.
            shared: what the kernels prepared for all layers.
            embedding: of the species.
            groups: the atoms by species.
        """
        matrices = self.radial.matrices()
        hidden = self.radial.hidden(radial, matrices)
        out = self.linear_out(kernel(mixed, hidden, matrices[-1], shared))
        if self.self_connection is not None:
            for ir, value in self.self_connection(x, embedding, groups).items():
                out[ir] = out[ir] + value
        return self.gate(out)
