"""Steps that a GPU replays against those that its host launches, and ASE's."""

import numpy as np
import pytest
import torch
from lammps_models import HEAD, allegro, as_lammps, nequip, water
from lammps_runs import CAPTURES, COMPUTES, ONE_LIST, TENTH, moving, ready, same, states

import ddpkit
from ddpkit.inference.export import export

pytestmark = [pytest.mark.gpu, pytest.mark.long]

LAUNCHED = {"DDPKIT_LAMMPS_REPLAY": "0"}


@pytest.fixture(scope="module", params=[allegro, nequip], ids=lambda make: make.__name__)
def exported(request, tmp_path_factory):
    ready()
    torch.manual_seed(3)
    model = request.param("float64").eval()
    path = tmp_path_factory.mktemp("model") / "model.pt2"
    export(model, path, device="cuda")
    return model, path


def found(path, box, run, folder, ranks=1, variables=None, style="ddpkit"):
    boundary, atoms = box
    folder.mkdir()
    (folder / "atoms").write_text(atoms)
    text = f"{HEAD}{boundary}\nread_data atoms\npair_style {style}\npair_coeff * * {path} H O\n{COMPUTES}{run}"
    return states(text, folder, ranks, variables=variables)


def captures(folder, number):
    return int((folder / f"captures{number}").read_text())


PERIODIC = "boundary p p p", as_lammps(water())[1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_replayed_steps_are_those_that_are_launched(ranks, exported, tmp_path):
    """Over rebuilds, a denser cell, atoms that change ranks, and a run whose sizes all fit."""
    model, path = exported
    run = (
        "velocity all create 300 4928 loop all\nfix nve all nve\ntimestep 2.5e-4\nneighbor 0.2 bin\n"
        f"neigh_modify every 1 delay 0 check yes\n{CAPTURES}{TENTH(1)}{TENTH(2)}"
        f"change_box all x scale 0.95 y scale 0.95 z scale 0.95 remap\n{TENTH(3)}{TENTH(4)}"
    )
    replayed = found(path, PERIODIC, run, tmp_path / "replayed", ranks)
    same(replayed, found(path, PERIODIC, run, tmp_path / "launched", ranks, LAUNCHED), 1e-9)
    counts = [captures(tmp_path / "replayed", n) for n in (1, 2, 3, 4)]
    if ranks == 2 and type(model).__name__ == "NequIP":
        assert counts == [0] * 4
    else:
        assert ranks <= counts[1] < counts[2]
        assert counts[3] <= counts[2] + ranks


@pytest.mark.parametrize(("style", "ranks"), [("ddpkit", 1), ("ddpkit", 2), ("ddpkit chunk 7", 1)])
def test_forces_are_those_of_ase(style, ranks, exported, tmp_path):
    model, path = exported
    if "chunk" in style and type(model).__name__ == "NequIP":
        pytest.skip("a model that passes messages is not computed in chunks")
    (got,) = found(path, PERIODIC, "run 0\nREPORT\n", tmp_path / "run", ranks, style=style)
    atoms, _ = as_lammps(water())
    atoms.calc = ddpkit.Calculator(model)
    forces = atoms.get_forces()
    np.testing.assert_allclose(got.forces, forces, rtol=0, atol=1e-11 * max(1, np.abs(forces).max()))
    assert got.energy == pytest.approx(atoms.get_potential_energy(), rel=1e-11)


@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_that_does_not_suffice_divides_the_atoms(ranks, exported, tmp_path):
    model, path = exported
    run = f"fix nve all nve\ntimestep 2.5e-4\n{CAPTURES}{TENTH(1)}"
    little = {"DDPKIT_LAMMPS_MEMORY": "0.0005"}
    divided = found(path, PERIODIC, run, tmp_path / "divided", ranks, little)
    same(divided, found(path, PERIODIC, run, tmp_path / "launched", ranks, LAUNCHED), 1e-9)
    if type(model).__name__ == "Allegro":
        assert captures(tmp_path / "divided", 1) == 0


@pytest.mark.parametrize(("rate", "spacing"), [(-5, 4.2), (5, 2.6)])
def test_edges_that_do_not_fit_have_the_step_made_again(rate, spacing, exported, tmp_path):
    _, path = exported
    run = f"fix nve all nve\ntimestep 0.001\n{ONE_LIST}{CAPTURES}{TENTH(1)}{TENTH(2)}{TENTH(3)}"
    box = moving(rate, spacing)
    replayed = found(path, box, run, tmp_path / "replayed")
    same(replayed, found(path, box, run, tmp_path / "launched", 1, LAUNCHED), 1e-9)
    assert captures(tmp_path / "replayed", 3) > 2


def test_a_replayed_run_is_the_same_each_time(exported, tmp_path):
    _, path = exported
    run = f"velocity all create 300 4928 loop all\nfix nve all nve\ntimestep 2.5e-4\n{CAPTURES}{TENTH(1)}{TENTH(2)}"
    first, second = (found(path, PERIODIC, run, tmp_path / name) for name in ("first", "second"))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.atoms, other.atoms)
