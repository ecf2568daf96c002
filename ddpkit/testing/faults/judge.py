"""What must hold of a run that was struck, and of what went on from it."""

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpkit.testing.faults.plan import FAULTS, Trial

_SENTENCE = 700  # characters
# mpirun names rank and host of a process that had no time to speak, or that a library ended which found no memory.
_MPIRUN_TELLS = {"limit": r"exited (on signal|with non-zero status)"}
_UNSTEADY = ("seconds",)  # how the columns begin that no two runs share


@dataclass(frozen=True)
class End:
    """How a run ended.

    Attributes:
        ended: whether by itself, within the bound.
        seconds: from the strike until all had ended.
        code: of mpirun.
        left: command lines of processes that outlived the run.
        status: of its `summary.json`; empty where there is none.
        error: the sentence there.
        output: what it printed.
    """

    ended: bool
    seconds: float
    code: int
    left: list[str]
    status: str
    error: str
    output: str

    @property
    def finished(self) -> bool:
        """Whether all steps were made."""
        return self.status == "finished"

    @property
    def printed(self) -> str:
        """What the run said of its end on the terminal."""
        said = [line.partition("ddpkit: ")[2] for line in self.output.replace("\r", "\n").splitlines()]
        return next((line for line in said if line and not line.startswith("warning")), "")

    @property
    def sentence(self) -> str:
        """What it said in its summary, else on the terminal."""
        return self.error or self.printed


def read_summary(run: Path) -> tuple[str, str]:
    """Status and error of a run folder; empty where they cannot be read."""
    try:
        facts: dict[str, Any] = json.loads((run / "summary.json").read_text())
    except (OSError, ValueError):
        return "", ""
    return str(facts.get("status") or ""), str(facts.get("error") or "")


def replayed(run: Path) -> int:
    """How many steps of a run were replayed."""
    return int(json.loads((run / "summary.json").read_text())["captured_steps"])


def faults_of_end(trial: Trial, end: End) -> list[str]:
    """What is wrong with the end of a struck run; empty if nothing."""
    fault, wrong = FAULTS[trial.fault], []
    if not end.ended:
        wrong.append(f"not ended {end.seconds:.0f} s after the fault")
    if end.left:
        wrong.append(f"processes left: {'; '.join(end.left)[:300]}")
    if end.finished:
        if fault.harmless and end.code:
            wrong.append(f"exit code {end.code} of a run that finished")
        return wrong
    if fault.harmless:
        wrong.append(f"a harmless fault ended the run ({end.status or 'no summary'}: {end.sentence[:200]})")
    if end.ended and end.code == 0 and end.status != "stopped":
        wrong.append("exit code 0 of a run that did not finish")
    if end.status:
        wrong += _faults_of_sentence(trial, end)
    elif not end.sentence and not trial.fault.startswith("mpirun-"):
        told = _MPIRUN_TELLS.get(trial.fault, "exited on signal")
        if not re.search(told, " ".join(end.output.split())):
            wrong.append("no word of what happened")
    return wrong


def _faults_of_sentence(trial: Trial, end: End) -> list[str]:
    if end.status not in ("failed", "stopped"):
        return [f"summary.json says {end.status}"]
    wanted = FAULTS[trial.fault].names.format(rank=trial.rank)
    if not re.search(wanted, end.error, re.IGNORECASE):
        return [f"the sentence does not say {wanted}: {end.error[:300] or 'nothing'}"]
    if "\n" in end.error.strip() or len(end.error) > _SENTENCE:
        return [f"more than a sentence: {end.error[:300]}"]
    return []


def rows(path: Path) -> list[dict[str, str]]:
    """The complete rows of a CSV file; none where there is none."""
    try:
        text = path.read_text()
    except OSError:
        return []
    whole = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(whole.splitlines()))


def lost(before: list[dict[str, str]], after: list[dict[str, str]], column: str, last: int) -> str:
    """Which rows up to `last` a resumed run no longer has as they were; empty if none."""
    now = {row[column]: row for row in after}
    gone = [row[column] for row in before if int(row[column]) <= last and now.get(row[column]) != row]
    return f"rows of {column} {', '.join(gone[:5])} were lost" if gone else ""


def differences(run: Path, reference: Path) -> str:
    """How the losses, rates, sizes, validation errors and weights of a run differ from the reference's; empty if in no bit.

    Numbers are written so that they read back the same bits: equal text is equality bit for bit.
    """
    for name, column in (("steps.csv", "step"), ("epochs.csv", "epoch")):
        mine, wanted = (_steady(rows(folder / name)) for folder in (run, reference))
        counted = [row[column] for row in mine]
        if counted != [row[column] for row in wanted]:
            return f"{name} has {column} {_spans(counted)}, not {_spans([row[column] for row in wanted])}"
        for one, other in zip(mine, wanted, strict=True):
            if changed := [key for key in other if one.get(key) != other[key]]:
                key = changed[0]
                return f"{name}, {column} {other[column]}: {key} is {one.get(key)}, not {other[key]}"
    return _difference_of_weights(run / "checkpoints" / "last.pt", reference / "checkpoints" / "last.pt")


def _difference_of_weights(mine: Path, wanted: Path) -> str:
    import torch

    try:
        one, other = (_tensors(torch.load(path, map_location="cpu", weights_only=True)) for path in (mine, wanted))
    except Exception as error:  # noqa: BLE001  (torch raises whatever a torn file leads to)
        return f"the last checkpoint cannot be read ({error})"
    if one.keys() != other.keys():
        return f"the last checkpoint lacks or adds {', '.join(sorted(one.keys() ^ other.keys())[:5])}"
    changed = [name for name, value in other.items() if not torch.equal(one[name], value)]
    return f"{changed[0]} of the last checkpoint differs" if changed else ""


def _tensors(state: Any, name: str = "") -> dict[str, Any]:
    import torch

    if isinstance(state, torch.Tensor):
        return {name: state}
    if isinstance(state, dict):
        pairs = list(state.items())
    elif isinstance(state, list | tuple):
        pairs = list(enumerate(state))
    else:
        return {}
    return {key: value for part, inner in pairs for key, value in _tensors(inner, f"{name}/{part}").items()}


def _steady(table: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if not key.startswith(_UNSTEADY)} for row in table]


def _spans(numbers: list[str]) -> str:
    """As `1-5, 7`."""
    spans: list[list[int]] = []
    for number in map(int, numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in spans) or "none"
