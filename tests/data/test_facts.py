import numpy as np
import pytest
from helpers import molecule

from ddpkit import InputError
from ddpkit.data import statistics, write_prepared


def numbers_and_energies(rng, energies):
    for _ in range(60):
        atoms = rng.choice([1, 6, 8], size=int(rng.integers(3, 9)))
        yield molecule(rng, len(atoms), numbers=atoms, energy=float(sum(energies[int(z)] for z in atoms)))


def test_facts_by_hand(tmp_path):
    rng = np.random.default_rng(0)
    frames = write_prepared(tmp_path / "set", numbers_and_energies(rng, {1: -13.6, 6: -1030.0, 8: -2040.0}), r_max=2.0)
    chosen = np.arange(5, 50)
    facts = statistics(frames, chosen, 2.0)
    given = [frames.frame(int(i)) for i in chosen]
    atoms = np.concatenate([f.numbers for f in given])
    forces = np.concatenate([f.forces for f in given])
    np.testing.assert_allclose(facts.shifts, [-13.6, -1030, -2040], rtol=1e-3)
    assert facts.species == ("H", "C", "O")
    overall = np.mean(forces**2)
    for scale, z in zip(facts.scales, (1, 6, 8), strict=True):
        mine = forces[atoms == z] ** 2
        n = len(mine)
        assert scale == pytest.approx(np.sqrt((mine.mean() * n + 10 * overall) / (n + 10)))
    pairs = sum((np.linalg.norm(f.positions[:, None] - f.positions, axis=-1) < 2.0).sum() - len(f) for f in given)
    assert facts.avg_num_neighbors == pytest.approx(pairs / len(atoms))


def test_shifts_of_one_molecule_stay_near_what_is_known_of_its_atoms(tmp_path):
    rng = np.random.default_rng(0)
    water = np.array([8, 1, 1])
    known = {"H": -13.6, "O": -2041.0}
    given = [molecule(rng, 3, numbers=water, energy=-2080.0 + 0.01 * i) for i in range(10)]
    frames = write_prepared(tmp_path / "set", given, r_max=3.0, atom_energies=known)
    assert statistics(frames, np.arange(10), 3.0).shifts.tolist() == [-13.6, -2041.0]
    of_more = statistics(frames, np.arange(10), 3.0, species=("O", "C", "H"))
    assert of_more.species == ("O", "C", "H")
    assert of_more.shifts.tolist() == [-2041.0, (-2041.0 - 13.6) / 2, -13.6]
    fitted = statistics(frames, np.arange(10), 3.0, isolated=False).shifts
    assert 2 * fitted[0] + fitted[1] == pytest.approx(-2079.955, abs=0.01)
    assert abs(fitted - [-13.6, -2041.0]).max() < 12
    some = write_prepared(tmp_path / "some", given, r_max=3.0, atom_energies={"O": -2041.0})
    with pytest.raises(InputError, match=r"isolated atoms of O, but not of H: add a frame .* data\.shifts=fitted"):
        statistics(some, np.arange(10), 3.0)
    assert np.isfinite(statistics(some, np.arange(10), 3.0, isolated=False).shifts).all()
    nothing = write_prepared(tmp_path / "other", given, r_max=3.0)
    assert 3 * np.mean(statistics(nothing, np.arange(10), 3.0).shifts) == pytest.approx(-2079.955, abs=1)


def test_a_species_that_is_not_in_the_training_part_is_finite(tmp_path):
    rng = np.random.default_rng(0)
    given = [
        molecule(rng, 3, numbers=np.array([8, 1, 1]), forces=np.zeros((3, 3))),
        molecule(rng, 2, numbers=np.array([6, 1])),
    ]
    frames = write_prepared(tmp_path / "set", given, r_max=3.0)
    facts = statistics(frames, np.array([0]), 3.0)
    assert np.isfinite(facts.shifts).all()
    assert (facts.scales > 0).all()
