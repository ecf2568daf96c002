"""Runs that meet in a folder, and runs that are gone on with."""

import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
from starts import ddpkit, wait_for
from tiny import TINY

from ddpkit import checkpoint
from ddpkit.errors import InputError
from ddpkit.experiments import config
from ddpkit.experiments import run as command
from ddpkit.experiments.cli import _dispatch
from ddpkit.experiments.config import read


def test_what_an_override_sets_is_composed_once(monkeypatch):
    """Hydra takes a tenth of a second each time, and a resumed run asks twice for each of its overrides."""
    composed, compose = [], config.compose
    monkeypatch.setattr(config, "compose", lambda *words, **how: composed.append(how) or compose(*words, **how))
    config._leaves.cache_clear()
    whole = read(["train.max_steps=7", "model=allegro_tiny"])
    for _ in range(2):
        assert config.keys_of("train.max_steps=7", whole) == ["train.max_steps"]
        assert "model.num_layers" in config.keys_of("model=allegro_tiny", whole)
    assert len(composed) == 4  # the whole, the defaults, and each override alone


@pytest.fixture
def endless(clusters, cache, tmp_path):
    """A run without checkpoints that is under way; it is ended afterwards."""
    words = [*TINY, f"data.path={clusters}", f"data.cache={cache}", f"run_dir={tmp_path / 'run'}"]
    with ddpkit(["run", *words, "train.checkpoint_every=0", "train.max_epochs=100000"], tmp_path) as process:
        epochs = tmp_path / "run" / "epochs.csv"
        wait_for(lambda: epochs.exists() and epochs.read_text().count("\n") >= 2, process)
        yield process


def test_a_running_run_is_left_alone_and_a_failed_one_kept(endless, ddpkit_run, tmp_path):
    run = tmp_path / "run"
    before = (run / "config.yaml").read_text()
    link = tmp_path / "link"
    link.symlink_to(run)
    attempts = [(f"run_dir={run}", "seed=5"), (f"run_dir={link}",), (f"resume={run}",)]
    with ThreadPoolExecutor() as pool:
        refused = list(pool.map(lambda words: ddpkit_run(*words, check=False), attempts))
    for done in refused:
        assert done.returncode == 2, done.stderr
        assert f"is being written by another run (process {endless.pid} on " in done.stderr
        assert "Traceback" not in done.stderr
    os.kill(endless.pid, signal.SIGKILL)
    endless.wait(60.0)
    rows = (run / "steps.csv").read_bytes()
    assert (run / "config.yaml").read_text() == before
    assert pd.read_csv(run / "steps.csv").step.is_monotonic_increasing
    done = ddpkit_run(f"run_dir={run}", "seed=5")  # the first one has no checkpoint
    said = f"ddpkit: {run} held a run that ended without a checkpoint: its files are in {run / 'previous-1'} now.\n"
    assert done.stderr.count(said) == 1
    assert (run / "previous-1" / "steps.csv").read_bytes() == rows
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    assert pd.read_csv(run / "steps.csv").step.tolist() == list(range(1, 13))
    assert not (run / ".lock").exists()


def test_two_that_start_together_do_not_mix(ddpkit_run, tmp_path):
    run = tmp_path / "run"
    with ThreadPoolExecutor() as pool:
        seeds = (1, 2)
        both = list(pool.map(lambda seed: ddpkit_run(f"run_dir={run}", f"seed={seed}", check=False, ranks=2), seeds))
    codes = [done.returncode for done in both]
    assert sorted(codes) == [0, 2], [done.stderr for done in both]
    assert f"seed: {seeds[codes.index(0)]}" in (run / "config.yaml").read_text()
    assert len(pd.read_csv(run / "steps.csv")) == 12
    assert both[codes.index(2)].stderr.count("ddpkit: ") == 1


def test_runs_of_one_second_have_folders_of_their_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {str(command._dated(read([]))) for _ in range(5)}
    assert len(names) == 5


@pytest.fixture(scope="module")
def finished(tmp_path_factory, clusters, cache):
    run = tmp_path_factory.mktemp("finished") / "run"
    _dispatch(["run", *TINY, f"data.path={clusters}", f"data.cache={cache}", "train.max_epochs=1", f"run_dir={run}"])
    return run


def refusal(*words):
    with pytest.raises(InputError) as raised:
        _dispatch(["run", *words])
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("optimizer.lr=0.1", "optimizer.lr=0.1"),
        ("seed=7", "seed=7"),
        ("model.num_layers=5", "model.num_layers=5"),
        ("model=nequip_tiny", "model=nequip_tiny"),
        ("experiment=mptrj", "experiment=mptrj"),
        ("strategy=standard", "strategy=standard"),
        ("train.plateau.factor=0.5", "train.plateau.factor=0.5"),
    ],
)
def test_the_override_that_does_not_fit_is_named(word, named, finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    said = refusal(f"resume={finished}", word)
    assert said.startswith(f"{named} is not what the run in "), said
    assert f"leave {named} out" in said
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_of_several_overrides_the_last_that_sets_a_key_is_named(finished):
    said = refusal(f"resume={finished}", TINY[0], "model.num_layers=5")
    assert said.startswith("model.num_layers=5 is not what the run in "), said
    assert "leave model.num_layers=5 out" in said


def test_overrides_that_fit_need_not_be_complete(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    _dispatch(["run", f"resume={run}", "train.batch_size=8", "seed=1", "train.max_epochs=2"])
    assert checkpoint.load(run / "checkpoints" / "last.pt")["progress"]["epoch"] == 2
    assert pd.read_csv(run / "steps.csv").step.tolist() == list(range(1, 13))
    (environment,) = json.loads((run / "environment.json").read_text())["earlier"]
    assert environment["world_size"] == 1


def test_a_resumption_that_is_refused_late_loses_nothing(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    last = run / "checkpoints" / "last.pt"
    checkpoint.save(last, checkpoint.load(last) | {"model": {}})
    with (run / "steps.csv").open("a") as file:
        file.write("7,2,1.0,1.0,1.0,,0.002,1.0,10,20,0.1,0.1,0.1,0.1,0.1\n")  # after the checkpoint
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "does not fit its model" in refusal(f"resume={run}", "train.max_epochs=2")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_of_an_older_version_goes_on_under_the_new_columns(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    table = pd.read_csv(run / "steps.csv", dtype=str)
    table.drop(columns=["loss_stress", "grad_norm"]).assign(old="1").to_csv(run / "steps.csv", index=False)
    state = checkpoint.load(run / "checkpoints" / "last.pt")
    progress = {key: value for key, value in state["progress"].items() if key not in ("skipped", "eager_steps")}
    checkpoint.save(run / "checkpoints" / "last.pt", state | {"progress": progress})
    _dispatch(["run", f"resume={run}", "train.max_epochs=2"])
    after = pd.read_csv(run / "steps.csv", dtype=str)
    assert list(after) == [*table, "old"]
    assert after.step.astype(int).tolist() == list(range(1, 13))
    assert after.loss[:6].tolist() == table.loss.tolist()
    assert after.lr.astype(float).between(0, 0.1).all()
    assert after.grad_norm.isna().tolist() == [True] * 6 + [False] * 6


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run_dir={run}", "init_from={run}"], "is the folder of the new run itself"),
        (["run_dir={run}/checkpoints/last.pt"], "is a file or lies below one"),
        (["run_dir={run}/checkpoints/last.pt/run"], "is a file or lies below one"),
        (["run_dir=/sys/run"], "/sys/run could not be written"),
        (["resume={run}", "run_dir=elsewhere"], "leave run_dir=elsewhere out"),
        (["resume={run}/checkpoints"], "no run folder"),
        (["init_from={run}/nothing"], "no checkpoint"),
    ],
)
def test_folders_that_cannot_be_the_runs(words, expected, finished, clusters, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = () if words[0].startswith("resume") else (*TINY, f"data.path={clusters}", f"data.cache={cache}")
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert expected in refusal(*own, *(word.format(run=finished) for word in words))
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.rglob("config.yaml"))
