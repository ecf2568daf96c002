import errno
import json
import os
import random
import re
from pathlib import Path

import pandas as pd
import pytest
import torch

import ddpkit
from ddpkit.compile.backend import using
from ddpkit.errors import InputError, exhausted, unusable_path, writing
from ddpkit.experiments.setup import build_model
from ddpkit.record import CsvLog, RunFolder, drop_rows_after


def test_floats_read_back_the_same_bits(tmp_path):
    values = [0.1 + 0.2, 1e-300, 2.0**-1074, 1 / 3]
    log = CsvLog(tmp_path / "log.csv", ("step", "loss", "absent"))
    for step, value in enumerate(values, 1):
        log.write({"step": step, "loss": value})
    read = pd.read_csv(tmp_path / "log.csv", float_precision="round_trip")  # rows are flushed as they are written
    log.close()
    assert list(read.loss) == values
    assert read.absent.isna().all()


def test_rows_are_dropped_after_a_step_and_where_torn(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n1,0.5\n2,0.4\n3,0.3\n4,0.")
    drop_rows_after(path, "step", 2)
    assert path.read_text() == "step,loss\n1,0.5\n2,0.4\n"


def test_tensorboard_beside_the_csv_files(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = RunFolder(tmp_path / "run", tensorboard=True)
    folder.write_step({"step": 1, "loss": 0.25})
    folder.write_step({"step": 2, "loss": 0.125})
    folder.close()
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("step/loss")] == [(1, 0.25), (2, 0.125)]


OLD = "step,epoch,loss,lr,weight"  # of another version: columns that are gone, others not there yet


@pytest.mark.parametrize("seed", range(20))
def test_a_log_that_was_cut_anywhere_goes_on_without_gap_or_double(seed, tmp_path):
    """Whatever a kill left of the last rows, and wherever the checkpoint is: each step once, no number cut short."""
    draw = random.Random(seed)
    path, count = tmp_path / "steps.csv", draw.randrange(1, 30)
    columns = ("step", "loss", "seconds")
    expected = {step: (repr(draw.random()), repr(draw.random())) for step in range(1, 41)}

    def train(first, last):
        log = CsvLog(path, columns)
        for step in range(first, last + 1):
            log.write({"step": step, "loss": float(expected[step][0]), "seconds": float(expected[step][1])})
        log.close()

    train(1, count)
    ends = [n + 1 for n, byte in enumerate(path.read_bytes()) if byte == ord("\n")][1:]  # of rows
    cut = draw.randrange(ends[0], ends[-1] + 1)
    path.write_bytes(path.read_bytes()[:cut] + draw.choice([b"", b"\0" * 9]))
    checkpoint = draw.randrange(1, sum(end <= cut for end in ends) + 1)  # rows are on the disk before a checkpoint is
    assert drop_rows_after(path, "step", checkpoint) == checkpoint
    train(checkpoint + 1, 40)
    lines = path.read_text().splitlines()
    assert lines == ["step,loss,seconds", *(f"{step},{a},{b}" for step, (a, b) in expected.items())]


def test_a_row_cut_within_its_last_number_is_torn(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n1,0.5\n2,0.4321"[:-2])
    assert drop_rows_after(path, "step", 9) == 1
    assert path.read_text() == "step,loss\n1,0.5\n"


def test_rows_of_another_version_keep_their_columns(tmp_path):
    path = tmp_path / "steps.csv"
    path.write_text(f"{OLD}\n1,1,0.5,0.1,7\n2,1,0.4,0.1,8\n")
    log = CsvLog(path, ("step", "loss", "grad_norm", "lr"))
    log.write({"step": 3, "loss": 0.25, "grad_norm": 2.0, "lr": 0.1})
    log.close()
    table = pd.read_csv(path)
    assert list(table) == ["step", "loss", "grad_norm", "lr", "epoch", "weight"]
    assert table.loss.tolist() == [0.5, 0.4, 0.25]
    assert table.weight.tolist()[:2] == [7, 8]
    assert table.grad_norm.isna().tolist() == [True, True, False]
    assert table.weight.isna().tolist() == [False, False, True]


def test_a_log_without_its_header_is_refused(tmp_path):
    (tmp_path / "steps.csv").write_text("\0\0\0\n1,2\n")
    with pytest.raises(InputError, match=r"steps\.csv has no column 'step'"):
        drop_rows_after(tmp_path / "steps.csv", "step", 3)
    assert (tmp_path / "steps.csv").read_text() == "\0\0\0\n1,2\n"


def started(path, *, steps=2, status="failed"):
    folder = RunFolder(path)
    folder.describe(f"seed: {steps}\n", {"world_size": 1})
    folder.summarize(status=status, error=None)
    for step in range(1, steps + 1):
        folder.write_step({"step": step, "loss": 0.5})
    folder.close()


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_what_a_failed_run_logged_is_moved_aside(tmp_path, caplog):
    run = tmp_path / "run"
    started(run, steps=2)
    (run / "notes.txt").write_text("the user's")
    first = contents(run)
    started(run, steps=3)
    assert caplog.messages == [
        f"{run} held a run that ended without a checkpoint: its files are in {run / 'previous-1'} now."
    ]
    second = contents(run)
    assert {f"previous-1/{name}" for name in first} - {"previous-1/notes.txt"} == {n for n in second if "/" in n}
    assert all(second[f"previous-1/{name}"] == text for name, text in first.items() if name != "notes.txt")
    started(run, steps=1)
    assert len(pd.read_csv(run / "steps.csv")) == 1
    assert len(pd.read_csv(run / "previous-2" / "steps.csv")) == 3
    assert contents(run)["notes.txt"] == b"the user's"


def test_a_run_that_logged_nothing_leaves_nothing_to_move(tmp_path):
    started(tmp_path / "run", steps=0)
    started(tmp_path / "run", steps=1)
    assert not list(tmp_path.glob("run/previous-*"))


@pytest.mark.parametrize(
    ("leave", "expected"),
    [
        (lambda run: (run / "checkpoints" / "last.pt").touch(), "go on with resume="),
        (lambda run: (run / "checkpoints" / "best.pt").touch(), "best.pt"),
        (lambda run: (run / "summary.json").write_text('{"status": "finished"}'), "finished"),
    ],
)
def test_a_run_with_results_is_not_written_over(leave, expected, tmp_path):
    run = tmp_path / "run"
    started(run)
    leave(run)
    before = contents(run)
    with pytest.raises(InputError, match=expected):
        RunFolder(run)
    assert contents(run) == before  # not even a lock is left


def test_a_running_run_is_left_alone(tmp_path):
    run = tmp_path / "run"
    running = RunFolder(run)
    running.write_step({"step": 1, "loss": 0.5})
    before = contents(run)
    for resume_from in (0, 1):
        with pytest.raises(InputError, match="is being written by another run"):
            RunFolder(run, resume_from=resume_from)
    assert contents(run) == before
    running.close()
    RunFolder(run, resume_from=1).close()


def test_a_resumed_run_keeps_what_it_ran_on_before(tmp_path):
    for part in (1, 2, 3):
        folder = RunFolder(tmp_path / "run", resume_from=part - 1)
        folder.describe("seed: 1\n", {"world_size": part})
        folder.begin()
        folder.close()
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment == {"world_size": 3, "earlier": [{"world_size": 1}, {"world_size": 2}]}


def test_rows_that_are_missing_before_the_checkpoint_are_told(tmp_path, caplog):
    for name in ("run", "other"):
        started(tmp_path / name, steps=4)
    RunFolder(tmp_path / "run", resume_from=5, log_every=2).begin()
    assert caplog.messages == []
    RunFolder(tmp_path / "other", resume_from=9, log_every=2).begin()
    assert caplog.messages == [
        f"{tmp_path / 'other' / 'steps.csv'} ends at step 4, but the checkpoint is of step 9: the rows between are lost."
    ]


def test_what_a_killed_run_was_writing_is_cleared_away(tmp_path):
    started(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "last.pt.part").write_text("half")
    (tmp_path / "run" / "summary.json.12-34.part").write_text("half")
    RunFolder(tmp_path / "run", resume_from=1).begin()
    assert not list((tmp_path / "run").rglob("*.part"))


def test_a_run_that_does_not_come_to_go_on_leaves_the_folder_as_it_was(tmp_path):
    started(tmp_path / "run", status="finished")
    before = contents(tmp_path / "run")
    folder = RunFolder(tmp_path / "run", resume_from=1)
    folder.describe("seed: 9\n", {})
    folder.summarize(status="running", parameters=3)
    folder.summarize(status="failed", error="The data have changed.")
    folder.close()
    assert contents(tmp_path / "run") == before
    folder = RunFolder(tmp_path / "run", resume_from=1)
    folder.summarize(status="running", parameters=3)
    folder.begin()
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {
        "status": "running", "error": None, "parameters": 3,
    }  # fmt: skip
    assert pd.read_csv(tmp_path / "run" / "steps.csv").step.tolist() == [1]


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE, errno.ENFILE])
def test_what_a_process_has_run_out_of_is_not_the_fault_of_a_path(number):
    error = OSError(number, os.strerror(number), "some/file")
    assert unusable_path(error) is None
    assert unusable_path(OSError(errno.EACCES, "Permission denied", "some/file")) is not None
    with pytest.raises(OSError, match=re.escape(os.strerror(number))), writing(Path("run")):
        raise error


class Greedy(torch.nn.Module):
    def __init__(self, **_):
        raise MemoryError("no room")


def test_lack_of_memory_is_not_told_as_a_fault_of_the_input():
    with pytest.raises(MemoryError, match="no room"):
        build_model({"_target_": f"{__name__}.Greedy"}, 1)
    model = torch.nn.Linear(2, 2)
    step = ddpkit.make_step(model, greedy, torch.optim.SGD(model.parameters()), strategy="none", compile=True)
    with using("interpreted"), pytest.raises(MemoryError, match="no room"):
        step(torch.ones(3, 2))
    assert exhausted(ValueError("no room")) is None


def greedy(*_):
    raise MemoryError("no room")
