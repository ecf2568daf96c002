"""What Allegro and NequIP share: from edge vectors to energies, forces and stress."""

import copy
from abc import abstractmethod
from contextlib import nullcontext
from typing import NamedTuple

import torch
from ase.data import atomic_numbers
from torch import Tensor

from ddpkit.batch import Batch
from ddpkit.frames import stress_of, sum_over_frames
from ddpkit.models.config import PotentialConfig
from ddpkit.models.geometry import RadialBasis, SphericalHarmonics, cutoff_derivative, polynomial_cutoff
from ddpkit.models.graph import (
    LITERAL,
    Graph,
    at_centre,
    at_neighbour,
    computing_by,
    graph_of,
    sum_to_centre,
    sum_to_neighbour,
    without_ghosts,
)
from ddpkit.models.local import Local


class Edges(NamedTuple):
    """A batch as the layers of a model see it."""

    graph: Graph
    species: Tensor  # [atoms, species] one-hot
    radial: Tensor  # [edges, bessels], zero from the cutoff on
    harmonics: Tensor  # [edges, (l_max + 1)^2]
    leaf: bool  # edge vectors are a leaf of autograd's graph: nobody asks for second derivatives by them


class Potential(torch.nn.Module):
    """A model of atomic energies that depend on edge vectors, with forces and stress as their derivatives.

    Subclasses implement `atomic_energies`, and say in `message_passing` whether features of neighbours enter it.

    Args:
        config: what all potentials are configured by.
    """

    charges: Tensor
    screening: Tensor
    is_reference = False
    message_passing = False
    kernels: str = "ddpkit"
    inverse_cutoffs: Tensor
    inverse_sqrt_neighbors: Tensor
    shifts: Tensor
    scales: Tensor

    def __init__(self, config: PotentialConfig) -> None:
        super().__init__()
        self.species = tuple(config.species)
        self.r_max = float(config.r_max)
        self.precision, self.dtype, self.geometry_dtype = config.precision, config.dtype, config.geometry_dtype
        self.polynomial_cutoff_p = float(config.polynomial_cutoff_p)
        cutoffs = config.pair_cutoffs()
        self.register_buffer("inverse_cutoffs", None if cutoffs is None else cutoffs.reciprocal())
        self.spherical_harmonics = SphericalHarmonics(config.l_max, self.geometry_dtype)
        self.radial_basis = RadialBasis(config.num_bessels, config.bessel_trainable, self.geometry_dtype)
        neighbors = config.per_species("avg_num_neighbors")
        self.register_buffer("inverse_sqrt_neighbors", neighbors.rsqrt().to(self.dtype))
        for name, trainable in (("shifts", config.shifts_trainable), ("scales", config.scales_trainable)):
            constant = config.per_species(name)
            if trainable:
                self.register_parameter(name, torch.nn.Parameter(constant))
            else:
                self.register_buffer(name, constant)
        self.zbl = bool(config.nuclei)
        self.zbl_cutoff_p = float(config.zbl_cutoff_p)
        if self.zbl:
            numbers = [atomic_numbers[name] for name in config.nuclei]
            charges = torch.tensor(numbers, dtype=self.geometry_dtype, device="cpu")
            self.register_buffer("charges", charges, persistent=False)
            screening = torch.tensor(SCREENING, dtype=self.geometry_dtype, device="cpu")
            self.register_buffer("screening", screening, persistent=False)

    def with_reference_kernels(self) -> "Potential":
        """A copy that computes the same literally, in float64 (`ddpkit.models.reference`); its parameters have the same names."""
        copied = copy.deepcopy(self, self.reference_kernels()).to(torch.float64)
        copied.dtype = copied.geometry_dtype = torch.float64
        copied.is_reference = True
        return copied

    def reference_kernels(self) -> dict[int, torch.nn.Module]:
        """For the `memo` of `copy.deepcopy`: by the id of a module, the reference that replaces it in the copy."""
        return {}

    @abstractmethod
    def atomic_energies(self, edges: Edges) -> Tensor:
        """`[atoms]` energies in units of the species' scales, before shifts."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Energies `[frames]` in eV, forces `[atoms, 3]` in eV/Å and stress in eV/Å^3.

        There is a stress `[frames, 3, 3]` where the batch has cells.
        It is the derivative of the energy by a symmetric strain, over the volume, and NaN for a frame whose cell has none.
        """
        graph = graph_of(batch)
        with computing_by(LITERAL) if self.is_reference else nullcontext(), torch.enable_grad():
            positions = batch.positions.double()
            vectors = at_neighbour(positions, graph) - at_centre(positions, graph) + batch.edge_shift
            leaf = not vectors.requires_grad
            if leaf:
                vectors.requires_grad_()
            atomic, slope = self._differentiated(vectors, graph, batch.species, leaf=leaf)
            energy = sum_over_frames(atomic, batch)
            result = {"energy": energy, "forces": sum_to_centre(slope, graph) - sum_to_neighbour(slope, graph)}
            if batch.cell is not None:
                virial = sum_over_frames(sum_to_centre(vectors.unsqueeze(2) * slope.unsqueeze(1), graph), batch)
                result["stress"] = stress_of(virial, batch.cell)
        if not self.training:
            return {name: value.detach() for name, value in result.items()}
        return result

    def of_rank(self, vectors: Tensor, species: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        """What the edges of a rank's atoms contribute, where a system is divided among ranks.

        Args:
            vectors: `[edges, 3]` float64, Å, from centre to neighbour.
            species: `[atoms and ghosts]`.
            graph: with `everyone`.

        Returns:
            Energies of the rank's atoms `[atoms]` float64, eV, and the derivative of the sum of all ranks' energies by the rank's
            edge vectors `[edges, 3]` float64, eV/Å.
        """
        with torch.enable_grad():
            atomic, slope = self._differentiated(vectors.detach().requires_grad_(), graph, species, leaf=True)
        return atomic.detach(), slope.detach()

    @property
    def cutoffs(self) -> list[list[float]] | None:
        """Cutoff of each pair (centre, neighbour) `[species, species]`, Å; None where it is `r_max` throughout."""
        return None if self.inverse_cutoffs is None else self.inverse_cutoffs.reciprocal().tolist()

    def for_inference(self) -> Local:
        """A copy of the model for `ddpkit.inference`: it computes the atoms of one rank."""
        return Local(copy.deepcopy(self).eval().requires_grad_(requires_grad=False))

    def exchange_width(self) -> int:
        """The widest row of features that layers need from other ranks; 0 where they need none."""
        return 0

    def _differentiated(self, vectors: Tensor, graph: Graph, species: Tensor, *, leaf: bool) -> tuple[Tensor, Tensor]:
        """Energies of the centres `[atoms]`, eV, and the derivative of their sum by the edge vectors `[edges, 3]`, eV/Å.

        Args:
            vectors: `[edges, 3]` float64, Å.
            graph: the edges.
            species: of all atoms.
            leaf: nobody asks for second derivatives by the vectors.
        """
        lengths = self._lengths(vectors, graph, species)
        atomic = self._energies(lengths, graph, species, leaf=leaf)
        if self.zbl and self.is_reference:
            atomic = atomic + sum_to_centre(self._repulsion(lengths, graph, species)[0], graph).squeeze(1)
        (slope,) = torch.autograd.grad(atomic.sum(), vectors, create_graph=self.training)
        if self.zbl and not self.is_reference:
            # depends on no parameter: its slope is written down, not differentiated
            if leaf:
                length, unit, scaled, inverse_cutoff = lengths
                lengths = Lengths(length.detach(), unit.detach(), scaled.detach(), inverse_cutoff)
            pair, pair_slope = self._repulsion(lengths, graph, species)
            atomic = atomic + sum_to_centre(pair, graph).squeeze(1).double()
            slope = slope + (pair_slope * lengths.unit).double()
        return atomic, slope

    def _lengths(self, vectors: Tensor, graph: Graph, species: Tensor) -> "Lengths":
        vectors = vectors.to(self.geometry_dtype)
        length = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        if self.inverse_cutoffs is None:
            inverse_cutoff: Tensor | float = 1 / self.r_max
        else:
            centre, neighbour = species.index_select(0, graph.centre), species.index_select(0, graph.neighbour)
            inverse_cutoff = self.inverse_cutoffs[centre, neighbour].unsqueeze(1)
        return Lengths(length, vectors / length, length * inverse_cutoff, inverse_cutoff)

    def _energies(self, lengths: "Lengths", graph: Graph, species: Tensor, *, leaf: bool) -> Tensor:
        """`[atoms]` float64, eV, without the repulsion of nuclei."""
        one_hot = (species.unsqueeze(1) == torch.arange(len(self.species), device=species.device)).to(self.dtype)
        envelope = polynomial_cutoff(lengths.scaled, self.polynomial_cutoff_p).to(self.dtype)
        radial = self.radial_basis(lengths.scaled).to(self.dtype) * envelope
        harmonics = self.spherical_harmonics(lengths.unit).to(self.dtype)
        atomic = self.atomic_energies(Edges(graph, one_hot, radial, harmonics, leaf)).double()
        one_hot = without_ghosts(one_hot.double(), graph)
        return one_hot @ self.shifts + (one_hot @ self.scales) * atomic

    def _repulsion(self, lengths: "Lengths", graph: Graph, species: Tensor) -> tuple[Tensor, Tensor]:
        """Half the repulsion of the nuclei of each edge `[edges, 1]`, eV, and its slope, eV/Å."""
        charges = at_edges(self.charges.index_select(0, species), graph)
        energy, slope = zbl_energy(lengths.length, charges, self.screening)
        envelope, envelope_slope = (cutoff_derivative(lengths.scaled, self.zbl_cutoff_p, order) for order in (0, 1))
        return energy * envelope, slope * envelope + energy * envelope_slope * lengths.inverse_cutoff


class Lengths(NamedTuple):
    """Of edges: `[edges, 1]` but for unit."""

    length: Tensor  # Å
    unit: Tensor  # [edges, 3]
    scaled: Tensor  # length over the cutoff
    inverse_cutoff: Tensor | float  # 1/Å


def at_edges(value: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
    """`[atoms]` constants -> `[edges, 1]` at the centre, and at the neighbour."""
    return value.index_select(0, graph.centre).unsqueeze(1), value.index_select(0, graph.neighbour).unsqueeze(1)


SCREENING = ((0.02817, 0.28022, 0.50986, 0.18175), (0.20162, 0.40290, 0.94229, 3.19980))  # factors, decays


def zbl_energy(length: Tensor, charges: tuple[Tensor, Tensor], screening: Tensor) -> tuple[Tensor, Tensor]:
    """Half the repulsion of two screened nuclei, eV, and its derivative by the length, eV/Å: the other half belongs to the edge
    back.

    J. F. Ziegler, J. P. Biersack, U. Littmark, The Stopping and Range of Ions in Solids (1985), with the constants of
    LAMMPS' `pair_style zbl`.

    Args:
        length: `[edges, 1]`, Å.
        charges: atomic numbers of centre and neighbour, `[edges, 1]`.
        screening: `SCREENING`.
    """
    z1, z2 = charges
    factors, decays = screening
    scale = (z1.pow(0.23) + z2.pow(0.23)) / 0.46850
    terms = factors * torch.exp(-decays * (scale * length))
    bare = (0.5 * 14.399645) * z1 * z2 / length
    energy = bare * terms.sum(1, keepdim=True)
    return energy, -(bare * scale * (decays * terms).sum(1, keepdim=True) + energy / length)
