"""The exponential moving average of a model's weights, which validation and prediction use."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn

from ddpkit.torch_private import copy_all, homes_of_buffers, lerp_all

T = TypeVar("T")


class MovingAverage(nn.Module):
    """Averages the weights of a model. Its buffers, and weights that are no floating-point numbers, are copied.

    `torch.optim.swa_utils.AveragedModel` computes the same bits, and its checkpoints can be loaded; but it looks at a number of
    the average and walks through all modules at every update.

    Args:
        model: its weights as they are now count as the first sample. Adam's first step moves each by the whole rate: a second
            stage would start its average from there, far from where the first one ended. The model must keep its parameters (not
            their values) from now on.
        decay: how much of the average an update keeps.

    Attributes:
        module: a copy of the model, with the averages as its weights.
        n_averaged: `[]` int64, the number of samples.
    """

    n_averaged: Tensor

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = deepcopy(model)
        self.register_buffer("n_averaged", torch.ones((), dtype=torch.int64, device=next(model.parameters()).device))
        self._weight = 1 - decay
        weights = list(zip(self.module.parameters(), model.parameters(), strict=True))
        self._averaged = _grouped((pair for pair in weights if _is_averaged(pair[1])), _kind)
        self._copied = _grouped((pair for pair in weights if not _is_averaged(pair[1])), _kind)
        # By name, because a model may put another tensor there.
        buffers = zip(self.module.buffers(), homes_of_buffers(model), strict=True)
        self._tables = _grouped(buffers, lambda place: _kind(place[0][place[1]]))

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the model's weights as the next sample.

        Its launches are few and the same at every call, and the host reads nothing: a CUDA graph may hold them.
        """
        for averages, weights in self._averaged:
            lerp_all(averages, weights, self._weight)
        for copies, weights in self._copied:
            copy_all(copies, weights)
        for copies, places in self._tables:
            copy_all(copies, [home[name] for home, name in places])
        self.n_averaged.add_(1)


def moving_average(model: nn.Module, decay: float) -> MovingAverage | None:
    """The moving average of the weights; None for decay 0."""
    return MovingAverage(model, decay) if decay else None


def _is_averaged(weight: Tensor) -> bool:
    return weight.is_floating_point() or weight.is_complex()


def _kind(tensor: Tensor) -> tuple[torch.device, torch.dtype]:
    return tensor.device, tensor.dtype


def _grouped(
    pairs: Iterable[tuple[Tensor, T]], kind: Callable[[T], tuple[torch.device, torch.dtype]]
) -> list[tuple[list[Tensor], list[T]]]:
    """Copies and their originals, in two lists for each device and dtype: a launch takes such lists."""
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[T]]] = {}
    for copy, original in pairs:
        copies, originals = groups.setdefault(kind(original), ([], []))
        copies.append(copy)
        originals.append(original)
    return list(groups.values())
