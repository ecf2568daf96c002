"""Errors of a model over a set, summed over ranks."""

from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from ddpkit.batch import Batch
from ddpkit.data import Loader, PreparedSet, Sweep
from ddpkit.errors import InputError
from ddpkit.ranks import phase
from ddpkit.ranks.agree import agree
from ddpkit.ranks.group import Environment

Floats = NDArray[np.float64]


@dataclass
class Errors:
    """Running sums of errors of energy per atom [eV] and force components [eV/Å].

    Attributes:
        sums: `[6]` count, sum of magnitudes and sum of squares of energies, then of forces; sums of ranks add up.
    """

    sums: np.ndarray = field(default_factory=lambda: np.zeros(6))

    def add(self, output: dict[str, Tensor], batch: Batch) -> None:
        """Adds a batch's errors, without what only fills it up."""
        assert batch.energy is not None
        assert batch.forces is not None
        atoms = torch.bincount(batch.frame, minlength=batch.num_frames)
        energy, forces = (output["energy"].detach() - batch.energy) / atoms, output["forces"].detach() - batch.forces
        if batch.mask is not None:
            energy, forces = energy[batch.real_frames()], forces[batch.mask]
        self.sums += np.concatenate([_sums(energy), _sums(forces)])

    def metrics(self) -> dict[str, float]:
        """RMSE and MAE of energy per atom [eV] and forces [eV/Å]."""
        found: dict[str, float] = {}
        for name, (count, magnitudes, squares) in zip(("energy", "forces"), self.sums.reshape(2, 3), strict=True):
            found |= {f"{name}_rmse": float(np.sqrt(squares / count)), f"{name}_mae": float(magnitudes / count)}
        return found


@dataclass(frozen=True)
class Evaluation:
    """What a model predicts for the frames of a set, the same on every rank.

    Attributes:
        indices: `[frames]` their numbers in the set, ascending.
        energy: `[frames]` predicted, eV.
        forces_abs: `[frames]` sum of |error| over a frame's force components, eV/Å.
        forces_square: `[frames]` sum of squared errors of a frame's force components, eV^2/Å^2.
        species: chemical symbols of the model.
        by_species: `[species, 3]` number of force components of each element, sum of |error|, sum of squared errors.
        kept: numbers of the frames whose forces are kept, evenly spaced over `indices`.
        forces: `[atoms of kept, 3]` predicted for them, eV/Å.
    """

    indices: NDArray[np.int64]
    energy: Floats
    forces_abs: Floats
    forces_square: Floats
    species: tuple[str, ...]
    by_species: Floats
    kept: NDArray[np.int64]
    forces: Floats


def evaluate(
    model: nn.Module,
    frames: PreparedSet,
    indices: NDArray[np.int64],
    here: Environment,
    *,
    batch_size: int = 32,
    keep_atoms: int = 50_000,
    progress: bool = False,
) -> Evaluation:
    """Predicts frames of a set on all ranks, each frame once.

    Args:
        model: of the model contract, in evaluation mode and on this rank's device.
        frames: the set.
        indices: `[frames]` which of it.
        here: where this process stands.
        batch_size: frames in a batch, over all ranks.
        keep_atoms: the predicted forces of about so many atoms are kept (for figures).
        progress: whether rank 0 shows how far it is.

    Raises:
        InputError: on every rank, where the model does not fit a frame, or predicts something that is not finite.
    """
    assert isinstance(model.r_max, float)
    indices = np.sort(indices)
    count, species = len(indices), tuple(model.species)  # type: ignore[arg-type]  # (the model contract)
    atoms = frames.atoms[indices]
    some = min(count, max(1, round(keep_atoms * count / max(1, int(atoms.sum())))))
    kept = indices[np.linspace(0, count - 1, some).astype(np.int64)]
    first = dict(zip(kept.tolist(), np.cumsum(frames.atoms[kept]) - frames.atoms[kept], strict=True))
    seen, energy, forces_abs, forces_square = np.zeros((4, count))
    by_species = np.zeros((len(species), 3))
    forces = np.zeros((int(frames.atoms[kept].sum()), 3))
    with agree("evaluating the model"):
        edges = frames.edges(model.r_max)[indices]
        sweep = Sweep(indices, atoms, edges, batch_size, world_size=here.world_size, rank=here.rank)
        loader = Loader(frames, sweep, species, model.r_max, device=here.device)
        with closing(loader.epoch(0)) as steps:
            for step, (batch,) in tqdm(
                steps, desc="evaluating", unit="batch", total=loader.steps_per_epoch(), leave=False,
                disable=not (progress and here.is_first), mininterval=1.0,
            ):  # fmt: skip
                output = model(batch)
                predicted = output["forces"].detach().to(torch.float64).cpu().numpy()
                assert batch.forces is not None
                error = predicted - batch.forces.cpu().numpy()
                by_species += _by_species(error, batch.species.cpu().numpy(), len(species))
                where = np.searchsorted(indices, step.indices)
                ends = np.cumsum(atoms[where])
                starts = ends - atoms[where]
                seen[where] += 1
                energy[where] = output["energy"].detach().to(torch.float64).cpu().numpy()
                forces_abs[where] = np.add.reduceat(np.abs(error).sum(axis=1), starts)
                forces_square[where] = np.add.reduceat(np.square(error).sum(axis=1), starts)
                for index, start, end in zip(step.indices.tolist(), starts, ends, strict=True):
                    if index in first:
                        forces[first[index] : first[index] + end - start] = predicted[start:end]
    own = (seen, energy, forces_abs, forces_square, by_species, forces)
    everything = summed(np.concatenate([part.reshape(-1) for part in own]), here)
    parts = np.split(everything, np.cumsum([part.size for part in own])[:-1])
    seen, energy, forces_abs, forces_square = parts[:4]
    assert (seen == 1).all(), "a frame was not predicted exactly once"
    with agree("evaluating the model"):
        bad = np.flatnonzero(~np.isfinite(energy + forces_square))
        if len(bad):
            raise InputError(
                f"The model's prediction for frame {indices[bad[0]]} of {frames.path} (and {len(bad) - 1} more) is NaN or "
                "infinite: use another checkpoint or leave such frames out."
            )
    return Evaluation(
        indices, energy, forces_abs, forces_square, species,
        parts[4].reshape(by_species.shape), kept, parts[5].reshape(forces.shape),
    )  # fmt: skip


@phase.waiting("the other ranks' errors")
def summed(values: Floats, here: Environment) -> Floats:
    """The sum over all ranks of equally long arrays of numbers."""
    if here.world_size == 1:
        return values
    total = torch.as_tensor(values, device=here.device if here.backend == "nccl" else "cpu")
    dist.all_reduce(total)
    return np.asarray(total.cpu().numpy())


def _by_species(error: Floats, species: NDArray[np.int64], count: int) -> Floats:
    """`[species, 3]` of force errors `[atoms, 3]`: components, sum of magnitudes, sum of squares."""
    columns = (np.full(len(error), 3.0), np.abs(error).sum(axis=1), np.square(error).sum(axis=1))
    return np.stack([np.bincount(species, weights=column, minlength=count) for column in columns], axis=1)


def _sums(errors: Tensor) -> np.ndarray:
    errors = errors.to(torch.float64)
    return torch.stack([errors.new_tensor(errors.numel()), errors.abs().sum(), errors.square().sum()]).cpu().numpy()
