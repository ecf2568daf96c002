"""Allegro and NequIP in LAMMPS against the same models in ASE."""

import re

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from lammps_models import HEAD, allegro, as_lammps, nequip, water
from lammps_runs import COMPUTES, OPERATORS, lammps, ready, states

import ddpkit
from ddpkit.inference.export import export

pytestmark = pytest.mark.long

BAR = 1.6021765e6  # of them are an eV/Å^3, as LAMMPS has it; CODATA of 2018 differs by 8e-8


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
    return model, path, 1e-12 if precision == "float64" else 1e-4


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


@pytest.mark.parametrize(("ranks", "variables"), [(1, None), (2, None), (3, None), (1, OPERATORS), (2, OPERATORS)])
@pytest.mark.parametrize("make", [water, triclinic, slab, in_a_box])
def test_forces_are_those_of_ase(make, ranks, variables, exported, tmp_path):
    model, path, tolerance = exported
    atoms, text = as_lammps(make())
    (tmp_path / "atoms").write_text(text)
    boundary = " ".join("p" if periodic else "f" for periodic in atoms.pbc)
    script = f"{HEAD}boundary {boundary}\nread_data atoms\npair_style ddpkit\npair_coeff * * {path} H O\n"
    (got,) = states(script + COMPUTES + "run 0\nREPORT\n", tmp_path, ranks, variables=variables)
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
    for way, (ranks, variables) in {"alone": (1, None), "ranks": (2, None), "steps of a GPU": (1, OPERATORS)}.items():
        for step in (1, 2):
            folder = tmp_path / f"{way}-{step}"
            folder.mkdir()
            (folder / "atoms").write_text(text)
            script = (
                f"{HEAD}boundary p p p\nread_data atoms\npair_style ddpkit\npair_coeff * * {path} H O\n"
                "velocity all create 300 4928 loop all\nfix nve all nve\nneigh_modify every 1 delay 0 check yes\n"
                f"timestep {step * 2.5e-4}\nthermo_style custom step etotal\nthermo {2 // step}\n"
                f"thermo_modify format float %.15g\nrun {80 // step}\n"
            )
            done = lammps(script, folder, ranks, variables)
            assert done.returncode == 0, done.stdout
            table = re.search(r"Step +TotEng *\n(.*?)Loop time", done.stdout, re.DOTALL)[1]
            totals[way, step] = np.array([float(line.split()[1]) for line in table.splitlines()])
            assert len(totals[way, step]) == 41
    is_exact = tolerance < 1e-8
    for way in ("ranks", "steps of a GPU"):
        np.testing.assert_allclose(totals[way, 1], totals["alone", 1], rtol=1e-9 if is_exact else 1e-3)
    for way in ("alone", "steps of a GPU") if is_exact else ():  # second order in the step
        short, long = (np.abs(totals[way, step] - totals[way, step][0]).max() for step in (1, 2))
        assert 3 < long / short < 5
