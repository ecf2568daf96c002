"""Numbers in a text, recomputed from the runs that they rest on.

`claims.yaml` in a folder of results names the sentences of its README.md, with the numbers in braces, and what each number is:

```yaml
tables: {numerics: numerics, speed-32M: speed}     # sub-folders with run folders, and which study they are of
claims:
  - says: "| rerun | 5 | {1.2e-15} | {2.8e-14} |"
    from: numerics.csv
    where: {arm: rerun}
    take: [mean mae, max max_abs]
```

Tables of the studies are made anew from the run folders, and what stands in the folder must agree with them; other CSVs are read
as they are. `in: FILE` or `in: [FILE, FILE]` names other texts, seen from the folder, each of which has the sentence.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from ddpkit.analysis import blocks, endpoints, numerics, plan, ranks, speed
from ddpkit.analysis.runs import holds_runs, read_runs
from ddpkit.errors import InputError

NAME = "claims.yaml"
_TOLERANCE = 1e-9
_BRACES = re.compile(r"\{([^{}]*)\}")
_TAKES: dict[str, Callable[["pd.Series[float]"], float]] = {
    "only": lambda values: float(values.iloc[0]) if len(values) == 1 else float("nan"),
    "mean": lambda values: float(values.mean()),
    "geomean": lambda values: float(np.exp(np.log(values).mean())),
    "median": lambda values: float(values.median()),
    "min": lambda values: float(values.min()),
    "max": lambda values: float(values.max()),
    "sum": lambda values: float(values.sum()),
    "count": lambda values: float(len(values)),
}


@dataclass(frozen=True)
class Number:
    """A number of a text.

    Attributes:
        says: the sentence, its numbers in braces.
        printed: the number as it stands there.
        value: what the runs give.
    """

    says: str
    printed: str
    value: float

    @property
    def holds(self) -> bool:
        """Whether the value, rounded to the digits that are printed, is the printed number."""
        printed = Decimal(self.printed.replace(",", ""))
        half = float(Decimal(1).scaleb(int(printed.as_tuple().exponent))) / 2
        return bool(abs(self.value - float(printed)) <= half * (1 + _TOLERANCE))


def folders(path: Path) -> list[Path]:
    """The folder itself, or those in it, that have a `claims.yaml`.

    Raises:
        InputError: there is none.
    """
    found = [path] if (path / NAME).is_file() else sorted(file.parent for file in path.glob(f"*/{NAME}"))
    if not found:
        raise InputError(f"Neither {path} nor a folder in it has a {NAME}, which names the numbers to recompute.")
    return found


def recount(folder: Path) -> list[Number]:
    """Recomputes what a folder's `claims.yaml` names.

    Raises:
        InputError: a sentence that the text does not have, a table that the runs do not give, or a file that cannot be read.
    """
    facts = _read(folder / NAME)
    tables = Tables(folder, facts.get("tables") or {})
    numbers = []
    for claim in facts["claims"]:
        says = str(claim["says"])
        for name in texts_of(claim):
            _require_said(folder / name, says)
        printed = _BRACES.findall(says)
        takes = claim["take"] if isinstance(claim["take"], list) else [claim["take"]]
        if len(printed) != len(takes):
            raise InputError(
                f"{folder / NAME}: {says!r} has {len(printed)} numbers in braces and {len(takes)} in take."
            )
        for text, take in zip(printed, takes, strict=True):
            own = claim | (take if isinstance(take, dict) else {"take": take})
            _require_number(folder, says, text)
            numbers.append(Number(says, text, tables.value(str(own["from"]), own.get("where") or {}, str(own["take"]))))
    return numbers


def texts_of(claim: Mapping[str, Any]) -> list[str]:
    """The texts that have the sentence of a claim, seen from its folder."""
    named = claim.get("in", "README.md")
    return [str(name) for name in (named if isinstance(named, list) else [named])]


class Tables:
    """The tables of a folder of results: those of studies made anew, the others read.

    Args:
        folder: of the results.
        studies: sub-folder with run folders -> which study they are of, or a mapping with `study`, `baseline`, `warmup`.

    Raises:
        InputError: a table in the folder is not what its runs give.
    """

    def __init__(self, folder: Path, studies: Mapping[str, Any]) -> None:
        self.folder = folder
        self._known: dict[str, pd.DataFrame] = {}
        for name, told in studies.items():
            options = told if isinstance(told, dict) else {"study": told}
            made = _made(folder / name, options)
            for file, table in made.items():
                self._compare(file, table)
                self._known[file] = table

    def value(self, name: str, where: Mapping[str, Any], take: str) -> float:
        """A number of a table: `take` is how rows are summed up and of what, as in `mean 1000 * seconds`."""
        try:
            table = self._table(name)
            for column, wanted in where.items():
                table = table[table[column].isin(wanted if isinstance(wanted, list) else [wanted])]
            how, _, what = take.partition(" ")
            return _TAKES[how](table.eval(what) if what else table.iloc[:, 0])
        except (KeyError, ValueError, NameError, SyntaxError, IndexError) as error:
            raise InputError(
                f"{self.folder / NAME}: {take!r} cannot be taken from {name} where {dict(where)} ({error})."
            ) from None

    def _table(self, name: str) -> pd.DataFrame:
        if name not in self._known:
            path = self.folder / name
            if not path.is_file():
                raise InputError(f"{self.folder / NAME} takes numbers from {name}, which is neither made nor there.")
            self._known[name] = pd.read_csv(path, float_precision="round_trip")
        return self._known[name]

    def _compare(self, name: str, table: pd.DataFrame) -> None:
        path = self.folder / name
        if not path.is_file():
            return
        written = pd.read_csv(path, float_precision="round_trip")
        wrong = [c for c in written.columns if c not in table or not _agree(written[c], table[c])]
        if len(written) != len(table):
            what = "the number of its rows"
        elif wrong:
            what = f"its columns {', '.join(wrong)}"
        else:
            return
        raise InputError(f"{path} is not what the runs beside it give now, in {what}: make it again.")


def _made(folder: Path, options: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    kind, name = options.get("study"), folder.name
    if kind == "numerics":
        data = _numerics(folder, options)
        return {f"{name}.csv": numerics.table(data), endpoints.file_name(name): endpoints.table(data)}
    if kind == "speed":
        runs, _ = read_runs(folder)
        timed = speed.study(runs, plan.read(folder, plan.SPEED), options.get("warmup"))
        return {f"{name}.csv": speed.table(timed), f"{name}_beside.csv": speed.beside_table(timed)}
    if kind == "ranks":
        parts = sorted(path for path in folder.iterdir() if path.is_dir() and holds_runs(path))
        values = ranks.distances([_numerics(path, options) for path in parts])
        return {"ranks.csv": values, "ranks_intervals.csv": ranks.intervals(values)}
    raise InputError(f"{folder.parent / NAME}: {name} is a study of {kind!r}: use numerics, speed or ranks.")


def _numerics(folder: Path, options: Mapping[str, Any]) -> blocks.Study:
    runs, _ = read_runs(folder)
    return blocks.study(runs, plan.read(folder, plan.NUMERICS), str(options.get("baseline", "baseline")))


def _agree(written: "pd.Series[Any]", made: "pd.Series[Any]") -> bool:
    if len(written) != len(made):
        return False
    if pd.api.types.is_numeric_dtype(written) and pd.api.types.is_numeric_dtype(made):
        pair = written.to_numpy(float), made.to_numpy(float)
        return bool(np.isclose(*pair, rtol=_TOLERANCE, atol=0, equal_nan=True).all())
    return all((pd.isna(a) and pd.isna(b)) or str(a) == str(b) for a, b in zip(written, made, strict=True))


def _read(path: Path) -> Mapping[str, Any]:
    try:
        facts = yaml.safe_load(path.read_text())
        for claim in facts["claims"]:
            claim["says"], claim["take"], claim["from"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be used ({error}): it has `claims`, a list of mappings with says, from, where and take."
        ) from None
    return dict(facts)


def _require_said(path: Path, says: str) -> None:
    if not path.is_file():
        raise InputError(f"{path} is missing: it is to say {says!r}.")
    sentence, text = (" ".join(words.split()) for words in (_BRACES.sub(r"\1", says), path.read_text()))
    if sentence not in text:
        raise InputError(f"{path} does not say {sentence!r}.")


def _require_number(folder: Path, says: str, text: str) -> None:
    try:
        finite = Decimal(text.replace(",", "")).is_finite()
    except InvalidOperation:
        finite = False
    if not finite:
        raise InputError(f"{folder / NAME}: {text!r} in {says!r} is no number.")


def told(folder: Path, numbers: Sequence[Number]) -> str:
    """One line for the folder, and one for each number that does not hold."""
    wrong = [one for one in numbers if not one.holds]
    lines = [f"{folder.name}: {len(numbers) - len(wrong)} of {len(numbers)} numbers are what the runs give"]
    lines += [f"  {one.printed} in {one.says!r} would be {one.value:.6g}" for one in wrong]
    return "\n".join(lines)
