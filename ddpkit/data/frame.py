"""One atomic configuration and its labels."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ddpkit.errors import InputError

# Position in this tuple is the atomic number; 0 is nothing.
SYMBOLS: tuple[str, ...] = tuple(
    """
    X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr
    Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir
    Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl
    Mc Lv Ts Og
    """.split()  # noqa: SIM905  (a table of 119 words)
)
NUMBERS: dict[str, int] = {symbol: number for number, symbol in enumerate(SYMBOLS) if number}


@dataclass(frozen=True)
class Frame:
    """One atomic configuration and its labels.

    `energy` and `forces` are NaN where there is no label (structures to be predicted); batches for training refuse NaN.
    """

    numbers: NDArray[np.int64]  # [atoms], atomic numbers
    positions: NDArray[np.float64]  # [atoms, 3] Å
    energy: float  # eV, total
    forces: NDArray[np.float64]  # [atoms, 3] eV/Å
    cell: NDArray[np.float64] | None = None  # [3, 3] Å, rows are lattice vectors; None for a molecule
    pbc: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(3, dtype=bool))  # [3]
    stress: NDArray[np.float64] | None = None  # [3, 3] eV/Å^3, ASE's sign; None where there is no label
    charge: int = 0  # total charge, elementary charges
    subset: str = ""  # part of the set that errors are tabulated by
    group: str = ""  # molecule or material; frames of one group can be kept together in a split
    name: str = ""  # where it came from, for messages
    isolated: bool = (
        False  # whether it is an isolated atom though it has a cell: a reference energy, not to be trained on
    )

    def __len__(self) -> int:
        return len(self.numbers)


def index_of_species(species: Sequence[str]) -> NDArray[np.int64]:
    """`[elements]` by atomic number: the place among a model's chemical symbols, and -1 for others."""
    index = np.full(len(SYMBOLS), -1, dtype=np.int64)
    for position, symbol in enumerate(species):
        index[NUMBERS[symbol]] = position
    return index


def require_usable(
    frame: Frame, name: str, index: NDArray[np.int64], species: Sequence[str], *, labels: bool = True
) -> None:
    """Refuses a frame that no batch can hold.

    Args:
        frame: the frame.
        name: of it, for messages.
        index: of `index_of_species`.
        species: the model's chemical symbols.
        labels: whether energy and forces must be there.

    Raises:
        InputError: a species the model does not know, or a position or label that is NaN or infinite.
    """
    unknown = np.unique(frame.numbers[index[frame.numbers] < 0])
    if len(unknown):
        raise InputError(
            f"{name} holds {', '.join(SYMBOLS[number] for number in unknown)}, which the model does not know (its species are "
            f"{', '.join(species)}): leave such frames out or train a model with these species"
        )
    if not np.isfinite(frame.positions).all():
        raise InputError(f"{name} has positions that are not finite: leave it out")
    if labels and not (np.isfinite(frame.energy) and np.isfinite(frame.forces).all()):
        raise InputError(
            f"{name} has an energy or forces that are missing, NaN or infinite: leave it out or repair the file"
        )


def complete(cell: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """`[3, 3]` a cell with unit vectors where it has none; a unit cell for a molecule."""
    if cell is None:
        return np.eye(3)
    if np.linalg.norm(cell, axis=1).all():
        return cell
    from ase.geometry import complete_cell

    return np.asarray(complete_cell(cell))
