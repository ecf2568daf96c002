import json
import os
import signal
import subprocess
import threading

import pytest

from ddpkit.errors import InputError
from ddpkit.experiments import experiment, turns
from ddpkit.experiments.config import read
from ddpkit.experiments.studies import STUDIES
from ddpkit.train import Progress


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


def test_each_run_with_a_new_seed_has_another_one():
    scale = STUDIES["numerics"]["workstation"]
    seeds = {arm.label: read([*scale.overrides, *arm.overrides]).seed for arm in scale.arms()}
    new = [seed for label, seed in seeds.items() if label.startswith("new_seed")]
    assert len(set(new)) == len(new) == scale.repeats
    assert {seed for label, seed in seeds.items() if not label.startswith("new_seed")} == {seeds["baseline"]}
    assert seeds["baseline"] not in new


class Ended:
    """A process that is over."""

    def poll(self):
        return 0

    def wait(self):
        return 0


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Studies whose runs are written instead of trained; what was run, in order."""
    ran = []
    fails = set()

    def start(run, *_):
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "study.json").write_text(json.dumps({"overrides": list(run.overrides), "ranks": run.ranks}))
        status = "failed" if run.label in fails else "finished"
        (run.folder / "summary.json").write_text(json.dumps({"status": status}))
        ran.append(run.label)
        return Ended()

    monkeypatch.setattr(experiment.StudyRun, "start", start)
    return lambda *words, name="numerics": experiment.main([name, "scale=demo", f"out={tmp_path}", *words]), ran, fails


def test_complete_runs_are_kept_and_unfinished_ones_run_again(study, tmp_path):
    start, ran, _ = study
    start()
    assert ran == ["baseline", "standard", "compiled", "rerun", "new_seed"]
    ran.clear()
    (tmp_path / "compiled" / "summary.json").write_text('{"status": "running"}')
    start()
    assert ran == ["compiled"]
    start("repeats=2")
    assert ran == ["compiled", "standard_2", "compiled_2", "rerun_2", "new_seed_2"]


def test_a_folder_of_another_configuration_is_refused(study):
    start, _, _ = study
    start()
    with pytest.raises(InputError, match="another configuration"):
        start("train.max_epochs=9")


@pytest.mark.parametrize(("name", "bad"), [("numerics", "compiled"), ("speed", "custom-compile-32")])
def test_a_run_that_fails_does_not_keep_the_others(study, name, bad):
    start, ran, fails = study
    fails.add(bad)
    with pytest.raises(InputError, match=rf"1 of \d runs failed \({bad}\)"):
        start(name=name)
    everything = [arm.label for arm in STUDIES[name]["demo"].arms()]
    assert ran == everything
    ran.clear()
    fails.clear()
    start(name=name)
    assert ran == [bad]


def test_runs_that_do_not_fit_into_memory_at_once_follow_one_another(study, monkeypatch, capsys):
    start, ran, _ = study
    monkeypatch.setattr(experiment, "_BYTES_OF_A_RANK", 1e15)
    start(name="speed")
    assert ran == [arm.label for arm in STUDIES["speed"]["demo"].arms()]
    said = capsys.readouterr().out
    assert "16 ranks at once need" in said
    assert "in turns" not in said


def test_a_wrong_override_starts_nothing(study):
    start, ran, _ = study
    with pytest.raises(InputError, match=r"train\.max_epoch"):
        start("train.max_epoch=9")
    assert not ran


def test_deterministic_runs_have_a_folder_of_their_own():
    plain = experiment._parse(["numerics", "scale=demo"])
    repeatable = experiment._parse(["numerics", "scale=demo", "deterministic=true"])
    assert [str(options.out) for options in (plain, repeatable)] == [
        "studies/numerics-demo",
        "studies/numerics-demo-deterministic",
    ]


class FakeTrainer:
    def __init__(self):
        self.progress = Progress(epoch=1)
        self.stop_signal = None


class Alive:
    def poll(self):
        return None


def test_runs_take_turns(tmp_path):
    giver, trace = turns.Turns(tmp_path / "turns"), []

    def run(label):
        trainer = FakeTrainer()
        wait = turns.wait_for(tmp_path / "turns", label)
        for epoch in (1, 2, 3):
            trainer.progress.epoch = epoch
            trace.append((label, epoch))
            assert wait(trainer) == 0

    threads = [threading.Thread(target=run, args=(label,)) for label in ("a", "b")]
    for thread in threads:
        thread.start()
    for label in ("a", "b"):
        giver.await_ready(label, 1, Alive())
    for label, epoch in (("b", 1), ("a", 1), ("a", 2), ("b", 2)):
        giver.give(label, epoch)
        giver.await_ready(label, epoch + 1, Alive())
        assert trace[-1] == (label, epoch + 1)
    for label in ("a", "b"):
        giver.give(label, 3)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    giver.await_ready("a", 9, Ended())  # a process that is gone is not waited for
    with giver:
        assert (tmp_path / "turns").exists()
    assert not (tmp_path / "turns").exists()


def test_a_signal_ends_the_waiting_and_nobody_waits_for_the_dead(tmp_path):
    trainer = FakeTrainer()
    trainer.stop_signal = 10
    with turns.Turns(tmp_path / "turns"):
        assert turns.wait_for(tmp_path / "turns", "a")(trainer) == 10
    (tmp_path / "turns").mkdir()
    trainer.stop_signal = None
    with pytest.raises(InputError, match="Nobody gives turns"):
        turns.wait_for(tmp_path / "turns", "a")(trainer)


def test_no_run_always_follows_the_same_one():
    orders = [turns.order(["a", "b", "c", "d"], round_) for round_ in range(1, 30)]
    assert all(sorted(one) == ["a", "b", "c", "d"] for one in orders)
    assert {one[0] for one in orders} == {"a", "b", "c", "d"}


def test_job_script(capsys, tmp_path):
    experiment.main(
        [
            "numerics",
            "scale=paper",
            "--slurm",
            "repeats=2",
            "train.max_epochs=2",
            "model.num_features=[8,4]",
            "out=my runs",
        ]
    )
    script = capsys.readouterr().out
    assert "#SBATCH --nodes=16" in script
    assert "#SBATCH --ntasks-per-node=4" in script
    line = next(line for line in script.splitlines() if line.startswith("ddpkit experiment"))
    words = "ranks=64 repeats=2 train.max_epochs=2 'model.num_features=[8,4]' &"
    assert line == f"ddpkit experiment numerics scale=paper out='my runs' {words}"
    path = tmp_path / "job.sh"
    path.write_text(script)
    subprocess.run(["/bin/bash", "-n", path], check=True)


def test_job_script_hands_the_signal_on_and_waits(capsys, tmp_path):
    """As SLURM does before the time is up: the batch shell alone gets the signal."""
    experiment.main(["numerics", "scale=demo", "--slurm", f"out={tmp_path}"])
    path = tmp_path / "job.sh"
    path.write_text(capsys.readouterr().out)
    wait = "for i in {1..100}; do sleep 0.1; done"
    stub = f"#!/bin/bash\ntrap 'sleep 0.3; echo saved; exit 130' USR1\nsleep 0.3\necho started\n{wait}\n"
    for name, text in (("ddpkit", stub), ("ddpkit-analyze", "#!/bin/bash\necho analysed\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    variables = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen(["/bin/bash", path], env=variables, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "started\n"
        job.send_signal(signal.SIGUSR1)
        assert job.communicate(timeout=10)[0] == "saved\nanalysed\n"
