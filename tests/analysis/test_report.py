import argparse
import base64
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from simulated_runs import falling, wander, write_run

from ddpkit.analysis import cli, tables
from ddpkit.analysis.published import published
from ddpkit.errors import InputError

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in {"src", "href", "srcset", "data", "action"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def _run(*words):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    cli.main(parser.parse_args([str(word) for word in words]))


def _numerics_runs(folder):
    rng = np.random.default_rng(2)
    base = falling(30)
    write_run(folder, "baseline", base)
    write_run(folder, "standard", base, **{"strategy.name": "standard"})
    write_run(folder, "rerun", base)
    write_run(folder, "compiled", base + wander(rng, 30, 1e-7), compile=True)
    write_run(folder, "new_seed", base + wander(rng, 30, 0.05), seed=2)


def _speed_runs(folder):
    for width, factor in ((32, 1.0), (128, 1.3)):
        for strategy, compiled, seconds in (("standard", False, 1.0), ("custom", False, 1.02), ("custom", True, 0.6)):
            write_run(
                folder,
                f"{strategy}-{'compile' if compiled else 'eager'}-{width}",
                falling(10),
                epochs=[seconds * factor, 1.01 * seconds * factor],
                parameters=100 * width,
                compile=compiled,
                **{"strategy.name": strategy, "model.type_embedding_dim": width},
            )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    _numerics_runs(folder / "numerics")
    _speed_runs(folder / "speed")
    return folder


def test_report_is_one_page_that_loads_nothing(demo, tmp_path, capsys):
    _run("report", demo, "--out", tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.open
    assert {"script", "link", "iframe", "object", "base"}.isdisjoint(page.tags)
    assert len(page.links) == page.tags.count("img") == 3
    for link in page.links:
        head, _, data = link.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    words = " ".join(page.text)
    assert "0 (bitwise)" in words
    assert "Cannot be told from these runs: on two ranks a sum of gradients has one order" in words
    assert "Environment of the 5 runs" in words
    # What was run, and what it can tell apart, stands before any verdict.
    for heading, what in (("Numerics: does", "2 ranks: cpu, gloo"), ("Speed: what", "2 ranks: cpu, gloo")):
        part = words[words.index(heading) :]
        first = part.index("Cannot be told from these runs")
        for fact in (what, "steps", "resolution", "declared by"):
            assert part.index(fact) < first, fact
    assert "seeds" in words
    assert "arXiv:2504.16068" in words
    said = capsys.readouterr().out
    assert f"report: {tmp_path / 'report.html'}" in said
    assert max(len(line) for line in said.splitlines() if not line.startswith(("figure:", "report:"))) <= 100


def test_numerics_writes_its_files(demo, tmp_path, capsys):
    _run("numerics", demo / "numerics", "--out", tmp_path)
    assert {"numerics.csv", "numerics.md", "numerics.tex", "numerics.png"} <= {p.name for p in tmp_path.iterdir()}
    header, *lines = (tmp_path / "numerics.csv").read_text().splitlines()
    assert header.startswith("run,steps,mae,rmse,max_abs,")
    values = pd.read_csv(tmp_path / "numerics.csv", float_precision="round_trip").set_index("run")
    assert list(values.index) == ["standard", "compiled", "rerun", "new_seed"]
    assert values.loc["standard", "mae"] == 0
    assert bool(values.loc["standard", "bitwise"])
    steps = [pd.read_csv(demo / "numerics" / label / "steps.csv", float_precision="round_trip")["loss"]
             for label in ("baseline", "compiled")]  # fmt: skip
    assert values.loc["compiled", "mae"] == (steps[1] - steps[0]).abs().mean()
    markdown = (tmp_path / "numerics.md").read_text()
    assert "| standard | 1 | 30 | 0 (bitwise) | 0 (bitwise) | 0 (bitwise) |  | 0.000730 | 0.00156 |" in markdown
    assert f"| compiled | 1 | 30 | {tables.number(values.loc['compiled', 'mae'])} |" in markdown
    assert "(2 ranks, 1 seed, 30 steps)" in markdown
    assert r"new\_seed & 2 & 30 &" in (tmp_path / "numerics.tex").read_text()
    assert tables.number(values.loc["new_seed", "rmse"]) in capsys.readouterr().out
    assert len(lines) == 4


def test_speed_writes_its_files(demo, tmp_path, capsys):
    _run("speed", demo / "speed", "--out", tmp_path)
    assert {"speed.csv", "speed.md", "speed.tex", "speed.png"} <= {p.name for p in tmp_path.iterdir()}
    lines = (tmp_path / "speed.csv").read_text().splitlines()
    assert lines[0].startswith("parameters,strategy,compile,seconds_per_epoch,relative_percent,")
    assert lines[2].startswith("3200,custom,false,")
    assert "+2.0 %" in capsys.readouterr().out
    assert "35:58" in (tmp_path / "speed.md").read_text()


def test_out_defaults_to_the_folder_itself(tmp_path):
    _numerics_runs(tmp_path)
    _run("numerics", tmp_path)
    assert (tmp_path / "numerics.csv").is_file()
    _run("numerics", tmp_path)


def test_report_takes_a_plain_folder_of_either_study(demo, tmp_path):
    _run("report", demo / "numerics", "--out", tmp_path / "n")
    assert "Numerics" in (tmp_path / "n" / "report.html").read_text()
    _run("report", demo / "speed", "--out", tmp_path / "s")
    assert "Speed: what" in (tmp_path / "s" / "report.html").read_text()


def test_attribution_is_over_the_runs_with_and_without_deterministic_kernels(tmp_path):
    rng = np.random.default_rng(3)
    base = falling(30)
    for label, change in (("baseline", {}), ("rerun", {}), ("standard", {"strategy.name": "standard"})):
        write_run(tmp_path / "numerics", label, base + wander(rng, 30, 1e-4), **change)
        write_run(tmp_path / "numerics-deterministic", label, base, deterministic=True, **change)
    _run("report", tmp_path, "--out", tmp_path / "out")
    values = pd.read_csv(tmp_path / "out" / "attribution.csv")
    found = {(row.source, row.held): (row.pairs, row.mae, row.outcome) for row in values.itertuples()}
    assert found["none (rerun)", "custom eager det."] == (1, 0, "zero, as due")
    assert found["reduction order", "eager det."] == (2, 0, "zero, as due")
    assert found["scatter order", "custom eager"][1] > 0
    assert found["determinism", "custom eager"][0] == 4
    text = (tmp_path / "out" / "report.html").read_text()
    assert text.count("Attribution: pairs of runs") == 1
    assert "under deterministic kernels" in text.lower()
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"numerics.csv", "numerics-deterministic.csv", "divergence-deterministic.png"} <= names


def test_labels_are_escaped(tmp_path):
    write_run(tmp_path, "baseline", falling(5))
    write_run(tmp_path, "a<b>&'c", falling(5), **{"strategy.name": "standard"})
    _run("report", tmp_path, "--out", tmp_path / "out")
    page = Page()
    page.feed((tmp_path / "out" / "report.html").read_text())
    assert "b" not in page.tags
    assert "a<b>&'c" in page.text


def test_bad_input_is_refused(demo, tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        _run("report", tmp_path / "missing")
    with pytest.raises(InputError, match="negative"):
        _run("speed", demo / "speed", "--warmup", "-1")
    with pytest.raises(InputError, match="no step times"):
        _run("speed", demo / "speed", "--format", "lightning")
    with pytest.raises(InputError, match="no run is called 'first'"):
        _run("numerics", demo / "numerics", "--baseline", "first")


def test_published_values_name_their_source():
    table = published()
    assert table["source"].str.contains("arXiv:2504.16068").all()
    numerics = table[table["study"] == "numerics"].set_index("comparison")[["mae", "rmse"]]
    assert numerics.loc["rerun"].tolist() == [0.00079, 0.00175]
    assert numerics.loc["compiled"].tolist() == [0.00280, 0.0264]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.00073, "0.000730"), (1.5e-8, "1.50e-8"), (9.9999, "10.0"), (123456789, "1.23e8"),
     (-0.5, "-0.500"), (float("nan"), "-"), (32.0, "32.0"), (2158, "2158")],
)  # fmt: skip
def test_numbers_are_shown_with_three_digits(value, shown):
    assert tables.number(value) == shown
