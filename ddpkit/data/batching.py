"""Frames to batches."""

from collections.abc import Sequence

import numpy as np
import torch

from ddpkit.batch import Batch
from ddpkit.data.frame import NUMBERS, SYMBOLS, Frame
from ddpkit.data.neighbours import neighbour_list
from ddpkit.errors import InputError


def _name(frame: Frame, position: int) -> str:
    return frame.name or f"frame {position} of the batch"


def collate(frames: Sequence[Frame], species: Sequence[str], r_max: float, *, labels: bool = True) -> Batch:
    """Puts frames one after another and finds their edges.

    `cell` is None when no frame is periodic. In a batch of both kinds, molecules get a unit cell, and stress is NaN for frames
    that have no such label; `stress` is None when none has. A cell that is not periodic in some direction is completed there by a
    unit vector where the file gives none.

    Args:
        frames: at least one.
        species: the model's chemical symbols; `Batch.species` is the index into them.
        r_max: cutoff in Å.
        labels: whether energy and forces must be there; without, the batch carries none.

    Raises:
        InputError: a species the model does not know, or a label that is NaN or infinite.
    """
    if not frames:
        raise InputError("a batch needs at least one frame: give a larger batch or fewer ranks")
    index = np.full(len(SYMBOLS), -1, dtype=np.int64)
    for position, symbol in enumerate(species):
        index[NUMBERS[symbol]] = position
    centres, neighbours, shifts = [], [], []
    first = 0
    for position, frame in enumerate(frames):
        _check(frame, _name(frame, position), index, species, labels=labels)
        centre, neighbour, shift = neighbour_list(frame, r_max)
        centres.append(centre + first)
        neighbours.append(neighbour + first)
        shifts.append(shift)
        first += len(frame)
    edge_index = torch.from_numpy(np.stack([np.concatenate(centres), np.concatenate(neighbours)]))
    cell = None
    stress = None
    if any(frame.cell is not None for frame in frames):
        cell = torch.from_numpy(np.stack([_complete(frame.cell) for frame in frames]))
        if labels and any(frame.stress is not None for frame in frames):
            missing = np.full((3, 3), np.nan)
            stress = torch.from_numpy(np.stack([missing if f.stress is None else f.stress for f in frames]))
    sizes = torch.tensor([len(frame) for frame in frames])
    return Batch(
        positions=torch.from_numpy(np.concatenate([frame.positions for frame in frames])),
        species=torch.from_numpy(index[np.concatenate([frame.numbers for frame in frames])]),
        frame=torch.repeat_interleave(torch.arange(len(frames)), sizes),
        edge_index=edge_index,
        edge_shift=torch.from_numpy(np.concatenate(shifts)),
        num_frames=len(frames),
        cell=cell,
        energy=torch.tensor([frame.energy for frame in frames], dtype=torch.float64) if labels else None,
        forces=torch.from_numpy(np.concatenate([frame.forces for frame in frames])) if labels else None,
        stress=stress,
    ).with_neighbours()


def _check(frame: Frame, name: str, index: np.ndarray, species: Sequence[str], *, labels: bool) -> None:
    unknown = np.unique(frame.numbers[index[frame.numbers] < 0])
    if len(unknown):
        raise InputError(
            f"{name} holds {', '.join(SYMBOLS[number] for number in unknown)}, which the model does not know (its species are "
            f"{', '.join(species)}): leave such frames out or train a model with these species"
        )
    if not np.isfinite(frame.positions).all():
        raise InputError(f"{name} has positions that are not finite: leave it out")
    if labels and not (np.isfinite(frame.energy) and np.isfinite(frame.forces).all()):
        raise InputError(
            f"{name} has an energy or forces that are missing, NaN or infinite: leave it out or repair the file"
        )


def _complete(cell: np.ndarray | None) -> np.ndarray:
    if cell is None:
        return np.eye(3)
    if np.linalg.norm(cell, axis=1).all():
        return cell
    from ase.geometry import complete_cell

    return np.asarray(complete_cell(cell))
