"""Molecular dynamics in LAMMPS: what its logs say of speed, and tables and figures of it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ddpkit.analysis.tables import Table, number
from ddpkit.errors import InputError

SECTIONS = ("pair", "neigh", "comm", "output", "modify", "other")
COLUMNS = (
    "part", "engine", "model", "system", "atoms", "ranks", "repeat", "device", "steps", "femtoseconds", "seconds_per_step",
    "atom_steps_per_second", "ns_per_day", *(f"{name}_percent" for name in SECTIONS), "lammps_percent", "neighbours",
    "ghosts", "seconds_per_calculator_step", "memory_mb", "gpu_memory_mb",
)  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """What LAMMPS says of one stretch of dynamics.

    Attributes:
        steps: that were made.
        seconds: of all of them.
        ranks: of MPI.
        atoms: in the system.
        seconds_by: of each section of LAMMPS' breakdown, on average over ranks.
        neighbours: of an atom, in the list that a model gets, skin included; None where it is not said.
        ghosts: of a rank, on average; None where it is not said.
    """

    steps: int
    seconds: float
    ranks: int
    atoms: int
    seconds_by: dict[str, float]
    neighbours: float | None
    ghosts: float | None

    @property
    def percent_by(self) -> dict[str, float]:
        """Shares of the sections."""
        total = sum(self.seconds_by.values())
        return {name: 100 * seconds / total if total > 0 else 0.0 for name, seconds in self.seconds_by.items()}


_LOOP = re.compile(r"^Loop time of (\S+) on (\d+) procs for (\d+) steps with (\d+) atoms", re.MULTILINE)
_THREADS = re.compile(r"CPU use with \d+ MPI tasks x (\d+) OpenMP threads")
_SECTION = re.compile(r"^(Pair|Neigh|Comm|Output|Modify|Other)\s*\|(.*)$", re.MULTILINE)


def timings(log: str) -> list[Timing]:
    """The stretches of dynamics or minimisation in a log of LAMMPS, in order.

    Args:
        log: its text.
    """
    starts = list(_LOOP.finditer(log))
    ends = [match.start() for match in starts][1:] + [len(log)] * bool(starts)
    return [_timing(match, log[match.end() : end]) for match, end in zip(starts, ends, strict=True)]


def _timing(loop: re.Match[str], after: str) -> Timing:
    seconds_by = {}
    for name, cells in _SECTION.findall(after):
        average = cells.split("|")[1].strip()  # of Other alone the average is said
        seconds_by[name.lower()] = float(average) if average else 0.0
    neighbours = re.search(r"^Ave neighs/atom\s*=\s*([\d.e+-]+)", after, re.MULTILINE)
    ghosts = re.search(r"^Nghost:\s*([\d.e+-]+) ave", after, re.MULTILINE)
    threads = _THREADS.search(after)  # what LAMMPS calls processes are ranks times threads
    return Timing(
        int(loop[3]),
        float(loop[1]),
        int(loop[2]) // (int(threads[1]) if threads else 1),
        int(loop[4]),
        seconds_by,
        float(neighbours[1]) if neighbours else None,
        float(ghosts[1]) if ghosts else None,
    )


@dataclass(frozen=True)
class Study:
    """What a folder holds.

    Attributes:
        cells: one row for each measurement that was finished, `COLUMNS`.
        machine: that it was made on.
        left_out: sentences on what could not be read.
    """

    cells: pd.DataFrame
    machine: str
    left_out: tuple[str, ...]


def read(folder: Path) -> Study:
    """Reads the cells that `ddpkit experiment inference` wrote.

    Raises:
        InputError: there are none.
    """
    rows, machines, left_out = [], [], []
    for path in sorted(folder.glob("*/cell.json")):
        name = path.parent.name
        try:
            held = json.loads(path.read_text())
            if held["status"] != "finished":
                left_out.append(f"{name} failed: {held['error']}")
                continue
            rows.append(_row(held, path.parent))
            machines.append(str(held["machine"]))
        except (OSError, ValueError, KeyError, IndexError) as error:
            left_out.append(f"{name} cannot be read ({type(error).__name__}: {error}).")
    if not rows:
        raise InputError("; ".join([f"{folder} holds no finished cell of `ddpkit experiment inference`", *left_out]))
    if len(set(machines)) > 1:
        left_out.append(f"The cells were measured on several machines: {', '.join(sorted(set(machines)))}.")
    cells = pd.DataFrame(rows, columns=list(COLUMNS))
    words = ["part", "engine", "model", "system", "device"]
    measured = cells.columns.difference(words)
    cells[measured] = cells[measured].apply(pd.to_numeric)
    return Study(cells, machines[0], tuple(left_out))


def _row(held: dict[str, Any], folder: Path) -> dict[str, Any]:
    cell = held["cell"]
    row = {
        key: cell[key]
        for key in ("part", "engine", "model", "system", "atoms", "ranks", "repeat", "device", "femtoseconds")
    }
    row |= {key: held[key] for key in ("memory_mb", "gpu_memory_mb")}
    if cell["part"] == "calls":
        calls = json.loads((folder / "calls.json").read_text())
        row |= {"steps": cell["steps"], "seconds_per_calculator_step": calls["seconds_step"]}
        row["neighbours"] = calls["edges"] / cell["atoms"]
        seconds = calls["seconds_call"]
    else:
        made = timings((folder / "log.lammps").read_text())
        if not made:
            raise ValueError("log.lammps has no `Loop time`")
        last = made[-1]
        if last.steps < 1:
            raise ValueError("no step was timed in log.lammps")
        if last.atoms != cell["atoms"] or last.ranks != cell["ranks"]:
            raise ValueError(f"log.lammps is of {last.atoms} atoms on {last.ranks} ranks")
        row |= {"steps": last.steps, "neighbours": last.neighbours, "ghosts": last.ghosts}
        row |= {f"{name}_percent": last.percent_by.get(name) for name in SECTIONS}
        if "pair" in last.percent_by:
            row["lammps_percent"] = 100 - last.percent_by["pair"]
        seconds = last.seconds / last.steps
        row["ns_per_day"] = cell["femtoseconds"] * 1e-6 * 86_400 / seconds
    return row | {"seconds_per_step": seconds, "atom_steps_per_second": cell["atoms"] / seconds}


def table(study: Study) -> pd.DataFrame:
    """One row for each cell, repeats together: their means, with the standard deviation of the time per step and their number."""
    keys = ["part", "engine", "model", "system", "atoms", "ranks", "device"]
    grouped = study.cells.groupby(keys, sort=False, dropna=False)
    means = grouped.mean(numeric_only=True).drop(columns="repeat")
    means["spread_seconds_per_step"] = grouped["seconds_per_step"].std()
    means["repeats"] = grouped.size()
    made = means.reset_index()
    # small models first
    made["size"] = made["model"].map(-made.groupby("model")["atom_steps_per_second"].max())
    order = ["part", "size", "model", "atoms", "ranks", "engine"]
    return made.sort_values(order, kind="stable", ignore_index=True).drop(columns="size")


def tables(values: pd.DataFrame, study: Study) -> list[Table]:
    """What is to be read, part by part."""
    makers = {"molecules": _molecules, "water": _water, "scaling": _scaling, "calls": _calls}
    made = [make(values[values["part"] == part], study) for part, make in makers.items() if part in set(values["part"])]
    if study.left_out:
        made[-1] = Table(
            made[-1].caption, made[-1].header, made[-1].rows, (*made[-1].notes, *study.left_out), made[-1].words
        )
    return made


_LAMMPS_NOTE = (
    "LAMMPS itself: all but the pair style (neighbour lists, communication, integration, output), by LAMMPS' own breakdown. "
    "Memory: of the largest process."
)


_CALLS_NOTE = (
    "The same weights on a graph that is there already: the file of `ddpkit export`, the model as it trains, and the model "
    "compiled by `nequip-compile`, with its packages' own kernels on GPUs."
)


def _molecules(values: pd.DataFrame, study: Study) -> Table:
    rows = []
    for _, row in values.iterrows():
        time = number(1000 * row["seconds_per_step"])
        if row["repeats"] > 1:
            time += f" ± {1000 * row['spread_seconds_per_step']:.1g}"
        rows.append([row["system"], row["model"], str(row["atoms"]), time, *_common(row)])
    return Table(
        f"Small molecules without boundaries, NVE of 0.5 fs after minimisation and NVT ({study.machine})",
        ("molecule", "model", "atoms", "ms per step", "atom-steps per s", "ns per day", "LAMMPS itself", "memory"),
        rows,
        (
            _LAMMPS_NOTE,
            *(["±: standard deviation over runs with other velocities."] if (values["repeats"] > 1).any() else []),
        ),
        words=2,
    )


def _common(row: "pd.Series[Any]") -> list[str]:
    memory = row["gpu_memory_mb"] if pd.notna(row["gpu_memory_mb"]) else row["memory_mb"]
    share = row["lammps_percent"]
    return [
        number(row["atom_steps_per_second"]),
        number(row["ns_per_day"]),
        f"{share:.1f} %" if pd.notna(share) else "-",
        f"{memory:,.0f} MB" if pd.notna(memory) else "-",
    ]


def _water(values: pd.DataFrame, study: Study) -> Table:
    rows = [
        [
            row["model"],
            f"{row['atoms']:,}",
            number(1000 * row["seconds_per_step"]),
            *_common(row),
            number(row["neighbours"]),
        ]
        for _, row in values.iterrows()
    ]
    return Table(
        f"Boxes of water at 1 g/cm^3 on one rank, Langevin at 300 K, 1 fs ({study.machine})",
        ("model", "atoms", "ms per step", "atom-steps per s", "ns per day", "LAMMPS itself", "memory", "neighbours"),
        rows,
        (_LAMMPS_NOTE, "Neighbours: entries of LAMMPS' list for an atom, skin included."),
    )


def _scaling(values: pd.DataFrame, study: Study) -> Table:
    rows = []
    for (model, system), group in values.groupby(["model", "system"], sort=False):
        least = group.loc[group["ranks"].idxmin()]
        for _, row in group.iterrows():
            gain = least["seconds_per_step"] / row["seconds_per_step"]
            efficiency = 100 * gain * least["ranks"] / row["ranks"]
            time, others = number(1000 * row["seconds_per_step"]), _common(row)
            shares = [f"{row[f'{name}_percent']:.1f} %" for name in ("comm", "neigh")]
            rows.append(
                [
                    system,
                    str(model),
                    f"{row['atoms']:,}",
                    str(row["ranks"]),
                    time,
                    f"{gain:.2f}",
                    f"{efficiency:.0f} %",
                    *shares,
                    *others,
                ]
            )
    return Table(
        f"Strong scaling over ranks, NVT of 0.5 fs ({study.machine})",
        ("system", "model", "atoms", "ranks", "ms per step", "speedup", "efficiency", "Comm", "Neigh", "atom-steps per s",
         "ns per day", "LAMMPS itself", "memory"),
        rows,
        (_LAMMPS_NOTE, "Speedup and efficiency are relative to the fewest ranks of the same system and model."),
        words=2,
    )  # fmt: skip


def _calls(values: pd.DataFrame, study: Study) -> Table:
    rows = []
    for (model, system, atoms), group in values.groupby(["model", "system", "atoms"], sort=False):
        times = dict(zip(group["engine"], group["seconds_per_step"], strict=True))
        steps = dict(zip(group["engine"], group["seconds_per_calculator_step"], strict=True))
        ours = times.get("package")
        ratios = [f"{times[engine] / ours:.2f}" if ours and engine in times else "-" for engine in ("nequip", "eager")]
        shown = [number(1000 * times[engine]) if engine in times else "-" for engine in ("package", "eager", "nequip")]
        whole = [number(1000 * steps[engine]) if engine in steps else "-" for engine in ("package", "nequip")]
        rows.append([system, str(model), f"{atoms:,}", *shown, *ratios, *whole])
    return Table(
        f"Calls in Python, ms ({study.machine})",
        ("system", "model", "atoms", "exported", "eager", "nequip", "nequip / exported", "eager / exported", "step, exported",
         "step, nequip"),
        rows,
        (_CALLS_NOTE, "Step: of ASE's calculator, with the neighbour list."),
        words=2,
    )  # fmt: skip
