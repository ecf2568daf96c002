"""Overviews and options that all commands share."""

import csv
import importlib
import logging
from contextlib import suppress

import numpy as np
import pytest

from ddpkit.data import Frame, write_prepared
from ddpkit.errors import InputError
from ddpkit.experiments import setup
from ddpkit.experiments.cli import VERBS, _dispatch, _leave
from ddpkit.experiments.config import keys_of, read

GROUPS = sorted({verb.split()[0] for verb in VERBS if " " in verb})


def shown(capsys, *words):
    with suppress(SystemExit):  # argparse's way
        _dispatch(words)
    return capsys.readouterr().out


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_the_overview_lists_every_command(words, capsys):
    told = shown(capsys, *words)
    assert all(f"  {verb} " in told for verb in VERBS)


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_has_an_overview_of_its_own(group, capsys):
    told = shown(capsys, group, "--help")
    assert told == shown(capsys, "help", group)
    for verb, (_, does, _) in VERBS.items():
        assert (does in told) is verb.startswith(f"{group} ")
    for words in ([group], [group, "nothing"]):
        with pytest.raises(InputError, match=f"no command '{' '.join(words)}': use one of {group} "):
            _dispatch(words)


def test_what_the_library_logs_is_printed_once_while_a_command_runs(capsys):
    def work():
        logging.getLogger("ddpkit.record").warning("%s is 1 %% full.", "It")
        logging.getLogger("ddpkit").info("no need to know")

    log, root = logging.getLogger("ddpkit"), logging.getLogger()
    before, level = ([*log.handlers], log.propagate), root.level
    _leave(work)
    assert capsys.readouterr().err == "ddpkit: It is 1 % full.\n"
    root.setLevel(logging.INFO)  # as other packages do
    try:
        _leave(work)
    finally:
        root.setLevel(level)
    assert capsys.readouterr().err == "ddpkit: It is 1 % full.\n"
    assert (log.handlers, log.propagate) == before


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_command_either_way(verb, capsys):
    told = shown(capsys, *verb.split(), "--help")
    assert "usage:" in told
    assert told == shown(capsys, "help", *verb.split())


def test_a_misspelt_command():
    with pytest.raises(InputError, match="no command 'analyse': did you mean analyze"):
        _dispatch(["analyse", "numerics", "."])
    with pytest.raises(InputError, match="no command 'fly': use one of run"):
        _dispatch(["help", "fly"])


def outputs(verb, capsys):
    told = shown(capsys, *verb.split(), "--help")
    return [option for option in ("--csv", "--plot") if f"{option} " in told]


def test_a_table_that_cannot_be_written_is_told_before_anything_is_measured(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    seen = 0
    for verb, (module, _, takes_overrides) in VERBS.items():
        if takes_overrides:
            continue
        monkeypatch.setattr(importlib.import_module(module), "main", lambda _: pytest.fail("it went on"))
        for option in outputs(verb, capsys):
            seen += 1
            for path in ("/proc/nowhere/table.csv", tmp_path / "file" / "table.csv", tmp_path):
                with pytest.raises(InputError, match=f"{option} {path} cannot be written"):
                    _dispatch([*verb.split(), option, str(path)])
    assert seen >= 6
    with pytest.raises(InputError, match=r"end it in \.png"):
        _dispatch(["bench", "comm", "--plot", str(tmp_path / "plot.xyz")])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "custom"),
        (["strategy=standard"], "standard"),
        (["strategy._target_=ddpkit.FlatSync"], "custom"),
        (["strategy._target_=mine.Own"], "mine.Own"),
        (["strategy=overlap", "strategy._target_=mine.Own", "strategy.name=overlap"], "mine.Own"),
    ],
)
def test_a_strategy_of_ones_own_is_not_taken_for_the_default(words, name):
    config = read(words)
    assert setup.strategy_name(config) == config.strategy.name == name


def test_bench_host_tells_who_computes(tmp_path, capsys):
    words = ["--model", "allegro_tiny", "--frames", "2", "--epochs", "2", "--device", "cpu", "train.workers=1"]
    _dispatch(["bench", "host", *words, "--csv", str(tmp_path / "table.csv")])
    told = capsys.readouterr().out
    assert "allegro_tiny, 2 frames a batch on cpu" in told
    assert "steps replayed and left out, 1 processes for batches" in told
    (row,) = csv.DictReader((tmp_path / "table.csv").open())
    assert 0 < float(row["seconds_main"]) < 1
    assert 0 < int(row["captured"]) < int(row["steps"]) == 6 * 32
    with pytest.raises(InputError, match="must be at least 1"):
        _dispatch(["bench", "host", "--frames", "0"])


def test_a_file_of_settings_that_takes_the_model_away(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("defaults:\n  - override /model: null\nmodel: {_target_: mine.Own}\n")
    with pytest.raises(InputError, match="model is null"):
        read([f"experiment={path}"])


def test_bench_loader_counts_batches(tmp_path, capsys):
    random = np.random.default_rng(0)
    frames = [
        Frame(np.array([1, 6, 8, 1]), np.diag(random.uniform(1, 2, size=4))[:, :3], 0.0, np.zeros((4, 3)))
        for _ in range(20)
    ]
    path = write_prepared(tmp_path / "set", frames, r_max=3.0).path
    words = [
        str(path),
        "--frames",
        "4",
        "--r-max",
        "3.0",
        "--epochs",
        "2",
        "--workers",
        "0",
        "2",
        "--csv",
        str(tmp_path / "table.csv"),
    ]
    _dispatch(["bench", "loader", *words])
    told = capsys.readouterr().out
    assert "4 frames a batch, 4 atoms" in told
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["workers"] for row in rows] == ["0", "2"]
    assert all(float(row[name]) > 0 for row in rows for name in row if name not in ("workers", "seconds_workers"))
    with pytest.raises(InputError, match="20 frames, fewer than a batch of 21"):
        _dispatch(["bench", "loader", str(path), "--frames", "21"])


def test_what_an_override_sets_does_not_hang_on_what_was_asked_before(monkeypatch):
    monkeypatch.setenv("DDPKIT_CACHE", "one")
    assert keys_of("seed=2", read(["seed=2"])) == ["seed"]
    monkeypatch.setenv("DDPKIT_CACHE", "another")
    assert keys_of("seed=3", read(["seed=3"])) == ["seed"]
