"""Forces of an exported model in LAMMPS, on one rank or on several."""

import subprocess
import tempfile
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.lammps import Prism
from ase.io.lammpsdata import write_lammps_data
from numpy.typing import NDArray

from ddpkit.errors import InputError
from ddpkit.experiments.inference import cause, lammps

_ROOM = 2.0  # Å around atoms where there are no periodic images
_SCRIPT = """units metal
atom_style atomic
newton on
boundary {boundary}
box tilt large
read_data atoms.data
pair_style ddpkit
pair_coeff * * {package} {species}
run 0
write_dump all custom forces id fx fy fz modify sort id format float %.17g
"""


def forces(package: Path, atoms: Atoms, ranks: int) -> NDArray[np.float64]:
    """`[atoms, 3]` eV/Å, by `ddpkit lammps` on so many ranks.

    Raises:
        InputError: LAMMPS cannot compute them; the sentence is its own.
    """
    atoms = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    if open_axes := [axis for axis in range(3) if not atoms.pbc[axis]]:
        atoms.center(vacuum=_ROOM, axis=open_axes)
    prism = Prism(atoms.cell, atoms.pbc)  # LAMMPS wants the cell's first vector along x
    species = sorted(set(atoms.symbols))
    boundary = " ".join("p" if periodic else "f" for periodic in atoms.pbc)
    with tempfile.TemporaryDirectory(prefix="ddpkit-md-check-") as name:
        folder = Path(name)
        write_lammps_data(folder / "atoms.data", atoms, specorder=species, masses=True, prismobj=prism)
        script = _SCRIPT.format(boundary=boundary, package=package.resolve(), species=" ".join(species))
        (folder / "script").write_text(script)
        command = [*lammps(ranks), "-in", "script", "-log", "none"]
        done = subprocess.run(
            command,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode or not (folder / "forces").is_file():
            raise InputError(
                f"LAMMPS on {ranks} rank{'s' * (ranks > 1)} ended with {done.returncode}: {cause(done.returncode, done.stdout)}"
            )
        rotated = np.loadtxt(folder / "forces", skiprows=9, ndmin=2)[:, 1:]
    forces: NDArray[np.float64] = prism.vector_to_ase(rotated)
    return forces
