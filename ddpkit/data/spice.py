"""SPICE files: one HDF5 group for each molecule or cluster, in hartree and bohr (Eastman et al., Sci. Data 10, 11 (2023))."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ddpkit.data.frame import Frame
from ddpkit.data.prepared import Block, Filters
from ddpkit.errors import InputError

# CODATA 2018
HARTREE = 27.211386245988  # eV
BOHR = 0.529177210903  # Å

_GROUPS_IN_A_PIECE = 32
_UNITS = {"conformations": "bohr", "dft_total_energy": "hartree", "dft_total_gradient": "hartree/bohr"}
_BRACKET = re.compile(r"\[([^\]]*)\]")
_CHARGE = re.compile(r"(\++|-+|[+-]\d+)(?::\d+)?$")


class Spice:
    """A SPICE file as a source of frames.

    Raises:
        InputError: it is no HDF5 file, or holds no groups in the SPICE layout.
    """

    unit = "molecule"

    def __init__(self, path: Path) -> None:
        self.files = [path]
        self.settings: dict[str, Any] = {"made_by": "ddpkit data prepare spice"}
        self.facts: dict[str, Any] = {
            "labels": "dft_total_energy and dft_total_gradient of SPICE (wB97M-D3(BJ)/def2-TZVPPD)",
            "keys": {"energy": "dft_total_energy", "forces": "dft_total_gradient"},
        }
        with _open(path) as file:
            self._names = list(file)
            if not any("conformations" in file[name] for name in self._names[:1000]):
                raise InputError(f"{path} holds no groups with conformations: it is no SPICE file")
        self.total = len(self._names)

    def pieces(self, position: Any) -> Iterator[tuple[Any, Any, int]]:
        """Some groups at a time."""
        for start in range(position or 0, len(self._names), _GROUPS_IN_A_PIECE):
            names = self._names[start : start + _GROUPS_IN_A_PIECE]
            yield names, start + len(names), len(names)

    def blocks(self, r_max: float, filters: Filters) -> Callable[[list[str]], Block]:
        """Reads the groups of a piece."""
        return partial(_read, self.files[0], r_max, filters)

    def done(self, position: Any) -> int:
        """Groups done."""
        return position or 0


def _open(path: Path) -> Any:
    import h5py

    try:
        return h5py.File(path, "r")
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: give the path of a SPICE file") from error
    except OSError as error:
        raise InputError(f"{path} is no readable HDF5 file ({error}): download it again") from error


def _read(path: Path, r_max: float, filters: Filters, names: list[str]) -> Block:
    with _open(path) as file:
        try:
            return Block.of((frame for name in names for frame in _frames(path, name, file[name])), r_max, filters)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error}): download it again") from error


def _frames(path: Path, name: str, group: Any) -> Iterator[Frame]:
    """The conformations of one group; none where it is empty."""
    missing = [key for key in ("atomic_numbers", "smiles", *_UNITS) if key not in group]
    if missing:
        raise InputError(f"group {name!r} of {path} has no {', '.join(missing)}: it is not in the SPICE layout")
    for key, unit in _UNITS.items():
        given = group[key].attrs.get("units", unit)
        if given != unit:
            raise InputError(f"{key} of group {name!r} in {path} is in {given}, not {unit}: convert the file")
    smiles = group["smiles"].asstr()[0]
    subset = group["subset"].asstr()[0] if "subset" in group else ""
    numbers = group["atomic_numbers"][:].astype(np.int64)
    energies = group["dft_total_energy"][:] * HARTREE
    count = len(energies)
    if count == 0:
        return
    shape = (count, len(numbers), 3)
    positions, gradients = group["conformations"][:], group["dft_total_gradient"][:]
    if positions.shape != shape or gradients.shape != shape:
        raise InputError(
            f"group {name!r} of {path} has arrays of shapes {positions.shape} and {gradients.shape} where {shape} was expected: "
            "download the file again"
        )
    charge = formal_charge(smiles)
    positions = positions.astype(np.float64) * BOHR
    forces = gradients.astype(np.float64) * (-HARTREE / BOHR)
    for i in range(count):
        yield Frame(
            numbers, positions[i], float(energies[i]), forces[i], charge=charge, subset=subset, group=name,
            name=f"conformation {i} of group {name!r} of {path}",
        )  # fmt: skip


def formal_charge(smiles: str) -> int:
    """Total charge: the sum of the formal charges of a SMILES string's bracket atoms."""
    total = 0
    for atom in _BRACKET.findall(smiles):
        if found := _CHARGE.search(atom):
            sign = found[1]
            total += int(sign) if sign[-1].isdigit() else len(sign) * (1 if sign[0] == "+" else -1)
    return total
