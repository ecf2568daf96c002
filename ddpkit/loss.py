"""Losses whose average over ranks is the mean over the whole global batch."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ddpkit.batch import Batch
from ddpkit.errors import InputError


def global_mean(local_sum: Tensor, global_count: Tensor | float) -> Tensor:
    """Scales a rank's sum so that the average over ranks is the mean over the global batch.

    Gradient synchronisation averages ranks equally, so a rank's share is `world_size * local_sum / global_count`. With
    gradient accumulation, `global_count` counts all micro-batches of the step: their gradients add up.

    Args:
        local_sum: a sum over this rank's samples, of any shape; usually `[]`.
        global_count: the number of samples on all ranks, in all micro-batches; of a shape that divides it.

    Returns:
        This rank's share, of the shape of `local_sum`.
    """
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return local_sum * (world_size / global_count)


@dataclass(frozen=True)
class EnergyForcesLoss:
    """Weighted sum of mean squared errors of energy per atom, force components and stress components.

    Without `per_atom`, the error of energy is that of a frame's whole energy.

    With `huber_delta`, an error e beyond it costs `huber_delta * (2 |e| - huber_delta)` in place of `e^2` (twice the function of
    Huber, Ann. Math. Statist. 35, 73 (1964)): its gradient is that of an error of `huber_delta`, so that a few frames with
    forces a thousand times the usual ones do not dominate a step.

    Called with a model's output and its batch, it returns this rank's share (`global_mean`) of `loss` and of its terms
    `loss_energy` [eV^2], `loss_forces` [eV^2/Å^2] and, with a stress weight, `loss_stress` [eV^2/Å^6], each 0-d. A frame whose
    stress is NaN has no stress label: it adds nothing, and the mean is over the other frames (`Batch.stress_total`). In a
    padded batch, padding atoms and frames of such atoms alone add nothing, whatever their values are.
    """

    energy: float = 1.0
    forces: float = 1.0
    stress: float = 0.0
    huber_delta: float | None = None  # in the unit of each error: eV, eV/Å, eV/Å^3
    per_atom: bool = True

    def __call__(self, output: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """The loss and its unweighted terms.

        Raises:
            InputError: stress is to be trained on, but the model gives none for periodic frames that have one.
        """
        assert batch.energy is not None
        assert batch.forces is not None
        real = torch.ones_like(batch.positions[:, 0]) if batch.mask is None else batch.mask.to(batch.positions.dtype)
        atoms = real.new_zeros(batch.num_frames).index_add(0, batch.frame, real)
        is_real = None if batch.mask is None else atoms > 0
        frames_total = _count(batch.frames_total, (atoms > 0).sum())
        energy_error = _kept(output["energy"] - batch.energy, is_real)
        if self.per_atom:
            energy_error = energy_error / atoms.clamp(min=1)
        force_error = _kept(output["forces"] - batch.forces, batch.mask)
        terms = {
            "loss_energy": global_mean(self._cost(energy_error).sum(), frames_total),
            "loss_forces": global_mean(self._cost(force_error).sum(), 3 * _count(batch.atoms_total, real.sum())),
        }
        loss = self.energy * terms["loss_energy"] + self.forces * terms["loss_forces"]
        if self.stress:
            terms["loss_stress"] = self._stress_term(output, batch, frames_total, is_real)
            loss = loss + self.stress * terms["loss_stress"]
        return {"loss": loss, **terms}

    def _stress_term(
        self, output: dict[str, Tensor], batch: Batch, frames_total: Tensor, is_real: Tensor | None
    ) -> Tensor:
        if batch.stress is None:  # other ranks or steps may have some
            return torch.zeros_like(frames_total)
        if "stress" not in output:
            raise InputError(
                "loss.stress is set, but the model's output has no stress: set loss.stress=0 or use a model that has"
            )
        unlabelled = batch.stress.isnan()
        if is_real is not None:
            unlabelled = unlabelled | ~is_real[:, None, None]
        error = torch.where(unlabelled, 0.0, output["stress"] - torch.where(unlabelled, 0.0, batch.stress))
        total = batch.stress_total
        if total is None:
            total = frames_total if batch.frames_total is not None else (~unlabelled[:, 0, 0]).sum().to(torch.float64)
        return global_mean(self._cost(error).sum(), 9 * total.clamp(min=1))

    def _cost(self, error: Tensor) -> Tensor:
        if self.huber_delta is None:
            return error.square()
        inside = error.clamp(-self.huber_delta, self.huber_delta)
        return inside * (2 * error - inside)


def _kept(error: Tensor, keep: Tensor | None) -> Tensor:
    """Errors `[n, ...]` with 0 where `keep` `[n]` is False; not a product, since what is left out may be no number."""
    if keep is None:
        return error
    return torch.where(keep.reshape(-1, *[1] * (error.dim() - 1)), error, 0.0)


def _count(total: Tensor | None, local: Tensor) -> Tensor:
    """The global count, or this batch's own where it is the whole."""
    return local.to(torch.float64) if total is None else total
