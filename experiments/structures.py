"""Configurations made here, as ASE's `Atoms`: boxes of water, molecules, crystals."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule
from ase.data import atomic_numbers, covalent_radii

from ddpkit.errors import InputError

_WATER_VOLUME = 18.01528 / 0.602214076  # Å^3 of a molecule at 1 g/cm^3
PENTAPEPTIDE = (
    "CC(=O)N[C@@H](Cc1c[nH]c2ccccc12)C(=O)NCC(=O)N[C@@H](Cc1ccc(O)cc1)C(=O)N[C@@H](CCCC[NH3+])C(=O)N1CCC[C@H]1C(=O)NC"
)
"""Trp-Gly-Tyr-Lys-Pro between acetyl and N-methyl amide, with lysine's charge: 100 atoms."""


def water(edge: int, seed: int = 1) -> Atoms:
    """A periodic cube of water at 1 g/cm^3: `edge`^3 molecules on a lattice, each turned at random.

    Args:
        edge: molecules along an edge; 2 to 12 give 24 to 5,184 atoms.
        seed: of the orientations.
    """
    random = np.random.default_rng(seed)
    spacing = _WATER_VOLUME ** (1 / 3)
    one = molecule("H2O")
    inner = one.positions - one.get_center_of_mass()
    sites = spacing * np.stack(np.meshgrid(*[np.arange(edge)] * 3, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    turns = np.linalg.qr(random.normal(size=(edge**3, 3, 3)))[0]
    turns *= np.linalg.det(turns)[:, None, None]
    positions = sites + np.einsum("ai,mij->maj", inner, turns)
    return Atoms(
        np.tile(one.numbers, edge**3),
        positions.reshape(-1, 3),
        cell=[edge * spacing] * 3,
        pbc=True,
        info={"name": "water"},
    )


def from_smiles(name: str, smiles: str, seed: int = 1) -> Atoms:
    """A conformer of a molecule, without a cell.

    Raises:
        InputError: RDKit is not installed.
    """
    try:
        from rdkit import Chem, rdBase
        from rdkit.Chem import rdDistGeom, rdForceFieldHelpers
    except ImportError as error:
        raise InputError(f"{name} is built with RDKit: pip install 'ddpkit[generate]'.") from error
    rdBase.DisableLog("rdApp.*")
    built = Chem.AddHs(Chem.MolFromSmiles(smiles))
    if rdDistGeom.EmbedMolecule(built, randomSeed=seed) != 0:
        raise RuntimeError(f"no conformer of {smiles}")
    rdForceFieldHelpers.MMFFOptimizeMolecule(built, maxIters=2000)
    numbers = [atom.GetAtomicNum() for atom in built.GetAtoms()]
    return Atoms(numbers, built.GetConformer().GetPositions(), info={"name": name})


def crystal(species: Sequence[str]) -> Atoms:
    """A disturbed crystal of one or two elements with the bond lengths of covalent radii."""
    first, second = (*species, species[0])[:2]
    bond = sum(float(covalent_radii[atomic_numbers[symbol]]) for symbol in (first, second))
    if first == second:
        unit, repeats = bulk(first, "fcc", a=2**0.5 * bond, cubic=True), 2
    else:
        unit, repeats = bulk(first + second, "rocksalt", a=2 * bond, cubic=True), 1
    atoms = unit.repeat(repeats)
    atoms.rattle(0.05, seed=1)
    atoms.info["name"] = f"crystal of {first}" if first == second else f"crystal of {first}{second}"
    return atoms


_MOLECULES = (
    ({"H", "C", "N", "O"}, "CH3CONH2"),
    ({"H", "C", "O"}, "CH3CH2OCH3"),
    ({"H", "C"}, "trans-butane"),
)  # of those that ASE has, and the elements that they take


def fitting(species: Sequence[str]) -> Atoms:
    """A small configuration of species that a model knows: a molecule, water, or else a crystal.

    Args:
        species: chemical symbols.

    Raises:
        InputError: a species is no chemical symbol.
    """
    if unknown := [symbol for symbol in species if atomic_numbers.get(symbol, 0) < 1]:
        raise InputError(
            f"The model's species {unknown[0]!r} is no chemical symbol, so nothing can be built of it: give --structure."
        )
    for elements, name in _MOLECULES:
        if elements <= set(species):
            atoms = molecule(name)
            atoms.info = {"name": name}
            return atoms
    if {"H", "O"} <= set(species):
        return water(2)
    return crystal([symbol for symbol in species if symbol != "H"][:2] or species)


_IONS = {"SOD": "Na", "NA": "Na", "NA+": "Na", "CLA": "Cl", "CL": "Cl", "CL-": "Cl", "POT": "K", "K+": "K", "ZN": "Zn"}
_CELL = ((6, 15), (15, 24), (24, 33), (33, 40), (40, 47), (47, 54))  # columns of CRYST1


def read_pdb(path: Path) -> Atoms:
    """The atoms of a PDB file with its cell, periodic where it has one.

    Elements stand in columns 77 and 78; where these are empty, the first letter of an atom's name is its element, but for ions.

    Raises:
        InputError: it cannot be read, or holds no atoms.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"pdb={path} cannot be read: give a PDB file.") from error
    symbols, positions, cell = [], [], None
    for number, line in enumerate(lines, 1):
        try:
            if line.startswith("CRYST1"):
                cell = [float(line[start:end]) for start, end in _CELL]
            elif line.startswith(("ATOM", "HETATM")):
                symbols.append(_element(line))
                positions.append([float(line[start : start + 8]) for start in (30, 38, 46)])
        except ValueError as error:
            raise InputError(f"pdb={path}, line {number} is no atom or cell of a PDB file: correct it.") from error
    if not symbols:
        raise InputError(f"pdb={path} holds no atoms: give a PDB file with some.")
    atoms = Atoms(symbols, positions, cell=cell, pbc=cell is not None, info={"name": path.stem})
    if cell is None:
        atoms.center(vacuum=5.0)
    return atoms


def _element(line: str) -> str:
    written, residue = line[76:78].strip().capitalize(), line[17:21].strip()
    if atomic_numbers.get(written, 0) > 0:
        return written
    if residue in _IONS:
        return _IONS[residue]
    letter = line[12:16].strip().lstrip("0123456789")[:1]
    if atomic_numbers.get(letter, 0) < 1:
        raise ValueError(line)
    return letter
