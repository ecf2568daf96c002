import pandas as pd
import pytest

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
