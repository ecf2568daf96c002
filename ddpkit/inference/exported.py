"""Exported models in Python."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpkit.batch import Batch
from ddpkit.checkpoint import load_model
from ddpkit.errors import InputError
from ddpkit.frames import stress_of, sum_over_frames
from ddpkit.inference.addressing import fullness
from ddpkit.inference.inputs import SMALLEST, Inputs, inputs_of
from ddpkit.inference.memory import keep_freed_memory
from ddpkit.inference.package import SUFFIX, load_package, read_metadata


def load_exported(path: Path | str, device: torch.device | str | None = None) -> "Exported":
    """A model that `ddpkit export` wrote, to be called with a `Batch`; `ddpkit.Calculator` takes it too.

    Args:
        path: of the file.
        device: for a model that was compiled for GPUs, the one to compute on; by default the first. A model that was compiled for
            CPUs computes there, whatever this says.

    Raises:
        InputError: the file is no package, is damaged, or does not run here (another torch, no GPU, another processor).
    """
    return Exported(Path(path), device)


def load(path: Path, device: torch.device | str | None = None) -> nn.Module:
    """A model to predict with, on a device: of a run folder, a checkpoint or an exported file (which has its own device).

    Raises:
        InputError: it cannot be loaded.
    """
    if path.suffix == SUFFIX:
        return load_exported(path, device)
    model = load_model(path)
    return model if device is None else model.to(device)


class Exported(nn.Module):
    """A compiled model, as a module of the model contract without parameters.

    Called with a `Batch` of any number of atoms, edges and frames, it returns `energy` `[frames]` in eV, `forces` `[atoms, 3]` in
    eV/Å and, where the batch has cells, `stress` `[frames, 3, 3]` in eV/Å^3, all float64, without derivatives, on the batch's
    device.

    Args:
        path: see `load_exported`.
        device: see `load_exported`.

    Attributes:
        species: chemical symbols; a batch's `species` are indices into these.
        r_max: cutoff, Å.
        metadata: all that the file says of itself (`ddpkit.inference.package.Metadata`).
        device: where it computes.
    """

    def __init__(self, path: Path, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.path = path
        self.metadata = read_metadata(path)
        self.device = torch.device(self.metadata.device)
        if device is not None and torch.device(device).type == self.device.type:
            self.device = torch.device(device)
        self.species = tuple(self.metadata.species)
        self.r_max = self.metadata.r_max
        self._run = load_package(path, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy loads the file again."""
        return load_exported, (self.path, self.device)

    @torch.no_grad()
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Energies, forces and stress.

        Raises:
            InputError: there are more atoms or edges than code for GPUs can address.
        """
        home = batch.positions.device
        batch = batch.to(self.device)
        inputs = self._inputs(batch)
        self._require_reach(inputs)
        energies, slopes = self._run(*inputs.arguments())
        atoms, edges = batch.positions.shape[0], batch.edge_index.shape[1]
        centre, neighbour = inputs.centre[:edges], inputs.neighbour[:edges]
        energies, slopes = energies[:atoms], slopes[:edges]  # without what padded them
        forces = slopes.new_zeros(atoms, 3).index_add(0, centre, slopes).index_add(0, neighbour, -slopes)
        result = {"energy": sum_over_frames(energies, batch), "forces": forces}
        if batch.cell is not None:
            of_edges = inputs.vectors[:edges].unsqueeze(2) * slopes.unsqueeze(1)
            virial = forces.new_zeros(batch.num_frames, 3, 3).index_add(0, batch.frame[centre], of_edges)
            result["stress"] = stress_of(virial, batch.cell)
        return {name: value.to(home) for name, value in result.items()}

    def _require_reach(self, inputs: Inputs) -> None:
        sizes = inputs.sizes()
        if (times := fullness(self.metadata.elements, sizes)) > 1:
            raise InputError(
                f"{sizes['owned']} atoms with {sizes['edges']} edges are {times:.1f} times what {self.path} can compute "
                "at once (code for GPUs addresses 2^31 elements of a tensor): give it fewer frames or atoms, or run LAMMPS, "
                f"{'on more ranks' if self.metadata.message_passing else 'which divides atoms by itself'}."
            )

    def _inputs(self, batch: Batch) -> Inputs:
        positions = batch.positions.double()
        centre, neighbour = (ends.clone() for ends in batch.edge_index)  # code for GPUs takes memory to be aligned
        vectors = positions.index_select(0, neighbour) - positions.index_select(0, centre) + batch.edge_shift
        batch = batch.with_neighbours()
        outgoing, incoming = batch.neighbours, batch.incoming
        assert outgoing is not None
        if min(*outgoing.shape, centre.shape[0]) >= SMALLEST:
            passes = self.metadata.message_passing
            return Inputs(vectors, batch.species, centre, neighbour, outgoing, incoming if passes else None)
        return inputs_of(
            vectors,
            batch.species,
            centre,
            neighbour,
            positions.shape[0],
            message_passing=self.metadata.message_passing,
            beyond=2 * self.r_max,
        )
