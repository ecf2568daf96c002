"""What logs of LAMMPS say, and the tables and figures of it. The logs here are of LAMMPS' own Lennard-Jones."""

import json
from pathlib import Path

import pandas as pd
import pytest

from ddpkit.analysis import inference
from ddpkit.errors import InputError
from ddpkit.experiments.cli import _dispatch

LOGS = {1: (Path(__file__).parent / "lammps" / "one_rank.log").read_text()}
LOGS[2] = (Path(__file__).parent / "lammps" / "two_ranks.log").read_text()


def cell(
    folder, part="water", engine="lammps", model="allegro_small", system="box", ranks=1, repeat=1, log=None, **more
):
    """Writes a cell as the experiment does."""
    name = f"{part}-{model}-{system}-{engine if part == 'calls' else ranks}_{repeat}"
    (folder / name).mkdir(parents=True)
    facts = {
        "part": part, "engine": engine, "model": model, "system": system, "atoms": 500, "ranks": ranks, "repeat": repeat,
        "steps": 100, "femtoseconds": 0.5, "device": "cpu", "settings": [],
    }  # fmt: skip
    held = {"status": "finished", "error": "", "memory_mb": 321.0, "gpu_memory_mb": None, "machine": "a machine"}
    (folder / name / "cell.json").write_text(json.dumps({"cell": facts} | held | more))
    if part == "calls":
        times = {"package": 0.01, "eager": 0.018, "nequip": 0.03}
        calls = {
            "seconds_call": times[engine],
            "seconds_step": times[engine] + 0.002,
            "seconds_load": 1.0,
            "edges": 5000,
        }
        (folder / name / "calls.json").write_text(json.dumps(calls))
    else:
        (folder / name / "log.lammps").write_text(log if log is not None else LOGS[ranks])
    return folder / name


@pytest.mark.parametrize(("ranks", "seconds"), [(1, 0.0), (2, 0.150599)])
def test_a_log_of_lammps(ranks, seconds):
    made = inference.timings(LOGS[ranks])
    assert [t.steps for t in made] == [made[0].steps, 30, 100]
    last = made[-1]
    assert (last.ranks, last.atoms) == (ranks, 500)
    assert set(last.seconds_by) == set(inference.SECTIONS)
    # the breakdown is of the whole loop
    assert sum(last.seconds_by.values()) == pytest.approx(last.seconds, rel=1e-3)
    assert sum(last.percent_by.values()) == pytest.approx(100)
    assert 37 < last.neighbours < 38
    assert last.ghosts > 1000
    if ranks == 2:
        assert last.seconds == seconds
        assert last.percent_by["comm"] == pytest.approx(84.09, abs=0.01)
        assert last.seconds_by["other"] == 0.01381


def test_threads_are_no_ranks():
    log = LOGS[2].replace("on 2 procs", "on 32 procs").replace("x 1 OpenMP", "x 16 OpenMP")
    assert inference.timings(log) == inference.timings(LOGS[2])


def test_times_are_those_of_the_last_stretch(tmp_path):
    cell(tmp_path, ranks=2)
    (row,) = inference.read(tmp_path).cells.to_dict("records")
    assert row["seconds_per_step"] == pytest.approx(0.00150599)
    assert row["atom_steps_per_second"] == pytest.approx(500 / 0.00150599)  # LAMMPS says 332.007 thousand
    assert row["ns_per_day"] == pytest.approx(0.5e-6 * 86400 / 0.00150599)
    assert row["lammps_percent"] == pytest.approx(100 - 4.23, abs=0.01)


def whole_study(folder):
    for model in ("allegro_small", "allegro_medium"):
        for repeat in (1, 2, 3):
            cell(folder, "molecules", model=model, system="peptide", repeat=repeat)
        cell(folder, "water", model=model, system="water500")
        for ranks in (1, 2):
            cell(folder, "scaling", model=model, system="dhfr", ranks=ranks)
        for engine in ("package", "eager", "nequip"):
            cell(folder, "calls", engine, model=model, system="water500")


def test_the_command_writes_tables_and_a_figure(tmp_path, capsys):
    whole_study(tmp_path / "study")
    cell(tmp_path / "study", model="allegro_large", status="failed", error="ERROR: Out of memory")
    _dispatch(["analyze", "inference", str(tmp_path / "study"), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    for text in (
        "Small molecules",
        "Boxes of water",
        "Strong scaling",
        "Calls in Python",
        "allegro_large-box-1_1 failed: ERROR",
    ):
        assert text in said
    values = pd.read_csv(tmp_path / "out" / "inference.csv")
    assert len(values) == 2 * (1 + 1 + 2 + 3)
    assert set(values.loc[values["part"] == "molecules", "repeats"]) == {3}
    assert (tmp_path / "out" / "inference.png").stat().st_size > 20_000
    assert "| 3.00 |" in (tmp_path / "out" / "inference.md").read_text()  # nequip over ours
    assert r"\toprule" in (tmp_path / "out" / "inference.tex").read_text()


@pytest.mark.parametrize("part", ["molecules", "water", "scaling", "calls"])
def test_a_study_of_one_part(part, tmp_path, capsys):
    cell(tmp_path, part, "package" if part == "calls" else "lammps")
    _dispatch(["analyze", "inference", str(tmp_path)])
    assert (tmp_path / "inference.png").is_file()
    assert "a machine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("log", "why"),
    [
        ("", "no `Loop time`"),
        (LOGS[1].split("MPI task timing")[0].replace("for ", "for no "), "no `Loop time`"),
        (LOGS[2], "500 atoms on 2 ranks"),
    ],
)
def test_a_log_that_says_nothing_is_named(log, why, tmp_path):
    cell(tmp_path, system="good")
    cell(tmp_path, system="bad", log=log)
    study = inference.read(tmp_path)
    assert len(study.cells) == 1
    assert "bad-1_1 cannot be read" in study.left_out[0]
    assert why in study.left_out[0]


def test_a_folder_without_cells_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no finished cell"):
        _dispatch(["analyze", "inference", str(tmp_path)])


def test_damaged_cells_are_named(tmp_path):
    cell(tmp_path, system="good")
    (cell(tmp_path, system="torn") / "cell.json").write_text("{")
    (cell(tmp_path, "calls", "package", system="empty") / "calls.json").unlink()
    said = " ".join(inference.read(tmp_path).left_out)
    assert "torn" in said
    assert "empty" in said
