"""Torsion benchmarks in the layout of TorsionNet500 (JSON): fragments, each with conformers along one dihedral angle."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.units import kcal, mol
from numpy.typing import NDArray
from torch import nn

from ddpkit.data import Frame, collate
from ddpkit.data.frame import NUMBERS
from ddpkit.errors import InputError
from ddpkit.evaluate import Floats, summed
from ddpkit.ranks.agree import agree
from ddpkit.ranks.group import Environment

CONFORMERS = 24
"""Of each fragment of TorsionNet500: every 15 degrees."""

FRAGMENTS = 500
"""Of TorsionNet500."""


@dataclass(frozen=True)
class Fragment:
    """One molecule turned about one bond.

    Attributes:
        name: as in the file.
        symbols: `[atoms]` chemical symbols.
        positions: `[conformers, atoms, 3]` Å.
        energies: `[conformers]` reference, kcal/mol.
    """

    name: str
    symbols: tuple[str, ...]
    positions: Floats
    energies: Floats


def read_fragments(path: Path, reference: Path | None = None) -> list[Fragment]:
    """Reads `{name: {atom_symbols, conformer_coordinates, dft_energy_profile}}`, a profile being pairs of angle and kcal/mol.

    Args:
        path: the file with the coordinates.
        reference: a file with the energies to compare with, at the same angles; by default the file's own.

    Raises:
        InputError: a file cannot be read, or does not have this layout.
    """
    content = _read(path)
    others = content if reference is None else _read(reference)
    fragments = []
    for name, entry in content.items():
        where = f"{name} of {path}"
        try:
            symbols = tuple(entry["atom_symbols"])
            positions = np.array(entry["conformer_coordinates"], dtype=np.float64)
            angles = [float(angle) for angle, _ in entry["dft_energy_profile"]]
            profile = {float(angle): float(energy) for angle, energy in others[name]["dft_energy_profile"]}
            energies = np.array([profile[angle] for angle in angles])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{where} lacks what a torsion benchmark needs ({type(error).__name__}: {error}): give a file with atom_symbols, "
                "conformer_coordinates and dft_energy_profile, and reference energies at the same angles."
            ) from error
        if positions.shape != (len(angles), len(symbols), 3) or len(angles) < 2:
            raise InputError(
                f"{where} has coordinates of shape {positions.shape} for {len(angles)} energies and {len(symbols)} atoms: "
                "repair the file."
            )
        if unknown := sorted(set(symbols) - NUMBERS.keys()):
            raise InputError(f"{where} has {unknown[0]!r}, which is no chemical symbol: repair the file.")
        if not np.isfinite(energies).all():
            raise InputError(f"{where} has energies that are not finite: repair the file.")
        fragments.append(Fragment(str(name), symbols, positions, energies))
    return fragments


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}): give a file in TorsionNet500's layout.") from error
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path} holds no fragments: give a file in TorsionNet500's layout.")
    return content


def profiles(model: nn.Module, fragments: list[Fragment], here: Environment) -> list[Floats]:
    """Predicted energies `[conformers]` of each fragment in kcal/mol, as single points; fragments are dealt out to the ranks.

    Args:
        model: of the model contract, in evaluation mode and on this rank's device.
        fragments: of species that the model knows.
        here: where this process stands.

    Raises:
        InputError: on every rank, where a prediction is not finite.
    """
    ends = np.cumsum([len(fragment.energies) for fragment in fragments])
    energies = np.zeros(ends[-1])
    with agree("predicting torsion profiles"):
        for fragment, end in list(zip(fragments, ends, strict=True))[here.rank :: here.world_size]:
            energies[end - len(fragment.energies) : end] = _energies(model, fragment, here.device)
            if not np.isfinite(energies[:end]).all():
                raise InputError(f"The model's energy of {fragment.name} is NaN or infinite: use another checkpoint.")
    return np.split(summed(energies, here) * (mol / kcal), ends[:-1])


def _energies(model: Any, fragment: Fragment, device: torch.device) -> NDArray[np.float64]:
    numbers = np.array([NUMBERS[symbol] for symbol in fragment.symbols])
    unlabelled = np.full((len(numbers), 3), np.nan)
    frames = [
        Frame(numbers, positions, float("nan"), unlabelled, name=f"conformer {k} of {fragment.name}")
        for k, positions in enumerate(fragment.positions)
    ]
    batch = collate(frames, model.species, model.r_max, labels=False).to(device)
    energy: torch.Tensor = model(batch)["energy"]
    return energy.detach().to(torch.float64).cpu().numpy()
