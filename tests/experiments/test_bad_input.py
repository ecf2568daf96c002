"""Bad input ends in one sentence and exit code 2, on every rank."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from starts import run_ddpkit

from ddpkit.errors import InputError
from ddpkit.experiments.cli import _dispatch
from ddpkit.ranks.mpirun import mpirun


def frame(symbols, *, energy=-1.0, bad_force=False):
    rng = np.random.default_rng(len(symbols))
    atoms = Atoms(symbols, rng.uniform(0, 3, (len(Atoms(symbols)), 3)))
    forces = rng.normal(size=(len(atoms), 3))
    if bad_force:
        forces[0, 0] = np.nan
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    return atoms


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write(folder / "good.xyz", [frame("CH4") for _ in range(20)], format="extxyz")
    write(folder / "nan.xyz", [frame("CH4", bad_force=k == 3) for k in range(20)], format="extxyz")
    write(folder / "few.xyz", [frame("CH4") for _ in range(2)], format="extxyz")
    unlabelled = Atoms("CH4", np.eye(5, 3))
    write(folder / "unlabelled.xyz", [unlabelled] * 20, format="extxyz")
    (folder / "empty.xyz").write_text("")
    (folder / "garbage.xyz").write_text("these are\nno frames\n")
    (folder / "no_run").mkdir()
    return folder


def save(path, state):
    torch.save(state, path)


TINY = ("model=allegro_tiny", "data=files", "device=cpu", "train.max_epochs=1", "train.batch_size=4")

BAD = {
    "missing file": ("data.path={files}/missing.xyz", "missing.xyz.*does not exist"),
    "empty file": ("data.path={files}/empty.xyz", "empty.xyz"),
    "garbage": ("data.path={files}/garbage.xyz", "garbage.xyz"),
    "no labels": ("data.path={files}/unlabelled.xyz", "energy|forces"),
    "NaN label": ("data.path={files}/nan.xyz", "NaN|not finite|infinite"),
    "too few frames": ("data.path={files}/few.xyz", "split|frames"),
    "batch larger than the set": ("data.path={files}/good.xyz train.batch_size=500", "batch_size"),
    "unknown strategy": ("data.path={files}/good.xyz strategy=horovod", "strategy=horovod.*unknown.*custom"),
    "unknown model": ("model=schnet", "model=schnet.*unknown"),
    "unknown data": ("data=imagenet", "data=imagenet.*unknown"),
    "misspelt override": ("data.path={files}/good.xyz trian.max_steps=3", "trian.max_steps.*train.max_steps"),
    "misspelt option": ("data.path={files}/good.xyz train.max_step=3", "train.max_step .*did you mean train.max_steps"),
    "no number": ("data.path={files}/good.xyz train.max_steps=many", "train.max_steps|max_steps"),
    "negative cutoff": ("data.path={files}/good.xyz model.r_max=-3", "model.r_max=-3"),
    "zero batch": ("data.path={files}/good.xyz train.batch_size=0", "train.batch_size=0"),
    "unknown precision": ("data.path={files}/good.xyz precision=float16", "precision=float16"),
    "unknown device": ("data.path={files}/good.xyz device=tpu", "device=tpu"),
    "unknown comm": ("data.path={files}/good.xyz comm=smoke", "comm=smoke"),
    "comm of the strategy": (
        "data.path={files}/good.xyz +strategy.comm=mpi",
        "strategy.comm is no option of a strategy in a run: write comm=mpi",
    ),
    "compile of the strategy": ("data.path={files}/good.xyz +strategy.compile=true", "write compile=true"),
    "clipping of the strategy": ("data.path={files}/good.xyz +strategy.clip_norm=2", "write train.clip_norm=2"),
    "split over one": ("data.path={files}/good.xyz data.split=[0.9,0.9,0.1]", "data.split"),
    "path not set": ("", "data.path must be set"),
    "syntax": ("data.path={files}/good.xyz train.plateau={{", "."),
    "resume nothing": ("data.path={files}/good.xyz resume={files}/no_run", "no run folder"),
    "start from nothing": ("data.path={files}/good.xyz init_from={files}/no_run", "no checkpoint"),
    "in-graph without compile": ("data.path={files}/good.xyz strategy=ingraph", "compile=[Tt]rue"),
    "negative clip": ("data.path={files}/good.xyz train.clip_norm=-1", "clip_norm"),
    "negative seed": ("data.path={files}/good.xyz data.seed=-1", "data.seed=-1"),
    "negative rate": ("data.path={files}/good.xyz optimizer.lr=-1", "optimizer.*learning rate"),
    "unknown optimizer": (
        "data.path={files}/good.xyz optimizer._target_=torch.optim.Nope",
        "optimizer.*torch.optim.Nope",
    ),
    "average of the weights": ("data.path={files}/good.xyz train.ema_decay=1.5", "train.ema_decay=1.5"),
    "no loss": ("data.path={files}/good.xyz loss.energy=0 loss.forces=0", "loss.energy or loss.forces"),
    "no walltime": ("data.path={files}/good.xyz train.max_seconds=0", "train.max_seconds=0"),
    "no frames": ("data.path={files}/good.xyz data.frames=0", "data.frames=0"),
    "nowhere to write": ("data.path={files}/good.xyz run_dir=/proc/nowhere", "/proc/nowhere could not be written"),
    "no configuration file but a file": ("data.path={files}/good.xyz resume={files}/good.xyz", "no run folder"),
    "start from a file": ("data.path={files}/good.xyz init_from={files}/good.xyz", "is a file: give the run folder"),
    "no key": ("data.path={files}/good.xyz =3", "=3 is no option"),
    "an option": ("data.path={files}/good.xyz --multirun", "--multirun is no option"),
    "no value": ("data.path={files}/good.xyz train.max_steps", "train.max_steps=VALUE"),
    "Hydra's own": ("data.path={files}/good.xyz hydra.run.dir=x", "hydra.run.dir=x would have no effect"),
    "an append to what is there": ("data.path={files}/good.xyz +model.r_max=3", "without the \\+"),
    "huge seed": ("data.path={files}/good.xyz seed=99999999999999999999", "seed=9.* less than 2"),
    "endless timeout": ("data.path={files}/good.xyz train.timeout=inf", "train.timeout=inf"),
    "cutoff in words": ("data.path={files}/good.xyz model.r_max=six", "model.r_max=six is no cutoff"),
    "split that is no number": ("data.path={files}/good.xyz data.split=[nan,0.1,0.1]", "data.split"),
    "no patience": ("data.path={files}/good.xyz train.early_stop.patience=0", "train.early_stop.patience=0"),
    "a strategy that there is not": ("data.path={files}/good.xyz strategy._target_=nope.Nope", "nope.Nope.*imported"),
    "bad model option": ("data.path={files}/good.xyz model.polynomial_cutoff_p=0", "polynomial_cutoff_p"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_sentence_that_names_the_thing(case, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, expected = BAD[case]
    chosen = [word for word in TINY if not any(w.startswith(word.split("=")[0] + "=") for w in words.split())]
    with pytest.raises(InputError) as raised:
        _dispatch(["run", *chosen, f"data.cache={tmp_path}", *words.format(files=files).split()])
    message = str(raised.value)
    assert re.search(expected, message), message
    assert "\n" not in message
    assert len(message) < 400


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    words = (*TINY, "train.projection=true", f"data.path={files}/good.xyz", f"data.cache={folder}/cache")
    _dispatch(["run", *words, f"run_dir={folder}/run"])
    return folder / "run"


@pytest.fixture
def killed(finished, tmp_path):
    """The folder of a run that was killed some steps after its last checkpoint."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"status": "running"}))
    for name in ("steps.csv", "projection.csv"):
        *_, last = (run / name).read_text().splitlines()
        step, *rest = last.split(",")
        (run / name).write_text(f"{(run / name).read_text()}{','.join([str(int(step) + 1), *rest])}\n")
    (run / "summary.json.12-34.part").write_text("half")
    return run


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Touch:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


DAMAGE = {
    "truncated": (lambda _, path: path.write_bytes(path.read_bytes()[:5000]), "cannot be read"),
    "of another model": (
        lambda state, path: save(path, state | {"model_spec": state["model_spec"] | {"num_layers": 1}}),
        "another model.*num_layers",
    ),
    "without a weight": (lambda state, path: save(path, state | {"model": {}}), "does not fit its model"),
    "of something else": (lambda _, path: save(path, {"weights": torch.zeros(3)}), "not a ddpkit checkpoint"),
    "with code": (lambda state, path: save(path, state | {"more": Touch(path.parent / "touched")}), "cannot be read"),
    "with a callable": (
        lambda state, path: save(
            path, state | {"model_spec": state["model_spec"] | {"scales": {"_target_": "os.getcwd"}}}
        ),
        "another model.*scales",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_checkpoint_is_refused_and_nothing_is_touched(damage, killed):
    last = killed / "checkpoints" / "last.pt"
    change, expected = DAMAGE[damage]
    change(torch.load(last, weights_only=True), last)
    before = contents(killed)
    with pytest.raises(InputError, match=expected) as raised:
        _dispatch(["run", f"resume={killed}", "train.max_epochs=2"])
    assert "\n" not in str(raised.value)
    assert contents(killed) == before


UNFIT = {
    "device=cuda:77": "cuda",
    "train.turns=gone": "train.turns=null",
    "seed=2": "seed=2 is not what the run in",
    "profile=-1": "profile=-1",
}


@pytest.mark.parametrize("word", UNFIT)
def test_settings_that_a_run_cannot_go_on_with_are_refused_and_nothing_is_touched(word, killed):
    before = contents(killed)
    with pytest.raises(InputError, match=UNFIT[word]) as raised:
        _dispatch(["run", f"resume={killed}", "train.max_epochs=2", word])
    assert "\n" not in str(raised.value)
    assert contents(killed) == before


def test_a_run_is_not_written_over(finished, files):
    with pytest.raises(InputError, match=f"holds a run already: go on with resume={finished}"):
        _dispatch(
            ["run", *TINY, f"data.path={files}/good.xyz", f"data.cache={finished}/../cache", f"run_dir={finished}"]
        )


COMMANDS = {
    "": None,
    "fly": "no command",
    "experiment": "study",
    "experiment numbers": "numbers",
    "experiment speed scale=huge": "scale=huge",
    "experiment numerics repeats=none": "repeats=none",
    "bench": "no command",
    "models alegro": "alegro",
    "analyze": "analyze",
    "analyze numerics missing_folder": "missing_folder",
    "analyze poetry .": "poetry",
    "data": "data",
    "data prepare spice missing.h5 out": "missing.h5|out",
    "data info missing": "missing",
    "eval missing": "missing does not exist",
    "models allegro_tiny --species Xx": "--species Xx",
    "models allegro_tiny model.nope=3": "did you mean model\\?$",
    "data generate --seed -1": "seed=-1",
    "data generate --frames 1 --processes -1 --cache cache": "-1 processes",
    "models allegro_tiny model.l_max=-2": "model cannot be built",
}


@pytest.mark.parametrize("command", [c for c, expected in COMMANDS.items() if expected])
def test_commands_refuse_in_one_sentence(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=COMMANDS[command]) as raised:
        _dispatch(command.split())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "expected", "launcher"),
    [
        ("data.path={files}/missing.xyz", "missing.xyz", "torchrun"),
        ("data.path={files}/nan.xyz", "nan.xyz", "mpirun"),
        ("data.path={files}/good.xyz train.batch_size=1", "train.batch_size", "torchrun"),
        ("data.path={files}/good.xyz strategy=horovod", "strategy=horovod", "mpirun"),
    ],
)
def test_on_two_ranks_with_exit_code_2(words, expected, launcher, files, tmp_path):
    places = (f"data.cache={tmp_path}", f"run_dir={tmp_path}/run")
    done = run_ddpkit("run", *TINY, *places, *words.format(files=files).split(), ranks=2, launcher=launcher)
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("ddpkit:")]
    assert len(said) == 1, done.stderr
    assert expected in said[0]
    assert "Traceback" not in done.stderr


LATE = """
import os, time
if os.environ["OMPI_COMM_WORLD_RANK"] == "0":
    time.sleep(3.0)
from ddpkit.experiments.cli import main
main()
"""


def test_a_sentence_is_not_lost_where_the_rank_that_says_it_starts_late(tmp_path):
    (tmp_path / "program.py").write_text(LATE)
    command, variables = mpirun(2)
    words = [*command, sys.executable, str(tmp_path / "program.py"), "run", *TINY, "strategy=horovod"]
    done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("ddpkit:")]
    assert len(said) == 1, done.stderr
    assert "strategy=horovod" in said[0]
