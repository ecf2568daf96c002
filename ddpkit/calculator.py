"""Models as calculators of ASE."""

from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator as AseCalculator
from ase.calculators.calculator import PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress
from torch import nn

from ddpkit.data import Frame, collate
from ddpkit.errors import InputError


class Calculator(AseCalculator):  # type: ignore[misc]
    """Energy [eV], forces [eV/Å] and, for periodic cells, stress [eV/Å^3] of a model, for ASE.

    Args:
        model: a module of the model contract (called with a `Batch`, with the attributes `species` and `r_max`), or the path of a
            run folder, a checkpoint or a file of `ddpkit export`.
        device: where to compute; the GPU where there is one. An exported model computes where it was compiled for.
        options: passed on to ASE's calculator.

    Raises:
        InputError: the model has no `species` or `r_max`, or it cannot be loaded.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces", "stress"]

    def __init__(self, model: nn.Module | str | Path, device: str | torch.device | None = None, **options: Any) -> None:
        super().__init__(**options)
        if not isinstance(model, nn.Module):
            from ddpkit.inference.exported import load

            model = load(Path(model))
        for name in ("species", "r_max"):
            if not hasattr(model, name):
                raise InputError(f"{type(model).__name__} has no attribute {name}: a calculator needs a model that has")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device).eval()
        self._species: tuple[str, ...] = tuple(cast("Any", model).species)
        self._r_max = float(cast("Any", model).r_max)

    def calculate(
        self, atoms: Atoms | None = None, properties: list[str] | None = None, system_changes: list[str] = all_changes
    ) -> None:
        """Computes all properties at once.

        Raises:
            InputError: the model does not know a species, or the atoms cannot be computed.
            PropertyNotImplementedError: stress is asked for without a periodic cell.
        """
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        if not len(self.atoms):
            raise InputError("There are no atoms to compute: give at least one.")
        periodic = bool(self.atoms.pbc.any())
        if not np.linalg.norm(self.atoms.cell[self.atoms.pbc], axis=1).all():
            raise InputError("A periodic direction has no lattice vector: set the cell, or pbc=False.")
        if "stress" in (properties or ()) and not periodic:
            raise PropertyNotImplementedError("stress needs a periodic cell")
        frame = Frame(
            numbers=self.atoms.numbers.astype(np.int64),
            positions=np.array(self.atoms.positions),
            energy=np.nan,
            forces=np.full((len(self.atoms), 3), np.nan),
            cell=np.array(self.atoms.cell) if periodic else None,
            pbc=np.array(self.atoms.pbc),
            name="the configuration",
        )
        batch = collate([frame], self._species, self._r_max, labels=False)
        output = self.model(batch.to(self.device))
        energy = float(output["energy"][0].detach())
        if not np.isfinite(energy):
            raise InputError(
                f"The energy is {energy}: atoms lie on top of one another, or the model's weights are not finite."
            )
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "forces": output["forces"].detach().cpu().double().numpy(),
        }
        if "stress" in output:
            self.results["stress"] = full_3x3_to_voigt_6_stress(output["stress"][0].detach().cpu().double().numpy())
