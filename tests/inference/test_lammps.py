"""The plugin against LAMMPS' own lj/cut, and several ranks against one, in cells of all kinds."""

import numpy as np
import pytest
from lammps_runs import COMPUTES, data, lammps, ready, same, states
from lammps_toys import LJ_CUT, Densities, LennardJones, metadata

from ddpkit.inference.package import compile_package


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    ready()
    folder = tmp_path_factory.mktemp("packages")
    for name, model in (("pairs", LennardJones()), ("densities", Densities())):
        compile_package(model, metadata(model), folder / f"{name}.pt2", lambda _: None)
    return folder


HEAD = """
units metal
atom_style atomic
newton on
"""
MODEL = "pair_style ddpkit {}\npair_coeff * * {}/{}.pt2 H O"
SETTINGS = """
neighbor 1.0 bin
neigh_modify every 1 delay 0 check yes
timestep 0.002
fix nve all nve
"""
RUN = "run 20\nREPORT\n"


def grid(*counts, spacing=3.1, tilt=None, box=None):
    """Atoms near the points of a lattice, of two types, as a data file."""
    random = np.random.default_rng(sum(counts))
    points = np.stack(np.meshgrid(*map(np.arange, counts), indexing="ij"), -1).reshape(-1, 3) + 0.5
    edges = np.diag(np.array(counts) * spacing)
    if tilt:
        edges[1, 0], edges[2, 0], edges[2, 1] = tilt
    positions = points / counts @ edges + random.uniform(-0.25, 0.25, points.shape)
    if box is None:
        box = [(0, size) for size in edges.diagonal()]
    return data(
        positions, random.choice([1, 2], len(points), p=[0.6, 0.4]), box, tilt, random.normal(0, 6, points.shape)
    )


LIQUID = ("boundary p p p", grid(5, 6, 4))
TRICLINIC = ("boundary p p p", grid(5, 4, 4, tilt=(1.7, -0.9, 0.6)))
SLAB = ("boundary p p f", grid(5, 5, 2, box=[(0, 15.5), (0, 15.5), (-12, 25)]))
SHRINKING = ("boundary p s m", SLAB[1])
SMALL = ("boundary p p p", grid(2, 1, 3))
MOLECULE = (
    "boundary f f f",
    data(
        np.array([[1.0, 2, 3], [3.9, 2, 3], [1, 5.1, 3], [2, 3.4, 6.2], [25, 25, -25]]),
        [1, 1, 2, 2, 1],
        [(-30, 30)] * 3,
        velocities=np.array([[1.0, 0, 2], [0, -3, 0], [0, 0, 1], [-1, 2, 0], [3, 3, 3]]),
    ),
)


def script(pair, folder, box=LIQUID, run=RUN, grid="* * *", head=HEAD):
    boundary, atoms = box
    folder.mkdir()
    (folder / "atoms").write_text(atoms)
    return f"{head}processors {grid}\n{boundary}\nread_data atoms\n{SETTINGS}{pair}\n{COMPUTES}{run}"


SCALED = "run 5\nREPORT\nchange_box all x scale 1.06 y scale 0.97 remap\nrun 10\nREPORT\n"
TILTED = "run 5\nREPORT\nchange_box all triclinic\nchange_box all xy delta 1.3 xz delta -0.6 remap\nrun 10\nREPORT\n"
DELETED = "run 5\nREPORT\nregion half block INF 7 INF INF INF INF\ndelete_atoms region half compress no\nrun 10\nREPORT\n"
PRESSED = "unfix nve\nfix npt all npt temp 300 300 0.1 aniso 0 0 1\nrun 30\nREPORT\n"
TURNED = "run 3\nset group all type 1\nset type 1 type/fraction 2 0.7 3\nrun 5\nREPORT\nrun 4 pre no\nREPORT\n"
MINIMIZED = "min_style fire\nminimize 0 1e-3 20 100\nREPORT\n"
RERUN = "dump kept all custom 2 kept id type x y z\nrun 6\nrerun kept first 4 dump x y z\nREPORT\n"
TILED = "comm_style tiled\nfix balance all balance 5 1.0 rcb\nrun 20\nREPORT\n"

CASES = {
    "liquid": ({}, 2),
    "by four": ({"grid": "2 2 1"}, 4),
    "in slices": ({"grid": "1 3 1"}, 3),
    "triclinic": ({"box": TRICLINIC}, 2),
    "slab": ({"box": SLAB}, 2),
    "slab on ranks without atoms": ({"box": SLAB, "grid": "1 1 3"}, 3),
    "shrink-wrapped": ({"box": SHRINKING}, 2),
    "molecule": ({"box": MOLECULE, "grid": "2 2 1"}, 4),
    "smaller than the cutoff": ({"box": SMALL}, 2),
    "scaled": ({"run": SCALED}, 2),
    "tilted": ({"run": TILTED}, 2),
    "atoms deleted": ({"run": DELETED}, 2),
    "npt": ({"run": PRESSED}, 2),
    "types changed": ({"run": TURNED}, 2),
    "minimized": ({"run": MINIMIZED}, 2),
    "rerun": ({"run": RERUN}, 2),
    "tiled": ({"run": TILED}, 2),
}


def model(packages, name, options=""):
    return MODEL.format(options, packages, name)


@pytest.mark.parametrize("case", CASES)
def test_pairs_equal_lj_cut(case, packages, tmp_path):
    parts, ranks = CASES[case]
    alone = {name: part for name, part in parts.items() if name != "grid"}
    theirs = states(script(LJ_CUT, tmp_path / "theirs", **alone), tmp_path / "theirs")
    for number, given in ((1, alone), (ranks, parts)):
        folder = tmp_path / f"ours{number}"
        same(states(script(model(packages, "pairs"), folder, **given), folder, number), theirs)


@pytest.mark.parametrize(
    ("box", "grid", "ranks"),
    [
        (LIQUID, "* * *", 2), (LIQUID, "2 2 1", 4), (LIQUID, "1 1 3", 3), (TRICLINIC, "* * *", 2), (SMALL, "* * *", 2),
        (SLAB, "1 1 3", 3), (MOLECULE, "2 2 1", 4),
    ],
)  # fmt: skip
def test_exchanged_rows_are_those_of_one_rank(box, grid, ranks, packages, tmp_path):
    one = script(model(packages, "densities"), tmp_path / "one", box)
    several = script(model(packages, "densities"), tmp_path / "several", box, grid=grid)
    same(states(several, tmp_path / "several", ranks), states(one, tmp_path / "one"))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("operators", ["", "1"])
def test_chunks_and_operators_of_a_gpu_compute_the_same(chunk, operators, packages, tmp_path):
    variables = {"DDPKIT_LAMMPS_OPERATORS": operators} if operators else {}
    whole = script(model(packages, "pairs"), tmp_path / "whole", SLAB)
    parts = script(model(packages, "pairs", f"chunk {chunk}"), tmp_path / "parts", SLAB)
    same(states(parts, tmp_path / "parts", 2, variables=variables), states(whole, tmp_path / "whole"))


@pytest.mark.parametrize("box", [TRICLINIC, MOLECULE])
def test_operators_of_a_gpu_make_the_same_tables(box, packages, tmp_path):
    one = script(model(packages, "densities"), tmp_path / "one", box)
    other = script(model(packages, "densities"), tmp_path / "other", box)
    variables = {"DDPKIT_LAMMPS_OPERATORS": "1"}
    same(states(other, tmp_path / "other", 2, variables=variables), states(one, tmp_path / "one"))


def test_several_types_are_one_element(packages, tmp_path):
    text = script(model(packages, "densities"), tmp_path / "two")
    text = text.replace("densities.pt2 H O", "densities.pt2 O O")
    more = text.replace("densities.pt2 O O", "densities.pt2 O")
    (tmp_path / "one").mkdir()
    atoms = [line.split() for line in LIQUID[1].splitlines()]
    as_one = [" ".join([line[0], "1", *line[2:]]) if len(line) == 5 else " ".join(line) for line in atoms]
    text_of_one = "\n".join(as_one).replace("2 atom types", "1 atom types").replace("\n2 16\n", "\n")
    (tmp_path / "one" / "atoms").write_text(text_of_one.replace("1 12", "1 12"))
    two, one = states(text.replace("run 20", "run 0"), tmp_path / "two"), states(more.replace("run 20", "run 0"), tmp_path / "one")
    np.testing.assert_allclose(two[0].forces, one[0].forces, atol=1e-12)
    assert two[0].energy == pytest.approx(one[0].energy, rel=1e-14)


def test_a_run_goes_on_from_a_restart_file(packages, tmp_path):
    pair = model(packages, "densities")
    through = script(pair, tmp_path / "through")
    again = script(pair, tmp_path / "again", run="run 12\nwrite_restart half\n")
    again += f"clear\nread_restart half\n{SETTINGS}{pair}\n{COMPUTES}run 8\nREPORT\n"
    same(states(again, tmp_path / "again", 2), states(through, tmp_path / "through"))


def test_a_model_is_added_to_another_style(packages, tmp_path):
    both = script(
        f"{LJ_CUT.replace('lj/cut 6.0', 'hybrid/overlay lj/cut 6.0 ddpkit').replace('1 1 ', '1 1 lj/cut ')}"
        .replace("1 2 ", "1 2 lj/cut ").replace("2 2 ", "2 2 lj/cut ")
        + f"\npair_coeff * * ddpkit {packages}/densities.pt2 H O",
        tmp_path / "both",
        run="run 0\nREPORT\n",
    )  # fmt: skip
    parts = [
        states(script(pair, tmp_path / name, run="run 0\nREPORT\n"), tmp_path / name)[0]
        for name, pair in (("model", model(packages, "densities")), ("lj", LJ_CUT))
    ]
    (got,) = states(both, tmp_path / "both", 2)
    assert got.energy == pytest.approx(sum(part.energy for part in parts), rel=1e-12)
    np.testing.assert_allclose(got.forces, sum(part.forces for part in parts), atol=1e-10)
    np.testing.assert_allclose(got.virial, sum(part.virial for part in parts), rtol=1e-10)


def test_energy_is_conserved(packages, tmp_path):
    text = script(model(packages, "densities"), tmp_path / "nve", run="")
    text += "thermo_style custom step etotal ke\nthermo 50\nthermo_modify format float %.12g\nrun 200\n"
    done = lammps(text, tmp_path / "nve", 2)
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()[:1].isdigit() and len(line.split()) == 3]
    total, kinetic = np.array(rows, float)[:, 1:].T
    assert np.abs(kinetic - kinetic[0]).max() > 1
    assert np.abs(total - total[0]).max() < 1e-3 * np.abs(kinetic - kinetic[0]).max()
