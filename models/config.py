"""What all potentials are configured by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from ase.data import atomic_numbers
from torch import Tensor

from ddpkit.errors import InputError

Precision = Literal["mixed", "float32", "float64"]


@dataclass(frozen=True, kw_only=True)
class PotentialConfig:
    """What all potentials share. These are keywords of `Allegro` and `NequIP`, and keys of `model` in a run's configuration.

    Where the text says "one for each species", values are in the order of `species`.

    Sources:
        [Batzner] S. Batzner et al., Nature Communications 13, 2453 (2022).
        [Gasteiger] J. Gasteiger et al., arXiv 2003.03123.
        [Musaelian] A. Musaelian et al., Nature Communications 14, 579 (2023).
        [Ziegler] J. F. Ziegler, J. P. Biersack, U. Littmark, The Stopping and Range of Ions in Solids (1985).

    Raises:
        InputError: a value cannot be used.
    """

    species: Sequence[str]
    """Chemical symbols, all different. A batch's `species` are indices into this list."""

    r_max: float = 6.0
    """Cutoff, Å: edges are shorter."""

    cutoffs: Sequence[Sequence[float]] | None = None
    """`[species, species]`: cutoff of each pair (centre, neighbour), Å, at most `r_max`; None for `r_max` throughout."""

    l_max: int
    """Highest degree of the spherical harmonics of an edge's direction (l_max in [Batzner] and [Musaelian])."""

    num_bessels: int = 8
    """Number of Bessel functions sin(n pi x) / (pi x) of an edge's length over its cutoff x ([Gasteiger], eq. 7)."""

    bessel_trainable: bool = False
    """Train their roots n pi, as [Batzner] does."""

    polynomial_cutoff_p: float = 6
    """Exponent p of the envelope that takes them to zero at the cutoff, at least 2 ([Gasteiger], eq. 8)."""

    avg_num_neighbors: float | Sequence[float]
    """Average number of neighbours of an atom; one number, or one for each species of the centre. Sums over neighbours
    are divided by its square root ([Musaelian], Methods, Normalization)."""

    shifts: float | Sequence[float] = 0.0
    """Energy of an isolated atom, eV; one number, or one for each species: mu in E = sum_i (sigma E_i + mu) ([Musaelian], Energy
    decomposition)."""

    scales: float | Sequence[float] = 1.0
    """Unit of the atomic energies E_i that a model computes, eV; one number, or one for each species: sigma in the same sum."""

    shifts_trainable: bool = False
    """Train the shifts."""

    scales_trainable: bool = False
    """Train the scales."""

    precision: Precision = "mixed"
    """"mixed" embeds the geometry in float64, runs the layers in float32 and sums energies in float64; "float32" embeds in
    float32 as well; "float64" does all in float64. Derivatives follow."""

    zbl: bool | Sequence[str] = False
    """Add the repulsion of screened nuclei ([Ziegler], as LAMMPS' `pair_style zbl` has it). Where `species` are no chemical
    symbols, give one symbol for each species instead of True."""

    zbl_cutoff_p: float = 6
    """Exponent of the envelope that takes this repulsion to zero at the cutoff, as `polynomial_cutoff_p`."""

    def __post_init__(self) -> None:
        if self.precision not in ("mixed", "float32", "float64"):
            raise InputError(f"precision {self.precision!r} is unknown: choose mixed, float32 or float64")
        if len(set(self.species)) != len(self.species) or not self.species:
            raise InputError(f"species {list(self.species)} must be a list of different chemical symbols")
        if self.r_max <= 0:
            raise InputError(f"r_max is {float(self.r_max)}: give a cutoff in Å greater than zero")
        self._check_cutoffs()
        if self.polynomial_cutoff_p < 2:
            raise InputError(f"polynomial_cutoff_p is {self.polynomial_cutoff_p}: give an exponent of at least 2")
        if not bool((self.per_species("avg_num_neighbors") > 0).all()):
            raise InputError("avg_num_neighbors must be greater than zero: compute it from frames with edges")
        self.per_species("shifts")
        self.per_species("scales")
        unknown = [name for name in self.nuclei if name not in atomic_numbers]
        if unknown or len(self.nuclei) not in (0, len(self.species)):
            raise InputError(
                f"zbl needs one chemical symbol for each species, not {self.nuclei}: give them, or zbl=False"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and layers."""
        return torch.float64 if self.precision == "float64" else torch.float32

    @property
    def geometry_dtype(self) -> torch.dtype:
        """Of edge vectors and what is computed from them, up to the layers."""
        return torch.float32 if self.precision == "float32" else torch.float64

    @property
    def nuclei(self) -> list[str]:
        """The chemical symbol of each species; empty without the repulsion of nuclei."""
        if self.zbl is False:
            return []
        return list(self.species if self.zbl is True else self.zbl)

    def per_species(self, name: str) -> Tensor:
        """`[species]`, float64: a field that is one number, or one for each species.

        Raises:
            InputError: their number differs from that of the species, or one is not finite.
        """
        tensor = torch.as_tensor(getattr(self, name), dtype=torch.float64, device="cpu")
        if tensor.ndim == 0:
            tensor = tensor.expand(len(self.species)).clone()
        if tensor.shape != (len(self.species),):
            raise InputError(
                f"{name} has {tensor.numel()} values: give one, or one for each of the {len(self.species)} species"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{name} holds a number that is not finite")
        return tensor

    def pair_cutoffs(self) -> Tensor | None:
        """`[species, species]`, Å."""
        return None if self.cutoffs is None else torch.tensor(self.cutoffs, dtype=self.geometry_dtype, device="cpu")

    def _check_cutoffs(self) -> None:
        table, species = self.pair_cutoffs(), len(self.species)
        if table is None:
            return
        if table.shape != (species, species):
            raise InputError(
                f"cutoffs has the shape {tuple(table.shape)}: give one cutoff for each pair of {species} species"
            )
        if not bool(((table > 0) & (table <= self.r_max)).all()):
            raise InputError(f"cutoffs of pairs must lie between 0 and r_max ({float(self.r_max)} Å)")
