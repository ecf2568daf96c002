import math
import statistics

import numpy as np
import pytest
from simulated_runs import falling, wander, write_run

from ddpkit.analysis import attribution, blocks, numerics, plan, present
from ddpkit.analysis.divergence import divergence, growth, spike_steps
from ddpkit.analysis.figures import _stretches
from ddpkit.analysis.runs import read_runs
from ddpkit.errors import InputError

DEFAULT = plan.Plan(plan.NUMERICS, declared=False)


def _study(folder):
    return blocks.study(read_runs(folder)[0], DEFAULT)


def test_every_number_of_a_row_recomputed(tmp_path):
    rng = np.random.default_rng(0)
    base = falling(37)
    other = base + wander(rng, 37, 0.02)
    write_run(tmp_path, "baseline", base)
    write_run(tmp_path, "standard", other, **{"strategy.name": "standard"})
    row = numerics.table(_study(tmp_path)).iloc[0]
    size = [abs(float(o) - float(b)) for o, b in zip(other, base, strict=True)]
    inside = [s for s in size if s <= 0.020]
    outside = [s for s in size if s > 0.020]
    assert outside
    assert row["run"] == "standard"
    assert row["steps"] == 37
    expected = {
        "mae": sum(size) / 37,
        "rmse": math.sqrt(sum(s * s for s in size) / 37),
        "max_abs": max(size),
        "median_abs": statistics.median(size),
        "mae_within": statistics.fmean(inside),
        "outside": len(outside),
        "outside_mean_abs": statistics.fmean(outside),
        "relative_mae": statistics.fmean(s / b for s, b in zip(size, base, strict=True)),
        "relative_median": statistics.median(s / b for s, b in zip(size, base, strict=True)),
        "mae_first_third": statistics.fmean(size[:12]),
        "mae_last_third": statistics.fmean(size[-12:]),
        "nonfinite": 0,
        "published_mae": 0.00073,
        "published_rmse": 0.00156,
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-12), name


def test_columns_begin_as_others_rely_on():
    assert numerics.COLUMNS[:5] == ("run", "steps", "mae", "rmse", "max_abs")


def test_one_unit_in_the_last_place_is_not_bitwise(tmp_path):
    base = falling(20)
    near = base.copy()
    near[7] = np.nextafter(near[7], 1)
    write_run(tmp_path, "baseline", base)
    write_run(tmp_path, "rerun", base)
    write_run(tmp_path, "standard", near, **{"strategy.name": "standard"})
    values = numerics.table(_study(tmp_path)).set_index("run")
    assert bool(values.loc["rerun", "bitwise"])
    assert values.loc["rerun", "mae"] == 0
    assert not values.loc["standard", "bitwise"]
    assert values.loc["standard", "max_abs"] == near[7] - base[7]
    study = _study(tmp_path)
    shown = present.numerics(numerics.table(study), study)[0]
    cells = {row[0]: row[3:6] for row in shown.rows}
    assert cells["rerun"] == ["0 (bitwise)"] * 3
    assert "0 (bitwise)" not in cells["standard"]


def test_runs_of_different_length_use_common_steps(tmp_path):
    write_run(tmp_path, "baseline", [1.0, 2.0, 3.0, 4.0])
    write_run(tmp_path, "standard", [1.5, 2.5], status="running", **{"strategy.name": "standard"})
    write_run(tmp_path, "rerun", [5.0], first_step=9)
    study = _study(tmp_path)
    values = numerics.table(study).set_index("run")
    assert values.loc["standard", ["steps", "mae"]].tolist() == [2, 0.5]
    assert values.loc["rerun", "steps"] == 0
    assert not values.loc["rerun", "bitwise"]
    said = " ".join(study.notes)
    assert "standard is running at step 2 of 9" in said
    assert "between step 2 and 9" in said


def test_losses_that_are_not_finite_are_counted_and_told(tmp_path):
    write_run(tmp_path, "baseline", [1.0, 2.0, 3.0])
    write_run(tmp_path, "standard", [1.0, math.nan, math.inf], **{"strategy.name": "standard"})
    study = _study(tmp_path)
    row = numerics.table(study).iloc[0]
    assert (row["nonfinite"], row["steps"], row["bitwise"]) == (2, 1, False)
    assert row["outcome"] == "failed"
    assert "standard logged 2 losses that are not finite: this counts against its arm" in " ".join(study.notes)
    sources = attribution.table(study)
    assert sources["bitwise_pairs"].tolist() == [0]
    assert sources["outcome"].tolist() == ["differs"]


def test_order_is_the_papers(tmp_path):
    for label, change in (
        ("overlap", {"strategy.name": "overlap"}),
        ("new_seed", {"seed": 2}),
        ("baseline", {}),
        ("rerun", {}),
        ("compiled", {"compile": True}),
        ("standard", {"strategy.name": "standard"}),
        ("a_deterministic", {"deterministic": True}),
    ):
        write_run(tmp_path, label, falling(6), **change)
    study = _study(tmp_path)
    assert list(numerics.table(study)["run"]) == [
        "standard",
        "compiled",
        "rerun",
        "new_seed",
        "overlap",
        "a_deterministic",
    ]


def test_learning_rates_that_part_are_told(tmp_path):
    write_run(tmp_path, "baseline", falling(6))
    run = write_run(tmp_path, "rerun", falling(6))
    lines = (run / "steps.csv").read_text().splitlines()
    lines[4:] = [line.replace(",0.002,1.0,", ",0.001,1.0,") for line in lines[4:]]
    (run / "steps.csv").write_text("\n".join(lines) + "\n")
    assert "Learning rates part at step 4" in " ".join(_study(tmp_path).notes)


def test_what_cannot_be_studied_is_refused(tmp_path):
    write_run(tmp_path, "only", falling(5))
    runs, _ = read_runs(tmp_path)
    with pytest.raises(InputError, match="no run is called 'baseline' among only"):
        blocks.study(runs, DEFAULT)
    with pytest.raises(InputError, match="nothing to compare"):
        blocks.study(runs, DEFAULT, "only")
    write_run(tmp_path, "only_2", falling(5), compile=True)
    with pytest.raises(InputError, match="only and only_2 are both baselines but differ in mode"):
        blocks.study(read_runs(tmp_path)[0], DEFAULT, "only")
    write_run(tmp_path, "other", falling(5))
    write_run(tmp_path, "other_2", falling(5), **{"strategy.name": "overlap"})
    with pytest.raises(
        InputError, match="other and other_2 carry one name but differ: the one is 'rerun', the other 'overlap'"
    ):
        blocks.study([run for run in read_runs(tmp_path)[0] if run.label != "only_2"], DEFAULT, "only")


def test_hundreds_of_runs_are_shown_by_arm(tmp_path):
    rng = np.random.default_rng(4)
    base = falling(12)
    write_run(tmp_path, "baseline", base)
    extras = [wander(rng, 12, 1e-3) for _ in range(150)]
    for i, extra in enumerate(extras, start=1):
        write_run(tmp_path, "rerun" if i == 1 else f"rerun_{i}", base + extra)
    study = _study(tmp_path)
    values = numerics.table(study)
    assert len(values) == 150
    shown = present.numerics(values, study)[0]
    (row,) = shown.rows
    assert row[0] == "rerun (150 runs)"
    mean = statistics.fmean(float(np.abs((base + e) - base).mean()) for e in extras)
    assert float(row[3]) == pytest.approx(mean, rel=0.01)


def test_divergence_is_the_mean_over_stretches_and_runs(tmp_path):
    base = np.zeros(60)
    write_run(tmp_path, "baseline", base)
    write_run(tmp_path, "standard", base + np.arange(1, 61), **{"strategy.name": "standard"})
    write_run(tmp_path, "standard_2", base - 3.0 * np.arange(1, 61), **{"strategy.name": "standard"})
    study = _study(tmp_path)
    steps, size = _stretches(study, "standard", points=30)
    assert len(steps) == 30
    assert steps[:2] == pytest.approx([1.5, 3.5])
    assert size == pytest.approx(2 * steps)


def _sources(folder):
    return attribution.table(_study(folder)).set_index(["source", "compared", "held"])


def test_growth_is_the_exponent_of_the_distance(tmp_path):
    steps = np.array([1, 2, 5, 10, 20, 50, 100])
    assert growth(steps, 3e-6 * steps**1.25, 100) == pytest.approx(1.25)
    assert math.isnan(growth(steps, np.zeros(7), 100))
    # Before a tenth of the run nothing counts.
    assert growth(steps, np.where(steps < 10, 1.0, 2.0 * steps), 100) == pytest.approx(1)
    rng = np.random.default_rng(1)
    direction = rng.normal(size=64)
    for seed, power in ((1, 1.0), (2, 1.2), (3, 1.4)):
        tag = "" if seed == 1 else f"_{seed}"
        for label, size, more in (("baseline", 0, {}), ("standard", 1e-6, {"strategy.name": "standard"})):
            rows = {int(t): 5 + size * t**power * direction for t in steps}
            write_run(tmp_path, label + tag, falling(100), seed=seed, projection=rows, **{"data.seed": seed}, **more)
        rows = {int(t): 5 + 1.01e-4 * direction for t in steps}
        write_run(tmp_path, f"new_seed{tag}", falling(100), seed=100 + seed, projection=rows, **{"data.seed": seed})
    found = divergence(_study(tmp_path), "standard")
    assert found.growth.value == pytest.approx(1.2, rel=1e-4)
    assert found.growth.count == 3
    assert found.growth.low < 1.2 < found.growth.high
    assert found.saturates == 50  # the median of 100, 50 and 20
    assert found.probe == 0


def test_spikes_are_counted(tmp_path):
    rng = np.random.default_rng(2)
    base = falling(300)
    quiet = 1e-3 * rng.normal(size=300)
    assert not len(spike_steps(quiet, base))
    assert list(spike_steps(quiet + 0.33 * (np.arange(300) == 7), base)) == [7]
    assert not len(spike_steps(np.where(np.arange(300) == 9, 1e-9, 0.0), base))  # rounding of float32
    write_run(tmp_path, "baseline", base)
    write_run(tmp_path, "rerun", base + quiet)
    write_run(tmp_path, "compiled", base + quiet + 0.33 * (np.arange(300) == 120), compile=True)
    study = _study(tmp_path)
    found = divergence(study, "compiled").spikes
    assert (found.count, found.steps, found.runs) == (1, 300, 1)
    assert found.largest == pytest.approx(0.33, abs=0.01)
    assert divergence(study, "rerun").spikes.count == 0
    # A new order of data gives other batches, whose losses cannot be compared.
    write_run(tmp_path, "ordered", base[::-1], **{"data.seed": 9})
    assert divergence(_study(tmp_path), "new order").spikes.steps == 0


def test_attribution_pairs_runs_that_differ_in_one_thing(tmp_path):
    base = np.full(10, 0.5)
    deterministic = {"deterministic": True}
    write_run(tmp_path, "baseline", base)
    write_run(tmp_path, "rerun", base + 1e-3)
    write_run(tmp_path, "rerun_2", base - 1e-3)
    write_run(tmp_path, "new_seed", base + 1.0, seed=2)
    write_run(tmp_path, "d_custom", base, **deterministic)
    write_run(tmp_path, "d_custom_2", base, **deterministic)
    write_run(tmp_path, "d_standard", base, **deterministic, **{"strategy.name": "standard"})
    write_run(tmp_path, "d_compiled", base + 1e-6, compile=True, **deterministic)
    write_run(tmp_path, "d_everything", base + 9.0, compile=True, **deterministic, **{"strategy.name": "standard"})
    rows = _sources(tmp_path)
    scatter = rows.loc[("scatter order", "reruns", "custom eager")]
    assert scatter["pairs"] == 3
    assert scatter["mae"] == pytest.approx((1e-3 + 1e-3 + 2e-3) / 3)
    assert scatter["rmse"] == pytest.approx(math.sqrt((1e-6 + 1e-6 + 4e-6) / 3))
    assert (scatter["mae_low"], scatter["mae_high"]) == pytest.approx((1e-3, 2e-3))
    assert scatter["outcome"] == "differs"
    none = rows.loc[("none (rerun)", "reruns", "custom eager det.")]
    assert (none["pairs"], none["mae"], none["outcome"]) == (1, 0, "zero, as due")
    order = rows.loc[("reduction order", "custom, standard", "eager det.")]
    assert (order["pairs"], order["expected_zero"], order["outcome"]) == (2, True, "zero, as due")
    compiler = rows.loc[("tracing and compiler", "eager, compiled", "custom det.")]
    assert compiler["pairs"] == 2
    assert compiler["mae"] == pytest.approx(1e-6, rel=1e-6)
    seed = rows.loc[("new seed", "two seeds", "custom eager")]
    assert seed["pairs"] == 3
    assert seed["mae"] == pytest.approx(1.0)
    assert rows.loc[("determinism", "off, on", "custom eager"), "pairs"] == 6
    # 9.0 stands apart in the compiled standard run alone: it pairs with one thing changed at a time.
    compiled = rows.loc[("reduction order and compiled code", "custom, standard", "compiled det.")]
    assert compiled["max_abs"] == pytest.approx(9.0)
    assert (compiled["expected_zero"], compiled["outcome"]) == (False, "differs")  # another graph, so no zero is due
    assert len(rows) == 8


def test_compiled_strategies_of_one_graph_must_agree(tmp_path):
    base = np.full(10, 0.5)
    write_run(tmp_path, "baseline", base)
    for strategy, added in (("standard", 0.0), ("overlap", 1e-9), ("ingraph", 1e-9)):
        write_run(tmp_path, strategy, base + added, compile=True, deterministic=True, **{"strategy.name": strategy})
    rows = _sources(tmp_path)
    assert rows.loc[("reduction order", "overlap, standard", "compiled det."), "outcome"] == "NOT ZERO"
    others = rows.loc["reduction order and compiled code"]
    assert sorted(others["outcome"]) == ["differs", "zero"]


def test_attribution_cries_out_where_zero_is_due(tmp_path):
    base = falling(10)
    write_run(tmp_path, "baseline", base, deterministic=True)
    write_run(tmp_path, "rerun", base + 1e-9, deterministic=True)
    assert _sources(tmp_path).loc[("none (rerun)", "reruns", "custom eager det."), "outcome"] == "NOT ZERO"


def test_on_four_ranks_the_order_of_sums_may_differ(tmp_path):
    base = falling(10)
    write_run(tmp_path, "baseline", base, deterministic=True, world_size=4)
    write_run(tmp_path, "standard", base + 1e-9, deterministic=True, world_size=4, **{"strategy.name": "standard"})
    row = _sources(tmp_path).loc[("reduction order", "custom, standard", "eager det.")]
    assert (row["expected_zero"], row["outcome"]) == (False, "differs")


def test_causes_are_told_apart(tmp_path):
    base = np.full(10, 0.5)
    code = lambda name: {"summary": {"code": name}}  # noqa: E731
    for label, added, more in (
        ("baseline", 0.0, {}),
        ("traced", 1e-3, {"compile": True, "compiler": "interpreted"}),
        ("compiled", 3e-3, {"compile": True, **code("a1")}),
        ("compiled_2", 3e-3, {"compile": True, **code("a1")}),
        ("compiled_3", 7e-3, {"compile": True, **code("b2")}),
        ("other_code", 4e-3, {"compile": True, "compiler": "public"}),
        ("fast", 2e-2, {"tf32": True}),
        ("tree", 1e-4, {"nccl_algo": "Tree"}),
        ("ring", 0.0, {"nccl_algo": "Ring"}),
        ("captured", 5e-3, {"compile": True, "cuda_graphs": True, **code("a1")}),
        ("partly", 0.9, {"compile": True, "summary": {"eager_steps": 3, "steps": 10}}),
    ):
        write_run(tmp_path, label, base + added, **more)
    rows = _sources(tmp_path)["mae"]
    assert rows["traced algorithms", "eager, interpreted", "custom"] == pytest.approx(1e-3)
    assert rows["compiler", "interpreted, compiled", "custom"] == pytest.approx((2e-3 + 2e-3 + 6e-3) / 3)
    assert rows["scatter order", "reruns", "custom compiled"] == 0  # the same code
    assert rows["code generated anew", "two codes", "custom compiled"] == pytest.approx(4e-3)
    assert rows["code generated anew", "compiled, torch.compile", "custom"] == pytest.approx((1e-3 + 1e-3 + 3e-3) / 3)
    assert rows["compiler", "interpreted, torch.compile", "custom"] == pytest.approx(3e-3)
    assert rows["TF32", "off, on", "custom eager"] == pytest.approx(2e-2)
    assert rows["reduction order", "Ring, Tree", "custom eager"] == pytest.approx(1e-4)
    assert rows["capture", "any, yes", "custom compiled"] == pytest.approx((2e-3 + 2e-3 + 2e-3) / 3)
    study = _study(tmp_path)
    assert list(numerics.same_code(study)) == ["compiled: 3 runs of 2 different codes (a1, b2)."]
