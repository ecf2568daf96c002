import argparse
import csv
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from ddpkit import InputError
from ddpkit.analysis import accuracy, published
from ddpkit.checkpoint import load_model
from ddpkit.data import collate, read_ase
from ddpkit.experiments import evaluate, run
from ddpkit.experiments.config import read as read_config
from ddpkit.ranks.mpirun import mpirun

FRAMES = 24
KCAL_PER_MOL = 23.060547830619  # of one eV
SYMBOLS = ("H", "C", "O", "H")


def positions(rng):
    spread = np.array([[0, 0, 0], [1.2, 0, 0], [1.2, 1.2, 0], [0, 0, 1.1]])
    return spread + 0.1 * rng.normal(size=spread.shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A set in two subsets of frames of two sizes, and a tiny run on it."""
    place = tmp_path_factory.mktemp("evaluate")
    rng = np.random.default_rng(0)
    images = []
    for number in range(FRAMES):
        count = 3 + number % 2
        atoms = Atoms(SYMBOLS[:count], positions(rng)[:count], info={"subset": "ab"[number % 3 == 0]})
        atoms.calc = SinglePointCalculator(
            atoms, energy=-10.0 * count + rng.normal(), forces=rng.normal(size=(count, 3))
        )
        images.append(atoms)
    write(place / "set.xyz", images)
    run.main(
        ["model=allegro_tiny", "data=files", f"data.path={place}/set.xyz", f"data.cache={place}/cache", "device=cpu",
         "data.split=[0.5,0.2,0.3]", "train.batch_size=4", "train.max_epochs=1", f"run_dir={place}/run"]
    )  # fmt: skip
    return place


@pytest.fixture(autouse=True)
def _cache(folder, monkeypatch):
    monkeypatch.setenv("DDPKIT_CACHE", str(folder / "cache"))


def ddpkit_eval(*words):
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    evaluate.main(parser.parse_args([str(word) for word in words] + ["--device", "cpu"]))


def table(path):
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    key = next(iter(rows[0]))
    return {row[key]: {k: float(v) for k, v in row.items() if k not in {key, "subset"}} for row in rows}


@pytest.fixture(scope="module")
def predictions(folder):
    """Every frame of the set predicted one by one, without the package's loaders and sums."""
    model = load_model(folder / "run")
    found = []
    for frame in read_ase(folder / "set.xyz"):
        output = model(collate([frame], model.species, model.r_max))
        found.append((frame, float(output["energy"].detach()), output["forces"].detach().double().numpy()))
    return found


def expected(predictions, keep=lambda _: True):
    chosen = [p for p in predictions if keep(p[0])]
    energy = np.array([(e - frame.energy) / len(frame) for frame, e, _ in chosen])
    total = np.array([e - frame.energy for frame, e, _ in chosen])
    forces = np.concatenate([(f - frame.forces).ravel() for frame, _, f in chosen])
    return {
        "frames": len(chosen),
        "atoms": len(forces) // 3,
        "energy_mae_mev_per_atom": 1e3 * np.mean(np.abs(energy)),
        "energy_rmse_mev_per_atom": 1e3 * np.sqrt(np.mean(energy**2)),
        "forces_mae_mev_per_angstrom": 1e3 * np.mean(np.abs(forces)),
        "forces_rmse_mev_per_angstrom": 1e3 * np.sqrt(np.mean(forces**2)),
        "total_energy_mae_mev": 1e3 * np.mean(np.abs(total)),
        "total_energy_rmse_mev": 1e3 * np.sqrt(np.mean(total**2)),
    }


def test_tables_are_what_frames_predicted_one_by_one_give(folder, predictions, capsys):
    ddpkit_eval(folder / "run", folder / "set.xyz", "--batch-size", 5, "--worst", 3)
    out = folder / "run" / "evaluation" / "set"
    found = table(out / "accuracy.csv")
    assert list(found) == ["a", "b", "all"]
    for name, row in found.items():
        keep = (lambda _: True) if name == "all" else (lambda frame, name=name: frame.subset == name)
        assert row == pytest.approx(expected(predictions, keep), rel=1e-5)
    by_element = table(out / "elements.csv")
    assert set(by_element) == {"H", "C", "O"}
    for number, symbol in ((1, "H"), (6, "C"), (8, "O")):
        errors = np.concatenate([(f - frame.forces)[frame.numbers == number].ravel() for frame, _, f in predictions])
        assert by_element[symbol] == pytest.approx(
            {
                "atoms": len(errors) // 3,
                "forces_mae_mev_per_angstrom": 1e3 * np.mean(np.abs(errors)),
                "forces_rmse_mev_per_angstrom": 1e3 * np.sqrt(np.mean(errors**2)),
            },
            rel=1e-5,
        )
    said = capsys.readouterr().out
    assert "best.pt" in said
    assert "| a | 16 |" in (out / "accuracy.md").read_text()
    assert (out / "parity.png").read_bytes().startswith(b"\x89PNG")


def test_values_of_another_model_stand_beside(folder, capsys):
    (folder / "published.csv").write_text("subset,energy_mae_mev_per_atom\na,1.25\nall,2.5\n")
    ddpkit_eval(folder / "run", folder / "set.xyz", "--beside", folder / "published.csv", "--out", folder / "beside")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    beside = {
        row[0]: [cell for cell in row if cell.startswith("(")] for row in rows if row and row[0] in ("a", "b", "all")
    }
    assert beside == {"a": ["(1.25)"], "b": [], "all": ["(2.50)"]}
    (folder / "published.csv").write_text("set,mae\na,1.25\n")
    with pytest.raises(InputError, match="needs a column subset"):
        ddpkit_eval(
            folder / "run", folder / "set.xyz", "--beside", folder / "published.csv", "--out", folder / "beside"
        )


def test_published_values_stand_beside_without_being_asked(folder):
    images = read(folder / "set.xyz", ":")
    names = ["SPICE DES Monomers Single Points Dataset v1.1", "SPICE PubChem Set 2 Single Points Dataset v1.3"]
    for number, atoms in enumerate(images):
        atoms.info["subset"] = names[number % 2]
    write(folder / "spice.xyz", images)
    ddpkit_eval(folder / "run", folder / "spice.xyz", "--out", folder / "published")
    said = (folder / "published" / "accuracy.md").read_text()
    rows = [line for line in said.splitlines() if line.startswith("| SPICE")]
    # Table 2: Allegro large; the run's own model is none of the paper's
    for row, values in zip(rows, [(0.4, 0.5, 7.7, 11.7), (0.6, 1.7, 18.1, 51.6)], strict=True):
        assert [float(cell) for cell in re.findall(r"\(([\d.]+)\)", row)] == list(values)
    assert said.count("In brackets: allegro_large as published (Tan et al., ") == 1
    assert evaluate._published(read_config(["model=allegro_small"])).errors["energy_rmse_mev_per_atom"].iloc[0] == 1.6
    assert "In brackets" not in (folder / "run" / "evaluation" / "set" / "accuracy.md").read_text()


def test_published_barriers_stand_below_those_of_the_same_fragments():
    values = accuracy.barriers(["a", "b"], [np.array([0.0, 1.0])] * 2, [np.array([0.0, 2.0])] * 2)
    table = accuracy.barrier_table(values, beside=published.published_barriers())
    found = {row[0]: float(row[3]) for row in table.rows}
    assert found["this one"] == 1.0
    assert found["Allegro large (Tan 2025)"] == pytest.approx(11.37e-3 * KCAL_PER_MOL, abs=5e-4)  # Table 1, in eV
    assert len(found) == 10


def test_worst_frames_carry_labels_and_predictions(folder, predictions):
    ddpkit_eval(folder / "run", folder / "set.xyz", "--out", folder / "worst", "--worst", 3)
    forces_rmse = [np.sqrt(np.mean((f - frame.forces) ** 2)) for frame, _, f in predictions]
    per_atom = [abs(e - frame.energy) / len(frame) for frame, e, _ in predictions]
    for name, sizes in (("forces", forces_rmse), ("energy", per_atom)):
        images = read(folder / "worst" / f"worst_{name}.xyz", ":")
        assert [atoms.info["frame"] for atoms in images] == np.argsort(sizes)[::-1][:3].tolist()
        for atoms in images:
            frame, energy, forces = predictions[atoms.info["frame"]]
            assert atoms.get_potential_energy() == pytest.approx(frame.energy, rel=1e-9)
            np.testing.assert_allclose(atoms.get_forces(), frame.forces, atol=1e-7)
            np.testing.assert_allclose(atoms.arrays["predicted_forces"], forces, atol=1e-5)
            assert atoms.info["predicted_energy"] == pytest.approx(energy, rel=1e-6)
            assert atoms.info["forces_rmse"] == pytest.approx(forces_rmse[atoms.info["frame"]], rel=1e-5)


def test_the_own_test_part_is_what_training_never_saw(folder, predictions):
    ddpkit_eval(folder / "run")
    found = table(folder / "run" / "evaluation" / "test" / "accuracy.csv")["all"]
    parts = {}
    for part in ("train", "validation", "test", "all"):
        ddpkit_eval(folder / "run", folder / "set.xyz", "--split", part, "--out", folder / part)
        with (folder / part / "frames.csv").open(newline="") as file:
            parts[part] = {int(row["frame"]) for row in csv.DictReader(file)}
    assert [len(parts[part]) for part in ("train", "validation", "test")] == [12, 5, 7]
    assert parts["train"] | parts["validation"] | parts["test"] == parts["all"] == set(range(FRAMES))
    names = {predictions[number][0].name for number in parts["test"]}
    assert found == pytest.approx(expected(predictions, lambda frame: frame.name in names), rel=1e-5)
    with (folder / "run" / "epochs.csv").open(newline="") as file:
        (epoch,) = csv.DictReader(file)
    validated = table(folder / "validation" / "accuracy.csv")["all"]
    assert validated["forces_rmse_mev_per_angstrom"] == pytest.approx(1e3 * float(epoch["val_forces_rmse"]), rel=1e-5)
    assert validated["energy_mae_mev_per_atom"] == pytest.approx(1e3 * float(epoch["val_energy_mae"]), rel=1e-5)


def test_frames_that_the_run_has_seen_are_left_out_of_other_sets(folder):
    rng = np.random.default_rng(8)
    parts = {}
    for part in ("train", "validation", "test"):
        ddpkit_eval(folder / "run", folder / "set.xyz", "--split", part, "--out", folder / part)
        with (folder / part / "frames.csv").open(newline="") as file:
            parts[part] = [int(row["frame"]) for row in csv.DictReader(file)]
    images = read(folder / "set.xyz", ":")
    fresh = Atoms(SYMBOLS, positions(rng))
    fresh.calc = SinglePointCalculator(fresh, energy=-40.0, forces=rng.normal(size=(4, 3)))
    of = {part: [images[number] for number in numbers] for part, numbers in parts.items()}
    write(folder / "other.xyz", [of["train"][0], of["test"][0], fresh, of["validation"][0], *of["test"][1:]])
    ddpkit_eval(folder / "run", folder / "other.xyz", "--out", folder / "other")
    with (folder / "other" / "frames.csv").open(newline="") as file:
        assert [int(row["frame"]) for row in csv.DictReader(file)] == [1, 2, *range(4, 4 + len(of["test"]) - 1)]
    assert "2 frames left out that the run trained or validated on." in (folder / "other" / "accuracy.md").read_text()
    write(folder / "trained.xyz", of["train"][:3])
    with pytest.raises(InputError, match=r"All frames of .* are among those that the run trained or validated on"):
        ddpkit_eval(folder / "run", folder / "trained.xyz", "--out", folder / "other")


def fragments(rng, names=("one", "two", "three")):
    """Fragments in TorsionNet500's layout, of different numbers of conformers."""
    content = {}
    for number, name in enumerate(names):
        conformers = 24 - number
        content[name] = {
            "torsion_atom_indices": [0, 1, 2, 3],
            "atom_symbols": list(SYMBOLS),
            "smiles": "",
            "conformer_coordinates": [positions(rng).tolist() for _ in range(conformers)],
            "dft_energy_profile": [[-165.0 + 15 * k, float(rng.uniform(0, 5))] for k in range(conformers)],
        }
    return content


def test_torsion_barriers(folder):
    content = fragments(np.random.default_rng(3))
    strange = {**content["one"], "atom_symbols": ["H", "C", "S", "H"]}
    (folder / "torsion.json").write_text(json.dumps({**content, "strange": strange}))
    ddpkit_eval(folder / "run" / "checkpoints" / "last.pt", "--torsion", folder / "torsion.json", "--out", folder / "t")
    model = load_model(folder / "run" / "checkpoints" / "last.pt")
    found = table(folder / "t" / "torsion.csv")
    assert list(found) == list(content)
    for name, entry in content.items():
        images = [Atoms(SYMBOLS, xyz) for xyz in entry["conformer_coordinates"]]
        write(folder / "conformers.traj", images)
        energies = [
            float(model(collate([frame], model.species, model.r_max, labels=False))["energy"].detach())
            for frame in read_ase(folder / "conformers.traj", labels=False)
        ]
        reference = [energy for _, energy in entry["dft_energy_profile"]]
        assert found[name]["barrier_reference"] == max(reference) - min(reference)
        assert found[name]["barrier_predicted"] == pytest.approx(KCAL_PER_MOL * np.ptp(energies), rel=1e-4)
    with (folder / "t" / "torsion.csv").open(newline="") as file:
        errors = [float(row["error"]) for row in csv.DictReader(file)]
    said = (folder / "t" / "torsion.md").read_text()
    assert f"{np.mean(np.abs(errors)):.3g}" in said
    assert "elements that the model does not know: 1" in said
    assert "too low: 2" in said


def test_torsion_reference_of_another_file_is_matched_by_fragment_and_angle(folder):
    rng = np.random.default_rng(4)
    content = fragments(rng)
    other = {
        name: {"dft_energy_profile": [[angle, 7.0 * (angle == 0)] for angle in np.arange(-165.0, 181, 15)[::-1]]}
        for name in [*content, "unused"]
    }
    (folder / "coordinates.json").write_text(json.dumps(content))
    (folder / "reference.json").write_text(json.dumps(other))
    ddpkit_eval(folder / "run", "--torsion", folder / "coordinates.json", "--torsion-reference", folder / "reference.json",
                "--out", folder / "r")  # fmt: skip
    assert {row["barrier_reference"] for row in table(folder / "r" / "torsion.csv").values()} == {7.0}


def test_two_ranks_agree_with_one(folder):
    (folder / "three.json").write_text(json.dumps(fragments(np.random.default_rng(5))))
    command, variables = mpirun(2)
    words = [folder / "run", folder / "set.xyz", "--torsion", folder / "three.json"]
    ddpkit_eval(*words, "--out", folder / "one_rank")
    subprocess.run(
        [*command, sys.executable, "-m", "ddpkit.experiments", "eval", *map(str, words), "--out", str(folder / "two_ranks"),
         "--device", "cpu"],
        env=variables, check=True, timeout=300, capture_output=True,
    )  # fmt: skip
    for name in ("accuracy", "elements", "frames", "torsion"):
        one, two = (table(folder / f"{ranks}_rank{'s' * (ranks == 'two')}" / f"{name}.csv") for ranks in ("one", "two"))
        assert one.keys() == two.keys()
        for key, row in one.items():
            assert two[key] == pytest.approx(row, rel=1e-5)


def test_a_prediction_that_is_not_finite_is_refused(folder):
    state = torch.load(folder / "run" / "checkpoints" / "last.pt", weights_only=True)
    for weights in (state["model"], state["ema"]):
        for value in weights.values():
            if value.is_floating_point():
                value.fill_(float("nan"))
    torch.save(state, folder / "nan.pt")
    with pytest.raises(InputError, match="NaN"):
        ddpkit_eval(folder / "nan.pt", folder / "set.xyz", "--out", folder / "nan")


def test_bad_input_is_one_sentence(folder, tmp_path):
    (tmp_path / "text.json").write_text("no")
    (tmp_path / "list.json").write_text("[]")
    content = fragments(np.random.default_rng(6))
    for key, value in (("atom_symbols", ["Q"] * 4), ("atom_symbols", ["H"]), ("dft_energy_profile", [])):
        (tmp_path / f"{len(str(value))}.json").write_text(json.dumps({"x": {**content["one"], key: value}}))
    without = {k: v for k, v in content["one"].items() if k != "conformer_coordinates"}
    (tmp_path / "nocoord.json").write_text(json.dumps({"x": without}))
    write(tmp_path / "unlabelled.xyz", Atoms("H2", [[0, 0, 0], [0, 0, 1]]))
    strange = Atoms("S2", [[0, 0, 0], [0, 0, 1]])
    strange.calc = SinglePointCalculator(strange, energy=0.0, forces=np.zeros((2, 3)))
    write(tmp_path / "strange.xyz", strange)
    checkpoint = tmp_path / "alone.pt"
    checkpoint.write_bytes((folder / "run" / "checkpoints" / "last.pt").read_bytes())
    cases = [
        ((tmp_path / "nothing",), "lies in no run folder"),
        ((tmp_path / "nothing", folder / "set.xyz"), "no checkpoint"),
        ((folder / "set.xyz", folder / "set.xyz"), "cannot be read"),
        ((checkpoint,), "give DATA"),
        ((checkpoint, folder / "set.xyz", "--split", "test"), "leave --split test out"),
        ((folder / "run", tmp_path / "nothing.xyz"), "does not exist"),
        ((folder / "run", tmp_path / "text.json"), "cannot be read"),
        ((folder / "run", tmp_path / "unlabelled.xyz"), "no energy"),
        ((folder / "run", tmp_path / "strange.xyz", "--out", tmp_path / "o"), "S, which the model does not know"),
        ((folder / "run", "--out", tmp_path / "text.json"), "choose another folder with --out"),
        ((folder / "run", "--batch-size", 0), "--batch-size 0"),
        ((folder / "run", "--worst", -1), "--worst -1"),
        ((folder / "run", "--torsion-reference", tmp_path / "nocoord.json"), "needs --torsion"),
        *(
            ((folder / "run", "--torsion", path), "JSON|fragments|lacks|coordinates of shape|symbol")
            for path in sorted(tmp_path.glob("*.json"))
        ),
    ]
    for words, sentence in cases:
        with pytest.raises(InputError, match=sentence) as caught:
            ddpkit_eval(*words)
        assert "\n" not in str(caught.value)
