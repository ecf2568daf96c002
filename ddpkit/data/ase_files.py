"""Anything that ASE reads."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ddpkit.data.frame import Frame
from ddpkit.data.labels import FAR, Advice, Choice, Labels, in_python, is_isolated
from ddpkit.data.neighbours import count_edges
from ddpkit.data.prepared import Block, Filters
from ddpkit.errors import InputError, exhausted

GROUP_KEYS = ("group", "mp_id", "material_id", "molecule", "mol_id", "smiles")
SUBSET_KEYS = ("subset", "config_type")
READER = 2  # its version: what an older one read is read again
_FRAMES_IN_A_PIECE = 256
_CLOSEST = 0.1  # Å; no atoms of a real structure are closer


def read_ase(
    path: str | os.PathLike[str],
    *,
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
    allow_missing: bool = False,
    labels: bool = True,
) -> Iterator[Frame]:
    """Reads frames one after another.

    Labels are the calculator's results (extended XYZ `energy`, `forces`, `stress`; what ASE wrote in trajectories and databases)
    or stand in `info` and `arrays` under a usual name (`REF_energy`, `dft_forces`, `virial` ...). All come from one level of
    theory, which is what stands before the name (`REF`, `dft`, or nothing), and from the same keys in every frame. Energies in
    eV, forces in eV/Å, stress in eV/Å^3 with ASE's sign, six components in Voigt's order (xx, yy, zz, yz, xz, xy). Where `virial`
    is part of the key it is a virial in eV, and stress = -virial / volume.

    Args:
        path: the file.
        energy_key: name of the energy where it is unusual, or where a file has several.
        forces_key: likewise.
        stress_key: likewise, of a stress or a virial.
        allow_missing: whether periodic frames may lack the stress that others have.
        labels: whether energy and forces must be there; without, missing ones are NaN.

    Raises:
        InputError: the file cannot be read, holds no frames, has labels of several levels of theory, or a frame that cannot be
            trained on (no labels, NaN, no atoms).
    """
    path = Path(path)
    choice = Choice(energy_key, forces_key, stress_key, allow_missing)
    found = Labels(choice, lambda: images(path), str(path), required=labels)
    for number, atoms in enumerate(images(path)):
        yield frame_of(atoms, f"frame {number} of {path}", found)
    found.finish()


def images(path: Path) -> Iterator[Any]:
    """The frames of a file as ASE's `Atoms`.

    Raises:
        InputError: the file cannot be read, or holds no frames.
    """
    from ase.io import iread

    if not path.exists():
        raise InputError(f"{path} does not exist: give the path of a prepared set or of a file that ASE reads")
    number = -1
    frames = iter(iread(str(path), index=":", parallel=False))
    while True:
        try:
            atoms = next(frames)
        except StopIteration:
            break
        except Exception as error:
            if exhausted(error):
                raise
            what = str(error).strip().split("\n")[0] or type(error).__name__
            raise InputError(
                f"{path} cannot be read after {number + 1} frames ({what}): is it a file that ASE knows?"
            ) from error
        number += 1
        yield atoms
    if number < 0:
        raise InputError(f"{path} holds no frames: give another file")


class AseFiles:
    """Files that ASE reads, as a source of frames.

    Args:
        paths: the files.
        choice: which keys hold the labels.
        labels: whether frames without labels are errors; without, their labels are NaN.
        advice: how the user makes settings, for messages.

    Raises:
        InputError: a file does not exist.
    """

    unit = "frame"
    total = None

    def __init__(
        self,
        paths: Sequence[Path],
        choice: Choice = Choice(),  # noqa: B008  (it is frozen)
        *,
        labels: bool = True,
        advice: Advice = in_python,
    ) -> None:
        for path in paths:
            if not path.is_file():
                raise InputError(f"{path} does not exist: give files that ASE reads")
        self.files = list(paths)
        self.settings: dict[str, Any] = {"made_by": "ddpkit data prepare ase", "reader": READER, **asdict(choice)}
        source = str(paths[0]) if len(paths) == 1 else f"the {len(paths)} files from {paths[0]} on"
        self._labels = Labels(
            choice,
            lambda: (atoms for path in self.files for atoms in images(path)),
            source,
            required=labels,
            advice=advice,
        )

    @property
    def facts(self) -> dict[str, Any]:
        """The keys that the labels were read from, once they were read."""
        return {"keys": self._labels.keys, "notes": self._labels.notes}

    def pieces(self, position: Any) -> Iterator[tuple[Any, Any, int]]:
        """Some frames at a time. What lies before the position is read again for its labels: all frames must have the same."""
        first, done = position or (0, 0)
        for number, path in enumerate(self.files):
            skip = done if number == first else 0
            named = ((f"frame {k} of {path}", atoms) for k, atoms in enumerate(images(path)))
            frames = (frame_of(atoms, name, self._labels) for name, atoms in named)
            if number < first:
                deque(frames, maxlen=0)
                continue
            deque(islice(frames, skip), maxlen=0)
            count = skip
            while some := list(islice(frames, _FRAMES_IN_A_PIECE)):
                count += len(some)
                yield some, (number, count), len(some)
        self._labels.finish()

    def blocks(self, r_max: float, filters: Filters) -> Callable[[list[Frame]], Block]:
        """Counts edges and filters."""
        return partial(_block, r_max=r_max, filters=filters)

    def done(self, position: Any) -> int:
        """Frames read from the file that is under way."""
        return position[1] if position else 0


def frame_of(atoms: Any, name: str, labels: Labels) -> Frame:
    """A frame with its labels.

    Args:
        atoms: ASE's.
        name: of the frame, for messages.
        labels: where they stand.

    Raises:
        InputError: it has no atoms, no labels, or a cell, positions or labels that cannot be used.
    """
    count = len(atoms)
    if not count:
        raise InputError(f"{name} has no atoms: remove it from the file")
    periodic = bool(atoms.pbc.any())
    cell = np.array(atoms.cell[:], dtype=np.float64) if periodic else None
    if cell is not None:
        vectors = cell[atoms.pbc]
        if not np.isfinite(cell).all():
            raise InputError(f"{name} has a cell that is NaN or infinite: repair the file or remove the frame")
        if not np.linalg.norm(vectors, axis=1).all():
            raise InputError(f"{name} is periodic along a lattice vector of length zero: repair its cell or its pbc")
        if np.linalg.matrix_rank(vectors) < len(vectors):
            raise InputError(f"{name} has lattice vectors that lie in one plane or line: repair its cell or its pbc")
    if labels.required:
        _refuse_not_finite("positions", atoms.positions, name, labels)
    values = labels.of(atoms, name)
    isolated = is_isolated(atoms)
    frame = Frame(
        numbers=atoms.numbers.astype(np.int64),
        positions=np.array(atoms.positions, dtype=np.float64),
        energy=float("nan") if values.energy is None else values.energy,
        forces=np.full((count, 3), 0.0 if isolated else np.nan) if values.forces is None else values.forces,
        cell=cell,
        pbc=np.array(atoms.pbc, dtype=bool),
        stress=values.stress,
        charge=round(float(_find(atoms.info, ("charge", "total_charge")) or 0)),
        subset=str(_find(atoms.info, SUBSET_KEYS) or ""),
        group=str(_find(atoms.info, GROUP_KEYS) or atoms.get_chemical_formula()),
        name=name,
        isolated=isolated,
    )
    if labels.required:
        _refuse_not_finite("an energy", frame.energy, name, labels)
        _refuse_not_finite("forces", frame.forces, name, labels)
    return frame


def atoms_of(frame: Frame) -> Any:
    """A frame as ASE's `Atoms`, with energy, forces and, where it has one, stress as the results of its calculator."""
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.stress import full_3x3_to_voigt_6_stress

    atoms = Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.pbc)
    labels: dict[str, Any] = {"energy": frame.energy, "forces": frame.forces}
    if frame.stress is not None:
        labels["stress"] = full_3x3_to_voigt_6_stress(frame.stress)
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


def _refuse_not_finite(what: str, value: Any, name: str, labels: Labels) -> None:
    if not np.isfinite(value).all():
        are = "is" if what == "an energy" else "are"
        raise InputError(
            f"{name} has {what} that {are} NaN or infinite: repair or remove it, or leave such frames out with "
            f"{labels.advice(drop_unlabelled=True)}"
        )


def _block(frames: list[Frame], r_max: float, filters: Filters) -> Block:
    for frame in frames:
        if len(frame) == 1 and frame.cell is not None and not frame.isolated and not filters.isolated:
            edges = count_edges(frame, r_max).edges
            if not edges:
                raise InputError(
                    f"{frame.name} is one atom without an image within r_max={r_max:g} Å, but with one within {FAR:g} Å, "
                    "so it may be a crystal or an isolated atom: raise the cutoff, or set config_type=IsolatedAtom in "
                    "the file"
                )
    return Block.of(frames, r_max, filters, _CLOSEST)


def _find(info: Mapping[str, Any], names: Sequence[str]) -> Any:
    by_lower_case = {str(key).lower(): value for key, value in info.items()}
    return next((by_lower_case[name] for name in names if by_lower_case.get(name) is not None), None)
