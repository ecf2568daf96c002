import subprocess
import sys

import numpy as np
import pytest
from simulated_runs import falling, write_run

from ddpkit.analysis.runs import common, read_runs, require_equal, require_same_frames
from ddpkit.errors import InputError


def test_import_loads_no_torch():
    code = "import sys, ddpkit.analysis.cli; print([m for m in ('torch', 'e3nn', 'ddpkit.models') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_losses_are_read_to_the_last_bit(tmp_path):
    rng = np.random.default_rng(3)
    losses = rng.random(2000) * 10.0 ** rng.integers(-12, 12, 2000)
    write_run(tmp_path, "baseline", losses)
    (run,), _ = read_runs(tmp_path)
    assert np.array_equal(run.steps["loss"].to_numpy(), losses)


def test_what_a_run_was_comes_from_its_configuration(tmp_path):
    write_run(tmp_path, "misleading_3", falling(5), compile=True, strategy={"_target_": "ddpkit.StandardSync"}, seed=9)
    write_run(tmp_path, "plain", falling(5), strategy="overlap", deterministic=True)
    write_run(tmp_path, "own", falling(5), strategy={"_target_": "mypackage.MySync"})
    runs = {run.label: run for run in read_runs(tmp_path)[0]}
    three = runs["misleading_3"]
    assert (three.stem, three.repeat, three.strategy, three.compiled, three.seed) == (
        "misleading",
        3,
        "standard",
        True,
        9,
    )
    assert (runs["plain"].strategy, runs["plain"].deterministic, runs["plain"].repeat) == ("overlap", True, 1)
    assert runs["own"].strategy == "MySync"


def test_repeats_come_in_natural_order(tmp_path):
    for label in ("rerun_10", "rerun_2", "rerun", "baseline"):
        write_run(tmp_path, label, falling(3))
    assert [run.label for run in read_runs(tmp_path)[0]] == ["baseline", "rerun", "rerun_2", "rerun_10"]


def test_half_finished_folders(tmp_path):
    torn = write_run(tmp_path, "torn", falling(10), status="running")
    text = (torn / "steps.csv").read_text()
    (torn / "steps.csv").write_text(text[:-25])
    (torn / "summary.json").unlink()
    fresh = write_run(tmp_path, "fresh", [])
    early = write_run(tmp_path, "early", falling(4))
    (early / "config.yaml").unlink()
    (tmp_path / "plots").mkdir()
    (tmp_path / ".cache").mkdir()
    runs, notes = read_runs(tmp_path)
    assert [run.label for run in runs] == ["torn"]
    assert list(runs[0].steps["step"]) == list(range(1, 10))
    assert runs[0].status == "unknown"
    assert runs[0].parameters is None
    assert len(notes) == 2
    assert any(note.startswith("fresh is left out") for note in notes)
    assert any(note.startswith("early is left out") for note in notes)
    assert fresh.exists()


def test_a_resumed_step_counts_once_with_its_last_value(tmp_path):
    run = write_run(tmp_path, "baseline", [1.0, 0.5, 0.25])
    again = (run / "steps.csv").read_text().splitlines()[2].replace("0.5", "0.75", 1)
    with (run / "steps.csv").open("a") as file:
        file.write(again + "\n")
    (read,), _ = read_runs(tmp_path)
    assert list(read.steps["loss"]) == [1.0, 0.75, 0.25]


def test_runs_of_different_steps_are_compared_where_both_logged(tmp_path):
    write_run(tmp_path, "a", [1.0, 2.0, 3.0, 4.0])
    write_run(tmp_path, "b", [20.0, 40.0], first_step=2, log_every=2, atoms=[102, 104])
    steps, mine, its = common(*read_runs(tmp_path)[0])
    assert (list(steps), list(mine), list(its)) == ([2, 4], [2, 4], [20, 40])


def test_ranks_that_were_emulated_count(tmp_path):
    write_run(tmp_path, "a", [1.0], world_size=1, strategy={"name": "emulated", "ranks": 64, "order": "ring"}, starts=3)
    ((run,), _) = read_runs(tmp_path)
    assert (run.world_size, run.ranks, run.starts) == (64, "64 emulated ranks", 3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data.seed": 8}, "data.seed is 7 in the one and 8"),
        ({"data.path": "other.xyz"}, "data.path"),
        ({"train.batch_size": 16}, "train.batch_size is 8 in the one and 16"),
        ({"model.r_max": 6.0}, "model.r_max"),
        ({"model._target_": "ddpkit.models.NequIP"}, "model._target_"),
        ({"optimizer.lr": 0.01}, "optimizer.lr"),
        ({"precision": "float64"}, "precision"),
        ({"world_size": 4}, "world_size is 2 in the one and 4"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused_by_name(tmp_path, change, named):
    write_run(tmp_path, "baseline", falling(5))
    write_run(tmp_path, "standard", falling(5), **change)
    with pytest.raises(InputError, match="baseline and standard cannot be compared") as caught:
        require_equal(read_runs(tmp_path)[0])
    assert named in str(caught.value)
    assert str(caught.value).count(". ") == 0


def test_what_the_studies_vary_may_differ(tmp_path):
    write_run(tmp_path, "baseline", falling(5))
    varied = {"strategy.name": "standard", "compile": True, "seed": 5, "deterministic": True, "comm": "mpi"}
    write_run(tmp_path, "other", falling(5), **varied, **{"train.max_steps": 50, "train.log_every": 10, "run_dir": "x"})
    require_equal(read_runs(tmp_path)[0])


def test_another_order_of_frames_is_seen_in_the_batches(tmp_path):
    write_run(tmp_path, "baseline", falling(5), atoms=[10, 11, 12, 13, 14])
    write_run(tmp_path, "standard", falling(5), atoms=[10, 11, 13, 12, 14])
    with pytest.raises(InputError, match=r"batches differ at step 3 \(12 and 13 atoms\)"):
        require_same_frames(read_runs(tmp_path)[0])


def test_bad_folders_end_in_one_sentence(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        read_runs(tmp_path / "missing")
    with pytest.raises(InputError, match="holds no run"):
        read_runs(tmp_path)
    run = write_run(tmp_path / "runs", "baseline", falling(5))
    with pytest.raises(InputError, match="is itself a run folder"):
        read_runs(run)
    for name, text, message in (
        ("config.yaml", "a: [", "not valid YAML"),
        ("summary.json", "{", "not valid JSON"),
        ("steps.csv", "step,loss\n1,2\n1,2,3,4\n", "not a table"),
        ("steps.csv", "step,value\n1,2\n", "lacks the column 'loss'"),
        ("steps.csv", "step,loss\n1,abc\n", "other than numbers"),
    ):
        kept = (run / name).read_text()
        (run / name).write_text(text)
        with pytest.raises(InputError, match=message):
            read_runs(tmp_path / "runs")
        (run / name).write_text(kept)


NEQUIP_HPARAMS = """
model:
  _target_: nequip.model.NequIPGNNModel
  seed: {seed}
  compile_mode: {mode}
  r_max: 5.0
info_dict:
  data: {{seed: 7, batch_size: 5}}
  trainer:
    strategy: {{_target_: {strategy}}}
"""


def _lightning(folder, label, losses, hparams=None, column="train_loss_step/weighted_sum"):
    where = folder / label / "version_0"
    where.mkdir(parents=True)
    lines = [f"epoch,lr,step,{column},val0_epoch/weighted_sum"]
    for i, loss in enumerate(losses):
        lines.append(f"0,,{i},{float(loss)!r},")
        lines.append(f"0,0.01,{i},,")
    lines.append(f"0,,{len(losses) - 1},,0.5")
    (where / "metrics.csv").write_text("\n".join(lines) + "\n")
    if hparams:
        (where / "hparams.yaml").write_text(NEQUIP_HPARAMS.format(**hparams))


def test_lightning_logs(tmp_path):
    simple, ddp = "nequip.train.SimpleDDPStrategy", "lightning.pytorch.strategies.DDPStrategy"
    _lightning(tmp_path, "a", [3.0, 2.0], {"seed": 1, "mode": "eager", "strategy": simple})
    _lightning(tmp_path, "b", [3.0, 2.0], {"seed": 1, "mode": "compile", "strategy": simple})
    _lightning(tmp_path, "c", [3.0, 2.5], {"seed": 2, "mode": "eager", "strategy": ddp})
    _lightning(tmp_path, "standard_2", [3.0, 2.0], column="train_loss")
    runs = {run.label: run for run in read_runs(tmp_path, "lightning")[0]}
    assert {k: (r.strategy, r.compiled) for k, r in runs.items()} == {
        "a": ("custom", False),
        "b": ("custom", True),
        "c": ("standard", False),
        "standard_2": ("standard", False),
    }
    assert runs["a"].seed != runs["c"].seed
    assert list(runs["a"].steps["step"]) == [1, 2]
    assert list(runs["a"].steps["loss"]) == [3.0, 2.0]
    require_equal([runs[k] for k in "abc"])


def test_lightning_log_without_a_known_name_is_refused(tmp_path):
    _lightning(tmp_path, "mystery", [1.0])
    with pytest.raises(InputError, match="does not tell its strategy"):
        read_runs(tmp_path, "lightning")


def test_lightning_hyperparameters_that_are_not_plain_yaml_are_passed_over(tmp_path):
    _lightning(tmp_path, "standard", [1.0])
    (tmp_path / "standard" / "version_0" / "hparams.yaml").write_text("model: !!python/object:torch.nn.Linear {}\n")
    (run,), _ = read_runs(tmp_path, "lightning")
    assert run.strategy == "standard"


def test_a_folder_without_its_environment_is_not_refused(tmp_path):
    write_run(tmp_path, "baseline", [1.0, 2.0])
    lost = write_run(tmp_path, "standard", [1.0, 2.0], **{"strategy.name": "standard"})
    (lost / "environment.json").unlink()
    require_equal(read_runs(tmp_path)[0])
    write_run(tmp_path, "more", [1.0, 2.0], world_size=4)
    with pytest.raises(InputError, match="world_size"):
        require_equal(read_runs(tmp_path)[0])
