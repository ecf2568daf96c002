"""Anything that ASE reads."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ddpkit.data.frame import Frame
from ddpkit.data.prepared import Block, Filters
from ddpkit.errors import InputError

# Names that labels go by in extended XYZ files and databases, after the calculator's own results. Compared without case.
ENERGY_KEYS = ("energy", "REF_energy", "dft_energy", "DFT_energy", "TotEnergy", "total_energy", "free_energy", "E")
FORCES_KEYS = ("forces", "force", "REF_forces", "REF_force", "dft_forces", "dft_force", "DFT_forces", "F")
STRESS_KEYS = ("stress", "REF_stress", "dft_stress")
VIRIAL_KEYS = ("virial", "virials", "REF_virial", "REF_virials", "dft_virial")
GROUP_KEYS = ("group", "mp_id", "material_id", "molecule", "mol_id", "smiles")
SUBSET_KEYS = ("subset", "config_type")
_FRAMES_IN_A_PIECE = 256


def read_ase(
    path: str | os.PathLike[str],
    *,
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
    labels: bool = True,
) -> Iterator[Frame]:
    """Reads frames one after another.

    Labels are the calculator's results (extended XYZ `energy`, `forces`, `stress`; what ASE wrote in trajectories and databases)
    or else stand in `info` and `arrays` under a usual name (`REF_energy`, `dft_forces`, `virial` ...). Energies in eV, forces in
    eV/Å, stress in eV/Å^3 with ASE's sign, virials (-stress times volume) in eV.

    Args:
        path: the file.
        energy_key: name of the energy where it is unusual, or where a file has several.
        forces_key: likewise.
        stress_key: likewise.
        labels: whether energy and forces must be there; without, missing ones are NaN.

    Raises:
        InputError: the file cannot be read, holds no frames, or a frame has no energy or forces.
    """
    from ase.io import iread

    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist: give the path of a prepared set or of a file that ASE reads")
    number = -1
    try:
        images: Iterator[Any] = iread(str(path), index=":", parallel=False)
        for number, atoms in enumerate(images):
            yield _frame(atoms, f"frame {number} of {path}", energy_key, forces_key, stress_key, labels=labels)
    except InputError:
        raise
    except Exception as error:
        what = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"{path} cannot be read after {number + 1} frames ({what}): is it a file that ASE knows?"
        ) from error
    if number < 0:
        raise InputError(f"{path} holds no frames: give another file")


class AseFiles:
    """Files that ASE reads, as a source of frames.

    Args:
        paths: the files.
        keys: `energy_key`, `forces_key`, `stress_key`, as for `read_ase`.
        labels: whether frames without labels are errors; without, their labels are NaN.

    Raises:
        InputError: a file does not exist.
    """

    unit = "frame"
    total = None

    def __init__(
        self, paths: Sequence[Path], keys: Mapping[str, str | None] | None = None, *, labels: bool = True
    ) -> None:
        for path in paths:
            if not path.is_file():
                raise InputError(f"{path} does not exist: give files that ASE reads")
        self.files = list(paths)
        self.settings: dict[str, Any] = {"made_by": "ddpkit data prepare ase", **(keys or {})}
        self.facts: dict[str, Any] = {}
        self._keys, self._labels = dict(keys or {}), labels

    def pieces(self, position: Any) -> Iterator[tuple[Any, Any, int]]:
        """Some frames at a time."""
        first, done = position or (0, 0)
        for number, path in enumerate(self.files[first:], start=first):
            frames = islice(read_ase(path, **self._keys, labels=self._labels), done, None)
            while some := list(islice(frames, _FRAMES_IN_A_PIECE)):
                done += len(some)
                yield some, (number, done), len(some)
            done = 0

    def blocks(self, r_max: float, filters: Filters) -> Callable[[list[Frame]], Block]:
        """Counts edges and filters."""
        return partial(Block.of, r_max=r_max, filters=filters)

    def done(self, position: Any) -> int:
        """Frames read from the file that is under way."""
        return position[1] if position else 0


def _frame(
    atoms: Any, name: str, energy_key: str | None, forces_key: str | None, stress_key: str | None, *, labels: bool
) -> Frame:
    results = atoms.calc.results if atoms.calc is not None and hasattr(atoms.calc, "results") else {}
    energy = _find((results, atoms.info), energy_key, ENERGY_KEYS)
    forces = _find((results, atoms.arrays), forces_key, FORCES_KEYS)
    if forces is None and len(atoms) == 1 and not atoms.pbc.any():
        forces = np.zeros((1, 3))  # a free atom
    if labels:
        for what, value, option in (("energy", energy, "--energy-key"), ("forces", forces, "--forces-key")):
            if value is None:
                there = sorted({*results, *atoms.info, *atoms.arrays} - {"numbers", "positions"})
                have = ", ".join(there) or "no labels"
                raise InputError(f"{name} has no {what} under a known name (it has {have}): name the key with {option}")
    periodic = bool(atoms.pbc.any())
    cell = np.array(atoms.cell[:], dtype=np.float64) if periodic else None
    if cell is not None and not np.linalg.norm(cell, axis=1)[atoms.pbc].all():
        raise InputError(f"{name} is periodic along a lattice vector of length zero: repair its cell or its pbc")
    count = len(atoms)
    if forces is not None and np.shape(forces) != (count, 3):
        raise InputError(f"{name} has forces of shape {np.shape(forces)} for {count} atoms: repair the file")
    return Frame(
        numbers=atoms.numbers.astype(np.int64),
        positions=np.array(atoms.positions, dtype=np.float64),
        energy=float("nan") if energy is None else float(np.asarray(energy).reshape(-1)[0]),
        forces=np.full((count, 3), np.nan) if forces is None else np.array(forces, dtype=np.float64),
        cell=cell,
        pbc=np.array(atoms.pbc, dtype=bool),
        stress=_stress(atoms, results, stress_key) if periodic else None,
        charge=round(float(_find((atoms.info,), None, ("charge", "total_charge")) or 0)),
        subset=str(_find((atoms.info,), None, SUBSET_KEYS) or ""),
        group=str(_find((atoms.info,), None, GROUP_KEYS) or atoms.get_chemical_formula()),
        name=name,
    )


def _find(places: tuple[Any, ...], key: str | None, usual: tuple[str, ...]) -> Any:
    names = usual if key is None else (key,)
    for place in places:
        by_lower_case = {str(k).lower(): value for k, value in place.items()}
        for name in names:
            if by_lower_case.get(name.lower()) is not None:
                return by_lower_case[name.lower()]
    return None


def _stress(atoms: Any, results: Any, key: str | None) -> np.ndarray | None:
    from ase.stress import voigt_6_to_full_3x3_stress

    value = _find((results, atoms.info), key, STRESS_KEYS)
    if value is None and key is None:
        virial = _find((results, atoms.info), None, VIRIAL_KEYS)
        value = None if virial is None else -_square(virial, voigt_6_to_full_3x3_stress) / atoms.get_volume()
    return None if value is None else _square(value, voigt_6_to_full_3x3_stress)


def _square(value: Any, from_voigt: Any) -> np.ndarray:
    value = np.asarray(value, dtype=np.float64)
    return np.asarray(from_voigt(value)) if value.size == 6 else value.reshape(3, 3)
