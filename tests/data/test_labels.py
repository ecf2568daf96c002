"""Labels of a set come from one level of theory and from the same keys in every frame, or are refused."""

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpkit import InputError
from ddpkit.data import prepare, read_ase
from ddpkit.data.ase_files import AseFiles, frame_of
from ddpkit.data.labels import Choice, Labels, as_options, as_overrides
from ddpkit.data.prepared import Filters

LEVELS = ("", "REF_", "DFT_", "dft_", "mace_", "pbe_", "xtb-")
CELL = 4.0 * np.eye(3)
STRESS = 0.01 * np.array([[1.0, 0.4, 0.5], [0.4, 2.0, 0.6], [0.5, 0.6, 3.0]])
VOIGT = STRESS[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]  # xx, yy, zz, yz, xz, xy


def atoms_of(info=None, forces=None, results=None, pbc=True, symbols="Ar2"):
    count = len(Atoms(symbols))
    atoms = Atoms(
        symbols, [[0, 0, 1.9 * k] for k in range(count)], cell=CELL if pbc else None, pbc=pbc, info=info or {}
    )
    for name, values in (forces or {}).items():
        atoms.arrays[name] = np.full((count, 3), values) if np.isscalar(values) else np.asarray(values)
    if results:
        atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def read(frames, labels=True, advice=as_options, **choice):
    found = Labels(Choice(**choice), lambda: frames, "a.xyz", required=labels, advice=advice)
    made = [frame_of(atoms, f"frame {k} of a.xyz", found) for k, atoms in enumerate(frames)]
    found.finish()
    return made, found


def refusal(frames, **options):
    with pytest.raises(InputError) as raised:
        read(frames, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def written(path, frames):
    ase.io.write(path, frames, format="extxyz")
    return path


# Each level has a number that all its labels tell: a mixture shows. Where each stands is drawn frame by frame.
ENERGIES = ("energy", "free_energy", "total_energy")
KEYS = st.lists(
    st.tuples(
        st.sampled_from(range(len(LEVELS))),
        st.sampled_from(ENERGIES),
        st.sampled_from(("forces", "force", "")),
        st.sampled_from(("stress", "virial", "virials", "")),
        st.booleans(),  # in the calculator's results
        st.booleans(),  # whether there is an energy
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(KEYS, min_size=1, max_size=3), st.booleans())
def test_one_level_or_a_refusal_never_a_mixture(drawn, repeated):
    frames = []
    for keys in [drawn[0]] * 3 if repeated else drawn:
        info, forces, results = {}, {}, {}
        for number, energy_name, forces_name, stress_name, in_results, has_energy in keys:
            level = {"DFT_": LEVELS.index("dft_")}.get(LEVELS[number], number)
            bare = LEVELS[number] == "" and in_results
            if has_energy:
                place = results if bare and energy_name != "total_energy" else info
                place[LEVELS[number] + energy_name] = float(level)
            if forces_name:
                if bare and forces_name == "forces":
                    results["forces"] = np.full((2, 3), float(level))
                else:
                    forces[LEVELS[number] + forces_name] = float(level)
            if stress_name:
                stress = level * STRESS if stress_name == "stress" else -level * STRESS * 64.0
                info[LEVELS[number] + stress_name] = stress
        frames.append(atoms_of(info, forces, results))
    try:
        made, found = read(frames, allow_missing=True)
    except InputError:
        return
    levels = {frame.energy for frame in made}
    assert len(levels) == 1
    (level,) = levels
    assert LEVELS[int(level)] in ("", "REF_", "dft_")
    assert found.keys["energy"]
    assert found.keys["forces"]
    for frame, atoms in zip(made, frames, strict=True):
        np.testing.assert_array_equal(frame.forces, level)
        if frame.stress is not None and not np.allclose(frame.stress, level * STRESS):
            # Without an energy or forces of its own, a stress of no level belongs to the only one.
            np.testing.assert_allclose(frame.stress, 0 * STRESS, atol=1e-12)
            names = {*atoms.info, *atoms.arrays, *(atoms.calc.results if atoms.calc else ())}
            assert not names & {*ENERGIES, "forces", "force"}


def test_a_free_energy_of_one_method_is_not_mixed_with_forces_of_another():
    frames = [atoms_of({"REF_energy": -2.0}, {"REF_forces": 2.0}, {"free_energy": -1.0}) for _ in range(3)]
    made, found = read(frames)
    assert [frame.energy for frame in made] == [-2.0] * 3
    assert found.keys == {"energy": "REF_energy", "forces": "REF_forces", "stress": None}
    mixed = [atoms_of({"REF_energy": -2.0}, {"forces": 2.0})]
    said = refusal(mixed)
    assert "no energy and forces of one level of theory" in said
    assert "REF_energy in 1" in said
    assert "--energy-key KEY --forces-key KEY" in said
    (frame,), found = read(mixed, energy_key="REF_energy", forces_key="forces")
    assert (frame.energy, frame.forces[0, 0]) == (-2.0, 2.0)


def test_two_levels_are_refused_with_their_counts_unless_all_frames_have_one():
    both = [
        atoms_of({"REF_energy": -2.0}, {"REF_forces": 2.0}, {"energy": -1.0, "forces": np.ones((2, 3))})
        for _ in range(3)
    ]
    said = refusal(both)
    assert "several levels of theory" in said
    for part in ("energy in 3", "forces in 3", "REF_energy in 3", "--energy-key REF_energy --forces-key REF_forces"):
        assert part in said
    assert "data.energy_key=REF_energy data.forces_key=REF_forces" in refusal(both, advice=as_overrides)
    made, _ = read(both, energy_key="REF_energy")
    assert [(f.energy, f.forces[0, 0]) for f in made] == [(-2.0, 2.0)] * 3
    made, _ = read(both, forces_key="forces")
    assert [(f.energy, f.forces[0, 0]) for f in made] == [(-1.0, 1.0)] * 3
    one = atoms_of({"REF_energy": -2.0}, {"REF_forces": 2.0})
    for frames in ([both[0], one], [one, both[0]]):
        assert {frame.energy for frame in read(frames)[0]} == {-2.0}


def test_a_level_that_changes_from_frame_to_frame_is_refused():
    one = atoms_of({"REF_energy": -2.0}, {"REF_forces": 2.0})
    other = atoms_of({"dft_energy": -1.0}, {"dft_forces": 1.0})
    said = refusal([one, one, other])
    assert "frame 2 of a.xyz has no energy under REF_energy" in said
    assert "REF_energy in 2" in said
    assert "--drop-unlabelled" in said
    free = atoms_of({}, {}, {"free_energy": -1.0, "forces": np.ones((2, 3))})
    full = atoms_of({}, {}, {"energy": -1.1, "free_energy": -1.0, "forces": np.ones((2, 3))})
    said = refusal([full, free])
    assert "no energy under energy" in said
    assert "choose keys that all frames have, for example with --energy-key free_energy --forces-key forces" in said
    assert {frame.energy for frame in read([full, free], energy_key="free_energy")[0]} == {-1.0}
    assert {frame.energy for frame in read([free, full])[0]} == {-1.0}  # the key that all have


def test_files_of_different_levels_are_refused(tmp_path):
    first = written(tmp_path / "a.xyz", [atoms_of({"REF_energy": -2.0}, {"REF_forces": 2.0})])
    second = written(tmp_path / "b.xyz", [atoms_of({"dft_energy": -1.0}, {"dft_forces": 1.0})] * 2)
    source = AseFiles([first, second], advice=as_options)
    with pytest.raises(InputError, match=r"frame 0 of .*b\.xyz has no energy under REF_energy.*of 3 frames"):
        prepare(source, tmp_path / "set", r_max=5.0, filters=Filters(), processes=0, progress=False)


def test_two_values_within_a_level_are_refused():
    frames = [atoms_of({"total_energy": -2.0}, {}, {"energy": -1.0, "forces": np.ones((2, 3))})]
    assert "two values for its energy, energy and total_energy" in refusal(frames)
    assert read(frames, energy_key="total_energy")[0][0].energy == -2.0
    frames = [atoms_of({"REF_energy": -2.0, "ref_energy": -1.0}, {"REF_forces": 1.0})]
    assert "two values" in refusal(frames)


def test_unknown_levels_are_asked_for_and_predictions_ignored():
    frames = [atoms_of({"mace_energy": -2.0}, {"mace_forces": 2.0})]
    assert "--energy-key mace_energy --forces-key mace_forces" in refusal(frames)
    assert read(frames, energy_key="mace_energy")[0][0].forces[0, 0] == 2.0
    frames = [
        atoms_of({"predicted_energy": -2.0}, {"predicted_forces": 2.0}, {"energy": -1.0, "forces": np.ones((2, 3))})
    ]
    assert read(frames)[0][0].energy == -1.0


@pytest.mark.parametrize("key", ["REF_virials", "virial", "my_VIRIAL"])
@pytest.mark.parametrize("form", ["matrix", "nine", "six"])
def test_a_virial_becomes_a_stress(key, form, tmp_path):
    volume = 64.0
    value = {"matrix": STRESS, "nine": STRESS.reshape(-1), "six": VOIGT}[form]
    frames = [atoms_of({"REF_energy": -2.0, key: -volume * value}, {"REF_forces": 2.0}) for _ in range(2)]
    made, found = read(frames, stress_key=key)
    assert found.keys["stress"] == key
    if (key, form) != ("virial", "six"):  # which ASE does not read
        made += read_ase(written(tmp_path / "a.xyz", frames), stress_key=key)
    for frame in made:
        np.testing.assert_allclose(frame.stress, STRESS, atol=1e-9)
    frames = [atoms_of({"REF_energy": -2.0, "REF_tension": value}, {"REF_forces": 2.0})]
    np.testing.assert_allclose(read(frames, stress_key="ref_tension")[0][0].stress, STRESS)


def test_a_virial_without_a_volume_is_refused():
    labels = {"REF_energy": -2.0, "REF_virial": STRESS}
    molecule = atoms_of(labels, {"REF_forces": 2.0}, pbc=False)
    assert "no periodic cell" in refusal([molecule], stress_key="REF_virial")
    slab = atoms_of(labels, {"REF_forces": 2.0})
    slab.cell[2], slab.pbc = 0, (True, True, False)
    assert "cell of no volume" in refusal([slab])
    flat = atoms_of(labels, {"REF_forces": 2.0})
    flat.cell[2] = flat.cell[0] + flat.cell[1]
    assert "lie in one plane" in refusal([flat])


def test_a_stress_that_cannot_be_read_is_refused():
    for value, expected in (
        (np.arange(9.0).reshape(3, 3), "no symmetric matrix"),
        (np.arange(3.0), "six numbers"),
        ("much", "six numbers"),
    ):
        frames = [atoms_of({"REF_energy": -2.0, "tension": value}, {"REF_forces": 2.0})]
        assert expected in refusal(frames, stress_key="tension")
    frames = [atoms_of({"REF_energy": -2.0, "REF_stress": STRESS, "REF_virial": 64 * STRESS}, {"REF_forces": 2.0})]
    assert "two values for its stress, REF_stress and REF_virial" in refusal(frames)


def test_a_stress_of_another_level_is_not_read_and_said():
    frames = [atoms_of({"REF_energy": -2.0}, {"REF_forces": 2.0}, {"energy": -1.0, "stress": VOIGT})] * 2
    (frame, _), found = read(frames)
    assert frame.stress is None
    (note,) = found.notes
    assert "no stress was read: stress may be of another level of theory than REF_energy" in note
    assert "name it as the stress key" in note
    np.testing.assert_allclose(read(frames, stress_key="stress")[0][0].stress, STRESS)


@pytest.mark.parametrize("quantity", ["energy", "forces", "stress"])
def test_a_named_key_that_no_frame_has_is_an_error(quantity):
    frames = [atoms_of({}, {}, {"energy": -1.0, "forces": np.ones((2, 3)), "stress": np.ones(6)})] * 3
    said = refusal(frames, **{f"{quantity}_key": "typo"})
    assert f"{quantity} under typo" in said
    assert f"correct --{quantity}-key typo" in said
    assert "energy in 3" in said
    assert f"data.{quantity}_key=typo" in refusal(frames, advice=as_overrides, **{f"{quantity}_key": "typo"})
    assert f"{quantity} under typo" in refusal(frames, labels=False, **{f"{quantity}_key": "typo"})


def test_labels_in_some_frames_are_counted_and_refused_unless_asked(tmp_path):
    labels = {"energy": -1.0, "forces": np.ones((2, 3))}
    full, less = atoms_of({}, {}, labels | {"stress": np.ones(6)}), atoms_of({}, {}, labels)
    molecule = atoms_of({}, {}, labels, pbc=False)
    for choice in ({}, {"stress_key": "stress"}):
        said = refusal([full, less, full, molecule], **choice)
        assert "1 of the 3 periodic frames" in said
        assert "frame 1 of a.xyz first" in said
        assert "--allow-missing" in said
        assert "data.allow_missing=true" in refusal([full, less], advice=as_overrides, **choice)
        made, _ = read([full, less, full, molecule], allow_missing=True, **choice)
        assert [frame.stress is None for frame in made] == [False, True, False, True]
    assert len(read([full, molecule])[0]) == 2  # a molecule has no stress to miss
    bare = atoms_of({}, {}, {"energy": -1.0})
    assert "frame 1 of a.xyz has no forces under forces" in refusal([full, bare])
    source = AseFiles([written(tmp_path / "a.xyz", [less, bare, less])], labels=False)
    made = prepare(source, tmp_path / "set", r_max=3.0, filters=Filters(unlabelled=True), processes=0, progress=False)
    assert (len(made), made.manifest["dropped"]) == (2, {"unlabelled": 1})
    assert made.labels == {"energy": {"key": "energy", "unit": "eV"}, "forces": {"key": "forces", "unit": "eV/Å"}}


def single(energy, edge=30.0, pbc=True, **info):
    atoms = Atoms("Ar", cell=edge * np.eye(3), pbc=pbc, info=info)
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((1, 3)))
    return atoms


def prepared(tmp_path, frames, r_max=5.0, **options):
    source = AseFiles([written(tmp_path / "a.xyz", frames)], advice=as_options)
    return prepare(source, tmp_path / "set", r_max=r_max, filters=Filters(**options), processes=0, progress=False)


PAIR = atoms_of({}, {}, {"energy": -1.0, "forces": np.ones((2, 3))})


@pytest.mark.parametrize(
    "atom",
    [single(-0.5), single(-0.5, pbc=False), single(-0.5, 12.0), single(-0.5, 4.0, config_type="IsolatedAtom"),
     single(-0.5, config_type="isolated_atom"), single(-0.5, 4.0, config_type="isol")],
)  # fmt: skip
def test_isolated_atoms_are_references_and_not_trained_on(tmp_path, atom):
    made = prepared(tmp_path, [PAIR, atom, PAIR])
    assert (len(made), made.manifest["dropped"], made.atom_energies) == (2, {"free atoms": 1}, {"Ar": -0.5})


def test_an_isolated_atom_needs_neither_forces_nor_stress(tmp_path):
    atom = Atoms("Ar", cell=30 * np.eye(3), pbc=True, info={"REF_energy": -0.5, "config_type": "IsolatedAtom"})
    frame = atoms_of({"REF_energy": -1.0, "REF_stress": STRESS}, {"REF_forces": 1.0})
    made = prepared(tmp_path, [atom, frame, frame])
    assert (len(made), made.atom_energies) == (2, {"Ar": -0.5})
    assert made.manifest["unlabelled"]["stress"] == 0
    assert "no energy" in refusal([atom, PAIR])  # of another level


def test_a_primitive_cell_of_one_atom_is_a_frame(tmp_path):
    made = prepared(tmp_path, [single(-3.0, 3.0), single(-2.9, 4.0), PAIR])
    assert (len(made), made.atom_energies) == (3, {})
    with pytest.raises(InputError, match="may be a crystal or an isolated atom"):
        prepared(tmp_path / "..", [single(-3.0, 6.0), PAIR])


def test_two_energies_of_an_isolated_atom_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"frame 2 of .* isolated Ar atom of -0\.6 eV, but another one has -0\.5"):
        prepared(tmp_path, [single(-0.5), PAIR, single(-0.6)])


def placed(positions, **changes):
    atoms = Atoms("Ar2", positions, cell=CELL, pbc=True)
    atoms.calc = SinglePointCalculator(atoms, **({"energy": -1.0, "forces": np.ones((2, 3))} | changes))
    return atoms


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (placed([[0, 0, 0], [0, 0, 0]]), "atoms 0 and 1 lie on top of one another"),
        (placed([[0, 0, 0], [0, 0, 0.05]]), "on top of one another"),
        (placed([[0, 0, 0], [4, 4, 0]]), "on top of one another"),
        (placed([[0, 0, 0], [0, 0, np.nan]]), "positions that are NaN"),
        (placed([[0, 0, 0], [0, 0, 2]], energy=np.nan), "an energy that is NaN"),
        (placed([[0, 0, 0], [0, 0, 2]], forces=np.full((2, 3), np.inf)), "forces that are NaN or infinite"),
        (Atoms(cell=CELL, pbc=True, info={"energy": 1.0}), "has no atoms"),
    ],
)
def test_frames_that_cannot_be_trained_on_are_named(tmp_path, frame, expected):
    ase.io.write(tmp_path / "a.traj", [PAIR, frame])
    source = AseFiles([tmp_path / "a.traj"], advice=as_options)
    with pytest.raises(InputError, match=expected) as raised:
        prepare(source, tmp_path / "set", r_max=5.0, filters=Filters(), processes=0, progress=False)
    assert "frame 1 of" in str(raised.value)
    assert "a.traj" in str(raised.value)
    assert "remove" in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.traj"]


def test_a_cutoff_without_an_edge_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no frame of .*a\.xyz has two atoms within r_max=1\.5"):
        prepared(tmp_path, [PAIR], r_max=1.5)
