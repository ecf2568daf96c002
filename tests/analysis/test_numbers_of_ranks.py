import argparse

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from simulated_runs import falling, write_run

from ddpkit.analysis import cli, ranks
from ddpkit.errors import InputError

EMULATED = {"strategy.name": "emulated", "strategy.ranks": 64, "strategy.order": "ring"}


def analyze(*words):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    cli.main(parser.parse_args([str(word) for word in words]))


def write_study(folder, size, seeds, apart, own=None, other=None):
    """Baselines, and runs of another arm whose losses are larger by a factor."""
    losses = falling(30)
    for seed in range(1, seeds + 1):
        tag = "" if seed == 1 else f"_{seed}"
        common = {"seed": seed, "data.seed": seed, "world_size": size}
        write_run(folder, f"baseline{tag}", losses, **common, **(own or {}))
        strategy = other or {"strategy.name": "standard"}
        write_run(folder, f"other{tag}", losses * (1 + apart * seed), **common, **strategy)


def test_distances_are_relative_to_the_loss_at_each_number_of_ranks(tmp_path, capsys):
    write_study(tmp_path / "two", 2, 3, 0.0)
    write_study(tmp_path / "eight", 8, 3, 1e-3)
    write_study(tmp_path / "many", 1, 2, 1e-2, EMULATED, EMULATED | {"strategy.order": "tree"})
    analyze("ranks", tmp_path)
    found = pd.read_csv(tmp_path / "ranks.csv")
    real, emulated = found[~found["emulated"]], found[found["emulated"]]
    assert real[["ranks", "seed"]].to_numpy().tolist() == [[2, 1], [2, 2], [2, 3], [8, 1], [8, 2], [8, 3]]
    np.testing.assert_allclose(real["relative"], [0, 0, 0, 1e-3, 2e-3, 3e-3], rtol=1e-9)
    assert set(emulated["ranks"]) == {64}
    np.testing.assert_allclose(emulated["relative"], [1e-2, 2e-2], rtol=1e-9)
    assert set(found["by"]) == {"loss"}
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if line.startswith("standard"))
    assert row.split()[1:3] == ["0", "0.00182"]  # the cube root of 6, times 1e-3
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


def spread_over(sizes, seeds, exponent, scatter=0.2, number=0):
    """Distances that go as a power of the number of emulated ranks, with scatter between seeds."""
    rng = np.random.default_rng([5, number])
    rows = [
        (size, True, "standard", str(seed), 1e-7 * size**exponent * np.exp(scatter * rng.normal()), "parameters")
        for seed in range(seeds)
        for size in sizes
    ]
    return pd.DataFrame(rows, columns=["ranks", "emulated", "arm", "seed", "relative", "by"])


def test_intervals_are_over_seeds_alone():
    values = spread_over((4, 16, 64), 6, 0.0)
    found = ranks.intervals(values).set_index("ranks")
    logs = np.log(values[values["ranks"] == 16]["relative"])
    reach = stats.t.ppf(0.975, 5) * logs.std(ddof=1) / np.sqrt(6)
    assert found.loc[16, "seeds"] == 6
    np.testing.assert_allclose(np.log(found.loc[16, ["low", "mean", "high"]].astype(float)),
                               [logs.mean() - reach, logs.mean(), logs.mean() + reach])  # fmt: skip
    few = ranks.intervals(values[values["seed"].isin(["0", "1"])])
    assert few["low"].isna().all()
    assert few["mean"].notna().all()


@pytest.mark.parametrize("exponent", [0.0, 0.5])
def test_the_exponent_over_ranks_is_a_fit_for_each_seed(exponent):
    studies = [spread_over((2, 4, 8, 16, 64), 6, exponent, number=n) for n in range(200)]
    told = [ranks.exponents(values)["standard"] for values in studies]
    assert 0.91 < np.mean([one.low < exponent < one.high for one in told]) < 0.99
    assert f"ranks^{told[0].value:.2f}" in ranks.table(studies[0]).notes[1]
    assert not ranks.exponents(studies[0][studies[0]["ranks"] < 8])  # two numbers of ranks are no trend
    assert not ranks.exponents(studies[0].assign(emulated=False))


def test_emulated_buckets_are_what_standard_does(tmp_path):
    write_study(tmp_path / "many", 1, 1, 1e-2, EMULATED, EMULATED | {"strategy.bucket_mb": 0.25})
    write_study(tmp_path / "real", 4, 1, 1e-2)
    write_study(tmp_path / "one", 1, 1, 1e-2, EMULATED, EMULATED | {"compile": True})
    analyze("ranks", tmp_path)
    found = pd.read_csv(tmp_path / "ranks.csv")
    assert found["arm"].tolist() == ["standard", "compiled", "standard"]
    assert pd.read_csv(tmp_path / "ranks_intervals.csv")["seeds"].tolist() == [1, 1, 1]


def test_some_seeds_may_be_identical():
    values = pd.DataFrame(
        [
            (4, False, "standard", "1", 0.0, "loss"),
            (4, False, "standard", "2", 0.25, "loss"),
            (4, False, "standard", "3", 1.0, "loss"),
        ],
        columns=["ranks", "emulated", "arm", "seed", "relative", "by"],
    )
    assert ranks.table(values).rows == [["standard", "0.500 (0.250 to 1.00, 1 × 0)"]]


def test_what_is_no_folder_of_studies_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        analyze("ranks", tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no studies"):
        analyze("ranks", tmp_path)
    write_study(tmp_path / "study", None, 1, 1e-3)
    with pytest.raises(InputError, match="do not tell how many ranks"):
        analyze("ranks", tmp_path)
