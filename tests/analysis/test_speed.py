import math
import statistics

import numpy as np
import pytest
from scipy import stats
from simulated_runs import falling, write_run

from ddpkit.analysis import claims, present, speed
from ddpkit.analysis.runs import read_runs
from ddpkit.errors import InputError


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
    return speed.study(read_runs(folder)[0], **options)


def _row(values, parameters, strategy, compiled=False):
    found = values[
        (values["parameters"] == parameters) & (values["strategy"] == strategy) & (values["compile"] == compiled)
    ]
    assert len(found) == 1
    return found.iloc[0]


def test_columns_begin_as_others_rely_on():
    assert speed.COLUMNS[:5] == ("parameters", "strategy", "compile", "seconds_per_epoch", "relative_percent")


def test_paired_repeats_recomputed_by_hand(tmp_path):
    standard = [[10.0, 10.2], [12.0, 12.4], [9.0, 9.1], [10.5, 10.4]]
    custom = [[10.1, 10.4], [12.3, 12.5], [9.1, 9.3], [10.6, 10.7]]
    for i in range(4):
        _write(tmp_path, "standard", 32, standard[i], repeat=i + 1)
        _write(tmp_path, "custom", 32, custom[i], repeat=i + 1)
    data = _study(tmp_path)
    assert data.unit == "repeat"
    row = _row(speed.table(data), 32000, "custom")
    means_s, means_c = [statistics.fmean(x) for x in standard], [statistics.fmean(x) for x in custom]
    ratio = sum(means_c) / sum(means_s)
    assert row["seconds_per_epoch"] == pytest.approx(statistics.fmean([x for epochs in custom for x in epochs]))
    assert row["relative_percent"] == pytest.approx(100 * (ratio - 1))
    residuals = [c - ratio * s for c, s in zip(means_c, means_s, strict=True)]
    error = math.sqrt(sum(r * r for r in residuals) / 3 / 4) / statistics.fmean(means_s)
    reach = 100 * stats.t.ppf(0.975, 3) * error
    assert row["relative_low"] == pytest.approx(100 * (ratio - 1) - reach)
    assert row["relative_high"] == pytest.approx(100 * (ratio - 1) + reach)
    # Drift of 30 % between repeats does not hide 1 %.
    assert row["relative_low"] > 0
    assert (row["runs"], row["epochs"], row["steps_per_epoch"]) == (4, 8, 10)
    assert row["seconds_per_step"] == pytest.approx(row["seconds_per_epoch"] / 10)
    reference = _row(speed.table(data), 32000, "standard")
    assert reference["relative_percent"] == 0


def test_intervals_cover_the_true_ratio():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(600):
        drift = np.exp(0.1 * rng.normal(size=5))
        found = speed.ratio_interval(
            1.02 * drift * np.exp(0.01 * rng.normal(size=5)), drift * np.exp(0.01 * rng.normal(size=5))
        )
        covered += found.low <= 1.02 <= found.high
    assert covered / 600 == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 600))


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
    growing = speed.cost_growth(data, "custom", False)
    assert growing.value == pytest.approx(100 * (12.9 / 12.0 - 10.3 / 10.0))
    found = {c.claim: c for c in claims.speed_claims(data)}
    assert found["The cost of custom DDP against standard DDP grows with the number of parameters."].verdict == "holds"


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
    assert not warm.notes
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


def test_one_measurement_has_no_interval_and_no_verdict(tmp_path):
    _write(tmp_path, "standard", 32, [1.0])
    _write(tmp_path, "custom", 32, [1.1])
    data = _study(tmp_path)
    row = _row(speed.table(data), 32000, "custom")
    assert math.isnan(row["relative_low"])
    found = claims.speed_claims(data)
    assert {claim.kind for claim in found} == {"open"}
    assert "did not take turns" in found[0].reason


def test_epochs_settle_a_claim_only_where_runs_took_turns(tmp_path):
    """Six epochs each, a tenth apart: drift between two runs that followed one another looks the same."""
    for name, config in (("after", {}), ("turns", {"train.turns": "somewhere"})):
        _write(tmp_path / name, "standard", 32, [9.0, 1.0, 1.01, 0.99, 1.0, 1.01], **config)
        _write(tmp_path / name, "custom", 32, [9.0, 1.1, 1.11, 1.1, 1.09, 1.1], **config)
    after, in_turns = _study(tmp_path / "after", warmup=1), _study(tmp_path / "turns")
    assert speed.relative_percent(after, after.reference(speed.Cell(32000, "custom", False))).count == 5
    verdicts = [claims.speed_claims(data)[0].verdict for data in (after, in_turns)]
    assert verdicts == ["cannot be told from these runs: about 2 more runs of each configuration are needed", "holds"]
    values = _row(speed.table(in_turns), 32000, "custom")
    assert values["epochs"] == 5  # the first warms up
    assert values["relative_percent"] == pytest.approx(100 * (5.5 / 5.01 - 1))


def test_runs_of_different_sessions_are_no_pairs(tmp_path):
    _write(tmp_path, "standard", 32, [9.0, 1.0, 1.0, 1.01], **{"train.turns": "monday"})
    _write(tmp_path, "custom", 32, [9.0, 1.1, 1.1, 1.11], **{"train.turns": "tuesday"})
    assert not _study(tmp_path).in_turns


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


def test_what_is_not_resolved_is_said(tmp_path):
    for i, (a, b) in enumerate(((10.0, 10.2), (10.1, 9.8), (9.9, 10.1), (10.0, 10.0)), start=1):
        _write(tmp_path, "standard", 32, [a], repeat=i)
        _write(tmp_path, "custom", 32, [b], repeat=i)
    first = claims.speed_claims(_study(tmp_path))[0]
    assert first.verdict.startswith("cannot be told from these runs: about ")
    assert first.verdict.endswith("more repeats are needed")
    assert "do not resolve the difference" in first.reason


def test_advised_repeats_resolve_the_difference():
    rng = np.random.default_rng(1)
    advised = []
    while len(advised) < 50:
        found = speed.mean_interval(rng.normal(1.0, 1.5, size=5))
        more = found.more()
        if not found.resolved and 0.8 < found.value < 1.2 and more:
            advised.append(5 + more)
    many = int(np.median(advised))
    resolved = [speed.mean_interval(rng.normal(1.0, 1.5, size=many)).resolved for _ in range(300)]
    assert np.mean(resolved) > 0.65


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
