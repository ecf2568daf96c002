"""Whole studies with known truth: what their verdicts may and may not say."""

import itertools
import json
import math

import numpy as np
import pytest
from simulated_runs import falling, run_of, wander, write_run

from ddpkit.analysis import attribution, blocks, claims, figures, numerics, plan, present
from ddpkit.analysis.endpoints import evidence, spread, units
from ddpkit.analysis.plan import DISTANCE, FORCE_ERROR, Declared, Plan
from ddpkit.analysis.runs import read_runs
from ddpkit.analysis.statistics import LEVEL
from ddpkit.errors import InputError

STEPS, STUDIES = 60, 100
BASE = falling(STEPS)
DEFAULT = Plan(plan.NUMERICS, declared=False)
FORCE, FORCE_STANDARD, FAR = range(3)


def trajectory(rng, size, spikes=0.0):
    """A loss that wanders off; with probability `spikes` a step stands out."""
    walk = wander(rng, STEPS, size)
    return BASE + walk + (rng.random(STEPS) < spikes) * 30 * size


def simulated(
    rng, *, seeds=6, standard=1.0, compiled=1.0, error=0.0, scatter=0.01, spikes=0.0, ranks=8, exact=False, **more
):
    """A study's runs. `standard` and `compiled` scale distances from the baseline, `error` shifts logarithms of force errors."""
    runs = []
    for seed in range(1, seeds + 1):
        tag = "" if seed == 1 else f"_{seed}"
        size = 1e-4 * math.exp(rng.normal())  # how far reruns part is each seed's own
        level = 0.1 * math.exp(0.3 * rng.normal())
        common = {"seed": seed, "ranks": ranks, **more}
        noise = lambda factor, size=size: BASE if exact and factor == 1 else trajectory(rng, size * factor, spikes)  # noqa: E731

        def forces(shift, level=level):
            return level * math.exp(shift + scatter * rng.normal())

        runs += [
            run_of(f"baseline{tag}", BASE, val_forces=level, **common),
            run_of(f"rerun{tag}", noise(1.0), val_forces=forces(0), **common),
            run_of(
                f"standard{tag}", noise(standard), val_forces=forces(error), **{"strategy.name": "standard"}, **common
            ),
            run_of(f"compiled{tag}", noise(compiled), val_forces=forces(error), compile=True, **common),
        ]
    return runs


def verdicts(runs, declared=DEFAULT):
    return claims.numerics_claims(blocks.study(runs, declared))


def kinds(runs, declared=DEFAULT):
    return [claim.kind for claim in verdicts(runs, declared)]


def rates(studies):
    """Share of studies that say `holds` and `fails` of any of the given claims."""
    found = list(studies)
    return [np.mean([kind in one for one in found]) for kind in ("holds", "fails")]


LIMIT = LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / STUDIES)


@pytest.mark.parametrize("spikes", [0.0, 0.02])
def test_distances_at_the_margin(spikes):
    """Half again as far as reruns: neither verdict comes in more than one study of twenty."""
    rng = np.random.default_rng(1)
    holds, fails = rates([kinds(simulated(rng, standard=1.5, spikes=spikes))[FAR]] for _ in range(STUDIES))
    assert max(holds, fails) <= LIMIT


def test_force_errors_at_the_margin():
    rng = np.random.default_rng(2)
    at = math.log(1.05)
    holds, fails = rates(kinds(simulated(rng, error=at))[: FORCE_STANDARD + 1] for _ in range(STUDIES))
    assert max(holds, fails) <= LIMIT


def test_equal_arms_hold_and_never_fail():
    rng = np.random.default_rng(3)
    found = [kinds(simulated(rng, seeds=10)) for _ in range(40)]
    assert np.mean([one[FORCE] == "holds" for one in found]) > 0.9
    assert np.mean(["fails" in one for one in found]) <= LEVEL


def test_arms_that_stray_are_found_out():
    rng = np.random.default_rng(4)
    found = [kinds(simulated(rng, standard=6, error=0.2)) for _ in range(30)]
    assert np.mean([one == ["fails"] * 3 for one in found]) > 0.9


@pytest.mark.parametrize("planted", ["nan", "logged", "blown", "skipped", "crash"])
def test_failures_are_evidence(planted):
    """Two of six runs of an arm fail: it never holds, and leaving the runs out does not help."""
    rng = np.random.default_rng(5)
    for _ in range(4):
        runs = simulated(rng, seeds=8, scatter=0.001)
        fine = kinds(runs)
        for number, run in enumerate(runs):
            if run.label in ("compiled_2", "compiled_5"):
                runs[number] = planted_failure(run, planted)
        found = verdicts(runs)
        assert found[FORCE].kind != "holds"
        assert "2 of 8 runs of compiled failed (compiled_2, compiled_5)" in found[FORCE].reason
        assert found[FORCE_STANDARD].kind == fine[FORCE_STANDARD]
        left = [run for run in runs if run.label not in ("compiled_2", "compiled_5")]
        assert kinds(left)[FORCE] == "open"
        planned = Plan(plan.NUMERICS, runs=tuple(run.label for run in runs))
        assert kinds([run for run in runs if not run.label.endswith(("_2", "_5"))], planned)[FORCE] == "open"


def planted_failure(run, how):
    losses, label = run.steps["loss"].to_numpy().copy(), run.label
    more = {"seed": run.seed, "compile": True, "val_forces": 0.1}
    if how == "nan":
        summary = {"error": "The loss was nan at step 21 on rank 3: look at that batch's labels"}
        return run_of(label, losses[:20], status="failed", summary=summary, **more)
    if how == "crash":
        return run_of(label, losses[:20], status="failed", summary={"error": "CUDA error: an illegal access"}, **more)
    if how == "skipped":
        return run_of(label, losses, summary={"skipped": 3}, **more)
    if how == "logged":
        losses[40:] = np.nan
    else:
        losses[40:] *= np.linspace(1, 1e6, 20)
    return run_of(label, losses, **more)


def test_a_failure_among_the_baselines_is_told_and_does_not_help():
    rng = np.random.default_rng(6)
    runs = simulated(rng, seeds=8, scatter=0.001)
    assert kinds(runs)[FORCE_STANDARD] == "holds"
    for number, run in enumerate(runs):
        if run.label == "baseline_3":
            runs[number] = run_of(run.label, BASE, summary={"skipped": 1}, seed=run.seed, val_forces=0.1)
    found = verdicts(runs)[FORCE_STANDARD]
    assert found.kind == "open"
    assert "baseline_3 failed" in found.reason


def test_an_interrupted_run_is_missing_and_no_evidence():
    rng = np.random.default_rng(7)
    runs = simulated(rng, seeds=8, scatter=0.001)
    number = next(n for n, run in enumerate(runs) if run.label == "compiled_4")
    stopped = "stopped by SIGTERM after step 20: continue with resume=x"
    for status, error in (("running", None), ("failed", stopped), ("stopped", stopped)):
        runs[number] = run_of(
            "compiled_4", BASE[:20], status=status, summary={"error": error}, seed=4, compile=True
        )  # fmt: skip
        study = blocks.study(runs, DEFAULT)
        found = claims.numerics_claims(study)[FORCE]
        assert found.verdict.startswith("cannot be told from these runs: 1 of 8 seeds lack complete runs")
        assert "failed" not in found.reason
        assert not study.failures("compiled")
        assert any("compiled_4" in note and "give the study's command again" in note for note in study.notes)


def test_one_seed_that_deviates_is_not_averaged_away():
    rng = np.random.default_rng(8)
    for _ in range(40):
        runs = simulated(rng, scatter=0.001)
        number = next(n for n, run in enumerate(runs) if run.label == "standard_3")
        strayed = run_of(
            "standard_3", BASE + wander(rng, STEPS, 0.05), val_forces=0.3, seed=3, **{"strategy.name": "standard"}
        )
        runs[number] = strayed
        found = verdicts(runs)
        assert found[FAR].kind == found[FORCE_STANDARD].kind == "open"
        assert "1 of 6 beyond the margin" in found[FORCE_STANDARD].reason


def test_exact_reruns_need_no_ratio():
    rng = np.random.default_rng(9)
    equal = verdicts(simulated(rng, exact=True))[FAR]
    assert equal.verdict == "holds: identical"
    assert "reruns are exact" in equal.reason.lower()
    strayed = verdicts(simulated(rng, exact=True, standard=1e-3))[FAR]
    assert strayed.verdict == "does not hold"
    assert strayed.reason.lower().startswith("reruns are exact, so there is no ratio: standard differs by")
    assert "roundings of float32" in strayed.reason


def test_exact_reruns_by_chance_alone_say_nothing():
    """Reruns and the arm are exact or not by the same coin: a verdict against the arm is a false one."""
    rng = np.random.default_rng(10)
    studies = []
    for _ in range(STUDIES):
        runs = simulated(rng, exact=True)
        for number, run in enumerate(runs):
            if run.stem in ("rerun", "standard") and rng.random() < 0.5:
                strategy = {"strategy.name": run.strategy}
                runs[number] = run_of(run.label, trajectory(rng, 1e-4), val_forces=0.1, seed=run.seed, **strategy)
        studies.append([kinds(runs)[FAR]])
    assert rates(studies)[1] <= LIMIT


def test_runs_that_have_come_to_different_steps_have_reasons_too():
    rng = np.random.default_rng(15)
    rows = {"baseline": {}, "rerun": {}, "standard": {"strategy.name": "standard"}, "compiled": {"compile": True}}
    runs = [
        run_of(label, trajectory(rng, 1e-4)[: STEPS - late], status="running", **changes)
        for late, (label, changes) in enumerate(rows.items())
    ]
    assert [claim.reason[:16] for claim in verdicts(runs)] == ["no seed has both"] * 3


def test_two_ranks_say_nothing_of_bucketing():
    rng = np.random.default_rng(11)
    found = verdicts(simulated(rng, ranks=2, scatter=0.001))
    assert found[FORCE].kind == "holds"
    for claim in (found[FORCE_STANDARD], found[FAR]):
        assert claim.kind == "open"
        assert "on two ranks a sum of gradients has one order" in claim.verdict
    assert "(2 ranks, 6 seeds, 60 steps)" in found[FORCE].claim


@pytest.mark.parametrize(("seeds", "said"), [(1, "there is 1 seed"), (5, "there are 5 seeds, and a test needs 6")])
def test_too_few_seeds_are_no_test(seeds, said):
    found = verdicts(simulated(np.random.default_rng(12), seeds=seeds))
    assert [claim.kind for claim in found] == ["open"] * 3
    assert said in found[FORCE].verdict
    assert "more are needed" not in " ".join(claim.verdict + claim.reason for claim in found)


def test_many_repeats_of_one_seed_are_one_unit():
    rng = np.random.default_rng(13)
    runs = [run_of("baseline", BASE, val_forces=0.1)]
    for n in range(1, 9):
        strategy = {"strategy.name": "standard"}
        runs += [run_of(f"rerun_{n}", trajectory(rng, 1e-4), val_forces=0.1)]
        runs += [run_of(f"standard_{n}", trajectory(rng, 1e-4), val_forces=0.1, **strategy)]
    study = blocks.study(runs, DEFAULT)
    assert len(study.blocks) == 1
    assert [claim.kind for claim in claims.numerics_claims(study)] == ["open"] * 3
    block, distances = spread(study)
    assert len(distances) == 8
    assert block.seed == "1"


def test_a_distance_by_hand():
    rng = np.random.default_rng(14)
    runs = simulated(rng, seeds=6)
    study = blocks.study(runs, DEFAULT)
    by = {run.label: run.steps["loss"].to_numpy() for run in runs}
    logs = []
    for seed in range(1, 7):
        tag = "" if seed == 1 else f"_{seed}"
        far = [np.abs(by[arm + tag] - by["baseline" + tag]).mean() for arm in ("standard", "rerun")]
        logs.append(math.log(far[0] / far[1]))
    found = evidence(study, DISTANCE, "standard")
    assert found.values == pytest.approx(logs)
    assert found.estimate.value == pytest.approx(np.mean(logs))
    relative = np.mean([np.abs(by[f"standard{t}"] - by[f"baseline{t}"]).mean() / np.abs(by[f"baseline{t}"]).mean()
                        for t in ("", *(f"_{n}" for n in range(2, 7)))])  # fmt: skip
    assert units(study, "standard").relative == pytest.approx(relative)
    assert units(study, "standard").roundings == pytest.approx(relative * 2**24)
    errors = {run.label: run.epochs["val_forces_rmse"].iloc[-1] for run in runs}
    ratio = [math.log(errors[f"compiled{t}"] / errors[f"baseline{t}"]) for t in ("", *(f"_{n}" for n in range(2, 7)))]
    assert evidence(study, FORCE_ERROR, "compiled").values == pytest.approx(ratio)


def test_projections_are_used_where_all_have_them(tmp_path):
    start = np.arange(64.0)
    shifts = {"baseline": 0.0, "rerun": 2.0, "standard": 3.0, "new_seed": 40.0}
    for label, shift in shifts.items():
        rows = {step: start + shift * step * (np.arange(64) == 5) for step in (0, 1, 2, 5)}
        more = {"strategy.name": "standard"} if label == "standard" else {"seed": 2} if label == "new_seed" else {}
        write_run(tmp_path, label, falling(5), projection=rows, **more)
    study = blocks.study(read_runs(tmp_path)[0], DEFAULT)
    assert study.by_projection
    assert evidence(study, DISTANCE, "standard").values == pytest.approx([math.log(3 / 2)])
    assert units(study, "standard").of_new_seed == pytest.approx(3 / 40)
    assert units(study, "standard").relative == pytest.approx(15 / np.linalg.norm(start))


def test_blocks_are_read_from_the_configurations():
    def both(seed, order):
        return {"seed": seed, "data.seed": order}

    runs = [
        run_of("baseline", BASE),
        run_of("baseline_2", BASE, **both(2, 2)),
        run_of("anything", BASE, **both(2, 2), **{"strategy.name": "standard"}),
        run_of("other", BASE, **both(7, 2)),
        run_of("ordered", BASE, **both(1, 9)),
        run_of("stray", BASE, **both(8, 8)),
        run_of("again", BASE, **both(1, 1)),
        run_of("ring", BASE, nccl_algo="Ring"),
        run_of("buckets", BASE, strategy={"name": "overlap", "bucket_mb": 1.0, "timeout": 9.0}),
        run_of("mostly", BASE, compile=True, summary={"eager_steps": 5, "steps": 60}),
        run_of("traced", BASE, compile=True, compiler="interpreted"),
        run_of("other_code", BASE, compile=True, compiler="public"),
    ]
    study = blocks.study(runs, DEFAULT)
    found = [{name: [run.label for run in rs] for name, rs in block.arms.items()} for block in study.blocks]
    assert found == [
        {
            "new order": ["ordered"], "rerun": ["again"], "custom, Ring": ["ring"], "overlap, bucket_mb=1.0": ["buckets"],
            "partly compiled": ["mostly"], "interpreted": ["traced"],
            "torch.compile": ["other_code"],
        },
        {"standard": ["anything"], "new seed": ["other"]},
    ]  # fmt: skip
    said = " ".join(study.notes)
    assert "stray is left out: no baseline has its seeds (8, data 8)" in said
    assert "mostly was to be compiled, but 8.3% of its steps ran eagerly" in said


def test_a_plan_decides_what_is_tested(tmp_path):
    runs = simulated(np.random.default_rng(15))
    declared = Plan((Declared(FORCE_ERROR, "standard"),), runs=tuple(run.label for run in runs))
    plan.write(tmp_path, declared, seeds=list(range(1, 7)))
    read = plan.read(tmp_path, plan.NUMERICS)
    assert read == declared
    assert read.declared
    assert json.loads((tmp_path / "plan.json").read_text())["seeds"] == [1, 2, 3, 4, 5, 6]
    (claim,) = verdicts(runs, read)
    assert "after Holm over the 1 primary claims" in claim.reason
    missing = verdicts([run for run in runs if run.label != "rerun_2"], read)[0]
    assert "1 of 24 planned runs are not there" in missing.verdict
    of_none = Plan(declared.primary, runs=(*declared.runs, "overlap", "overlap_2"))
    (cut,) = verdicts(runs, of_none)  # an arm that was never begun, and of which nothing is claimed
    assert (cut.verdict, cut.reason) == (claim.verdict, claim.reason)
    reruns = Plan(declared.primary, runs=(*declared.runs, "spread", "spread_2"))  # by another name
    assert "2 of 26 planned runs are not there" in verdicts(runs, reruns)[0].verdict
    begun = Plan(declared.primary, runs=(*declared.runs, "rerun_7"))
    assert "1 of 25 planned runs are not there" in verdicts(runs, begun)[0].verdict
    for text in ("{", '{"primary": [{"endpoint": "beauty", "arm": "standard"}]}', '{"primary": [1]}'):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(InputError, match=r"plan\.json"):
            plan.read(tmp_path, plan.NUMERICS)


def test_no_verdict_gets_better_by_dropping_runs():
    """Of any runs of a study without plan that has a failure: what is left never holds where the whole did not."""
    rng = np.random.default_rng(16)
    runs = simulated(rng, seeds=6, scatter=0.001)
    failed = [
        planted_failure(run, "nan") if run.label == "compiled_2" else run for run in runs
    ]  # fmt: skip
    assert kinds(failed)[FORCE] == "open"
    for dropped in itertools.combinations([run.label for run in failed if run.stem == "compiled"], 2):
        assert kinds([run for run in failed if run.label not in dropped])[FORCE] == "open"


@pytest.mark.parametrize("projected", [False, True])
def test_a_run_that_failed_before_its_first_step_counts(tmp_path, projected):
    for seed in range(1, 7):
        tag = "" if seed == 1 else f"_{seed}"
        common = {"seed": seed, "data.seed": seed, "val_forces": 0.1, "world_size": 8}
        common["projection"] = {step: np.arange(64) + step for step in (0, 1, 20)} if projected else None
        write_run(tmp_path, f"baseline{tag}", falling(20), **common)
        write_run(tmp_path, f"rerun{tag}", falling(20), **common)
        failed = {"status": "failed", "summary": {"error": "compiled and eager differ", "error_kind": "ParityError"}}
        write_run(
            tmp_path,
            f"compiled{tag}",
            falling(20 * (seed != 4)),
            compile=True,
            **common,
            **(failed if seed == 4 else {}),
        )
    runs, notes = read_runs(tmp_path)
    study = blocks.study(runs, DEFAULT)
    assert not notes
    assert study.by_projection == projected
    assert len(attribution.table(study))
    assert claims.numerics_claims(study)[FORCE].reason.startswith("1 of 6 runs of compiled failed (compiled_4)")
    assert claims.numerics_claims(study)[FORCE].kind == "open"
    assert len(numerics.table(study)) == 12
    assert present.endpoints(study).rows
    figures.trajectories(study)
    figures.divergences(study)
