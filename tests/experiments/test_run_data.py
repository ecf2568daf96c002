"""The data of a run: what it says of them, what it refuses, and what happens when they change under it."""

import argparse
import json
import re
import shutil
import threading

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from starts import run_ddpkit

from ddpkit import InputError
from ddpkit.data import PreparedSet, split, write_prepared
from ddpkit.data.frame import Frame
from ddpkit.experiments import evaluate, run_data
from ddpkit.experiments.cli import _dispatch
from ddpkit.experiments.config import read

TINY = ("model=allegro_tiny", "data=files", "device=cpu", "train.max_epochs=1", "train.batch_size=4")


def image(seed, symbols="OH2", stress=None, periodic=False, **info):
    rng = np.random.default_rng(seed)
    positions = np.eye(3) * 1.1 + 0.1 * rng.normal(size=(3, 3))
    atoms = Atoms(symbols, positions, info=info, cell=4 * np.eye(3) if periodic else None, pbc=periodic)
    labels = {"energy": float(rng.normal()), "forces": rng.normal(size=(3, 3))}
    atoms.calc = SinglePointCalculator(atoms, **labels, **({} if stress is None else {"stress": stress * np.ones(6)}))
    return atoms


def images(count, first=0, **options):
    return [image(first + k, **options) for k in range(count)]


def save(path, frames):
    write(path, frames, format="extxyz")
    return path


def run(tmp_path, *words):
    _dispatch(["run", *TINY, f"data.cache={tmp_path}/cache", *map(str, words)])


def refused(tmp_path, *words, command="run"):
    with pytest.raises(InputError) as raised:
        _dispatch([command, *TINY, f"data.cache={tmp_path}/cache", *map(str, words)])
    assert "\n" not in str(raised.value)
    return str(raised.value)


def ddpkit_eval(*words):
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    evaluate.main(parser.parse_args([*map(str, words), "--device", "cpu"]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, its data file, and the file with frames added."""
    folder = tmp_path_factory.mktemp("trained")
    save(folder / "original.xyz", images(20))
    save(folder / "grown.xyz", images(20) + images(10, first=50))
    shutil.copy(folder / "original.xyz", folder / "data.xyz")
    run(folder, f"data.path={folder}/data.xyz", f"run_dir={folder}/run", "data.split=[0.6,0.2,0.2]")
    return folder


@pytest.fixture
def place(trained, monkeypatch):
    monkeypatch.setenv("DDPKIT_CACHE", str(trained / "cache"))
    yield trained
    shutil.copy(trained / "original.xyz", trained / "data.xyz")


def test_a_run_names_its_labels_and_keeps_a_fingerprint(place):
    summary = json.loads((place / "run" / "summary.json").read_text())
    assert summary["labels"] == {"energy": {"key": "energy", "unit": "eV"}, "forces": {"key": "forces", "unit": "eV/Å"}}
    kept = PreparedSet(summary["data_fingerprint"]["set"])
    assert summary["data_fingerprint"]["frames"] == kept.fingerprint
    state = torch.load(place / "run" / "checkpoints" / "last.pt", weights_only=True)
    assert state["data"] == summary["data_fingerprint"]


def test_the_same_data_read_again_are_the_same(place):
    shutil.copytree(place / "run", place / "again")
    (place / "data.xyz").touch()
    _dispatch(["run", f"resume={place}/again", "train.max_epochs=2"])
    ddpkit_eval(place / "again", "--split", "all")
    ddpkit_eval(place / "again", place / "original.xyz", "--split", "test")
    said = (place / "again" / "evaluation" / "original-test" / "accuracy.md").read_text()
    assert "Labels: energy from energy [eV], forces from forces [eV/Å]." in said


def test_changed_data_are_refused(place):
    shutil.copytree(place / "run", place / "changed")
    shutil.copy(place / "grown.xyz", place / "data.xyz")
    with pytest.raises(InputError, match="have changed since it began: its frames or labels are others") as raised:
        _dispatch(["run", f"resume={place}/changed", "train.max_epochs=2"])
    kept = json.loads((place / "run" / "summary.json").read_text())["data_fingerprint"]["set"]
    assert kept in str(raised.value)
    for words in ((), ("--split", "test"), (place / "grown.xyz", "--split", "test")):
        with pytest.raises(InputError, match=r"is not what .* was trained on.*test part may hold frames") as raised:
            ddpkit_eval(place / "run", *words)
        assert kept in str(raised.value)
    ddpkit_eval(place / "run", place / "grown.xyz", "--out", place / "out")  # all of it, divided into nothing
    ddpkit_eval(place / "run", kept, "--split", "test", "--out", place / "out")
    with pytest.raises(InputError, match="was trained on other data"):
        run(
            place,
            f"data.path={place}/grown.xyz",
            f"init_from={place}/run",
            f"run_dir={place}/next",
            "data.split=[0.6,0.2,0.2]",
        )


def test_a_set_changed_in_place_is_refused(tmp_path):
    rng = np.random.default_rng(0)

    def frame():
        return Frame(
            np.array([8, 1]), np.array([[0, 0, 0], [0, 0, 1.0 + 0.1 * rng.random()]]), 0.0, rng.normal(size=(2, 3))
        )

    made = write_prepared(tmp_path / "set", [frame() for _ in range(20)], r_max=4.0)
    forces = np.load(made.path / "forces.npy")
    np.save(made.path / "forces.npy", forces + 1)
    assert "forces.npy does not match its checksum" in refused(
        tmp_path, f"data.path={tmp_path}/set", f"run_dir={tmp_path}/run"
    )


def test_runs_without_a_fingerprint_go_on_and_it_is_said(place, capsys):
    old = place / "old"
    shutil.copytree(place / "run", old)
    for path in (old / "checkpoints").iterdir():
        state = torch.load(path, weights_only=True)
        del state["data"]
        torch.save(state, path)
    summary = json.loads((old / "summary.json").read_text())
    del summary["data_fingerprint"]
    (old / "summary.json").write_text(json.dumps(summary))
    ddpkit_eval(old)
    assert "no fingerprint of its data" in capsys.readouterr().out
    _dispatch(["run", f"resume={old}", "train.max_epochs=2"])
    assert "no fingerprint of its data" in capsys.readouterr().out


def test_frames_in_two_parts_and_species_that_are_never_trained_on_are_said(tmp_path, capsys):
    frames = images(20)
    path = save(tmp_path / "a.xyz", frames + frames)
    run(tmp_path, f"data.path={path}", f"run_dir={tmp_path}/run", "train.max_steps=1", "data.split=[0.5,0.25,0.25]")
    said = capsys.readouterr().out
    assert "test frames are identical to train frames" in said
    assert "in none to train on" not in said
    rng = np.random.default_rng(1)
    test = rng.permutation(20)[18:]  # as `split` divides
    frames = [image(k, "SiH2" if k in test else "OH2") for k in range(20)]
    save(path, frames)
    run(tmp_path, f"data.path={path}", f"run_dir={tmp_path}/other", "train.max_steps=1", "data.split=[0.8,0.1,0.1]")
    said = capsys.readouterr().out
    assert "Si is in 2 of the 2 test frames and in none to train on" in said
    assert "identical" not in said


def test_a_loss_on_labels_that_are_not_there_is_refused(tmp_path):
    molecules = save(tmp_path / "molecules.xyz", images(20))
    assert "set loss.stress=0" in refused(tmp_path, f"data.path={molecules}", "loss.stress=1")
    bare = save(tmp_path / "bare.xyz", images(20, periodic=True))
    said = refused(tmp_path, f"data.path={bare}", "loss.stress=1")
    assert "none of the 18 frames to train on has a stress" in said
    assert "data.stress_key" in said
    validation = np.random.default_rng(1).permutation(20)[16:]
    some = [image(k, periodic=True, stress=0.1 if k in validation else None) for k in range(20)]
    path = save(tmp_path / "some.xyz", some)
    assert "data.allow_missing=true" in refused(tmp_path, f"data.path={path}")
    words = (f"data.path={path}", "loss.stress=1", "data.allow_missing=true", "data.split=[0.8,0.1,0.1]")
    assert "none of the 16 frames to train on has a stress, though 4 others" in refused(tmp_path, *words)


def test_partial_stress_is_trained_on_when_asked(tmp_path, capsys):
    some = [image(k, periodic=True, stress=0.1 if k % 2 else None) for k in range(20)]
    path = save(tmp_path / "some.xyz", some)
    words = (
        f"data.path={path}",
        "data.allow_missing=true",
        f"run_dir={tmp_path}/run",
        "loss.stress=1",
        "train.max_steps=2",
    )
    run(tmp_path, *words)
    said = capsys.readouterr().out
    assert "frames to train on have no stress and add nothing to its term" in said
    rows = (tmp_path / "run" / "steps.csv").read_text().splitlines()
    place = rows[0].split(",").index("loss_stress")
    assert all(float(row.split(",")[place]) > 0 for row in rows[1:])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("model.r_max=0.5", r"o frame of .*a\.xyz has two atoms within (model\.)?r_max=0\.5"),
        ("data.energy_key=typo", r"no energy under typo .*correct data\.energy_key=typo"),
        ("data.stress_key=typo", r"so none has a stress: leave data\.stress_key=typo out"),
    ],
)
def test_what_a_file_lacks_is_told_as_overrides(tmp_path, words, expected):
    path = save(tmp_path / "a.xyz", images(20))
    assert re.search(expected, refused(tmp_path, f"data.path={path}", f"run_dir={tmp_path}/run", words))


def test_keys_of_a_prepared_set_are_not_chosen_again(place, tmp_path):
    kept = json.loads((place / "run" / "summary.json").read_text())["data_fingerprint"]["set"]
    said = refused(tmp_path, f"data.path={kept}", "data.energy_key=REF_energy")
    assert "energy was read from energy, not REF_energy: leave data.energy_key=REF_energy out" in said
    said = refused(tmp_path, "data=generated", "data.energy_key=REF_energy")
    assert "data.energy_key=REF_energy is for data=files" in said


def test_a_run_without_weights_says_why(place, tmp_path):
    for words, expected in (
        (("train.checkpoint_every=0",), r"left no weights .*train\.checkpoint_every=0, which writes none"),
        ((), "left no weights .*ended before its first checkpoint"),
    ):
        run(tmp_path, f"data.path={place}/original.xyz", f"run_dir={tmp_path}/run", "train.max_steps=1", *words)
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        with pytest.raises(InputError, match=expected):
            ddpkit_eval(tmp_path / "run")
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize(("case", "launcher"), [("levels", "mpirun"), ("changed", "torchrun")])
def test_on_two_ranks_with_exit_code_2(case, launcher, place, tmp_path):
    if case == "levels":
        frames = images(20)
        for atoms in frames:
            atoms.info["REF_energy"], atoms.arrays["REF_forces"] = 1.0, np.ones((3, 3))
        path = save(tmp_path / "a.xyz", frames)
        words = [*TINY, f"data.path={path}", f"data.cache={tmp_path}/cache", f"run_dir={tmp_path}/run"]
        expected = "data.energy_key=REF_energy data.forces_key=REF_forces"
    else:
        shutil.copy(place / "grown.xyz", place / "data.xyz")
        words = [f"resume={shutil.copytree(place / 'run', tmp_path / 'run')}", "train.max_epochs=2"]
        expected = "have changed since it began"
    done = run_ddpkit("run", *words, ranks=2, launcher=launcher)
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("ddpkit:")]
    assert len(said) == 1, done.stderr
    assert expected in said[0]
    assert "Traceback" not in done.stderr


def test_a_run_that_ends_between_epochs_leaves_no_thread(tmp_path):
    save(tmp_path / "a.extxyz", images(40))
    words = ["train.max_epochs=9", "train.early_stop.patience=1", "train.early_stop.threshold=1e9"]
    run(tmp_path, f"data.path={tmp_path}/a.extxyz", f"run_dir={tmp_path}/run", *words)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == 2
    assert not [thread for thread in threading.enumerate() if thread.name == "ddpkit-loader"]


def lone(symbol, energy, **info):
    atoms = Atoms(symbol, info={"config_type": "IsolatedAtom", **info})
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((1, 3)))
    return atoms


def test_a_model_is_normalised_by_the_frames_to_train_on_and_the_isolated_atoms_of_the_file(tmp_path):
    frames = images(12)
    save(tmp_path / "a.xyz", [lone("O", -7.0), *frames[:6], lone("H", -3.0), *frames[6:]])
    run(
        tmp_path,
        f"data.path={tmp_path}/a.xyz",
        f"run_dir={tmp_path}/run",
        "model.r_max=1.7",
        "data.split=[0.5,0.25,0.25]",
    )
    spec = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["model_spec"]
    assert (spec["species"], spec["shifts"]) == (["H", "O"], [-3.0, -7.0])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    kept = PreparedSet(summary["data_fingerprint"]["set"])
    assert (len(kept), kept.atoms.tolist()) == (12, [3] * 12)  # without the isolated atoms
    trained = [frames[k] for k in split(12, [0.5, 0.25, 0.25], 1)[0]]
    near = [(np.linalg.norm(a.positions[:, None] - a.positions, axis=-1) < 1.7).sum() - 3 for a in trained]
    assert spec["avg_num_neighbors"] == pytest.approx(sum(near) / (3 * len(trained)))
    forces = np.array([a.get_forces() for a in trained])
    of = {"H": forces[:, 1:], "O": forces[:, :1]}
    overall = 10 * np.mean(forces**2)  # ten atoms' worth, which a few atoms lean towards
    for symbol, scale in zip(spec["species"], spec["scales"], strict=True):
        count = of[symbol].size / 3
        assert scale == pytest.approx(np.sqrt((count * np.mean(of[symbol] ** 2) + overall) / (count + 10)))


def test_isolated_atoms_that_contradict_each_other_or_do_not_suffice_are_refused(tmp_path):
    def sentence(name, *atoms, also=()):
        save(tmp_path / name, [*images(12), *atoms])
        return refused(tmp_path, f"data.path={tmp_path}/{name}", f"run_dir={tmp_path}/run", *also)

    said = sentence("two.xyz", lone("O", -7.0), lone("H", -3.0), lone("O", -7.1))
    assert "frame 14 of" in said
    assert "is an isolated O atom of -7.1 eV, but another one has -7 eV" in said
    said = sentence("few.xyz", lone("O", -7.0))
    assert "has energies of isolated atoms of O, but not of H: add a frame of one isolated atom for each" in said
    run(tmp_path, f"data.path={tmp_path}/few.xyz", f"run_dir={tmp_path}/fitted", "data.shifts=fitted")


def test_some_of_the_frames_to_train_on(tmp_path):
    """For learning curves: frames to validate and test on stay, and fewer to train on are some of more."""
    config = read(["data=files", "data.path=-", "data.split=[0.6,0.2,0.2]"])
    save(tmp_path / "a.xyz", images(30))
    for count in (4, 9):
        run(tmp_path, f"data.path={tmp_path}/a.xyz", f"run_dir={tmp_path}/{count}", "data.split=[0.6,0.2,0.2]",
            f"data.train_frames={count}")  # fmt: skip
        rows = (tmp_path / str(count) / "steps.csv").read_text().splitlines()
        assert len(rows) - 1 == count // 4
    train = np.arange(3, 21)
    few, more = (run_data._some(train, count, config.data.seed) for count in (4, 9))
    assert (len(few), len(more), sorted(more)) == (4, 9, more.tolist())
    assert set(few) < set(more) < set(train)
    assert set(run_data._some(train, 4, 2)) != set(few)
    said = refused(tmp_path, f"data.path={tmp_path}/a.xyz", f"run_dir={tmp_path}/x", "data.train_frames=40")
    assert "data.train_frames=40 is more than the 27 frames to train on" in said
