"""A run's trajectory in few numbers: a fixed random projection of the parameters, and the loss on one fixed batch.

Distances of projections estimate distances of parameters (with a standard deviation of 9 %), without keeping the parameters.
Unlike the losses of changing batches, they do not cross zero, and they are the same wherever a run computes them.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpkit.record import CsvLog, drop_rows_after

WIDTH = 64
PER_DECADE = 10
COLUMNS = ("step", *(f"p{n}" for n in range(WIDTH)), "probe_loss")
_SEED = 20_250_416  # of the signs; another one gives numbers that cannot be compared


def is_due(step: int) -> bool:
    """Whether a step is recorded: ten in each power of ten, evenly spaced in the logarithm, and all up to the tenth."""
    if step < 1:
        return False
    place = round(PER_DECADE * math.log10(step))
    return step <= PER_DECADE or any(step == round(10 ** (n / PER_DECADE)) for n in (place - 1, place, place + 1))


class Projection:
    """Writes `projection.csv` of a run, from `begin()` on. Rank 0 alone holds one.

    Args:
        model: whose trained parameters are projected: added up with random signs into 64 numbers.
        probe: computes the loss on the fixed batch.
        path: the file; continued where it exists.
        resume_from: rows of later steps are dropped.
    """

    def __init__(self, model: nn.Module, probe: Callable[[], float], path: Path, *, resume_from: int = 0) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._signs = list(_signs(self._parameters))
        self._probe, self._path = probe, path
        self._last = resume_from

    def begin(self) -> None:
        """Opens the file; a run from scratch records where it starts."""
        drop_rows_after(self._path, "step", self._last)
        self._log = CsvLog(self._path, COLUMNS)
        if not self._last:
            self._write(0)

    def after(self, step: int, *, ends: bool = False) -> None:
        """Records a step that is due, or the last one."""
        if step > self._last and (ends or is_due(step)):
            self._write(step)
            self._last = step

    def _write(self, step: int) -> None:
        numbers = project(self._parameters, self._signs).tolist()
        names = dict(zip(COLUMNS[1:-1], numbers, strict=True))
        self._log.write({"step": step, **names, "probe_loss": self._probe()})


@torch.no_grad()
def project(parameters: list[nn.Parameter], signs: list[Tensor]) -> Tensor:
    """`[64]` float64: sums of the parameters times their signs, every 64th of a parameter into the same one."""
    total = torch.zeros(WIDTH, dtype=torch.float64, device=parameters[0].device)
    for parameter, sign in zip(parameters, signs, strict=True):
        values = torch.zeros(sign.shape, dtype=torch.float64, device=parameter.device)
        flat = torch.view_as_real(parameter) if parameter.is_complex() else parameter
        values.view(-1)[: flat.numel()] = flat.reshape(-1)
        total += (values * sign).sum(0).to(total.device)
    return total.cpu()


def _signs(parameters: list[nn.Parameter]) -> Iterator[Tensor]:
    """Of each parameter, `[rows, 64]` int8; drawn on the CPU, so that they are the same on every device."""
    generator = torch.Generator().manual_seed(_SEED)
    for parameter in parameters:
        rows = -(-parameter.numel() * (2 if parameter.is_complex() else 1) // WIDTH)
        drawn = torch.randint(0, 2, (rows, WIDTH), dtype=torch.int8, generator=generator)
        yield (2 * drawn - 1).to(parameter.device)
