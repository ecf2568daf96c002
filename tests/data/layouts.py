"""Files in exactly the layouts of SPICE and MPtrj, edge cases included, filled with made-up numbers.

Run as a program it makes large ones: `python tests/data/layouts.py spice|mptrj FILE COUNT`.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

_HEXADECANE = "".join(f"[C:{i}]([H:{2 * i + 15}])([H:{2 * i + 16}])" for i in range(1, 17))
# name, mapped SMILES, atomic numbers, subset, total charge
MOLECULES = (
    ("103147721", "[H:5][C:1]([H:6])([H:7])[C:2](=[O:3])[O-:4]", (6, 6, 8, 8, 1, 1, 1),
     "SPICE PubChem Set 1 Single Points Dataset v1.3", -1),
    ("C#C.[Na+]", "[H:3][C:1]#[C:2][H:4].[Na+:5]", (6, 6, 1, 1, 11), "SPICE DES370K Single Points Dataset Supplement v1.1", 1),
    ("[Cl-] [Na+]", "[Na+:1].[Cl-:2]", (11, 17), "SPICE Ion Pairs Single Points Dataset v1.2", 0),
    ("c1ccncc1", "[c:1]1([H:7])[c:2]([H:8])[c:3]([H:9])[n:4][c:5]([H:10])[c:6]1[H:11]", (6, 6, 6, 7, 6, 6, 1, 1, 1, 1, 1),
     "SPICE DES Monomers Single Points Dataset v1.1", 0),
    ("gly-ser", "[H:5][N+:1]([H:6])([H:7])[C:2]([H:8])([H:9])[C:3](=[O:4])[O-:10]", (7, 6, 6, 8, 1, 1, 1, 1, 1, 8),
     "SPICE Dipeptides Single Points Dataset v1.3", 0),
    ("hexadecane", f"[H:49]{_HEXADECANE}[H:50]", (6,) * 16 + (1,) * 34, "SPICE PubChem Set 4 Single Points Dataset v1.3", 0),
    ("water", "[O:1]([H:2])[H:3]", (8, 1, 1), "SPICE Water Clusters Single Points Dataset v1.0", 0),
)  # fmt: skip


def write_group(
    file: h5py.File, name: str, smiles: str, numbers: tuple[int, ...], subset: str, conformations: int, rng: np.random.Generator,
    *, mbis: bool = True, spread: float = 1.5,
) -> None:  # fmt: skip
    """One molecule; without conformations every dataset of them has the shape (0,), as in the release."""
    atoms, m = len(numbers), conformations
    group = file.create_group(name)
    text = h5py.string_dtype()
    group.create_dataset("subset", data=[subset], dtype=text)
    group.create_dataset("smiles", data=[smiles], dtype=text)
    group["atomic_numbers"] = np.array(numbers, dtype=np.int16)
    shapes: dict[str, tuple[tuple[int, ...], str, str | None]] = {
        "conformations": ((m, atoms, 3), "f4", "bohr"),
        "dft_total_energy": ((m,), "f8", "hartree"),
        "dft_total_gradient": ((m, atoms, 3), "f4", "hartree/bohr"),
        "formation_energy": ((m,), "f8", "hartree"),
        "scf_dipole": ((m, 3), "f4", "elementary_charge*bohr"),
    }
    if mbis:
        shapes["mbis_charges"] = ((m, atoms, 1), "f4", "elementary_charge")
    place = np.arange(atoms)
    grid = spread * np.stack([place % 3, place // 3 % 3, place // 9], axis=1)
    for key, (shape, dtype, unit) in shapes.items():
        values = rng.normal(scale=0.05, size=shape)
        if key == "conformations":
            values = 1.9 * grid + 4 * values
        if key == "dft_total_energy":
            values = values - 37.8 * atoms
        group[key] = (values if m else np.zeros(0)).astype(dtype)
        group[key].attrs["units"] = unit


def write_spice(path: Path, copies: int = 1, conformations: int = 5, seed: int = 0) -> dict[str, int]:
    """A SPICE file with all the edge cases.

    Returns:
        How many conformations it holds: in all, charged, and neutral ones with an isolated atom or NaN.
    """
    rng = np.random.default_rng(seed)
    counts = {"all": 0, "charged": 0, "isolated": 0, "unlabelled": 0}
    with h5py.File(path, "w") as file:
        for copy in range(copies):
            for name, smiles, numbers, subset, charge in MOLECULES:
                write_group(
                    file, f"{name} {copy}", smiles, numbers, subset, conformations, rng, mbis="Na" not in smiles
                )
                counts["all"] += conformations
                counts["charged"] += conformations * (charge != 0)
        name, smiles, numbers, subset, _ = MOLECULES[2]
        write_group(file, "far apart", smiles, numbers, subset, 2, rng, spread=30.0)
        write_group(file, "nothing", smiles, numbers, subset, 0, rng)
        write_group(file, "not a number", smiles, numbers, subset, 2, rng)
        file["not a number"]["dft_total_energy"][1] = np.nan
        counts["all"] += 4
        counts["isolated"] += 2
        counts["unlabelled"] += 1
    return counts


def mptrj_frame(
    rng: np.random.Generator, material: str, task: str, step: int, atoms: int | None = None
) -> tuple[str, dict[str, Any]]:
    """One frame and its id."""
    atoms = atoms or int(rng.integers(2, 40))
    edge = (18.0 * atoms) ** (1 / 3)
    matrix = np.eye(3) * edge + rng.normal(scale=0.05 * edge, size=(3, 3))
    fractional = rng.random((atoms, 3))
    elements = rng.choice(["Li", "O", "Fe", "Ac", "H", "Si"], size=atoms)
    sites = [
        {
            "species": [{"element": str(element), "occu": 1}],
            "abc": abc.tolist(),
            "xyz": (abc @ matrix).tolist(),
            "label": str(element),
            "properties": {},
        }
        for element, abc in zip(elements, fractional, strict=True)
    ]
    stress = rng.normal(scale=10.0, size=(3, 3))
    energy = float(rng.normal(-6.0, 0.5) * atoms)
    return f"{task}-0-{step}", {
        "structure": {
            "@module": "pymatgen.core.structure",
            "@class": "Structure",
            "charge": 0,
            "lattice": {
                "matrix": matrix.tolist(),
                "pbc": [True, True, True],
                "a": edge,
                "volume": abs(np.linalg.det(matrix)),
            },
            "sites": sites,
        },
        "uncorrected_total_energy": energy,
        "corrected_total_energy": energy - 0.7,
        "energy_per_atom": (energy - 0.7) / atoms,
        "ef_per_atom": -0.1,
        "e_per_atom_relaxed": -6.0,
        "ef_per_atom_relaxed": -0.2,
        "force": rng.normal(scale=0.3, size=(atoms, 3)).tolist(),
        "stress": ((stress + stress.T) / 2).tolist(),
        "magmom": rng.random(atoms).tolist() if step % 2 else None,
        "bandgap": 0.0,
        "mp_id": material,
    }


def mptrj_materials(materials: int, seed: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Materials with their frames; every seventh comes from a task whose id starts with `mvc-`."""
    rng = np.random.default_rng(seed)
    for number in range(materials):
        material, task = f"mp-{1000 + number}", f"{'mvc' if number % 7 == 3 else 'mp'}-{2000 + number}"
        yield material, dict(mptrj_frame(rng, material, task, step) for step in range(1 + int(rng.poisson(9))))


def write_mptrj(path: Path, materials: int, seed: int = 0, extra: dict[str, Any] | None = None) -> int:
    """An MPtrj file; the number of its frames."""
    frames = 0
    with path.open("w") as file:
        file.write("{")
        members = (
            [*mptrj_materials(materials, seed), *(extra or {}).items()] if extra else mptrj_materials(materials, seed)
        )
        for number, (material, entries) in enumerate(members):
            file.write(", " * (number > 0) + json.dumps(material) + ": " + json.dumps(entries))
            frames += len(entries)
        file.write("}")
    return frames


if __name__ == "__main__":
    kind, target, count = sys.argv[1:]
    if kind == "spice":
        print(write_spice(Path(target), copies=-(-int(count) // (50 * len(MOLECULES))), conformations=50))
    else:
        print(write_mptrj(Path(target), int(count)))
