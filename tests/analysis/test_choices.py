import argparse

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from simulated_runs import write_run

from ddpkit.analysis import choices, cli
from ddpkit.errors import InputError

COLUMNS = (
    "subset,frames,atoms,energy_mae_mev_per_atom,energy_rmse_mev_per_atom,forces_mae_mev_per_angstrom,"
    "forces_rmse_mev_per_angstrom,total_energy_mae_mev,total_energy_rmse_mev"
)


def analyze(*words):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    cli.main(parser.parse_args([str(word) for word in words]))


def evaluated(folder, arm, pair, errors, *, status="finished", digest="a", summary=None, **config):
    """A run and its evaluation; `errors` are force and energy RMSE by subset, or none."""
    label = arm if pair == 1 else f"{arm}_{pair}"
    facts = {"data_fingerprint": {"frames": digest}} | (summary or {})
    run = write_run(folder, label, [1.0], seed=pair, summary=facts, status=status, **{"data.seed": pair} | config)
    if errors:
        place = run / "evaluation" / "test"
        place.mkdir(parents=True)
        rows = [f"{subset},50,1350,1,1,1,{f!r},1,{e!r}" for subset, (f, e) in errors.items()]
        (place / "accuracy.csv").write_text("\n".join([COLUMNS, *rows]) + "\n")


@pytest.fixture
def arms(tmp_path):
    """Five seeds: an arm that is equal within a per cent, one a fifth worse, one that scatters, one of a single seed."""
    rng = np.random.default_rng(3)
    logs = {
        "same": 0.005 + 0.01 * rng.normal(size=5),
        "worse": np.log(1.2) + 0.01 * rng.normal(size=5),
        "noisy": 0.15 * rng.normal(size=5),
    }
    for pair in range(1, 6):
        base = 13.0 + rng.normal()
        evaluated(tmp_path, "baseline", pair, {"all": (base, 4.0)})
        for arm, values in logs.items():
            error = float(base * np.exp(values[pair - 1]))
            evaluated(tmp_path, arm, pair, {"all": (error, 5.0)}, **{"train.ema_decay": len(arm) / 10})
    cosine = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": "all"}
    evaluated(tmp_path, "once", 1, {"all": (13.0, 4.0)}, **{"optimizer.lr": 0.004, "scheduler": cosine})
    return tmp_path, logs


def test_arms_are_compared_seed_by_seed(arms, capsys):
    folder, logs = arms
    analyze("accuracy", folder)
    said = capsys.readouterr().out
    study = choices.read(folder)
    for arm, values in logs.items():
        found, test = study.ratio(arm, choices.FORCES)
        np.testing.assert_allclose(found, values, atol=1e-12)
        low, high = stats.t.interval(0.9, 4, values.mean(), stats.sem(values))
        np.testing.assert_allclose((test.estimate.low, test.estimate.high), (low, high))
        margin = np.log(1.05)
        one_sided = max(
            stats.ttest_1samp(values, margin, alternative="less").pvalue,
            stats.ttest_1samp(values, -margin, alternative="greater").pvalue,
        )
        assert test.inside == pytest.approx(one_sided)
    rows = {row[0]: row for row in choices.table(study).rows}
    assert {arm: row[-1] for arm, row in rows.items()} == {
        "baseline": "-", "same": "yes", "worse": "no", "noisy": "open", "once": "open",
    }  # fmt: skip
    assert rows["once"][1] == "scheduler=CosineAnnealingLR, optimizer.lr=0.004"
    assert rows["same"][1] == "train.ema_decay=0.4"
    assert rows["same"][6] == "+25.0 % [+25.0, +25.0]"
    base = study.errors("baseline", choices.FORCES)
    assert rows["baseline"][3].startswith(f"{base.mean():.1f} ± ")
    assert next(iter(rows)) == "baseline"
    assert "same" in said
    assert (folder / "accuracy.png").stat().st_size > 5000
    assert len(pd.read_csv(folder / "accuracy.csv")) == 21


def test_a_run_that_failed_counts_and_one_that_was_not_evaluated_is_named(arms):
    folder, _ = arms
    evaluated(
        folder,
        "same",
        6,
        None,
        status="failed",
        summary={"error": "the loss was nan", "error_kind": "NonFiniteLossError"},
    )
    evaluated(folder, "baseline", 6, {"all": (13.0, 4.0)})
    evaluated(folder, "worse", 6, None)
    evaluated(folder, "noisy", 6, None, status="running")
    study = choices.read(folder)
    assert np.isinf(study.ratio("same", choices.FORCES)[0]).tolist() == [False] * 5 + [True]
    rows = {row[0]: row for row in choices.table(study).rows}
    assert rows["same"][-1] != "yes"
    assert "failed" in rows["same"][3]
    said = " ".join(study.notes)
    assert "worse_6 is left out: it has no evaluation/test/accuracy.csv; make it with `ddpkit eval" in said
    assert "noisy_6 is left out: it has not ended" in said
    assert "same_6 met NaN or infinity" in said
    choices.figure(study)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({}, {"digest": "b"}, "baseline and other cannot be compared: their frames"),
        ({}, {"data.split": [0.5, 0.5, 0.0]}, "cannot be compared"),
    ],
)
def test_pairs_that_were_tested_on_other_frames_are_refused(tmp_path, first, second, expected):
    evaluated(tmp_path, "baseline", 1, {"all": (13.0, 4.0)}, **first)
    evaluated(tmp_path, "other", 1, {"all": (13.0, 4.0)}, **second)
    with pytest.raises(InputError, match=expected):
        choices.read(tmp_path)


def test_a_folder_without_the_baseline_names_its_arms(tmp_path):
    evaluated(tmp_path, "recipe", 1, {"all": (13.0, 4.0)})
    evaluated(tmp_path, "other", 1, {"all": (14.0, 4.0)})
    with pytest.raises(
        InputError, match=r"no evaluated run called baseline, .* name one of other, recipe with --baseline"
    ):
        choices.read(tmp_path)
    assert choices.read(tmp_path, "recipe").baseline == "recipe"
    with pytest.raises(InputError, match="Lightning's logs carry no errors"):
        analyze("accuracy", tmp_path, "--format", "lightning")


def test_a_learning_curve_has_the_exponent_that_was_put_in(tmp_path, capsys):
    for pair in (1, 2):
        for count in (200, 800, 3200):
            factor = 1 + 0.01 * (pair - 1.5)
            errors = {"Dimers": (900 * count**-0.5 * factor, 30.0), "all": (400 * count**-0.25 * factor, 20.0)}
            evaluated(tmp_path, f"frames-{count}", pair, errors, **{"data.train_frames": count})
    analyze("accuracy", tmp_path)
    found = choices.curve(choices.read(tmp_path))
    exponents = found.groupby("subset")[f"{choices.FORCES}_slope"].first()
    assert exponents["Dimers"] == pytest.approx(-0.5)
    assert exponents["all"] == pytest.approx(-0.25)
    assert found[found["subset"] == "all"]["seeds"].tolist() == [2, 2, 2]
    said = capsys.readouterr().out
    assert "3,200" in said
    assert "Dimers" in said
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
