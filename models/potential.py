"""What Allegro and NequIP share: from edge vectors to energies, forces and stress."""

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from ase.data import atomic_numbers
from torch import Tensor

from ddpkit.batch import Batch
from ddpkit.errors import InputError
from ddpkit.models.geometry import (
    RadialBasis,
    SphericalHarmonics,
    check_cutoffs,
    cutoff_derivative,
    polynomial_cutoff,
)
from ddpkit.models.graph import (
    Graph,
    at_centre,
    at_neighbour,
    graph_of,
    literally,
    sum_to_centre,
    sum_to_neighbour,
)

Precision = Literal["mixed", "float32", "float64"]


class Edges(NamedTuple):
    """What the layers of a model are given."""

    graph: Graph
    species: Tensor  # [atoms, species] one-hot
    radial: Tensor  # [edges, bessels], zero from the cutoff on
    harmonics: Tensor  # [edges, (l_max + 1)^2]
    apart: bool  # whether nobody can ask for second derivatives by edge vectors


class Potential(torch.nn.Module):
    """A model of atomic energies that depend on edge vectors, with forces and stress as their derivatives.

    Subclasses implement `atomic_energies`.

    Args:
        species: chemical symbols; a batch's `species` are indices into this list.
        r_max: cutoff, Å.
        l_max: highest degree of the spherical harmonics of edges.
        num_bessels: size of the radial basis.
        bessel_trainable: train the roots of the Bessel functions.
        polynomial_cutoff_p: exponent of the cutoff envelope.
        avg_num_neighbors: sums over neighbours are divided by its square root; one number, or one for each species.
        shifts: energy of an isolated atom, eV; one number, or one for each species.
        scales: unit of the model's atomic energies, eV; one number, or one for each species.
        shifts_trainable: train the shifts.
        scales_trainable: train the scales.
        cutoffs: `[species, species]` cutoffs in Å of each pair (centre, neighbour), at most `r_max`; None for `r_max`
            throughout.
        precision: "mixed" embeds geometry in float64, runs the layers in float32 and sums energies in float64; "float32" embeds
            in float32 as well; "float64" does all in float64. Derivatives follow.
        zbl: add the repulsion of screened nuclei (`zbl_energy`); give their chemical symbols where `species` are other names.
        zbl_cutoff_p: exponent of its cutoff envelope.

    Raises:
        InputError: an argument cannot be used.
    """

    charges: Tensor
    screening: Tensor
    is_reference = False
    kernels: str = "ddpkit"
    inverse_cutoffs: Tensor
    inverse_sqrt_neighbors: Tensor
    shifts: Tensor
    scales: Tensor

    def __init__(
        self,
        species: Sequence[str],
        *,
        r_max: float,
        l_max: int,
        num_bessels: int,
        bessel_trainable: bool,
        polynomial_cutoff_p: float,
        avg_num_neighbors: float | Sequence[float],
        shifts: float | Sequence[float],
        scales: float | Sequence[float],
        shifts_trainable: bool,
        scales_trainable: bool,
        cutoffs: Sequence[Sequence[float]] | None,
        precision: Precision,
        zbl: bool | Sequence[str],
        zbl_cutoff_p: float,
    ) -> None:
        super().__init__()
        if precision not in ("mixed", "float32", "float64"):
            raise InputError(f"precision {precision!r} is unknown: choose mixed, float32 or float64")
        if len(set(species)) != len(species) or not species:
            raise InputError(f"species {list(species)} must be a list of different chemical symbols")
        self.species = tuple(species)
        self.r_max = float(r_max)
        self.precision = precision
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        self.geometry_dtype = torch.float32 if precision == "float32" else torch.float64
        self.polynomial_cutoff_p = float(polynomial_cutoff_p)
        table = None if cutoffs is None else torch.tensor(cutoffs, dtype=self.geometry_dtype, device="cpu")
        check_cutoffs(table, self.r_max, len(species))
        if self.polynomial_cutoff_p < 2:
            raise InputError(f"polynomial_cutoff_p is {polynomial_cutoff_p}: give an exponent of at least 2")
        self.register_buffer("inverse_cutoffs", None if table is None else table.reciprocal())
        self.spherical_harmonics = SphericalHarmonics(l_max, self.geometry_dtype)
        self.radial_basis = RadialBasis(num_bessels, bessel_trainable, self.geometry_dtype)
        neighbors = self._per_species("avg_num_neighbors", avg_num_neighbors)
        if not bool((neighbors > 0).all()):
            raise InputError("avg_num_neighbors must be greater than zero: compute it from frames with edges")
        self.register_buffer("inverse_sqrt_neighbors", neighbors.rsqrt().to(self.dtype))
        for name, value, trainable in (("shifts", shifts, shifts_trainable), ("scales", scales, scales_trainable)):
            constant = self._per_species(name, value)
            if trainable:
                self.register_parameter(name, torch.nn.Parameter(constant))
            else:
                self.register_buffer(name, constant)
        self.zbl_cutoff_p = float(zbl_cutoff_p)
        nuclei = [] if zbl is False else list(self.species if zbl is True else zbl)
        self.zbl = bool(nuclei)
        if nuclei:
            unknown = [name for name in nuclei if name not in atomic_numbers]
            if unknown or len(nuclei) != len(self.species):
                raise InputError(
                    f"zbl needs one chemical symbol for each species, not {nuclei}: give them, or zbl=False"
                )
            charges = torch.tensor([atomic_numbers[name] for name in nuclei], dtype=self.geometry_dtype, device="cpu")
            self.register_buffer("charges", charges, persistent=False)
            screening = torch.tensor(SCREENING, dtype=self.geometry_dtype, device="cpu")
            self.register_buffer("screening", screening, persistent=False)

    def _per_species(self, name: str, value: float | Sequence[float]) -> Tensor:
        tensor = torch.as_tensor(value, dtype=torch.float64, device="cpu")
        if tensor.ndim == 0:
            tensor = tensor.expand(len(self.species)).clone()
        if tensor.shape != (len(self.species),):
            raise InputError(
                f"{name} has {tensor.numel()} values: give one, or one for each of the {len(self.species)} species"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{name} holds a number that is not finite")
        return tensor

    def with_reference_kernels(self) -> "Potential":
        """A copy that computes the same literally, in float64 (`ddpkit.models.reference`); its parameters have the same names."""
        copied = copy.deepcopy(self, self.replaced_kernels()).to(torch.float64)
        copied.dtype = copied.geometry_dtype = torch.float64
        copied.is_reference = True
        return copied

    def replaced_kernels(self) -> dict[int, None]:
        """For `copy.deepcopy`: what such a copy leaves out."""
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
        with literally() if self.is_reference else nullcontext(), torch.enable_grad():
            positions = batch.positions.double()
            vectors = at_neighbour(positions, graph) - at_centre(positions, graph) + batch.edge_shift
            apart = not vectors.requires_grad
            if apart:
                vectors.requires_grad_()
            lengths = self._lengths(vectors, graph, batch.species)
            atomic = self._energies(lengths, graph, batch.species, apart=apart)
            if self.zbl and self.is_reference:
                atomic = atomic + sum_to_centre(self._repulsion(lengths, graph, batch.species)[0], graph).squeeze(1)
            (slope,) = torch.autograd.grad(atomic.sum(), vectors, create_graph=self.training)
            if self.zbl and not self.is_reference:
                # depends on no parameter: its slope is written down, not differentiated
                if apart:
                    length, unit, scaled, inverse_cutoff = lengths
                    lengths = Lengths(length.detach(), unit.detach(), scaled.detach(), inverse_cutoff)
                pair, pair_slope = self._repulsion(lengths, graph, batch.species)
                atomic = atomic + sum_to_centre(pair, graph).squeeze(1).double()
                slope = slope + (pair_slope * lengths.unit).double()
            energy = _sum_over_frames(atomic, batch)
            result = {"energy": energy, "forces": sum_to_centre(slope, graph) - sum_to_neighbour(slope, graph)}
            if batch.cell is not None:
                virial = _sum_over_frames(sum_to_centre(vectors.unsqueeze(2) * slope.unsqueeze(1), graph), batch)
                a, b, c = batch.cell.unbind(1)
                volume = (a * torch.linalg.cross(b, c)).sum(1).abs().reshape(-1, 1, 1)
                safe = torch.where(volume > 0, volume, torch.ones_like(volume))
                stress = (virial + virial.transpose(1, 2)) / (2 * safe)
                result["stress"] = torch.where(volume > 0, stress, torch.full_like(stress, torch.nan))
        if not self.training:
            return {name: value.detach() for name, value in result.items()}
        return result

    def _lengths(self, vectors: Tensor, graph: Graph, species: Tensor) -> "Lengths":
        vectors = vectors.to(self.geometry_dtype)
        length = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        if self.inverse_cutoffs is None:
            inverse_cutoff: Tensor | float = 1 / self.r_max
        else:
            centre, neighbour = species.index_select(0, graph.centre), species.index_select(0, graph.neighbour)
            inverse_cutoff = self.inverse_cutoffs[centre, neighbour].unsqueeze(1)
        return Lengths(length, vectors / length, length * inverse_cutoff, inverse_cutoff)

    def _energies(self, lengths: "Lengths", graph: Graph, species: Tensor, *, apart: bool) -> Tensor:
        """`[atoms]` float64, eV, without the repulsion of nuclei."""
        one_hot = (species.unsqueeze(1) == torch.arange(len(self.species), device=species.device)).to(self.dtype)
        envelope = polynomial_cutoff(lengths.scaled, self.polynomial_cutoff_p).to(self.dtype)
        radial = self.radial_basis(lengths.scaled).to(self.dtype) * envelope
        harmonics = self.spherical_harmonics(lengths.unit).to(self.dtype)
        atomic = self.atomic_energies(Edges(graph, one_hot, radial, harmonics, apart)).double()
        one_hot = one_hot.double()
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


def _sum_over_frames(x: Tensor, batch: Batch) -> Tensor:
    """`[atoms, ...]` -> `[frames, ...]`."""
    return x.new_zeros((batch.num_frames, *x.shape[1:])).index_add(0, batch.frame, x)


def uniform(*shape: int, dtype: torch.dtype) -> torch.nn.Parameter:
    """Weights of variance one."""
    return torch.nn.Parameter(torch.empty(*shape, dtype=dtype).uniform_(-math.sqrt(3), math.sqrt(3)))
