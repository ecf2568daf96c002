import itertools
import json

import h5py
import numpy as np
import pytest
from layouts import MOLECULES, mptrj_materials, write_group, write_mptrj, write_spice
from rdkit import Chem

from ddpkit import InputError
from ddpkit.data import prepare
from ddpkit.data.mptrj import MPtrj, split_object
from ddpkit.data.prepared import Filters
from ddpkit.data.spice import Spice, formal_charge

ALL = Filters(charged=True, isolated=True, unlabelled=True)


def made(source, path, filters=ALL, **options):
    return prepare(source, path, r_max=6.0, filters=filters, **({"processes": 0, "progress": False} | options))


def test_spice_counts_units_and_order(tmp_path):
    counts = write_spice(tmp_path / "s.hdf5", copies=8)
    frames = made(Spice(tmp_path / "s.hdf5"), tmp_path / "set")
    manifest = frames.manifest
    assert manifest["read"] == counts.pop("all")
    assert manifest["dropped"] == {
        "charged": counts["charged"], "isolated atoms": counts["isolated"], "unlabelled": counts["unlabelled"],
    }  # fmt: skip
    assert len(frames) == manifest["read"] - sum(counts.values())
    expected = []
    with h5py.File(tmp_path / "s.hdf5") as file:
        for name in file:
            if name not in ("far apart", "nothing") and formal_charge(file[name]["smiles"].asstr()[0]) == 0:
                rows = range(1) if name == "not a number" else range(len(file[name]["dft_total_energy"]))
                expected += [(name, file[name], row) for row in rows]
        for i, (name, group, row) in enumerate(expected):
            frame = frames.frame(i)
            assert (frame.group, frame.subset) == (name, group["subset"].asstr()[0])
            # hartree and bohr as ASE has them, from another edition of CODATA
            from ase.units import Bohr, Hartree

            np.testing.assert_allclose(frame.positions, group["conformations"][row] * Bohr, rtol=1e-6)
            np.testing.assert_allclose(frame.energy, group["dft_total_energy"][row] * Hartree, rtol=1e-8)
            np.testing.assert_allclose(frame.forces, -group["dft_total_gradient"][row] * Hartree / Bohr, rtol=1e-6)
    assert len(expected) == len(frames)


def test_spice_the_same_with_processes_and_after_an_interruption(tmp_path, monkeypatch):
    write_spice(tmp_path / "s.hdf5", copies=20)
    one = made(Spice(tmp_path / "s.hdf5"), tmp_path / "one")
    two = made(Spice(tmp_path / "s.hdf5"), tmp_path / "two", processes=2)
    source = Spice(tmp_path / "s.hdf5")
    read = source.blocks

    def failing(r_max, filters):
        inner, calls = read(r_max, filters), []

        def work(names):
            calls.append(names)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return inner(names)

        return work

    monkeypatch.setattr("ddpkit.data.preparing._SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    monkeypatch.setattr(source, "blocks", failing)
    with pytest.raises(KeyboardInterrupt):
        made(source, tmp_path / "three")
    assert not (tmp_path / "three").exists()
    monkeypatch.setattr(source, "blocks", read)
    starts = []
    pieces = source.pieces
    monkeypatch.setattr(source, "pieces", lambda position: starts.append(position) or pieces(position))
    three = made(source, tmp_path / "three")
    assert starts == [64]
    for file in one.path.iterdir():
        assert file.read_bytes() == (two.path / file.name).read_bytes() == (three.path / file.name).read_bytes()


def test_charges_of_smiles_are_rdkits():
    others = (
        "[Ca+2:1].[Cl-:2].[Cl-:3]",
        "[Fe++]",
        "[O--]",
        "[NH4+]",
        "[13C@@H:7]([H:1])([F:2])[Cl:3]",
        "C[N+](C)(C)C",
        "CC(=O)[O-]",
    )
    for smiles in (*others, *(m[1] for m in MOLECULES)):
        molecule = Chem.MolFromSmiles(smiles, sanitize=False)
        assert formal_charge(smiles) == sum(atom.GetFormalCharge() for atom in molecule.GetAtoms()), smiles
    for _, smiles, _, _, charge in MOLECULES:
        assert formal_charge(smiles) == charge


def test_spice_bad_files(tmp_path):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match="no readable HDF5"):
        Spice(tmp_path / "text")
    with pytest.raises(InputError, match="does not exist"):
        Spice(tmp_path / "missing")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file.create_group("a")
    with pytest.raises(InputError, match="no SPICE file"):
        Spice(tmp_path / "other.h5")
    for name, damage, message in (
        ("units", lambda g: g["conformations"].attrs.__setitem__("units", "angstrom"), "in angstrom, not bohr"),
        ("missing", lambda g: g.__delitem__("dft_total_gradient"), "has no dft_total_gradient"),
    ):
        with h5py.File(tmp_path / name, "w") as file:
            write_group(file, *MOLECULES[3][:4], 2, np.random.default_rng(0))
            damage(file[MOLECULES[3][0]])
        with pytest.raises(InputError, match=message):
            made(Spice(tmp_path / name), tmp_path / "set")


def test_mptrj_counts_units_and_order(tmp_path):
    bad = {"mp-9": {}, "mp-10": dict(mptrj_materials(1, seed=5))["mp-1000"]}
    for number, (entry, key) in enumerate(
        zip(bad["mp-10"].values(), ("force", "uncorrected_total_energy", "stress"), strict=False)
    ):
        entry[key] = None
        assert number < 3
    write_mptrj(tmp_path / "m.json", 30, extra=bad)
    frames = made(MPtrj(tmp_path / "m.json"), tmp_path / "set", Filters(unlabelled=True))
    expected = [(m, e) for m, entries in [*mptrj_materials(30), *bad.items()] for e in entries.values()]
    assert frames.manifest["read"] == len(expected)
    expected = [(m, e) for m, e in expected if e["force"] and e["uncorrected_total_energy"]]
    assert frames.manifest["dropped"] == {"unlabelled": 2}
    assert len(frames) == len(expected)
    for i, (material, entry) in enumerate(expected):
        frame = frames.frame(i)
        assert frame.group == material
        assert frame.energy == entry["uncorrected_total_energy"]
        np.testing.assert_array_equal(frame.forces, entry["force"])
        np.testing.assert_array_equal(frame.positions, [s["xyz"] for s in entry["structure"]["sites"]])
        if entry["stress"] is None:
            assert frame.stress is None
        else:
            from ase.units import GPa

            np.testing.assert_allclose(frame.stress, -0.1 * GPa * np.array(entry["stress"]), rtol=1e-8)
    corrected = made(MPtrj(tmp_path / "m.json", "corrected"), tmp_path / "corrected", Filters(unlabelled=True))
    assert corrected.frame(0).energy == expected[0][1]["corrected_total_energy"]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("size", [1, 5000, 10**9])
def test_the_pieces_of_an_object_are_its_members(tmp_path, monkeypatch, indent, size):
    monkeypatch.setattr("ddpkit.data.mptrj._READ", 997)
    content = {f"mp-{i}": {'a "quoted\\" {brace': [{"b": "}\\"}, i], "é": {}} for i in range(60)} | {"empty": {}}
    (tmp_path / "a.json").write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n")
    text = (tmp_path / "a.json").read_bytes()
    pieces = list(split_object(tmp_path / "a.json", size=size))
    assert pieces[0][0] == 0
    assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
    assert b"".join(text[a:b] for a, b in pieces) + b"}" == text.rstrip().removesuffix(b"}").rstrip() + b"}"
    assert len(pieces) == {1: 61, 10**9: 1}.get(size, len(pieces))
    middle = len(pieces) // 2
    if middle:
        assert list(split_object(tmp_path / "a.json", pieces[middle][0], size)) == pieces[middle:]


def test_mptrj_the_same_with_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpkit.data.mptrj.split_object.__defaults__", (0, 20_000))
    write_mptrj(tmp_path / "m.json", 25)
    assert len(list(MPtrj(tmp_path / "m.json").pieces(None))) > 10
    one = made(MPtrj(tmp_path / "m.json"), tmp_path / "one")
    two = made(MPtrj(tmp_path / "m.json"), tmp_path / "two", processes=2)
    for file in one.path.iterdir():
        assert file.read_bytes() == (two.path / file.name).read_bytes()


def test_mptrj_bad_files(tmp_path):
    write_mptrj(tmp_path / "m.json", 5)
    text = (tmp_path / "m.json").read_text()
    for name, content, message in (
        ("cut", text[: len(text) // 2], "download is incomplete"),
        ("more", text + "{}", "goes on after"),
        ("list", "[1, 2]", "no JSON object"),
        ("empty", "{}", "no frames are left"),
        ("broken", text.replace("[", "]", 1), "no valid JSON"),
        ("layout", '{"mp-1": {"mp-1-0-0": {"structure": {}}}}', "not in the MPtrj layout"),
        ("shared", text.replace('"occu": 1', '"occu": 0.5', 1), "shared by several elements"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=message):
            made(MPtrj(tmp_path / name), tmp_path / "set")
        assert not (tmp_path / "set").exists()
        assert not (tmp_path / ".set.partial").exists()
    with pytest.raises(InputError, match="cannot be read"):
        MPtrj(tmp_path / "missing")


def test_a_cutoff_must_be_positive(tmp_path):
    write_mptrj(tmp_path / "m.json", 1)
    with pytest.raises(InputError, match="no cutoff"):
        prepare(MPtrj(tmp_path / "m.json"), tmp_path / "set", r_max=0.0, filters=ALL)
    assert [p.name for p in tmp_path.iterdir()] == ["m.json"]
