import argparse
import gzip
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from simulated_runs import falling, write_run

from ddpkit.analysis import cli
from ddpkit.analysis.recount import Number, texts_of
from ddpkit.analysis.runs import read_run
from ddpkit.errors import InputError

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def analyze(*words):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    cli.main(parser.parse_args([str(word) for word in words]))


def write_claims(folder, text, claims, **tables):
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(text)
    (folder / "claims.yaml").write_text(yaml.safe_dump({"tables": tables, "claims": claims}))


@pytest.mark.skipif(not RESULTS.is_dir(), reason="the wheel has no results")
def test_every_number_of_the_results_is_what_the_runs_give(capsys):
    analyze("claims", RESULTS)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(list(RESULTS.glob("*/claims.yaml"))) >= 3


@pytest.mark.skipif(not RESULTS.is_dir(), reason="the wheel has no results")
def test_every_number_of_the_projects_own_tables_is_among_them():
    path = RESULTS.parents[1] / "README.md"
    told = [
        claim["says"]
        for file in RESULTS.glob("*/claims.yaml")
        for claim in yaml.safe_load(file.read_text())["claims"]
        if path in {(file.parent / name).resolve() for name in texts_of(claim)}
    ]
    text = path.read_text().partition("## The two studies")[2].partition("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("|") and re.search(r"\d", line)]
    assert len(rows) == 4 + 1 + 4
    assert not [says for says in told if "|" in says and re.search(r"\d", re.sub(r"\{[^}]*\}", "", says))]
    said = [re.sub(r"[{}]", "", says) for says in told]
    published = ("", " paper, 32.1 M / 114 M |", " 35:58 / 40:02 |")
    assert not [row for row in rows if not any(row.startswith(o) and row[len(o) :] in published for o in said)]


@pytest.mark.parametrize(
    ("printed", "value", "holds"),
    [
        ("1.2e-15", 1.2257e-15, True), ("1.2e-15", 1.26e-15, False), ("1.20e-15", 1.2257e-15, False), ("-60", -60.54, False),
        ("-61", -60.54, True), ("+2.3", 2.2873, True), ("32,136,288", 32136288.0, True), ("0", 0.0, True), ("0", 0.4, True),
        ("0.0", 0.06, False), ("3e6", 3.4e6, True), ("3e6", 3.6e6, False), ("5", float("nan"), False),
    ],
)  # fmt: skip
def test_a_number_is_compared_in_the_digits_that_are_printed(printed, value, holds):
    assert Number("", printed, value).holds is holds


def test_numbers_of_any_csv(tmp_path, capsys):
    folder = tmp_path / "day"
    claim = {
        "says": "takes {2.5} ms, {4.00} at most", "from": "steps.csv", "where": {"arm": ["a", "b"]},
        "take": ["mean 1000 * seconds", {"where": {"arm": "b"}, "take": "max 1000 * seconds"}],
    }  # fmt: skip
    write_claims(folder, "A step\ntakes 2.5\nms, 4.00 at most.", [claim])
    (folder / "steps.csv").write_text("arm,seconds\na,0.001\nb,0.004\nc,9\n")
    analyze("claims", tmp_path)
    assert "day: 2 of 2 numbers are what the runs give" in capsys.readouterr().out
    (folder / "steps.csv").write_text("arm,seconds\na,0.001\nb,0.00399\nc,9\n")
    with pytest.raises(InputError, match="1 numbers are not what the runs give"):
        analyze("claims", folder)
    assert "4.00 in 'takes {2.5} ms, {4.00} at most' would be 3.99" in capsys.readouterr().out


def study_of(folder, apart):
    losses = falling(12)
    for seed, size in enumerate(apart, 1):
        tag = "" if seed == 1 else f"_{seed}"
        common = {"seed": seed, "data.seed": seed}
        write_run(folder, f"baseline{tag}", losses, val_forces=0.1, **common)
        write_run(folder, f"standard{tag}", losses + size, val_forces=0.101, **common, **{"strategy.name": "standard"})


def test_tables_are_made_anew_from_the_runs(tmp_path):
    study_of(tmp_path / "numerics", [1e-3, 3e-3])
    claims = [
        {"says": "lies {0.0020} away", "from": "numerics.csv", "where": {"arm": "standard"}, "take": "mean mae"},
        {"says": "{+1.0} % worse", "from": "endpoints.csv", "where": {"arm": "standard"}, "take": "only force_percent"},
    ]
    write_claims(tmp_path, "It lies 0.0020 away and is +1.0 % worse.", claims, numerics="numerics")
    analyze("claims", tmp_path)
    analyze("report", tmp_path)  # writes the same tables
    analyze("claims", tmp_path)
    path = tmp_path / "numerics.csv"
    path.write_text(path.read_text().replace("complete", "failed"))
    with pytest.raises(
        InputError, match=r"numerics\.csv is not what the runs beside it give now, in its columns outcome"
    ):
        analyze("claims", tmp_path)
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    with pytest.raises(InputError, match="in the number of its rows"):
        analyze("claims", tmp_path)
    path.unlink()
    (tmp_path / "endpoints.csv").unlink()
    analyze("claims", tmp_path)
    steps = tmp_path / "numerics" / "standard" / "steps.csv"
    rows = pd.read_csv(steps)
    rows["loss"] += 1e-3
    rows.to_csv(steps, index=False)
    with pytest.raises(InputError, match="1 numbers are not"):
        analyze("claims", tmp_path)


def test_a_study_over_ranks(tmp_path):
    study_of(tmp_path / "ranks" / "two", [1e-3])
    claim = {
        "says": "{1} row, {1} seed",
        "from": "ranks.csv",
        "take": ["count", {"from": "ranks_intervals.csv", "take": "only seeds"}],
    }
    write_claims(tmp_path, "1 row, 1 seed", [claim], ranks={"study": "ranks"})
    analyze("claims", tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"says": "said {3} elsewhere"}, "does not say 'said 3 elsewhere'"),
        ({"says": "is {three}"}, "'three' in 'is {three}' is no number"),
        ({"says": "is 3"}, "has 0 numbers in braces and 1 in take"),
        ({"from": "none.csv"}, "none.csv, which is neither made nor there"),
        ({"take": "mode x"}, "'mode x' cannot be taken from x.csv"),
        ({"take": "mean y"}, "'mean y' cannot be taken from x.csv"),
        ({"where": {"arm": 1}}, "cannot be taken from x.csv where {'arm': 1}"),
        ({"in": "OTHER.md"}, "OTHER.md is missing"),
    ],
)  # fmt: skip
def test_claims_that_cannot_be_recomputed(tmp_path, change, named):
    write_claims(tmp_path, "is 3, is three", [{"says": "is {3}", "from": "x.csv", "take": "mean x"} | change])
    (tmp_path / "x.csv").write_text("x\n3\n")
    with pytest.raises(InputError, match=named):
        analyze("claims", tmp_path)


def test_folders_that_claim_nothing(tmp_path):
    with pytest.raises(InputError, match=r"has a claims\.yaml"):
        analyze("claims", tmp_path)
    for text in ("claims: [", "claims: [{says: a}]", "a: b", ""):
        (tmp_path / "claims.yaml").write_text(text)
        with pytest.raises(InputError, match="cannot be used"):
            analyze("claims", tmp_path)
    write_claims(tmp_path, "", [], numbers="accuracy")
    with pytest.raises(InputError, match="numbers is a study of 'accuracy': use numerics, speed or ranks"):
        analyze("claims", tmp_path)


def test_logs_may_be_packed(tmp_path):
    run = write_run(tmp_path, "run", falling(9))
    before = read_run(run).steps
    (run / "steps.csv.gz").write_bytes(gzip.compress((run / "steps.csv").read_bytes()))
    (run / "steps.csv").unlink()
    pd.testing.assert_frame_equal(read_run(run).steps, before)
    assert np.isfinite(before["loss"]).all()
