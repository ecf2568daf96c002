import argparse
import math
import statistics

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from simulated_runs import falling, run_of, write_run

from ddpkit.analysis import claims, cli, plan, present, speed
from ddpkit.analysis.plan import Plan
from ddpkit.analysis.runs import read_runs
from ddpkit.analysis.statistics import LEVEL
from ddpkit.errors import InputError

DEFAULT = Plan(plan.SPEED, declared=False)


def _write(folder, strategy, width, epochs, *, compiled=False, repeat=1, parameters=None, **more):
    label = f"{strategy}-{'compile' if compiled else 'eager'}-{width}{f'_{repeat}' if repeat > 1 else ''}"
    return write_run(
        folder,
        label,
        falling(6),
        epochs=epochs,
        parameters=parameters or 1000 * width,
        compile=compiled,
        **{"strategy.name": strategy, "model.type_embedding_dim": width},
        **more,
    )


def _study(folder, **options):
    return speed.study(read_runs(folder)[0], DEFAULT, **options)


def _row(values, parameters, strategy, compiled=False):
    found = values[
        (values["parameters"] == parameters) & (values["strategy"] == strategy) & (values["compile"] == compiled)
    ]
    assert len(found) == 1
    return found.iloc[0]


def test_columns_begin_as_others_rely_on():
    assert speed.COLUMNS[:5] == ("parameters", "strategy", "compile", "seconds_per_epoch", "relative_percent")


def test_paired_launches_recomputed_by_hand(tmp_path):
    standard = [[10.0, 10.2], [12.0, 12.4], [9.0, 9.1], [10.5, 10.4]]
    custom = [[10.1, 10.4], [12.3, 12.5], [9.1, 9.3], [10.6, 10.7]]
    for i in range(4):
        _write(tmp_path, "standard", 32, standard[i], repeat=i + 1, **{"train.turns": f"t{i}"})
        _write(tmp_path, "custom", 32, custom[i], repeat=i + 1, **{"train.turns": f"t{i}"})
    data = _study(tmp_path, warmup=0)
    row = _row(speed.table(data), 32000, "custom")
    logs = [math.log(statistics.fmean(c) / statistics.fmean(s)) for c, s in zip(custom, standard, strict=True)]
    assert row["seconds_per_epoch"] == pytest.approx(statistics.fmean([x for epochs in custom for x in epochs]))
    mean, deviation = statistics.fmean(logs), statistics.stdev(logs)
    assert row["relative_percent"] == pytest.approx(100 * math.expm1(mean))
    reach = stats.t.ppf(0.975, 3) * deviation / 2
    assert row["relative_low"] == pytest.approx(100 * math.expm1(mean - reach))
    assert row["relative_high"] == pytest.approx(100 * math.expm1(mean + reach))
    # Drift of 30 % between launches does not hide 1 %.
    assert row["relative_low"] > 0
    pairs = [[math.log(c / s) for c, s in zip(cs, ss, strict=True)] for cs, ss in zip(custom, standard, strict=True)]
    within = math.sqrt(sum(statistics.variance(x) for x in pairs) / 4)
    assert row["within_percent"] == pytest.approx(100 * within)
    assert row["between_percent"] == pytest.approx(100 * math.sqrt(max(0, deviation**2 - within**2 / 2)))
    assert (row["launches"], row["epochs"], row["steps_per_epoch"]) == (4, 8, 10)
    assert row["seconds_per_step"] == pytest.approx(row["seconds_per_epoch"] / 10)
    reference = _row(speed.table(data), 32000, "standard")
    assert reference["relative_percent"] == 0


def test_relative_to_standard_eager_of_the_same_size(tmp_path):
    for width, base in ((32, 10.0), (128, 20.0)):
        _write(tmp_path, "standard", width, [base])
        _write(tmp_path, "custom", width, [base * 1.1])
        _write(tmp_path, "custom", width, [base * 0.5], compiled=True)
    values = speed.table(_study(tmp_path))
    for width in (32, 128):
        assert _row(values, 1000 * width, "custom")["relative_percent"] == pytest.approx(10)
        assert _row(values, 1000 * width, "custom", True)["relative_percent"] == pytest.approx(-50)
    assert _row(values, 32000, "custom")["published_relative_percent"] == 0.7
    assert _row(values, 128000, "custom")["published_relative_percent"] == 5.0
    assert _row(values, 32000, "custom", True)["published_relative_percent"] == -8.5
    assert _row(values, 128000, "standard")["published_seconds"] == 40 * 60 + 2
    assert _row(values, 32000, "standard")["published_seconds"] == 35 * 60 + 58


def test_published_rows_are_found_by_size_before_width(tmp_path):
    _write(tmp_path, "standard", 64, [1.0], parameters=114_870_720)
    assert _row(speed.table(_study(tmp_path)), 114_870_720, "standard")["published_seconds"] == 2402


def test_effects_recomputed_by_hand(tmp_path):
    seconds = {
        (32, "standard", False): 10.0, (32, "custom", False): 10.3, (32, "none", False): 9.8,
        (32, "standard", True): 6.0, (32, "custom", True): 6.1, (32, "none", True): 5.8,
        (128, "standard", False): 12.0, (128, "custom", False): 12.9, (128, "none", False): 11.0,
        (128, "standard", True): 8.0, (128, "custom", True): 8.5, (128, "none", True): 7.0,
    }  # fmt: skip
    drift = (1.0, 1.1, 0.95)
    for (width, strategy, compiled), base in seconds.items():
        for i, factor in enumerate(drift, start=1):
            _write(tmp_path, strategy, width, [base * factor], compiled=compiled, repeat=i)
    data = _study(tmp_path)
    mean_drift = statistics.fmean(drift)
    assert data.scope == "2 ranks, 3 launches, epochs of 10 steps"
    exposed = {(c.parameters, c.name): e.value for c, e in speed.exposed_communication(data)}
    assert exposed[32000, "custom"] == pytest.approx(0.5 * mean_drift)
    assert exposed[128000, "custom compiled"] == pytest.approx(1.5 * mean_drift)
    crossed = {(c.parameters, c.strategy): e for c, e in speed.interaction(data)}
    assert crossed[32000, "custom"].value == pytest.approx(100 * ((6.1 / 10.3) / (6.0 / 10.0) - 1))
    grown = {entry.cell.name: entry for entry in speed.growth(data)}
    custom = grown["custom"]
    assert custom.total.value == pytest.approx(100 * (12.9 / 10.3 - 1))
    assert custom.compute.value == pytest.approx(100 * (11.0 - 9.8) / 10.3)
    assert custom.communication.value == pytest.approx(100 * ((12.9 - 11.0) - (10.3 - 9.8)) / 10.3)
    assert custom.compute.value + custom.communication.value == pytest.approx(custom.total.value)
    assert grown["none"].communication is None


def test_nequips_own_trainer_stands_beside_ours_and_in_nothing_else(tmp_path, capsys):
    drift = (1.0, 1.1, 0.95)
    seconds = {"standard": 10.0, "custom": 10.4, "none": 9.5, "nequip ddp": 12.0, "nequip simple": 13.0}
    ratios = {"nequip simple": (1.0, 1.02, 0.99)}
    for width in (32, 128):
        for strategy, base in seconds.items():
            for i, factor in enumerate(drift):
                own = base * factor * ratios.get(strategy, (1, 1, 1))[i] * (1 + width / 1000)
                _write(tmp_path, strategy, width, [99.0, own, own], repeat=i + 1, **{"train.turns": f"t{width}{i}"})
        _write(tmp_path, "nequip simple", width, [99.0, 7.0], compiled=True, **{"train.turns": f"t{width}0"})
    data = _study(tmp_path)
    found = {(one.cell.parameters, one.cell.name, one.peer.name): one for one in speed.beside(data)}
    sizes, ours, peers = (32000, 128000), ("standard", "custom"), ("nequip ddp", "nequip simple")
    assert set(found) == {(size, a, b) for size in sizes for a in ours for b in peers}  # no compiled one of ours
    exact = found[32000, "standard", "nequip ddp"].ratio
    assert (exact.value, exact.count) == (pytest.approx(10 / 12), 3)
    logs = [math.log(10.4 / (13.0 * x)) for x in ratios["nequip simple"]]
    reach = stats.t.ppf(0.975, 2) * statistics.stdev(logs) / math.sqrt(3)
    ratio = found[128000, "custom", "nequip simple"].ratio
    assert ratio.value == pytest.approx(math.exp(statistics.fmean(logs)))
    assert (ratio.low, ratio.high) == pytest.approx(
        (math.exp(statistics.fmean(logs) - reach), math.exp(statistics.fmean(logs) + reach))
    )
    assert all(one.in_turns for one in found.values())
    assert not any(cell.is_peer for cell, _ in (*speed.exposed_communication(data), *speed.interaction(data)))
    assert all(entry.compute is None for entry in speed.growth(data) if entry.cell.is_peer)
    assert len(claims.speed_claims(data)) == 2
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    cli.main(parser.parse_args(["speed", str(tmp_path)]))
    said = capsys.readouterr().out
    assert "An epoch beside nequip's own trainer: time of ours over nequip's" in said
    written = pd.read_csv(tmp_path / "speed_beside.csv")
    assert tuple(written.columns) == speed.BESIDE_COLUMNS
    assert len(written) == 8
    assert written["in_turns"].all()


def test_launches_beside_nequips_that_followed_one_another_are_told(tmp_path):
    for repeat in (1, 2):
        for strategy, seconds in (("standard", [10.0, 10.0]), ("nequip ddp", [90.0, 12.0])):
            _write(tmp_path, strategy, 32, seconds, repeat=repeat)
    (one,) = speed.beside(_study(tmp_path))
    assert not one.in_turns
    assert one.ratio.value == pytest.approx(10 / 12)  # the first epoch warms nequip up
    table = next(
        table for table in present.epochs(speed.table(_study(tmp_path)), _study(tmp_path)) if "beside" in table.caption
    )
    assert table.rows[0][-1] == "one after another"


def test_splits_bytes_and_compilation(tmp_path):
    _write(tmp_path, "standard", 32, [1.0])
    _write(tmp_path, "custom", 32, [1.0], splits=(0.002, 0.05, 0.01, None), summary={"seconds_compile": 7.5})
    _write(tmp_path, "none", 32, [1.0], splits=(0.002, 0.05, 0.0, 0.001))
    values = speed.table(_study(tmp_path))
    custom = _row(values, 32000, "custom")
    assert custom["data_per_step"] == pytest.approx(0.002)
    assert custom["sync_per_step"] == pytest.approx(0.01)
    assert math.isnan(custom["optimizer_per_step"])
    assert math.isnan(_row(values, 32000, "standard")["sync_per_step"])
    assert custom["seconds_compile"] == 7.5
    assert custom["gradient_bytes_per_step"] == 4 * 32000
    assert _row(values, 32000, "none")["gradient_bytes_per_step"] == 0


def test_rows_weigh_with_the_steps_since_the_row_before(tmp_path):
    run = _write(tmp_path, "standard", 32, [1.0])
    lines = (run / "steps.csv").read_text().splitlines()
    first = lines[1].replace("0.001,0.08", "0.010,0.08")
    later = ["4", *lines[4].split(",")[1:]]
    (run / "steps.csv").write_text("\n".join([lines[0], first, ",".join(later)]) + "\n")
    assert speed.table(_study(tmp_path))["data_per_step"].iloc[0] == pytest.approx((0.010 + 3 * 0.001) / 4)


def test_partial_epochs_and_unfinished_runs_are_left_out_and_told(tmp_path):
    whole = _write(tmp_path, "standard", 32, [1.0, 3.0, 9.0])
    lines = (whole / "epochs.csv").read_text().splitlines()
    lines[3] = lines[3].replace(",10,", ",4,")
    (whole / "epochs.csv").write_text("\n".join(lines) + "\n")
    _write(tmp_path, "custom", 32, [], status="running")
    early = _write(tmp_path, "none", 32, [1.0])
    (early / "summary.json").unlink()
    data = _study(tmp_path)
    values = speed.table(data)
    assert list(values["strategy"]) == ["standard"]
    assert values["seconds_per_epoch"].iloc[0] == 2.0
    said = " ".join(data.notes)
    assert "standard-eager-32: epochs of fewer than 10 steps are left out" in said
    assert "custom-eager-32 is left out: it has no complete epoch yet" in said
    assert "none-eager-32 is left out" in said


def test_warmup_epochs(tmp_path):
    _write(tmp_path, "standard", 32, [5.0, 2.0, 2.2])
    _write(tmp_path, "custom", 32, [6.0, 2.1, 2.3])
    plain = _study(tmp_path)
    assert any("--warmup 1" in note for note in plain.notes)
    assert speed.table(plain)["seconds_per_epoch"].iloc[0] == pytest.approx(9.2 / 3)
    warm = _study(tmp_path, warmup=1)
    assert not any("--warmup" in note for note in warm.notes)
    assert speed.table(warm)["seconds_per_epoch"].tolist() == pytest.approx([2.1, 2.2])
    assert _row(speed.table(warm), 32000, "custom")["epochs"] == 2
    with pytest.raises(InputError, match="none of the 2 runs has a complete epoch"):
        _study(tmp_path, warmup=3)


def test_unpaired_repeats_are_compared_over_what_both_have(tmp_path):
    for i, seconds in enumerate((10.0, 20.0, 30.0), start=1):
        _write(tmp_path, "standard", 32, [seconds], repeat=i)
    for i, seconds in enumerate((11.0, 22.0), start=1):
        _write(tmp_path, "custom", 32, [seconds], repeat=i)
    row = _row(speed.table(_study(tmp_path)), 32000, "custom")
    assert row["relative_percent"] == pytest.approx(10)


def test_one_launch_has_no_interval_and_no_verdict(tmp_path):
    """However many epochs it has: they resemble each other."""
    for strategy, seconds in (("standard", 1.0), ("custom", 1.1)):
        epochs = [9.0, *(seconds + 0.001 * n for n in range(30))]
        _write(tmp_path, strategy, 32, epochs, **{"train.turns": "somewhere"})
    data = _study(tmp_path)
    row = _row(speed.table(data), 32000, "custom")
    assert row["epochs"] == 30  # the first warms up
    assert math.isnan(row["relative_low"])
    (claim,) = claims.speed_claims(data)
    assert claim.verdict == "cannot be told from these runs: there is 1 pair of launches, and a test needs 8"
    assert "between epochs of one launch" in claim.reason
    assert "2 ranks, 1 launch, epochs of 10 steps" in claim.claim


def test_runs_of_different_sessions_are_no_pairs(tmp_path):
    _write(tmp_path, "standard", 32, [9.0, 1.0, 1.0, 1.01], **{"train.turns": "monday"})
    _write(tmp_path, "custom", 32, [9.0, 1.1, 1.1, 1.11], **{"train.turns": "tuesday"})
    data = _study(tmp_path)
    assert math.isnan(_row(speed.table(data), 32000, "custom")["relative_percent"])
    assert "there are 0 pairs" in claims.speed_claims(data)[0].verdict


def test_labels_that_clash_are_not_renumbered_into_pairs(tmp_path):
    for label, seconds in (("a", 1.1), ("b", 1.3)):
        write_run(tmp_path, label, falling(6), epochs=[seconds], parameters=32000)
    for repeat in (1, 2):
        _write(tmp_path, "standard", 32, [1.0 * repeat], repeat=repeat)
    data = _study(tmp_path)
    assert _row(speed.table(data), 32000, "custom")["relative_percent"] == pytest.approx(10)
    assert any("b is left out: a is the same in the same block" in note for note in data.notes)


def test_a_second_launch_of_the_reference_checks_calibration(tmp_path):
    for repeat in range(1, 4):
        turns = {"train.turns": str(repeat)}
        write_run(tmp_path, f"standard-eager-32_{repeat}", falling(6), epochs=[9, 1.0 + repeat], parameters=32000,
                  **{"strategy.name": "standard"}, **turns)  # fmt: skip
        write_run(tmp_path, f"standard_again-eager-32_{repeat}", falling(6), epochs=[9, 1.01 + repeat], parameters=32000,
                  **{"strategy.name": "standard"}, **turns)  # fmt: skip
    data = _study(tmp_path)
    values = speed.table(data)
    again = values[values["again"]].iloc[0]
    logs = [math.log((1.01 + n) / (1.0 + n)) for n in (1, 2, 3)]
    assert again["relative_percent"] == pytest.approx(100 * math.expm1(statistics.fmean(logs)))
    assert [cell.name for cell in data.times] == ["standard", "standard again"]
    facts = present.speed_facts(data).text()
    assert "standard against itself" in facts


def test_splits_are_of_the_epochs_that_count(tmp_path):
    for label, strategy in (("standard-eager-32", "standard"), ("custom-eager-32", "custom")):
        _write(tmp_path, strategy, 32, [9.0, 1.0], **{"train.turns": "somewhere"})
        steps = tmp_path / label / "steps.csv"
        lines = steps.read_text().splitlines()
        second = [line.replace(",1,", ",2,", 1).replace("0.001,0.08", "0.003,0.06") for line in lines[1:]]
        moved = [f"{int(line.split(',')[0]) + len(second)},{line.split(',', 1)[1]}" for line in second]
        steps.write_text("\n".join([*lines, *moved]) + "\n")
    row = _row(speed.table(_study(tmp_path)), 32000, "custom")
    assert row["data_per_step"] == pytest.approx(0.003)
    assert row["compute_per_step"] == pytest.approx(0.06)


def launched(rng, *, true=0.0, launches=8, scatter=0.001, again=True):
    """Runs of blocks that took turns; of the arm, the reference, and the reference again."""
    runs = []
    for block in range(1, launches + 1):
        common = 0.1 * rng.normal()
        arms = [("standard-eager-32", "standard", 0.0), ("custom-eager-32", "custom", true)]
        arms += [("standard_again-eager-32", "standard", 0.0)] if again else []
        for label, strategy, shift in arms:
            seconds = np.exp(common + shift + scatter * rng.normal(size=5))
            name = label if block == 1 else f"{label}_{block}"
            runs.append(run_of(name, [1.0], epochs=[9.0, *seconds], turns=f"t{block}", **{"strategy.name": strategy}))
    return runs


CELL = speed.Cell(1000, "custom", False)
STUDIES = 500
TEMPLATE = [run_of("standard-eager-32", [1.0], epochs=[1.0], turns="t1", **{"strategy.name": "standard"})]


def simulated(
    rng, *, launches=8, true=0.0, drift=0.1, launch=0.02, within=0.03, correlation=0.7, epochs=6, again=True, pilot=()
):
    """A study with known truth: drift between blocks, an effect of each launch, epochs that resemble each other."""
    cells = {speed.Cell(1000, "standard", False): 0.0, CELL: true}
    cells |= {speed.Cell(1000, "standard", False, again=True): 0.0} if again else {}
    times = {cell: {} for cell in cells}
    for block in range(1, launches + len(pilot) + 1):
        common = drift * rng.normal()
        for cell, shift in cells.items():
            noise = [rng.normal()]
            for _ in range(epochs - 1):
                noise.append(correlation * noise[-1] + math.sqrt(1 - correlation**2) * rng.normal())
            seconds = np.exp(common + shift + launch * rng.normal() + within * np.array(noise))
            times[cell][block, f"t{block}"] = dict(enumerate(seconds, start=2))
    declared = Plan(plan.SPEED, pilot=pilot, declared=False)
    return speed.Study(times, dict.fromkeys(times, TEMPLATE), {}, declared, 10, ())


def test_an_arm_against_itself_covers_zero_at_the_nominal_rate():
    rng = np.random.default_rng(0)
    found = [simulated(rng) for _ in range(STUDIES)]
    covers = [not speed.relative(data, data.again(CELL)).estimate.excludes_zero for data in found]
    assert np.mean(covers) == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / STUDIES))
    # Where nothing differs, a verdict of either kind comes in one study of twenty at most.
    kinds = [claims.speed_claims(data)[0].kind for data in found]
    assert np.mean([kind != "open" for kind in kinds]) <= LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / STUDIES)


def test_epochs_as_units_would_not():
    """What the unit is for: intervals over the epochs of one launch miss most of the time."""
    rng = np.random.default_rng(1)
    missed = 0
    for _ in range(60):
        data = simulated(rng, launches=1, epochs=20)
        mine, its = data.epochs(data.blocks(CELL)[0], CELL, data.reference(CELL))
        logs = np.log(mine / its)
        missed += abs(stats.ttest_1samp(logs, 0).statistic) > stats.t.ppf(0.975, len(logs) - 1)
    assert missed / 60 > 0.3


def test_a_true_difference_is_found_and_its_interval_covers_it():
    rng = np.random.default_rng(2)
    found = [simulated(rng, true=math.log(1.08)) for _ in range(100)]
    estimates = [speed.relative(data, CELL).estimate for data in found]
    covered = np.mean([e.low <= math.log(1.08) <= e.high for e in estimates])
    assert covered == pytest.approx(0.95, abs=0.07)
    kinds = [claims.speed_claims(data)[0].kind for data in found]
    assert np.mean([kind == "holds" for kind in kinds]) > 0.8
    assert "fails" not in kinds


def test_what_is_not_resolved_is_bounded_and_no_more():
    rng = np.random.default_rng(3)
    first = next(
        c for c in (claims.speed_claims(simulated(rng, again=False))[0] for _ in range(20)) if c.kind == "open"
    )
    assert first.verdict.startswith("cannot be told from these runs: the difference lies between -")
    assert "more" not in first.verdict
    assert "8 pairs of launches" in first.reason


def test_no_verdict_where_the_same_thing_differs_from_itself():
    rng = np.random.default_rng(4)
    runs = launched(rng, true=0.2)
    for run in runs:
        if run.stem.startswith("standard_again"):
            run.epochs["seconds"] *= 1.05
    (claim,) = claims.speed_claims(speed.study(runs, DEFAULT))
    assert claim.kind == "open"
    assert "two launches of the same thing differ" in claim.verdict


def test_runs_that_followed_one_another_need_an_order_that_was_drawn(tmp_path):
    """A machine that slows down makes what always runs second look slower."""
    for repeat in range(1, 10):
        for place, strategy in enumerate(("standard", "custom")):
            _write(tmp_path, strategy, 32, [1.0 + 0.02 * (2 * repeat + place)], repeat=repeat)
    runs = read_runs(tmp_path)[0]
    (claim,) = claims.speed_claims(speed.study(runs, DEFAULT))
    assert "no plan has drawn" in claim.verdict
    (claim,) = claims.speed_claims(speed.study(runs, Plan(plan.SPEED)))
    assert claim.kind == "holds"  # whoever writes a plan has drawn the order


def test_the_spread_between_and_within_launches_is_recovered():
    data = simulated(np.random.default_rng(5), launches=200, epochs=12, correlation=0.0)
    found = speed.relative(data, CELL)
    assert found.within == pytest.approx(100 * 0.03 * math.sqrt(2), rel=0.1)
    assert found.between == pytest.approx(100 * 0.02 * math.sqrt(2), rel=0.15)


def test_a_pilot_tells_the_number_of_pairs_and_is_in_no_claim():
    rng = np.random.default_rng(6)
    data = simulated(rng, launches=8, pilot=(1, 2, 3))
    assert speed.relative(data, CELL).estimate.count == 8
    assert "in no claim" in present.speed_facts(data).text()
    for spread, pairs in ((0.0001, 8), (0.015, 12), (0.2, 24)):
        runs = launched(rng, launches=3, again=False)
        logs = [spread * x for x in (-1, 0, 1)]  # exactly this standard deviation
        for run, log in zip([r for r in runs if r.stem.startswith("custom")], logs, strict=True):
            its = next(r for r in runs if r.repeat == run.repeat and r.stem.startswith("standard"))
            run.epochs["seconds"] = its.epochs["seconds"] * math.exp(log)
        found = speed.pairs_needed(speed.study(runs, DEFAULT), CELL)
        assert found == pairs
        if pairs < speed.MOST_PAIRS:
            assert speed.reach(spread, found) <= speed.RESOLUTION


def test_a_run_that_was_not_compiled_is_not_called_so(tmp_path):
    _write(tmp_path, "standard", 32, [1.0])
    _write(tmp_path, "custom", 32, [0.9], compiled=True, summary={"eager_steps": 2, "steps": 100})
    data = _study(tmp_path)
    assert [cell.name for cell in data.times] == ["standard"]
    assert any("custom-compile-32 is left out: 2.0% of its steps ran eagerly" in note for note in data.notes)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"train.batch_size": 4}, "train.batch_size"), ({"world_size": 8}, "world_size"), ({"data.seed": 3}, "data.seed")],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path, change, named):
    _write(tmp_path, "standard", 32, [1.0])
    _write(tmp_path, "custom", 128, [1.0], **change)
    with pytest.raises(InputError, match=named):
        _study(tmp_path)


def test_models_of_one_size_must_be_the_same_model(tmp_path):
    _write(tmp_path, "standard", 32, [1.0])
    _write(tmp_path, "custom", 32, [1.0], **{"model.r_max": 6.0})
    with pytest.raises(InputError, match=r"model\.r_max"):
        _study(tmp_path)


def test_no_standard_run_is_refused(tmp_path):
    _write(tmp_path, "custom", 32, [1.0])
    with pytest.raises(InputError, match="no run with strategy standard"):
        _study(tmp_path)


def test_mpi_is_a_cell_of_its_own(tmp_path):
    _write(tmp_path, "standard", 32, [1.0])
    _write(tmp_path, "custom", 32, [1.2])
    write_run(
        tmp_path,
        "custom-mpi",
        falling(6),
        epochs=[1.5],
        parameters=32000,
        comm="mpi",
        **{"model.type_embedding_dim": 32},
    )
    data = _study(tmp_path)
    rows = present.epochs(speed.table(data), data)[0].rows
    assert [row[1] for row in rows] == ["standard", "custom over mpi", "custom"]
    assert [row[3] for row in rows] == ["reference", "+50.0 %", "+20.0 %"]


def test_recorded_steps_are_a_cell_of_their_own(tmp_path):
    _write(tmp_path, "standard", 32, [2.0] * 5)
    _write(tmp_path, "custom", 32, [1.0] * 5, compiled=True)
    losses = falling(6)
    facts = {"steps": 6, "captured_steps": 5}
    wide = {"model.type_embedding_dim": 32, "parameters": 32_000, "compile": True}
    times = [0.9, 0.8, 0.7, 0.6, 0.5]  # of ten steps each: the first four record
    write_run(tmp_path, "custom-captured-32", losses, epochs=times, cuda_graphs=True, summary=facts, **wide)
    found = speed.table(_study(tmp_path)).set_index("captured")
    assert found.loc[False, "relative_percent"].tolist() == pytest.approx([0.0, -50.0])
    assert found.loc[True, "relative_percent"] == pytest.approx(-75.0)
    assert np.isnan(found.loc[True, "published_relative_percent"])
    assert found["published_relative_percent"].notna().sum() == 2
