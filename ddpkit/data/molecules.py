"""The built-in set of molecules: conformations drawn by Langevin dynamics and labelled with GFN2-xTB.

It mirrors the make-up of SPICE (Eastman et al., Sci. Data 10, 11 (2023)): drug-like molecules and dipeptides of 20 to 50 atoms,
monomers, dimers, water clusters and ion pairs, with a few charged species. GFN2-xTB: Bannwarth, Ehlert, Grimme, J. Chem. Theory
Comput. 15, 1652 (2019), through the package tblite.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpkit.data.frame import NUMBERS, Frame
from ddpkit.data.parallel import cores, ordered_map

LABELS = "GFN2-xTB (tblite)"

# CODATA 2018
HARTREE = 27.211386245988  # eV
BOHR = 0.529177210903  # Å
BOLTZMANN = 8.617333262e-5  # eV/K
FEMTOSECOND = 1 / 10.180505717871  # fs in Å sqrt(amu/eV)

TEMPERATURES = (300.0, 500.0, 700.0)  # K
_MASS = 12.0  # amu for every atom: the conformations drawn are the same, and no hydrogen asks for a short time step
_TIME_STEP = 2.0  # fs
_FRICTION = 0.05  # 1/fs
_EQUILIBRATION = 32  # steps
_INTERVAL = 12  # steps between frames
_FRAMES_PER_TRAJECTORY = 6
_TOO_FAR = 40.0  # eV/Å; a trajectory that meets such a force is drawn anew

Positions = NDArray[np.float64]
Structure = tuple[NDArray[np.int64], Positions]  # atomic numbers, Å

DRUGS = {
    "acetaminophen": "CC(=O)Nc1ccc(O)cc1",
    "aspirin": "CC(=O)Oc1ccccc1C(=O)O",
    "benzocaine": "CCOC(=O)c1ccc(N)cc1",
    "bromazepam fragment": "O=C1CN=C(c2ccccc2)c2cc(Br)ccc2N1",
    "bupropion": "CC(NC(C)(C)C)C(=O)c1cccc(Cl)c1",
    "caffeine": "Cn1cnc2c1c(=O)n(C)c(=O)n2C",
    "captopril": "C[C@H](CS)C(=O)N1CCC[C@H]1C(=O)O",
    "cyclophosphamide": "O=P1(N(CCCl)CCCl)NCCCO1",
    "dopamine": "NCCc1ccc(O)c(O)c1",
    "epinephrine": "CNC[C@H](O)c1ccc(O)c(O)c1",
    "fluconazole fragment": "OC(Cn1cncn1)c1ccc(F)cc1F",
    "flurbiprofen": "CC(C(=O)O)c1ccc(-c2ccccc2)c(F)c1",
    "glucose": "OC[C@H]1OC(O)[C@H](O)[C@@H](O)[C@@H]1O",
    "ibuprofen": "CC(C)Cc1ccc(C(C)C(=O)O)cc1",
    "ketamine": "CNC1(c2ccccc2Cl)CCCCC1=O",
    "lidocaine": "CCN(CC)CC(=O)Nc1c(C)cccc1C",
    "melatonin": "CC(=O)NCCc1c[nH]c2ccc(OC)cc12",
    "metronidazole": "Cc1ncc([N+](=O)[O-])n1CCO",
    "naproxen": "COc1ccc2cc(C(C)C(=O)O)ccc2c1",
    "nicotine": "CN1CCC[C@H]1c1cccnc1",
    "phenacetin": "CCOc1ccc(NC(C)=O)cc1",
    "salbutamol": "CC(C)(C)NCC(O)c1ccc(O)c(CO)c1",
    "sulfamethoxazole": "Cc1cc(NS(=O)(=O)c2ccc(N)cc2)no1",
    "tramadol fragment": "COc1cccc(C2(O)CCCCC2)c1",
}
CHARGED_DRUGS = {
    "choline": "C[N+](C)(C)CCO",
    "dopamine cation": "[NH3+]CCc1ccc(O)c(O)c1",
    "ibuprofen anion": "CC(C)Cc1ccc(C(C)C(=O)[O-])cc1",
}
RESIDUES = {
    "Ala": "N[C@@H](C)C(=O)",
    "Asn": "N[C@@H](CC(N)=O)C(=O)",
    "Cys": "N[C@@H](CS)C(=O)",
    "Gly": "NCC(=O)",
    "Met": "N[C@@H](CCSC)C(=O)",
    "Phe": "N[C@@H](Cc1ccccc1)C(=O)",
    "Pro": "N1CCC[C@H]1C(=O)",
    "Ser": "N[C@@H](CO)C(=O)",
    "Thr": "N[C@@H]([C@H](O)C)C(=O)",
    "Val": "N[C@@H](C(C)C)C(=O)",
}
DIPEPTIDES = (
    "Ala-Ala", "Ala-Gly", "Asn-Gly", "Cys-Ala", "Gly-Gly", "Gly-Met", "Gly-Phe", "Gly-Pro", "Pro-Ala",
    "Ser-Ala", "Ser-Gly", "Thr-Ala", "Val-Gly", "Cys-Ser",
)  # fmt: skip
CHARGED_DIPEPTIDES = {"Lys cation": "CC(=O)N[C@@H](CCCC[NH3+])C(=O)NC", "Asp anion": "CC(=O)N[C@@H](CC(=O)[O-])C(=O)NC"}
# Closed shells of the G2 set, by their names in ASE.
MONOMERS = (
    "H2O", "NH3", "CH4", "HF", "HCl", "SH2", "PH3", "CO2", "HCN", "C2H2", "C2H4", "C2H6", "H2CO", "HCOOH",
    "CH3OH", "CH3SH", "CH3Cl", "CH3CN", "H3CNH2", "CH3NO2", "CH3COOH", "CH3CONH2", "CH3OCH3", "CH3COCH3",
    "C2H6SO", "SO2", "OCS", "H2CF2", "C4H4O", "C4H4NH", "C4H4S", "C5H5N", "C6H6", "HCOOCH3",
)  # fmt: skip
DIMERS = (
    ("H2O", "CH3OH"), ("H2O", "NH3"), ("H2O", "CH4"), ("HCOOH", "HCOOH"), ("CH3CONH2", "H2O"), ("C6H6", "CH4"),
    ("C6H6", "H2O"), ("C4H4NH", "C5H5N"), ("CH3COCH3", "CH3OH"), ("CH3SH", "H2CO"), ("CH3Cl", "CH3CN"),
    ("CH3NO2", "H3CNH2"), ("C2H6SO", "H2O"), ("C4H4S", "CO2"), ("HCl", "CH3OCH3"),
)  # fmt: skip
WATERS = (2, 3, 4, 6, 8, 10)
ION_PAIRS = (("Na", "Cl"), ("Na", "Br"), ("K", "F"), ("K", "Cl"), ("Li", "F"), ("Li", "Cl"))
HYDRATED_IONS = (("Na", 1, 2), ("K", 1, 1), ("Cl", -1, 2))

_SHARES = {
    "Drug-like molecules": 0.36, "Dipeptides": 0.22, "Monomers": 0.16, "Dimers": 0.12, "Water clusters": 0.08, "Ion pairs": 0.06,
}  # fmt: skip
# Unpaired electrons of the free atoms.
_UNPAIRED = {"H": 1, "Li": 1, "C": 2, "N": 3, "O": 2, "F": 1, "Na": 1, "P": 3, "S": 2, "Cl": 1, "K": 1, "Br": 1}


@dataclass(frozen=True)
class System:
    """A molecule or cluster to draw conformations of."""

    subset: str
    name: str
    charge: int
    kind: str  # which function builds it
    recipe: Any


def systems() -> list[System]:
    """Everything the set is made of, in a fixed order."""
    drugs = [System("Drug-like molecules", n, 0, "smiles", s) for n, s in DRUGS.items()]
    drugs += [
        System("Drug-like molecules", n, s.count("+]") - s.count("-]"), "smiles", s) for n, s in CHARGED_DRUGS.items()
    ]
    peptides = [System("Dipeptides", name, 0, "smiles", _dipeptide(name)) for name in DIPEPTIDES]
    peptides += [
        System("Dipeptides", n, s.count("+]") - s.count("-]"), "smiles", s) for n, s in CHARGED_DIPEPTIDES.items()
    ]
    monomers = [System("Monomers", name, 0, "cluster", (name,)) for name in MONOMERS]
    dimers = [System("Dimers", f"{a} + {b}", 0, "cluster", (a, b)) for a, b in DIMERS]
    waters = [System("Water clusters", f"(H2O){n}", 0, "cluster", ("H2O",) * n) for n in WATERS]
    pairs = [System("Ion pairs", f"{a}{b}", 0, "cluster", (a, b)) for a, b in ION_PAIRS]
    pairs += [System("Ion pairs", f"{a}{b} + H2O", 0, "cluster", (a, b, "H2O")) for a, b in ION_PAIRS[:3]]
    pairs += [
        System("Ion pairs", f"{ion}{'+' if charge > 0 else '-'} + {n} H2O", charge, "cluster", (ion, *("H2O",) * n))
        for ion, charge, n in HYDRATED_IONS
    ]
    return drugs + peptides + monomers + dimers + waters + pairs


def _dipeptide(name: str) -> str:
    first, second = name.split("-")
    return f"CC(=O){RESIDUES[first]}{RESIDUES[second]}NC"


@dataclass(frozen=True)
class Trajectory:
    """A unit of work: the same frames whichever process makes them."""

    system: System
    number: int  # of the system
    replica: int
    frames: int
    seed: int


def plan(frames: int, seed: int) -> list[Trajectory]:
    """Trajectories that give exactly this many frames: subsets by their shares, the systems of each evenly."""
    everything = systems()
    numbers = {subset: [i for i, s in enumerate(everything) if s.subset == subset] for subset in _SHARES}
    work = []
    for subset, share in _apportion(frames, list(_SHARES.values()), list(_SHARES)).items():
        order = np.random.default_rng([seed, 0]).permutation(numbers[subset])
        for place, number in enumerate(order):
            left = share // len(order) + (place < share % len(order))
            replica = 0
            while left > 0:
                count = min(left, _FRAMES_PER_TRAJECTORY)
                work.append(Trajectory(everything[number], int(number), replica, count, seed))
                left -= count
                replica += 1
    return sorted(work, key=lambda t: (t.number, t.replica))


def _apportion(total: int, weights: list[float], names: list[str]) -> dict[str, int]:
    """Whole numbers in these proportions, by largest remainders."""
    exact = np.array(weights) / sum(weights) * total
    counts = np.floor(exact).astype(int)
    for i in np.argsort(-(exact - counts), kind="stable")[: total - counts.sum()]:
        counts[i] += 1
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


def generate_molecules(
    frames: int, seed: int, *, processes: int | None = None, done: Callable[[int], object] = lambda _: None
) -> Iterator[Frame]:
    """Draws and labels conformations.

    The frames are the same for one seed however many processes make them.

    Args:
        frames: how many.
        seed: of starting structures, velocities and noise.
        processes: how many at a time; all cores where None.
        done: called with the number of frames as they are finished.
    """
    work = plan(frames, seed)
    for made in ordered_map(run_trajectory, work, min(processes or cores(), max(1, len(work)))):
        done(len(made))
        yield from made


def run_trajectory(task: Trajectory) -> list[Frame]:
    """Frames along one Langevin trajectory; drawn anew where a geometry came apart or its electrons did not converge."""
    error: Exception | None = None
    for attempt in range(8):
        random = np.random.default_rng([task.seed, 1, task.number, task.replica, attempt])
        try:
            return _langevin(task, random)
        except (RuntimeError, FloatingPointError) as caught:
            error = caught
    raise RuntimeError(f"no stable trajectory of {task.system.name} in 8 attempts: {error}")


def _langevin(task: Trajectory, random: np.random.Generator) -> list[Frame]:
    """Splitting BAOAB (Leimkuhler, Matthews, Appl. Math. Res. Express 2013, 34)."""
    numbers, positions = build(task.system, random)
    temperature = float(random.choice(TEMPERATURES))
    dt = _TIME_STEP * FEMTOSECOND
    keep = float(np.exp(-_FRICTION * _TIME_STEP))
    thermal = np.sqrt(BOLTZMANN * temperature / _MASS)
    # The start is nearly at rest in its minimum: half of this kinetic energy becomes potential energy.
    velocities = np.sqrt(2) * thermal * random.normal(size=positions.shape)
    label = Labeller(numbers, positions, task.system.charge)
    _, forces = label(positions)
    made: list[Frame] = []
    for step in range(1, _EQUILIBRATION + _INTERVAL * task.frames + 1):
        velocities += 0.5 * dt * forces / _MASS
        positions = positions + 0.5 * dt * velocities
        velocities = keep * velocities + np.sqrt(1 - keep**2) * thermal * random.normal(size=positions.shape)
        positions = positions + 0.5 * dt * velocities
        energy, forces = label(positions)
        velocities += 0.5 * dt * forces / _MASS
        if step > _EQUILIBRATION and np.abs(forces).max() > _TOO_FAR:
            raise FloatingPointError(f"a force of {np.abs(forces).max():.0f} eV/Å")
        if step > _EQUILIBRATION and (step - _EQUILIBRATION) % _INTERVAL == 0:
            s = task.system
            made.append(
                Frame(numbers, positions, energy, forces, charge=s.charge, subset=s.subset, group=s.name, name=s.name)
            )
    return made


class Labeller:
    """Energy [eV] and forces [eV/Å] of one molecule by GFN2-xTB, each call started from the electrons of the last."""

    def __init__(self, numbers: NDArray[np.int64], positions: Positions, charge: int = 0, unpaired: int = 0) -> None:
        from tblite.interface import Calculator

        self._calculator = Calculator("GFN2-xTB", numbers, positions / BOHR, charge=charge, uhf=unpaired)
        self._calculator.set("verbosity", 0)
        self._calculator.set("accuracy", 0.1)
        self._result: Any = None

    def __call__(self, positions: Positions) -> tuple[float, Positions]:
        """Labels a geometry.

        Raises:
            RuntimeError: the electrons did not converge.
        """
        self._calculator.update(positions / BOHR)
        self._result = self._calculator.singlepoint(self._result)
        gradient = np.array(self._result.get("gradient"))
        return float(self._result.get("energy")) * HARTREE, -gradient * (HARTREE / BOHR)


def atom_energies() -> dict[str, float]:
    """Energies [eV] of the free neutral atoms of all species that the set can hold."""
    origin = np.zeros((1, 3))
    return {s: Labeller(np.array([NUMBERS[s]]), origin, 0, unpaired)(origin)[0] for s, unpaired in _UNPAIRED.items()}


def build(system: System, random: np.random.Generator) -> Structure:
    """A starting structure."""
    return _conformer(system.recipe, random) if system.kind == "smiles" else _cluster(system.recipe, random)


def _conformer(smiles: str, random: np.random.Generator) -> Structure:
    from rdkit import Chem, rdBase
    from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

    rdBase.DisableLog("rdApp.*")
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    if rdDistGeom.EmbedMolecule(molecule, randomSeed=int(random.integers(1, 2**31 - 1))) != 0:
        raise RuntimeError(f"no conformer of {smiles}")
    rdForceFieldHelpers.MMFFOptimizeMolecule(molecule)
    numbers = np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()], dtype=np.int64)
    return numbers, np.array(molecule.GetConformer().GetPositions())


def _cluster(parts: tuple[str, ...], random: np.random.Generator) -> Structure:
    """Molecules and ions brought near each other, one after another, from random sides in random orientations."""
    numbers, positions = _part(parts[0])
    for part in parts[1:]:
        new_numbers, new_positions = _part(part)
        new_positions = (new_positions - new_positions.mean(axis=0)) @ _rotation(random).T
        near = positions[random.integers(len(positions))]
        direction = random.normal(size=3)
        direction /= np.linalg.norm(direction)
        reach = _contact(numbers, new_numbers)
        distance = 1.0
        while (
            np.linalg.norm(positions[:, None] - (new_positions + near + distance * direction), axis=-1) < reach
        ).any():
            distance += 0.1
        positions = np.concatenate([positions, new_positions + near + distance * direction])
        numbers = np.concatenate([numbers, new_numbers])
    return numbers, positions


def _contact(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
    """Least distances in Å between the atoms of two parts."""
    radius = np.full(120, 1.45)
    for symbol, value in (
        ("H", 0.85),
        ("C", 1.5),
        ("N", 1.4),
        ("O", 1.3),
        ("F", 1.1),
        ("Na", 1.2),
        ("Li", 0.8),
        ("K", 1.5),
    ):
        radius[NUMBERS[symbol]] = value
    return np.asarray(radius[first][:, None] + radius[second])


def _part(name: str) -> Structure:
    if name in NUMBERS and name not in MONOMERS:
        return np.array([NUMBERS[name]], dtype=np.int64), np.zeros((1, 3))
    from ase.build import molecule

    atoms = molecule(name)
    return atoms.numbers.astype(np.int64), np.array(atoms.positions)


def _rotation(random: np.random.Generator) -> Positions:
    """A rotation drawn evenly (from a unit quaternion)."""
    a, b, c, d = (q := random.normal(size=4)) / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (c * c + d * d), 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), 1 - 2 * (b * b + d * d), 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), 1 - 2 * (b * b + c * c)],
        ]
    )
