"""How well a model predicts: tables by subset and by element, parity plots, errors of torsion barriers.

Energies are in eV, forces in eV/Å where they come in, and in meV/atom and meV/Å where they are shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ddpkit.analysis.figures import BLUE, GREY, STYLE
from ddpkit.analysis.runs import NDArray
from ddpkit.analysis.tables import Table, number
from ddpkit.errors import InputError

SHOWN = (
    "energy_mae_mev_per_atom", "energy_rmse_mev_per_atom", "forces_mae_mev_per_angstrom", "forces_rmse_mev_per_angstrom",
)  # fmt: skip
"""The columns that are read by people."""
_MILLI = 1e3
_MEV_IN_KCAL_PER_MOL = 43.36410  # 1 kcal/mol = 4184 J/mol, over the Faraday constant 96,485.332 C/mol
_POINTS = 4_000
"""More points than this are drawn as a density."""
_SHOWN = 0.998
"""Share of the points that the axis of errors has room for."""


@dataclass(frozen=True)
class Frames:
    """Errors frame by frame.

    Attributes:
        subset: `[frames]` number of each frame's subset.
        subsets: names of the subsets.
        atoms: `[frames]` atoms of each frame.
        energy_error: `[frames]` predicted less reference energy, eV.
        forces_abs: `[frames]` sum of |error| over the force components of a frame, eV/Å.
        forces_square: `[frames]` sum of squared errors of the force components of a frame, eV^2/Å^2.
    """

    subset: NDArray
    subsets: Sequence[str]
    atoms: NDArray
    energy_error: NDArray
    forces_abs: NDArray
    forces_square: NDArray

    @property
    def energy_per_atom_error(self) -> NDArray:
        """`[frames]` error of the energy per atom, eV/atom."""
        return self.energy_error / self.atoms

    @property
    def forces_rmse(self) -> NDArray:
        """`[frames]` root mean square error of a frame's force components, eV/Å."""
        return np.sqrt(self.forces_square / (3 * self.atoms))


def by_subset(frames: Frames) -> pd.DataFrame:
    """Errors of each subset that has frames, by name, and of `all`, in the layout of the paper's Table 2.

    Columns: MAE and RMSE of the energy per atom (over frames), of the force components (over components), and of the total
    energy (over frames), in meV.
    """
    numbers = sorted(np.unique(frames.subset).tolist(), key=lambda n: frames.subsets[n])
    rows = [_errors(frames, frames.subset == n, frames.subsets[n] or "(none)") for n in numbers]
    if [row["subset"] for row in rows] == ["(none)"]:
        rows = []
    return pd.DataFrame([*rows, _errors(frames, np.ones(len(frames.atoms), dtype=bool), "all")])


def _errors(frames: Frames, part: NDArray, name: str) -> dict[str, Any]:
    energy, total, atoms = frames.energy_per_atom_error[part], frames.energy_error[part], int(frames.atoms[part].sum())
    return {
        "subset": name,
        "frames": int(part.sum()),
        "atoms": atoms,
        "energy_mae_mev_per_atom": _MILLI * np.abs(energy).mean(),
        "energy_rmse_mev_per_atom": _MILLI * np.sqrt(np.square(energy).mean()),
        "forces_mae_mev_per_angstrom": _MILLI * frames.forces_abs[part].sum() / (3 * atoms),
        "forces_rmse_mev_per_angstrom": _MILLI * np.sqrt(frames.forces_square[part].sum() / (3 * atoms)),
        "total_energy_mae_mev": _MILLI * np.abs(total).mean(),
        "total_energy_rmse_mev": _MILLI * np.sqrt(np.square(total).mean()),
    }


def by_frame(frames: Frames, indices: NDArray, reference: NDArray) -> pd.DataFrame:
    """Errors of each frame.

    Args:
        frames: the errors.
        indices: `[frames]` numbers of the frames in their set.
        reference: `[frames]` reference energies, eV.
    """
    return pd.DataFrame(
        {
            "frame": indices,
            "subset": [frames.subsets[n] for n in frames.subset],
            "atoms": frames.atoms,
            "energy": reference,
            "energy_predicted": reference + frames.energy_error,
            "energy_error_per_atom": frames.energy_per_atom_error,
            "forces_mae": frames.forces_abs / (3 * frames.atoms),
            "forces_rmse": frames.forces_rmse,
        }
    )


def by_element(species: Sequence[str], sums: NDArray) -> pd.DataFrame:
    """Force errors of the atoms of each element that occurs.

    Args:
        species: chemical symbols.
        sums: `[species, 3]` number of force components, sum of |error|, sum of squared errors.
    """
    rows = [
        {
            "element": symbol,
            "atoms": int(count) // 3,
            "forces_mae_mev_per_angstrom": _MILLI * magnitudes / count,
            "forces_rmse_mev_per_angstrom": _MILLI * np.sqrt(squares / count),
        }
        for symbol, (count, magnitudes, squares) in zip(species, sums, strict=True)
        if count
    ]
    return pd.DataFrame(rows)


def subset_table(values: pd.DataFrame, notes: Sequence[str] = (), beside: pd.DataFrame | None = None) -> Table:
    """`by_subset` to be read.

    Args:
        values: of `by_subset`.
        notes: sentences below.
        beside: values of other models to stand in brackets: a column `subset`, and any of the columns of `values`. A subset
            finds those whose name its own begins with, so that versions in names do not matter.
    """
    rows = [
        [
            str(row["subset"]),
            f"{row['frames']:,}",
            *(number(row[column]) + _beside(beside, str(row["subset"]), column) for column in SHOWN),
        ]
        for _, row in values.iterrows()
    ]
    header = ("subset", "frames", "energy MAE", "energy RMSE", "forces MAE", "forces RMSE")
    return Table("Errors: energy in meV/atom, force components in meV/Å", header, rows, notes)


def stands_beside(others: pd.DataFrame, values: pd.DataFrame) -> bool:
    """Whether `subset_table` shows any of the other values."""
    return any(_beside(others, str(subset), column) for subset in values["subset"] for column in SHOWN)


def _beside(others: pd.DataFrame | None, subset: str, column: str) -> str:
    """Another model's value in brackets; nothing where there is none."""
    if others is None:
        return ""
    values = dict(zip(others["subset"], others.get(column, ()), strict=False))
    names = [name for name in values if name == subset or (subset != "all" and subset.startswith(name))]
    value = values[max(names, key=len)] if names else np.nan
    return f" ({number(value)})" if np.isfinite(value) else ""


def read_beside(path: Path) -> pd.DataFrame:
    """Reads values that are to stand beside: an `accuracy.csv`, or published ones in its columns.

    Raises:
        InputError: it is no such table.
    """
    try:
        others = pd.read_csv(path, dtype={"subset": str})
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"{path} cannot be read ({why}): give a CSV file such as accuracy.csv.") from error
    if "subset" not in others or not set(SHOWN) & set(others.columns):
        raise InputError(
            f"{path} needs a column subset and some of {', '.join(SHOWN)}: give a CSV file such as accuracy.csv."
        )
    return others


def element_table(values: pd.DataFrame) -> Table:
    """`by_element` to be read."""
    rows = [
        [str(row["element"]), f"{row['atoms']:,}", *(number(row[column]) for column in values.columns[2:])]
        for _, row in values.iterrows()
    ]
    return Table("Errors of force components by element, meV/Å", ("element", "atoms", "MAE", "RMSE"), rows)


def parity(energy: NDArray, forces: NDArray, frames: int, atoms: int) -> Figure:
    """Predicted against reference values above, their errors below, for energies per atom and force components.

    Args:
        energy: `[points, 2]` reference and predicted energy per atom, eV/atom.
        forces: `[points, 2]` reference and predicted force components, eV/Å.
        frames: how many frames there are in all; the points may be some of them.
        atoms: likewise atoms.
    """
    with mpl.rc_context(dict(STYLE)):
        figure = Figure(figsize=(7.2, 5.6), layout="constrained")
        axes = figure.subplots(2, 2, gridspec_kw={"height_ratios": (2, 1)})
        mean = float(energy[:, 0].mean())
        columns = (
            (energy - mean, frames, "energy per atom", f" {-mean:+.4f}", "eV/atom"),
            (forces, 3 * atoms, "force component", "", "eV/Å"),
        )
        for column, (points, total, what, shift, unit) in enumerate(columns):
            _parity(axes[0, column], points)
            _error(axes[1, column], points, unit)
            axes[0, column].set_ylabel(f"predicted{shift}, {unit}")
            for axis in axes[:, column]:
                axis.set_xlabel(f"reference {what}{shift}, {unit}")
            some = f"{len(points):,} of {total:,}" if len(points) < total else f"{total:,}"
            axes[0, column].set_title(f"{some} {('frames', 'force components')[column]}", loc="left")
    return figure


def _parity(axis: Any, points: NDArray) -> None:
    low, high = float(points.min()), float(points.max())
    margin = 0.04 * (high - low) or 1.0
    limits = (low - margin, high + margin)
    axis.axline((low, low), slope=1, color=GREY, lw=0.8, zorder=0 if len(points) <= _POINTS else 3)
    _draw(axis, points[:, 0], points[:, 1], (*limits, *limits))
    axis.set(xlim=limits, ylim=limits)
    axis.set_aspect("equal")


def _error(axis: Any, points: NDArray, unit: str) -> None:
    error = _MILLI * (points[:, 1] - points[:, 0])
    reach = float(np.quantile(np.abs(error), _SHOWN)) * 1.1 or 1.0
    low, high = float(points[:, 0].min()), float(points[:, 0].max())
    margin = 0.04 * (high - low) or 1.0
    axis.axhline(0, color=GREY, lw=0.8, zorder=0)
    _draw(axis, points[:, 0], error, (low - margin, high + margin, -reach, reach))
    axis.set(xlim=(low - margin, high + margin), ylim=(-reach, reach), ylabel=f"error, m{unit}")
    outside = int((np.abs(error) > reach).sum())
    text = f"MAE {number(float(np.abs(error).mean()))}, RMSE {number(float(np.sqrt(np.square(error).mean())))} m{unit}"
    axis.set_title(text + (f"; {outside:,} points outside" if outside else ""), loc="left", fontsize=8)


def _draw(axis: Any, x: NDArray, y: NDArray, extent: tuple[float, float, float, float]) -> None:
    """Dots, or the logarithm of their density where there are many."""
    if len(x) <= _POINTS:
        axis.plot(x, y, ".", color=BLUE, ms=4, alpha=0.6, mew=0)
        return
    axis.hexbin(x, y, gridsize=70, bins="log", mincnt=1, extent=extent, cmap="cividis_r", lw=0.1)


def barriers(fragments: Sequence[str], reference: Sequence[NDArray], predicted: Sequence[NDArray]) -> pd.DataFrame:
    """Torsion barriers: the highest less the lowest energy of a fragment's conformers, for each side on its own.

    Args:
        fragments: their names.
        reference: energies `[conformers]` of each, kcal/mol.
        predicted: likewise.
    """
    rows = [
        {
            "fragment": name,
            "conformers": len(ours),
            "barrier_reference": float(np.ptp(theirs)),
            "barrier_predicted": float(np.ptp(ours)),
            "error": float(np.ptp(ours) - np.ptp(theirs)),
        }
        for name, theirs, ours in zip(fragments, reference, predicted, strict=True)
    ]
    return pd.DataFrame(rows)


def barrier_table(values: pd.DataFrame, notes: Sequence[str] = (), beside: pd.DataFrame | None = None) -> Table:
    """`barriers` in one row, and published mean errors of the same fragments below it.

    Args:
        values: of `barriers`.
        notes: sentences below.
        beside: of `published.published_barriers`.
    """
    error = values["error"].to_numpy()
    worst = values.iloc[int(np.abs(error).argmax())]
    row = [
        "this one",
        f"{len(values):,}",
        f"{int(values['conformers'].sum()):,}",
        number(float(np.abs(error).mean())),
        number(float(np.sqrt(np.square(error).mean()))),
        f"{number(abs(worst['error']))} ({worst['fragment']})",
    ]
    others = [] if beside is None else [
        [str(other["model"]), row[1], row[2], number(float(other["barrier_mae_mev"]) / _MEV_IN_KCAL_PER_MOL), "", ""]
        for _, other in beside.iterrows()
    ]  # fmt: skip
    header = ("model", "fragments", "conformers", "MAE", "RMSE", "largest")
    return Table("Errors of torsion barrier heights, kcal/mol", header, [row, *others], notes)
