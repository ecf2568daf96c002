import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator

from ddpkit import InputError
from ddpkit.data import PreparedSet, prepare, read_ase
from ddpkit.data.ase_files import AseFiles, atoms_of
from ddpkit.data.prepared import Filters


def labelled(count=4, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        atoms = Atoms("Ar4", rng.uniform(0, 5, size=(4, 3)), cell=5 * np.eye(3) + 0.1, pbc=True)
        model = LennardJones(sigma=2.0, rc=4.0, smooth=True)
        energy, forces, stress = model.get_potential_energy(atoms), model.get_forces(atoms), model.get_stress(atoms)
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces, stress=stress)
        made.append(atoms)
    return made


@pytest.mark.parametrize("name", ["a.extxyz", "a.traj", "a.db", "a.json"])
def test_formats_keep_labels(tmp_path, name):
    given = labelled()
    ase.io.write(tmp_path / name, given)
    for frame, atoms in zip(read_ase(tmp_path / name), given, strict=True):
        np.testing.assert_allclose(frame.energy, atoms.get_potential_energy(), atol=1e-6)
        np.testing.assert_allclose(frame.forces, atoms.get_forces(), atol=1e-6)
        np.testing.assert_allclose(frame.stress, atoms.get_stress(voigt=False), atol=1e-6)
        np.testing.assert_allclose(frame.cell, atoms.cell[:], atol=1e-6)
        np.testing.assert_array_equal(frame.numbers, atoms.numbers)
        assert frame.pbc.all()


@pytest.mark.parametrize("name", ["a.extxyz", "a.traj"])
def test_frames_become_atoms_with_the_same_labels(tmp_path, name):
    molecule = Atoms("H2", [[0, 0, 0], [0, 0, 0.7]])
    molecule.calc = SinglePointCalculator(molecule, energy=-1.0, forces=np.eye(3)[:2])
    ase.io.write(tmp_path / "given.traj", [*labelled(2), molecule])
    frames = list(read_ase(tmp_path / "given.traj", allow_missing=True))
    ase.io.write(tmp_path / name, [atoms_of(frame) for frame in frames])
    for frame, again in zip(frames, read_ase(tmp_path / name, allow_missing=True), strict=True):
        np.testing.assert_allclose(again.energy, frame.energy, atol=1e-6)
        for key in ("positions", "forces", "stress", "cell"):
            one, two = getattr(frame, key), getattr(again, key)
            assert (one is None) == (two is None), key
            if one is not None:
                np.testing.assert_allclose(two, one, atol=1e-6)
        np.testing.assert_array_equal(again.pbc, frame.pbc)


@pytest.mark.parametrize(
    ("energy_key", "forces_key", "virial_key"),
    [
        ("REF_energy", "REF_forces", "REF_virial"),
        ("dft_energy", "dft_force", "virials"),
        ("TotEnergy", "force", "virial"),
    ],
)
def test_usual_names_of_labels(tmp_path, energy_key, forces_key, virial_key):
    (atoms,) = labelled(1)
    energy, forces, stress = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(voigt=False)
    atoms.calc = None
    atoms.info |= {energy_key: energy, virial_key: -stress * atoms.get_volume(), "subset": "test", "charge": -1}
    atoms.arrays[forces_key] = forces
    ase.io.write(tmp_path / "a.extxyz", atoms)
    (frame,) = read_ase(tmp_path / "a.extxyz")
    np.testing.assert_allclose(frame.energy, energy)
    np.testing.assert_allclose(frame.forces, forces, atol=1e-7)
    np.testing.assert_allclose(frame.stress, stress, atol=1e-7)
    assert (frame.subset, frame.charge) == ("test", -1)


def test_unusual_names_are_asked_for(tmp_path):
    (atoms,) = labelled(1)
    atoms.info["my_energy"] = 5.0
    ase.io.write(tmp_path / "a.extxyz", atoms)
    (frame,) = read_ase(tmp_path / "a.extxyz", energy_key="my_energy")
    assert frame.energy == 5.0
    with pytest.raises(InputError, match=r"frame 0 of .* has no forces"):
        list(read_ase(tmp_path / "a.extxyz", forces_key="no_such"))


def test_what_cannot_be_read_is_named(tmp_path):
    atoms = Atoms("Ar2", [[0, 0, 0], [0, 0, 3]])
    ase.io.write(tmp_path / "bare.extxyz", atoms)
    with pytest.raises(InputError, match=r"bare\.extxyz has no energy"):
        list(read_ase(tmp_path / "bare.extxyz"))
    (frame,) = read_ase(tmp_path / "bare.extxyz", labels=False)
    assert np.isnan(frame.energy)
    assert frame.cell is None
    with pytest.raises(InputError, match="does not exist"):
        list(read_ase(tmp_path / "missing.xyz"))
    (tmp_path / "noise.xyz").write_text("3\nno\natoms here")
    with pytest.raises(InputError, match=r"noise\.xyz cannot be read"):
        list(read_ase(tmp_path / "noise.xyz"))
    (tmp_path / "empty.extxyz").write_text("")
    with pytest.raises(InputError, match=r"empty\.extxyz"):
        list(read_ase(tmp_path / "empty.extxyz"))


def test_a_molecule_with_a_box_is_a_molecule(tmp_path):
    atoms = Atoms("Ar2", [[0, 0, 0], [0, 0, 3]], cell=np.eye(3) * 50, pbc=False)
    atoms.calc = SinglePointCalculator(atoms, energy=1.0, forces=np.zeros((2, 3)))
    ase.io.write(tmp_path / "a.extxyz", atoms)
    (frame,) = read_ase(tmp_path / "a.extxyz")
    assert frame.cell is None


def test_files_become_a_set_with_free_atoms_as_reference(tmp_path):
    ase.io.write(tmp_path / "a.extxyz", labelled(5))
    ase.io.write(tmp_path / "b.traj", labelled(3, seed=1))
    free = Atoms("Ar", [[0, 0, 0]], info={"energy": -0.25})
    ase.io.write(tmp_path / "free.extxyz", free)
    source = AseFiles([tmp_path / "a.extxyz", tmp_path / "b.traj", tmp_path / "free.extxyz"])
    made = prepare(source, tmp_path / "set", r_max=4.0, filters=Filters(), processes=0, progress=False)
    assert (len(made), made.manifest["read"], made.manifest["dropped"]) == (8, 9, {"free atoms": 1})
    assert made.atom_energies == {"Ar": -0.25}
    expected = [*read_ase(tmp_path / "a.extxyz"), *read_ase(tmp_path / "b.traj")]
    for i, frame in enumerate(expected):
        np.testing.assert_array_equal(PreparedSet(tmp_path / "set").frame(i).forces, frame.forces)


def test_prepare_goes_on_within_the_second_file(tmp_path):
    ase.io.write(tmp_path / "a.extxyz", labelled(2))
    ase.io.write(tmp_path / "b.extxyz", labelled(5, seed=1))
    source = AseFiles([tmp_path / "a.extxyz", tmp_path / "b.extxyz"])
    rest = [frame for some, _, _ in source.pieces((1, 3)) for frame in some]
    assert [f.name for f in rest] == [f"frame {i} of {tmp_path / 'b.extxyz'}" for i in (3, 4)]
