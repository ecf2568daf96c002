from collections import Counter

import numpy as np
import pytest
from ase.build import molecule as ase_molecule
from helpers import crystal

from ddpkit import InputError
from ddpkit.data import PreparedSet, crystals, generate, generated, molecules
from ddpkit.data.frame import NUMBERS, SYMBOLS


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "small"
    return generate("generated", path, frames=8, seed=3, processes=2, progress=False)


def test_molecules_do_not_depend_on_the_number_of_processes(small, tmp_path):
    alone = generate("generated", tmp_path / "alone", frames=8, seed=3, processes=1, progress=False)
    assert bytes_of(small.path) == bytes_of(alone.path)
    frame, task = small.frame(0), molecules.plan(8, 3)[0]
    other = molecules.plan(8, 4)
    assert (frame.group, frame.subset) == (task.system.name, task.system.subset)
    assert other != molecules.plan(8, 3)


def test_molecules_are_labelled_whole_and_at_several_hundred_kelvin(small):
    assert len(small) == 8
    assert small.manifest["labels"] == molecules.LABELS
    assert set(small.species) <= set(small.atom_energies)
    for i in range(len(small)):
        frame = small.frame(i)
        bound = sum(small.atom_energies[SYMBOLS[z]] for z in frame.numbers)
        assert -12 * len(frame) < frame.energy - bound < -1 * len(frame)
        assert 0.2 < np.sqrt(np.mean(frame.forces**2)) < 3.0
        np.testing.assert_allclose(frame.forces.sum(axis=0), 0, atol=1e-3)


def test_labels_are_gfn2_of_the_reference_program():
    # The water energy that tblite's own ASE calculator gives, and forces from its energies.
    from tblite.ase import TBLite

    atoms = ase_molecule("H2O")
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    energy, forces = molecules.Labeller(atoms.numbers, atoms.positions)(atoms.positions)
    assert energy == pytest.approx(atoms.get_potential_energy(), abs=1e-5)
    np.testing.assert_allclose(forces, atoms.get_forces(), atol=1e-4)
    label = molecules.Labeller(atoms.numbers, atoms.positions)
    step = np.zeros((3, 3))
    step[1, 2] = 1e-3
    slope = (label(atoms.positions + step)[0] - label(atoms.positions - step)[0]) / 2e-3
    assert -slope == pytest.approx(forces[1, 2], abs=1e-3)


@pytest.mark.parametrize("frames", [1, 7, 300, 5000])
def test_the_plan_gives_as_many_frames_as_asked_for(frames):
    plan = molecules.plan(frames, 0)
    assert sum(t.frames for t in plan) == frames
    assert len({(t.number, t.replica) for t in plan}) == len(plan)
    if frames >= 300:
        subsets = Counter(t.system.subset for t in plan)
        assert set(subsets) == set(molecules._SHARES)
        assert {t.system.name for t in plan} == {s.name for s in molecules.systems()}
        charged = sum(t.frames for t in plan if t.system.charge != 0)
        assert 0.02 < charged / frames < 0.15


def test_every_system_can_be_built_with_an_even_number_of_electrons():
    sizes = {}
    for system in molecules.systems():
        numbers, positions = molecules.build(system, np.random.default_rng(0))
        assert (numbers.sum() - system.charge) % 2 == 0, system.name
        distances = np.linalg.norm(positions[:, None] - positions, axis=-1) + 9 * np.eye(len(numbers))
        assert distances.min() > 0.7, system.name
        sizes.setdefault(system.subset, []).append(len(numbers))
        assert {SYMBOLS[z] for z in numbers} <= set(molecules._UNPAIRED)
    assert min(sizes["Drug-like molecules"]) >= 20
    assert min(sizes["Dipeptides"]) >= 20
    assert max(map(max, sizes.values())) <= 50


def test_crystal_forces_and_stress_are_derivatives_of_the_energy():
    rng = np.random.default_rng(0)
    frame = crystal(rng, 5, 4.0, numbers=np.array([3, 8, 26, 57, 1]))

    def energy(positions, cell):
        changed = crystal(rng, 5, numbers=frame.numbers, positions=positions, cell=cell)
        return crystals.label(changed)[0]

    _, forces, stress = crystals.label(frame)
    h = 1e-5
    for atom in range(5):
        for axis in range(3):
            step = np.zeros((5, 3))
            step[atom, axis] = h
            slope = (energy(frame.positions + step, frame.cell) - energy(frame.positions - step, frame.cell)) / (2 * h)
            assert -slope == pytest.approx(forces[atom, axis], rel=1e-5, abs=1e-6)
    volume = abs(np.linalg.det(frame.cell))
    for i in range(3):
        for j in range(3):
            strain = np.zeros((3, 3))
            strain[i, j] = h
            plus, minus = np.eye(3) + strain, np.eye(3) - strain
            slope = (
                energy(frame.positions @ plus, frame.cell @ plus) - energy(frame.positions @ minus, frame.cell @ minus)
            ) / (2 * h)
            assert slope / volume == pytest.approx(stress[i, j], rel=1e-5, abs=1e-7)


def test_the_pair_potential_ends_smoothly_at_its_cutoff():
    def at(r):
        frame = crystal(
            np.random.default_rng(0),
            2,
            numbers=np.array([26, 8]),
            positions=np.array([[0, 0, 0], [0, 0, r]]),
            cell=np.eye(3) * 40,
        )
        return crystals.label(frame)

    base = float(crystals.atom_energy(np.array([26, 8])).sum())
    assert at(6.1)[0] == base
    assert abs(at(5.999)[0] - base) < 1e-9
    assert np.abs(at(5.999)[1]).max() < 1e-6
    assert np.abs(at(2.5)[1]).max() > 1e-2


def test_crystals_have_the_make_up_of_mptrj(tmp_path):
    frames = 120
    made = generate("generated_crystals", tmp_path / "a", frames=frames, seed=1, progress=False)
    again = generate("generated_crystals", tmp_path / "b", frames=frames, seed=1, progress=False)
    assert bytes_of(made.path) == bytes_of(again.path)
    assert len(made) == frames
    assert len(made.species) == 89
    assert not set(made.species) & {"Po", "At", "Rn", "Fr", "Ra"}
    assert max(NUMBERS[s] for s in made.species) == 94
    assert made.atoms.min() >= 2
    assert made.atoms.max() <= 150
    assert 14 <= np.median(made.atoms) <= 34
    assert "no quantum chemistry" in made.manifest["labels"]
    assert 20 < made.manifest["edges"] / made.manifest["atoms"] < 100
    assert made.frame(0).stress is not None
    assert np.sqrt(np.mean(made.array("forces") ** 2)) < 2


def test_the_cache_keeps_sets_by_size_and_seed(tmp_path):
    first = generated("generated_crystals", tmp_path, frames=5)
    before = (first / "manifest.json").stat().st_mtime_ns
    assert generated("generated_crystals", tmp_path, frames=5) == first
    assert (first / "manifest.json").stat().st_mtime_ns == before
    assert generated("generated_crystals", tmp_path, frames=6) != first
    assert generated("generated_crystals", tmp_path, frames=5, seed=1) != first
    assert len(PreparedSet(first)) == 5


def test_unknown_sets_are_refused(tmp_path):
    with pytest.raises(InputError, match="no built-in set"):
        generated("imagined", tmp_path, frames=5)
    with pytest.raises(InputError, match="at least one"):
        generate("generated_crystals", tmp_path / "a", frames=0)
