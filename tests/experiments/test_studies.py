import json

import pytest

from ddpkit.errors import InputError
from ddpkit.experiments import experiment
from ddpkit.experiments.config import read
from ddpkit.experiments.studies import STUDIES, Arm


def test_repeats_are_interleaved_and_labelled():
    labels = [arm.label for arm in STUDIES["numerics"]["demo"].arms(2)]
    assert labels == [
        "baseline", "standard", "compiled", "rerun", "new_seed", "standard_2", "compiled_2", "rerun_2", "new_seed_2",
    ]  # fmt: skip


def test_the_papers_cells_and_the_ones_it_could_not_fill():
    labels = {arm.label for arm in STUDIES["speed"]["paper"].arms(1)}
    assert labels >= {
        f"{s}-{c}-{w}" for s in ("standard", "custom", "none") for c in ("eager", "compile") for w in (32, 128)
    }
    assert "ingraph-compile-128" in labels
    assert "ingraph-eager-128" not in labels


@pytest.mark.parametrize(("study", "scale"), [(study, scale) for study in STUDIES for scale in STUDIES[study]])
def test_every_arm_is_a_valid_configuration(study, scale, monkeypatch):
    monkeypatch.setenv("DDPKIT_SPICE", "spice")
    monkeypatch.setenv("DDPKIT_MPTRJ", "mptrj")
    size = STUDIES[study][scale]
    for arm in size.arms(1):
        read([*size.overrides, *arm.overrides])


def test_the_new_seed_changes_the_seed_alone():
    scale = STUDIES["numerics"]["demo"]
    configs = {arm.label: read([*scale.overrides, *arm.overrides]) for arm in scale.arms(1)}
    assert configs["baseline"] == configs["rerun"]
    changed = {key for key in configs["baseline"] if configs["baseline"][key] != configs["new_seed"][key]}
    assert changed == {"seed"}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study whose runs are written instead of trained; what was run, in order."""
    ran = []

    def run(folder, overrides, ranks):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "study.json").write_text(json.dumps({"overrides": list(overrides), "ranks": ranks}))
        (folder / "summary.json").write_text('{"status": "finished"}')
        ran.append(folder.name)

    monkeypatch.setattr(experiment, "_run", run)
    return lambda *words: experiment.main(["numerics", "scale=demo", f"out={tmp_path}", *words]), ran


def test_complete_runs_are_kept_and_unfinished_ones_run_again(study, tmp_path):
    start, ran = study
    start()
    assert ran == ["baseline", "standard", "compiled", "rerun", "new_seed"]
    ran.clear()
    (tmp_path / "compiled" / "summary.json").write_text('{"status": "running"}')
    start()
    assert ran == ["compiled"]
    start("repeats=2")
    assert ran == ["compiled", "standard_2", "compiled_2", "rerun_2", "new_seed_2"]


def test_a_folder_of_another_configuration_is_refused(study):
    start, _ = study
    start()
    with pytest.raises(InputError, match="another configuration"):
        start("train.max_epochs=9")


def test_job_script(capsys):
    experiment.main(["numerics", "scale=paper", "--slurm", "train.max_epochs=2"])
    script = capsys.readouterr().out
    assert "#SBATCH --nodes=16" in script
    assert "#SBATCH --ntasks-per-node=4" in script
    assert "ddpkit experiment numerics scale=paper out=studies/numerics-paper ranks=64 train.max_epochs=2" in script
    assert isinstance(STUDIES["numerics"]["paper"].arms()[0], Arm)
