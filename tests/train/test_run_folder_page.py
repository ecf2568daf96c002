"""What a run leaves behind is what docs/reference/run-folder.md says, and the other way round."""

import csv
import fnmatch
import json
import re

import pytest
from pages import ROOT, rows, section

from ddpkit import lock
from ddpkit.record import _OF_A_RUN

PAGE = "reference/run-folder.md"
EVERYTHING = (  # that a run can leave behind
    "model._target_=pairs.Pairs", "compile=true", "compiler=interpreted", "cuda_graphs=true", "check_kernels=false",
    "train.projection=true", "train.tensorboard=true", "profile=2", "train.max_epochs=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(ddpkit_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("everything") / "run"
    ddpkit_run(*EVERYTHING, f"run_dir={path}", ranks=2)
    return path


def told(heading):
    return rows(section(PAGE, heading))


def names(table):
    """The names in the first column; a range of numbers is written out."""
    for name, *_ in table:
        if found := re.fullmatch(r"(\w)(\d+) to \1(\d+)", name):
            yield from (f"{found[1]}{n}" for n in range(int(found[2]), int(found[3]) + 1))
        else:
            yield name


def test_files(folder):
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    patterns = [row[0] for row in told("## Files") if len(row) == 3 and row[1] not in WRITERS]
    assert [file for file in left if not any(fnmatch.fnmatch(file, pattern) for pattern in patterns)] == []
    assert [pattern for pattern in patterns if not fnmatch.filter(left, pattern)] == []


WRITERS = {"the run, while it goes on", "a new run in the folder", "ddpkit eval", "ddpkit experiment"}


def test_what_others_put_there(folder):
    other = {row[0] for row in told("## Files") if row[1] in WRITERS}
    assert other == {lock.NAME, "previous-1", "evaluation", "study.json"}
    of_a_run = {row[0].split("/")[0] for row in told("## Files")} - other
    assert of_a_run | {"evaluation"} == set(_OF_A_RUN)
    assert '"study.json"' in (ROOT / "experiments" / "experiment.py").read_text()
    assert not (folder / lock.NAME).exists()


@pytest.mark.parametrize(
    "name", ["steps.csv", "epochs.csv", "projection.csv", "profile/table.csv", "profile/kernels.csv"]
)
def test_columns(folder, name):
    with (folder / name).open(newline="") as file:
        header, *lines = csv.reader(file)
    assert list(names(told(f"## `{name}`"))) == header
    assert lines


@pytest.mark.parametrize("name", ["summary.json", "environment.json"])
def test_fields(folder, name):
    left = json.loads((folder / name).read_text())
    assert sorted(names(told(f"## `{name}`"))) == sorted(left)


def test_parts_of_a_profile(folder):
    (row,) = (row for row in told("## `profile/table.csv`") if row[0] == "part")
    with (folder / "profile" / "table.csv").open(newline="") as file:
        parts = [line["part"] for line in csv.DictReader(file)]
    assert re.split(r", | or ", row[2].rstrip(".")) == parts


def test_fields_that_come_at_the_end_stand_last(folder):
    """A run that fails lacks those that the page says are written at the end."""
    order = list(names(told("## `summary.json`")))
    late = order[order.index("bytes_per_step") :]
    left = list(json.loads((folder / "summary.json").read_text()))
    assert set(left[left.index("bytes_per_step") :]) == set(late) - {"capacities"}


@pytest.mark.parametrize("heading", ["## `steps.csv`", "## `epochs.csv`", "## `summary.json`", "## `projection.csv`"])
def test_all_have_a_unit_and_a_meaning(heading):
    for name, unit, meaning in told(heading):
        assert unit in ("-", "s", "byte", "eV^2", "eV^2/Å^2", "eV^2/Å^6", "eV/atom", "eV/Å"), name
        assert len(meaning) > 10
        assert meaning.endswith(".")
        assert name.startswith("seconds") <= (unit == "s")
