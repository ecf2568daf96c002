import json
import os
import signal
import subprocess
import threading

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from ddpkit.analysis import blocks, plan
from ddpkit.analysis.runs import Run
from ddpkit.errors import InputError
from ddpkit.experiments import experiment, turns
from ddpkit.experiments.config import flat, read
from ddpkit.experiments.studies import PEERS, STUDIES
from ddpkit.progress import Progress


def configs(study, scale, *counts):
    size = STUDIES[study][scale] if isinstance(scale, str) else scale
    return {arm.label: read([*size.overrides, *arm.overrides]) for block in size.blocks(*counts) for arm in block}


def test_each_seed_is_a_block_of_all_arms_in_an_order_of_its_own():
    size = STUDIES["numerics"]["workstation"]
    blocks = size.blocks()
    *seeds, spread = blocks
    assert len(seeds) == 6
    stems = [[arm.label.removesuffix(f"_{n}") for arm in block] for n, block in enumerate(seeds, 1)]
    assert all(sorted(block) == sorted(arm.label for arm in size.arms) for block in stems)
    assert len({tuple(block) for block in stems}) > 1
    assert blocks == size.blocks()  # the same command goes on where it stopped
    assert [arm.label for arm in spread] == ["spread", "spread_2", "spread_3", "spread_4", "spread_5"]


def test_the_papers_cells_and_the_ones_it_could_not_fill():
    found = {arm.label for block in STUDIES["speed"]["paper"].blocks(1) for arm in block}
    assert found >= {
        f"{s}-{c}-{w}" for s in ("standard", "custom", "none") for c in ("eager", "compile") for w in (32, 128)
    }
    assert "ingraph-compile-128" in found
    assert "ingraph-eager-128" not in found


@pytest.mark.parametrize(("study", "scale"), [("speed", scale) for scale in STUDIES["speed"]])
def test_every_arm_is_a_valid_configuration(study, scale, monkeypatch):
    monkeypatch.setenv("DDPKIT_SPICE", "spice")
    monkeypatch.setenv("DDPKIT_MPTRJ", "mptrj")
    found = configs(study, scale, 1)
    for label, config in found.items():
        assert config.strategy.name, label
    for block in getattr(STUDIES[study][scale], "pairs", lambda *_: [])(1, 3):
        for arm in block:
            read([*STUDIES[study][scale].overrides, *arm.overrides])


def test_seeds_of_weights_and_data_go_together():
    found = configs("numerics", "workstation", 2)
    for seed in (1, 2):
        tag = "" if seed == 1 else f"_{seed}"
        for arm in ("baseline", "rerun", "standard", "compiled", "overlap"):
            assert (found[arm + tag].seed, found[arm + tag].data.seed) == (seed, seed)
        assert (found[f"new_seed{tag}"].seed, found[f"new_seed{tag}"].data.seed) == (seed + 1, seed)
        assert found[f"baseline{tag}"] == found[f"rerun{tag}"]
    assert found["baseline"] == found["spread_5"]
    changed = {key for key in found["baseline"] if found["baseline"][key] != found["new_seed"][key]}
    assert changed == {"seed"}
    (ordered,) = (arm for arm in STUDIES["numerics"]["causes"].blocks(2)[1] if arm.label == "new_order_2")
    assert ordered.overrides[0] == "seed=2"
    assert ordered.overrides[-1] == "data.seed=1002"


def test_arms_are_what_the_analysis_calls_them(monkeypatch):
    """The declared claims name arms as the analysis will find them in the configurations."""
    monkeypatch.setenv("DDPKIT_SPICE", "spice")
    many = STUDIES["numerics"]["ranks"].parts["emulated-64"]
    for scale in ("demo", "emulated", "causes", many):
        runs = [
            Run(
                label,
                OmegaConf.to_container(config, resolve=True),
                pd.DataFrame({"step": [1], "loss": [1.0]}),
                pd.DataFrame(),
            )
            for label, config in configs("numerics", scale, 1).items()
        ]
        found = blocks.study(runs, plan.Plan(()))
        assert len(found.blocks) == 1
        primary = (STUDIES["numerics"][scale] if isinstance(scale, str) else scale).primary
        assert {claim.arm for claim in primary} - {"standard", "compiled"} <= set(found.names)
        if scale != "causes":
            assert {claim.arm for claim in primary} <= set(found.names)
        assert not found.left_out


def test_every_arm_of_accuracy_is_the_recipe_but_for_one_thing(monkeypatch):
    monkeypatch.setenv("DDPKIT_MOLECULE", "molecule.xyz")
    for scale in STUDIES["accuracy"]:
        found = {label: flat(config) for label, config in configs("accuracy", scale, 1).items()}
        assert all(Run(label, {}, pd.DataFrame(), pd.DataFrame()).stem == label for label in found)
        first = found.get("baseline") or next(iter(found.values()))
        for label, config in found.items():
            changed = {key for key in config if config[key] != first[key]}
            assert bool(changed) == (config is not first), label
    recipe = configs("accuracy", "choices", 1)["baseline"]
    assert flat(recipe) == flat(read(["experiment=small_molecule", "data.path=molecule.xyz", "seed=1", "data.seed=1"]))
    assert len(STUDIES["accuracy"]["choices"].arms) == 7  # six choices
    strategies = configs("accuracy", "strategies", 1)
    assert {label: (c.strategy.name, c.compile, c.cuda_graphs) for label, c in strategies.items()} == {
        "baseline": ("standard", False, False), "custom": ("custom", False, False), "compiled": ("custom", True, False),
        "captured": ("custom", True, True),
    }  # fmt: skip
    assert len(STUDIES["accuracy"]["strategies"].blocks()) == 5


class Ended:
    """A process that is over."""

    def poll(self):
        return 0

    def wait(self):
        return 0


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Studies whose runs are written instead of trained; what was run, in order; what befalls runs."""
    ran = []
    befalls = {}
    begin = experiment.StudyRun.start

    def start(run, *more):
        with monkeypatch.context() as context:
            context.setattr(experiment.subprocess, "Popen", lambda *_, **__: Ended())
            process = begin(run, *more)
        ran.append(run.label)
        told = dict(word.lstrip("+").split("=", 1) for word in (*run.overrides, *more))
        width = int(told.get("model.type_embedding_dim", 1))
        facts = {"status": "finished", "parameters": 100 * width}
        (run.folder / "summary.json").write_text(json.dumps(facts | befalls.get(run.label, {})))
        config = {
            "strategy": told.get("strategy", "custom"),
            "compile": told.get("compile") == "true",
            "model": {"type_embedding_dim": width},
            "train": {"turns": told.get("train.turns")},
        }
        (run.folder / "config.yaml").write_text(json.dumps(config))
        (run.folder / "steps.csv").write_text("step,loss\n1,1.0\n")
        seconds = np.exp(np.random.default_rng(len(ran)).normal(0, 0.001, 3)) + (run.label[:6] == "custom")
        rows = "".join(f"{n},{s},4\n" for n, s in enumerate(seconds, 1))
        (run.folder / "epochs.csv").write_text("epoch,seconds,steps\n" + rows)
        return process

    monkeypatch.setattr(experiment.StudyRun, "start", start)

    def run(*words, name="numerics", scale="demo"):
        experiment.main([name, f"scale={scale}", f"out={tmp_path}", *words])

    return run, ran, befalls


DEMO = {"baseline", "standard", "compiled", "rerun", "new_seed"}


def test_complete_runs_are_kept_and_interrupted_ones_run_again(study, tmp_path):
    start, ran, _ = study
    start()
    assert set(ran) == DEMO
    ran.clear()
    (tmp_path / "compiled" / "summary.json").write_text('{"status": "running"}')
    start()
    assert ran == ["compiled"]
    starts = {label: json.loads((tmp_path / label / "study.json").read_text())["starts"] for label in DEMO}
    assert starts == {label: 1 + (label == "compiled") for label in DEMO}


def test_a_run_that_failed_of_itself_is_kept_as_evidence(study, capsys):
    start, ran, befalls = study
    befalls["compiled"] = {
        "status": "failed",
        "error": "The loss was nan at step 9 on rank 1: look at that batch's labels",
    }
    start()
    assert "1 runs failed of themselves and count against their arms: compiled." in capsys.readouterr().out
    ran.clear()
    start()
    assert not ran


def test_what_is_tested_is_fixed_before_the_first_run(study, tmp_path):
    start, ran, _ = study
    plan.write(tmp_path, plan.Plan((plan.Declared("force_error", "compiled"),)))
    start()
    facts = json.loads((tmp_path / "plan.json").read_text())
    assert facts["primary"] == [{"endpoint": "force_error", "arm": "compiled"}]
    assert set(facts["runs"]) == DEMO
    assert (facts["ranks"], facts["seeds"]) == (2, 1)
    with pytest.raises(InputError, match="declared 5 runs and not 10: what is tested is fixed before the first run"):
        start("seeds=2")
    for word in ("repeats=3", "seed=4", "data.seed=4"):
        with pytest.raises(InputError, match="is for the study to choose: give seeds=N"):
            start(word)
    with pytest.raises(InputError, match="pairs=3 is not for numerics"):
        start("pairs=3")
    assert len(ran) == 5


def test_a_folder_of_another_configuration_is_refused(study):
    start, _, _ = study
    start()
    with pytest.raises(InputError, match="another configuration"):
        start("train.max_epochs=9")


@pytest.mark.parametrize(("name", "bad"), [("numerics", "compiled"), ("speed", "custom-compile-32")])
def test_a_run_that_is_interrupted_does_not_keep_the_others(study, name, bad):
    start, ran, befalls = study
    befalls[bad] = {"status": "stopped", "error": "stopped by SIGUSR1 after step 7"}
    with pytest.raises(InputError, match=rf"1 of \d runs failed \({bad}\)"):
        start(name=name)
    assert set(ran) == {arm.label for block in STUDIES[name]["demo"].blocks() for arm in block}
    ran.clear()
    befalls.clear()
    start(name=name)
    assert ran == [bad]


def test_a_pilot_is_followed_by_as_many_pairs_as_it_asks_for(study, tmp_path):
    start, ran, _ = study
    start(name="speed", scale="workstation")
    pilot = [label for label in ran if not label.endswith(tuple(f"_{n}" for n in range(4, 30)))]
    assert len(pilot) == 3 * 14
    assert ran[: len(pilot)] == pilot
    later = [label for label in ran if label not in pilot]
    assert len(later) == 8 * 6
    assert {label.rsplit("_", 1)[0] for label in later} == {
        f"{arm}-eager-{width}" for arm in ("standard", "custom", "standard_again") for width in (32, 128)
    }
    known = plan.read(tmp_path, ())
    assert (known.pilot, known.pairs, set(known.runs)) == ((1, 2, 3), 8, set(ran))
    ran.clear()
    start(name="speed", scale="workstation")
    assert not ran


def test_what_does_not_fit_at_once_is_launched_in_groups_with_a_reference_each(study, tmp_path):
    start, ran, _ = study
    start("launches=2", "pairs=1", name="speed", scale="node")
    assert [len(group) for group in STUDIES["speed"]["node"].groups] == [5, 4, 5, 4]
    settings = read(STUDIES["speed"]["node"].overrides)
    assert settings.train.batch_size == 4 * 80  # as the paper's
    assert settings.data.split[0] * settings.data.frames == 12 * settings.train.batch_size
    assert len(ran) == 2 * 18 + 6
    for first, count in ((0, 5), (5, 4), (9, 5), (14, 4), (18, 5)):
        group = ran[first : first + count]
        assert sum(label.startswith(("standard-eager", "standard_again-eager")) for label in group) == 1
        assert len({label.removesuffix("_2").rsplit("-", 1)[1] for label in group}) == 1  # of one size
    assert all(label.endswith("_3") for label in ran[-6:])
    known = plan.read(tmp_path, ())
    assert (known.pilot, known.pairs, len(known.runs)) == ((1, 2), 1, 42)


def test_runs_that_do_not_fit_into_memory_at_once_follow_one_another(study, monkeypatch, capsys):
    start, ran, _ = study
    monkeypatch.setattr(experiment, "_BYTES_OF_A_RANK", 1e15)
    start(name="speed")
    assert set(ran) == {arm.label for block in STUDIES["speed"]["demo"].blocks() for arm in block}
    said = capsys.readouterr().out
    assert "16 ranks at once need" in said
    assert "in turns" not in said


def test_so_many_runs_are_under_way_at_a_time(study, monkeypatch):
    start, ran, _ = study
    under_way, most = [], []

    class Underway(Ended):
        def __init__(self):
            self.polls = 0
            under_way.append(self)
            most.append(sum(process.polls < 3 for process in under_way))

        def poll(self):
            self.polls += 1
            return 0 if self.polls >= 3 else None

        def wait(self):
            self.polls = 3

    monkeypatch.setattr(experiment, "_POLL", 0.0)
    begin = experiment.StudyRun.start
    monkeypatch.setattr(experiment.StudyRun, "start", lambda run, *more: begin(run, *more) and Underway())
    start("together=2")
    assert set(ran) == DEMO
    assert max(most) == 2
    with pytest.raises(InputError, match="together=2 is not for speed"):
        start("together=2", name="speed")


def test_many_numbers_of_ranks_are_studies_side_by_side(study, tmp_path, monkeypatch, capsys):
    start, ran, _ = study
    places = {}
    begin = experiment.StudyRun.start

    def placed(run, *more):
        places[run.title] = run.gpu
        return begin(run, *more)

    monkeypatch.setattr(experiment.StudyRun, "start", placed)
    monkeypatch.setattr(experiment, "gpus", lambda: 2)
    words = "seeds=3", "parts=emulated-4,real-4", "arms=baseline,standard"
    start(*words, scale="ranks")
    assert len(ran) == 12
    for part in ("emulated-4", "real-4"):
        facts = json.loads((tmp_path / part / "plan.json").read_text())
        assert set(facts["runs"]) == {f"{arm}{n}" for arm in ("baseline", "standard") for n in ("", "_2", "_3")}
    assert {title: gpu for title, gpu in places.items() if title.startswith("emulated")} == {
        f"emulated-4/{arm}{n}": gpu for arm in ("baseline", "standard") for n, gpu in (("", 0), ("_2", 1), ("_3", 0))
    }
    assert {gpu for title, gpu in places.items() if title.startswith("real")} == {None}
    first = list(places)[:4]
    assert [places[title] for title in first] == [0, 1, 0, 1]  # both GPUs have work from the start
    assert all(title.startswith("real") for title in list(places)[6:])
    ran.clear()
    start(*words, scale="ranks")
    assert not ran
    assert "[12/12] real-4/" in capsys.readouterr().out
    with pytest.raises(InputError, match="parts=emulated-5: 'emulated-5' is unknown: use some of emulated-1, "):
        start("parts=emulated-5", scale="ranks")
    with pytest.raises(InputError, match="has several numbers of ranks: leave --slurm and ranks= out"):
        start("ranks=3", scale="ranks")


def test_the_gpu_that_a_run_is_dealt_is_one_that_the_study_may_use(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(experiment.subprocess, "Popen", lambda *_, env, **__: seen.append(env["CUDA_VISIBLE_DEVICES"]))
    for visible in ("", "4,6"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        experiment.StudyRun(tmp_path / "run", (), 1, gpu=1).start()
    assert seen == ["1", "6"]


def test_arms_may_be_left_out_and_with_them_their_claims(study, tmp_path):
    start, ran, _ = study
    start("arms=baseline,rerun,standard")
    assert set(ran) == {"baseline", "rerun", "standard"}
    declared = [(c["endpoint"], c["arm"]) for c in json.loads((tmp_path / "plan.json").read_text())["primary"]]
    assert declared == [("force_error", "standard"), ("distance", "standard")]
    with pytest.raises(InputError, match="arms=tree: 'tree' is unknown: use some of baseline, compiled, new_seed"):
        start("arms=tree")
    with pytest.raises(InputError, match="parts=a: 'a' is unknown: this scale has no parts"):
        start("parts=a")
    with pytest.raises(InputError, match="arms=custom is not for speed"):
        start("arms=custom", name="speed")


def test_some_arms_of_speed_are_launched_beside_nequips_own_trainer(study, tmp_path, monkeypatch):
    start, ran, _ = study
    commands = []
    begin = experiment.StudyRun.start

    def noted(run, *more):
        commands.append((run.label, run.nequip, run.overrides))
        return begin(run, *more)

    monkeypatch.setattr(experiment.StudyRun, "start", noted)
    monkeypatch.setattr(experiment.nequip_trainer, "require_installed", lambda _: None)
    words = "arms=custom-eager,nequip-ddp-32,nequip-simple,nequip-simple-compiled-128", "launches=2"
    start(*words, name="speed", scale="node")
    small, large = (
        {f"{arm}-{width}" for arm in ("standard-eager", "custom-eager", *peers)}
        for width, peers in ((32, ("nequip-ddp", "nequip-simple")), (128, ("nequip-simple", "nequip-simple-compiled")))
    )
    # one block for each size, twice; no pairs
    assert [set(ran[i : i + 4]) for i in (0, 4)] == [small, large]
    assert set(ran[8:]) == {f"{label}_2" for label in small | large}
    known = json.loads((tmp_path / "plan.json").read_text())
    assert (known["primary"], known["pilot"], known["pairs"], set(known["runs"])) == ([], [], None, set(ran))
    of = {label: (scheme, overrides) for label, scheme, overrides in commands}
    assert of["nequip-ddp-32"][0] == "ddp"
    assert of["nequip-simple-compiled-128"][0] == "simple"
    assert of["custom-eager-32"][0] is None
    assert read(of["nequip-simple-compiled-128"][1]).compile
    # but for what averages gradients, the configuration is that of our runs
    peer, ours = (flat(read(of[label][1])) for label in ("nequip-simple-32_2", "custom-eager-32_2"))
    assert peer == ours
    ran.clear()
    start(*words, name="speed", scale="node")
    assert not ran
    facts = json.loads((tmp_path / "nequip-ddp-32" / "study.json").read_text())
    assert facts["nequip"] == "ddp"
    assert "nequip" not in json.loads((tmp_path / "custom-eager-32" / "study.json").read_text())


def test_nequips_trainer_is_started_under_mpirun(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(experiment.subprocess, "Popen", lambda command, **_: started.append(command))
    arm = next(arm for arm in PEERS if arm.label == "nequip-simple-32").numbered(3)
    experiment.StudyRun(tmp_path / arm.label, arm.overrides, 2, nequip=arm.nequip).start("train.turns=t")
    (command,) = started
    verb = command.index("ddpkit.experiments")
    assert command[verb + 1 : verb + 4] == ["bench", "nequip", "simple"]
    assert command[-2:] == ["train.turns=t", f"run_dir={tmp_path / 'nequip-simple-32_3'}"]


def test_arms_of_speed_that_there_are_not_are_refused(study, monkeypatch):
    start, ran, _ = study
    with pytest.raises(
        InputError, match="arms=nequip-fast is not for speed: 'nequip-fast' is none of its arms, which are"
    ):
        start("arms=nequip-fast", name="speed")
    with pytest.raises(InputError, match="pairs=8 is not for arms="):
        start("arms=custom-eager", "pairs=8", name="speed")
    with pytest.raises(InputError, match="pairs=8 is not for scale=eight, which no pairs follow: give launches=N"):
        start("pairs=8", name="speed", scale="eight")
    with pytest.raises(InputError, match=r"train.accumulate=2 is not for nequip's trainer"):
        start("arms=nequip-ddp", "train.accumulate=2", name="speed")
    with pytest.raises(InputError, match="cannot be divided among 3 ranks"):
        start("arms=nequip-ddp", "ranks=3", name="speed")
    monkeypatch.setattr(experiment.nequip_trainer, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"The arm nequip-simple .*: pip install 'ddpkit\[nequip\]'"):
        start("arms=custom-eager,nequip-simple", name="speed")
    assert not ran


def test_a_node_has_one_new_seed_and_as_many_more_reruns_as_are_asked_for():
    *seeds, rest = STUDIES["numerics"]["node"].blocks()
    assert [len(block) for block in seeds] == [7] * 6
    assert [arm.label for arm in rest] == ["new_seed", "spread", "spread_2", "spread_3", "spread_4", "spread_5"]
    assert rest[0].overrides[-3:] == ("compile=false", "cuda_graphs=false", "seed=2")
    assert STUDIES["numerics"]["node"].blocks(1, 0)[1:] == [rest[:1]]


@pytest.mark.timeout(0)  # a process has one alarm
def test_a_study_stops_in_time(study, monkeypatch):
    start, ran, _ = study

    class Endless(Ended):
        def poll(self):
            return None

        def send_signal(self, number):
            assert number == signal.SIGUSR1

    begin = experiment.StudyRun.start
    monkeypatch.setattr(experiment.StudyRun, "start", lambda run, *more: begin(run, *more) and Endless())
    with pytest.raises(KeyboardInterrupt):
        start("within=1")
    assert len(ran) == 1
    assert signal.alarm(0) == 0
    with pytest.raises(InputError, match="within=0 is no number of seconds"):
        start("within=0")


def test_no_launch_is_begun_that_would_be_cut_off(study, monkeypatch, capsys):
    start, ran, _ = study
    clock = iter(range(0, 100_000, 7))
    monkeypatch.setattr(experiment.time, "monotonic", lambda: next(clock))
    with pytest.raises(KeyboardInterrupt):
        start("within=500", name="speed", scale="workstation")
    assert 14 <= len(ran) < 14 * 3
    assert len(ran) % 14 == 0
    assert "No time is left for another launch." in capsys.readouterr().out
    monkeypatch.undo()


def test_runs_of_accuracy_are_evaluated_once_they_have_finished(study, monkeypatch, tmp_path, capsys):
    start, ran, befalls = study
    told = []

    def evaluate(run):
        told.append(run.label)
        if run.label != befalls.get("not evaluated"):
            (run.folder / "evaluation" / "test").mkdir(parents=True)
            (run.folder / "evaluation" / "test" / "accuracy.csv").write_text("")
        return Ended()

    monkeypatch.setattr(experiment.StudyRun, "evaluate", evaluate)
    befalls["no_average"] = {"status": "failed", "error": "The loss was nan at step 9 on rank 0"}
    befalls["not evaluated"] = "baseline_2"
    with pytest.raises(InputError, match=r"1 of 6 runs could not be evaluated \(baseline_2\)"):
        start(name="accuracy")
    assert sorted(told) == sorted(set(ran) - {"no_average"})
    assert len(ran) == 6
    told.clear()
    befalls.clear()
    start(name="accuracy")
    assert told == ["baseline_2"]
    assert f"`ddpkit-analyze accuracy {tmp_path}` compares them" in capsys.readouterr().out
    with pytest.raises(InputError, match="pairs=3 is not for accuracy"):
        start("pairs=3", name="accuracy")
    assert experiment._parse(["accuracy"]).scale == "choices"


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
            "seeds=8",
            "train.max_epochs=2",
            "model.num_features=[8,4]",
            "out=my runs",
        ]
    )
    script = capsys.readouterr().out
    assert "#SBATCH --nodes=16" in script
    assert "#SBATCH --ntasks-per-node=4" in script
    line = next(line for line in script.splitlines() if line.startswith("ddpkit experiment"))
    words = "ranks=64 seeds=8 train.max_epochs=2 'model.num_features=[8,4]' &"
    assert line == f"ddpkit experiment numerics scale=paper out='my runs' {words}"
    path = tmp_path / "job.sh"
    path.write_text(script)
    subprocess.run(["/bin/bash", "-n", path], check=True)


def test_job_script_keeps_what_arms_were_named(capsys):
    experiment.main(["numerics", "scale=demo", "--slurm", "arms=baseline,rerun"])
    assert " ranks=2 arms=baseline,rerun &" in capsys.readouterr().out


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
        assert job.communicate(timeout=300)[0] == "saved\nanalysed\n"
