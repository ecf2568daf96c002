"""Allegro and NequIP in LAMMPS against the same models in ASE."""

import re

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from lammps_runs import COMPUTES, data, lammps, ready, states

import ddpkit
from ddpkit.inference.export import export
from ddpkit.models import Allegro, NequIP

pytestmark = pytest.mark.long

SPECIES = ("H", "O")
BAR = 1.6021765e6  # of them are an eV/Å^3, as LAMMPS has it; CODATA of 2018 differs by 8e-8
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


@pytest.fixture(
    scope="module",
    params=[(allegro, "float64"), (nequip, "float64"), (nequip, "mixed")],
    ids=lambda p: f"{p[0].__name__}-{p[1]}",
)
def exported(request, tmp_path_factory):
    """A model with random weights, its file, and how well what it computes is defined."""
    ready()
    make, precision = request.param
    torch.manual_seed(3)
    model = make(precision).eval()
    path = tmp_path_factory.mktemp("model") / "model.pt2"
    export(model, path)
    return model, path, 1e-10 if precision == "float64" else 1e-4


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


def triclinic():
    atoms = bulk("NaCl", "rocksalt", a=4.4) * (2, 2, 3)
    atoms.numbers = np.where(atoms.numbers == 11, 1, 8)
    atoms.rattle(0.1, seed=2)
    return atoms


def slab():
    atoms = water()
    atoms.cell[2, 2] = 40
    atoms.center(axis=2)
    atoms.pbc = [True, True, False]
    return atoms


def in_a_box():
    atoms = molecule("H2O")
    atoms.center(vacuum=15)
    atoms += Atoms("O", [[1, 1, 1]])  # without neighbours
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


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("make", [water, triclinic, slab, in_a_box])
def test_forces_are_those_of_ase(make, ranks, exported, tmp_path):
    model, path, tolerance = exported
    atoms, text = as_lammps(make())
    (tmp_path / "atoms").write_text(text)
    boundary = " ".join("p" if periodic else "f" for periodic in atoms.pbc)
    script = f"{HEAD}boundary {boundary}\nread_data atoms\npair_style ddpkit\npair_coeff * * {path} H O\n"
    (got,) = states(script + COMPUTES + "run 0\nREPORT\n", tmp_path, ranks)
    atoms.calc = ddpkit.Calculator(model)
    forces = atoms.get_forces()
    np.testing.assert_allclose(got.forces, forces, rtol=0, atol=tolerance * max(1, np.abs(forces).max()))
    assert got.energy == pytest.approx(atoms.get_potential_energy(), rel=tolerance)
    assert got.atoms[:, 8].sum() == pytest.approx(got.energy, rel=1e-12)
    if atoms.pbc.all():
        stress = -atoms.get_stress() * BAR  # xx yy zz yz xz xy
        virial = got.virial[[0, 1, 2, 5, 4, 3]]
        np.testing.assert_allclose(virial, stress, rtol=0, atol=tolerance * np.abs(stress).max())


def test_energy_is_conserved_and_ranks_agree(exported, tmp_path):
    _, path, tolerance = exported
    _, text = as_lammps(water())
    totals = {}
    for ranks in (1, 2):
        for step in (1, 2):
            folder = tmp_path / f"{ranks}-{step}"
            folder.mkdir()
            (folder / "atoms").write_text(text)
            script = (
                f"{HEAD}boundary p p p\nread_data atoms\npair_style ddpkit\npair_coeff * * {path} H O\n"
                "velocity all create 300 4928 loop all\nfix nve all nve\nneigh_modify every 1 delay 0 check yes\n"
                f"timestep {step * 2.5e-4}\nthermo_style custom step etotal\nthermo {2 // step}\n"
                f"thermo_modify format float %.15g\nrun {80 // step}\n"
            )
            done = lammps(script, folder, ranks)
            assert done.returncode == 0, done.stdout
            table = re.search(r"Step +TotEng *\n(.*?)Loop time", done.stdout, re.DOTALL)[1]
            totals[ranks, step] = np.array([float(line.split()[1]) for line in table.splitlines()])
            assert len(totals[ranks, step]) == 41
    np.testing.assert_allclose(totals[1, 1], totals[2, 1], rtol=10 * tolerance)
    if tolerance < 1e-8:  # second order in the step
        short, long = (np.abs(totals[1, step] - totals[1, step][0]).max() for step in (1, 2))
        assert 3 < long / short < 5
