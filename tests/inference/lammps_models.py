"""Small models of this package and what they compute, for LAMMPS."""

import numpy as np
from ase import Atoms
from ase.build import molecule
from lammps_runs import data

from ddpkit.models import Allegro, NequIP

SPECIES = ("H", "O")
SHARED = {
    "r_max": 4.0,
    "avg_num_neighbors": 12.0,
    "cutoffs": [[3.0, 4.0], [4.0, 3.7]],
    "zbl": True,
    "scales": [0.3, 0.4],
    "shifts": [-1.0, -2.0],
}


def allegro(precision):
    return Allegro(
        SPECIES, l_max=1, num_scalar_features=8, num_tensor_features=4, embed_dim=4, scalar_embed_width=8, scalar_embed_dim=8,
        mlp_depth=1, mlp_width=8, readout_width=8, precision=precision, **SHARED,
    )  # fmt: skip


def nequip(precision):
    return NequIP(SPECIES, l_max=1, num_layers=3, num_features=4, radial_width=8, precision=precision, **SHARED)


def water():
    """27 molecules, turned at random."""
    random = np.random.default_rng(1)
    atoms = Atoms(cell=[9.3] * 3, pbc=True)
    for place in np.ndindex(3, 3, 3):
        one = molecule("H2O")
        one.rotate(random.uniform(0, 360), random.normal(size=3))
        one.translate(3.1 * np.array(place) + random.uniform(-0.1, 0.1, 3))
        atoms += one
    return atoms


def as_lammps(atoms):
    """The atoms in a cell whose first vector is along x and whose second lies in the plane of x and y, and the data file."""
    turned = atoms.copy()
    turned.set_cell(atoms.cell.standard_form()[0], scale_atoms=True)
    cell = turned.cell.array
    tilt = cell[1, 0], cell[2, 0], cell[2, 1]
    types = np.where(atoms.numbers == 8, 2, 1)
    box = [(0.0, size) for size in cell.diagonal()]
    if turned.pbc.all():
        turned.wrap()
    return turned, data(turned.positions, types, box, tuple(map(float, tilt)) if np.abs(tilt).max() > 1e-8 else None)


HEAD = "units metal\natom_style atomic\nnewton on\n"
