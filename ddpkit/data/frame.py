"""One atomic configuration and its labels."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

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
