"""The gate before compiled training: compiled and eager code must agree on outputs and on every parameter gradient."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ddpkit.batch import Batch, select_frames
from ddpkit.errors import InputError, ParityError
from ddpkit.torch_private import pytree

# A parameter's gradient is measured against its own norm, but no less than this part of what its size makes one expect: where
# gradients cancel, rounding is all that is left.
_FLOOR = 1e-2


@dataclass(frozen=True)
class Difference:
    """How far one tensor differs.

    Attributes:
        name: `loss`, `energy`, `forces` or a parameter.
        error: norm of the difference over the norm of the eager value.
        tolerance: the largest error that is allowed.
        shape: the sizes of the batch.
        is_finite: False for a loss or gradient that is NaN or infinite in both, so that nothing can be compared.
    """

    name: str
    error: float
    tolerance: float
    shape: str
    is_finite: bool = True

    @property
    def is_fine(self) -> bool:
        """Whether the error is within the tolerance, or neither value is finite. NaN in only one of them is a difference."""
        return not self.is_finite or self.error <= self.tolerance


@dataclass
class Tally:
    """Costs and check results of all code that was compiled for a model.

    Attributes:
        examples: batches of other shapes than the first, which show what varies and are checked too.
        differences: all that the checks measured so far, within the tolerance or not.
        seconds: time spent on tracing, compiling and checking.
        eager: number of batches that were run eagerly so far.
    """

    examples: list[Any] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    seconds: float = 0.0
    eager: int = 0


def tolerance_for(tensors: Sequence[Tensor]) -> float:
    """The relative difference that rounding explains: 1e-10 in float64, 1e-4 in float32, more in TF32 and half precision."""
    kinds = {t.dtype for t in tensors if t.is_floating_point()}
    if kinds & {torch.bfloat16, torch.float16}:
        return 5e-2
    if torch.float32 not in kinds:
        return 1e-10
    on_gpu = any(t.is_cuda for t in tensors)
    return 1e-2 if on_gpu and torch.backends.cuda.matmul.allow_tf32 else 1e-4


def differences(
    compiled: Mapping[str, Tensor | None],
    eager: Mapping[str, Tensor | None],
    gradients: Sequence[str],
    tolerance: float,
    shape: str,
) -> list[Difference]:
    """Compares tensors by name.

    Numbers of an output that are NaN or infinite in both (the stress of a frame without a cell) are left out; a loss or gradient
    with such numbers is not finite.

    Args:
        compiled: of the compiled code.
        eager: of eager code; None where a parameter is unused.
        gradients: which names are gradients of parameters.
        tolerance: allowed.
        shape: the sizes of the batch, in words.
    """
    norms = {name: float(_exact(value).norm()) for name, value in eager.items() if value is not None}
    used = {name: value for name in gradients if (value := eager[name]) is not None}
    finite = [name for name in used if math.isfinite(norms[name])]
    numbers = sum(used[name].numel() for name in finite)
    typical = sum(norms[name] ** 2 for name in finite) ** 0.5 / max(1, numbers) ** 0.5
    result = []
    for name, value in eager.items():
        other = compiled.get(name)
        if name not in used and value is not None and other is not None and not (value.any() or other.any()):
            continue  # a buffer that stays as it is
        if value is None or other is None:
            error = 0.0 if value is None and other is None else float("inf")
        elif (name in used or name == "loss") and not (torch.isfinite(value).all() or torch.isfinite(other).all()):
            result.append(Difference(name, math.nan, tolerance, shape, is_finite=False))
            continue
        else:
            floor = _FLOOR * typical * value.numel() ** 0.5 if name in used else 0.0
            error = relative_error(other, value, floor)
        result.append(Difference(name, error, tolerance, shape))
    return result


def relative_error(other: Tensor, value: Tensor, floor: float = 0.0) -> float:
    """The norm of the difference over that of `value`; infinite where they are not finite in the same places.

    Args:
        other: another way to compute the same.
        value: of any shape; where it is zero, the error is absolute.
        floor: the least to divide by.
    """
    if other.shape != value.shape:
        return math.inf
    finite = torch.isfinite(value)
    if not torch.equal(finite, torch.isfinite(other)):
        return math.inf
    other, value = _exact(other[finite]), _exact(value[finite])
    gap, scale = float((other - value).norm()), max(float(value.norm()), floor)
    return gap / scale if scale else gap


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def named(output: Any) -> dict[str, Tensor]:
    """The tensors in a model's output, by name."""
    leaves = pytree.tree_flatten_with_path(output)[0]
    return {pytree.keystr(path).strip("[]'.") or "output": x for path, x in leaves if isinstance(x, Tensor)}


def probe(outputs: Mapping[str, Tensor]) -> Tensor:
    """A loss `[]` float64 that depends on every finite number that has a derivative, each with a weight of its own."""
    differentiable = [torch.where(torch.isfinite(x), x, 0) for x in outputs.values() if x.requires_grad]
    losses = []
    for x in differentiable:
        weights = torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape)
        losses.append((x * weights).square().sum().double() + (x * weights).sum().double())
    return torch.stack(losses).sum()


def require(measured: Sequence[Difference]) -> None:
    """Raises where compiled code differs.

    Raises:
        ParityError: names the worst tensor.
    """
    bad = [d for d in measured if not d.is_fine]
    if not bad:
        return
    worst = max(bad, key=lambda d: float("inf") if math.isnan(d.error) else d.error)
    raise ParityError(
        f"Compiled and eager code differ: {worst.name!r} by {worst.error:.2g} relative (allowed {worst.tolerance:.0e}) on a "
        f"batch of {worst.shape}, and {len(bad) - 1} other tensors: train with compile=false, and see what in the model depends "
        "on sizes, random numbers or Python state."
    )


def require_finite(measured: Sequence[Difference]) -> None:
    """Raises where there was no batch on which the loss and all gradients are finite.

    Args:
        measured: what was compared, of at least one batch.

    Raises:
        InputError: names the first tensor and its batch.
    """
    bad = [d for d in measured if not d.is_finite]
    if not bad or {d.shape for d in measured} - {d.shape for d in bad}:
        return
    first = "loss" if bad[0].name == "loss" else f"gradient of {bad[0].name!r}"
    others = f" (and {len({d.name for d in bad}) - 1} other tensors)" if len({d.name for d in bad}) > 1 else ""
    raise InputError(
        f"The {first}{others} is NaN or infinite on a batch of {bad[0].shape}, in eager code as in compiled code: look for "
        "labels and positions that are no numbers, atoms on one place, and weights or settings with which the loss overflows."
    )


def samples(batch: Any) -> list[Any]:
    """Small batches of several shapes made of a batch's frames: one frame, two, and three; any other batch as it is.

    Eager code needs many times the memory of compiled code, so whole batches are not compared. Of a padded batch, each sample
    ends with a frame of padding: with atoms that have edges, and one that has none, as far as the batch has such.
    """
    if not isinstance(batch, Batch):
        return [batch]
    atoms = torch.bincount(batch.frame, minlength=batch.num_frames)
    edges = torch.bincount(batch.frame[batch.edge_index[0]], minlength=batch.num_frames)
    real = batch.real_frames()
    usable = [n for n in torch.argsort(atoms, stable=True).tolist() if real[n] and atoms[n] > 1 and edges[n] > 1]
    if not usable:
        return [batch]
    smallest = (usable * 3)[:3]
    padding = []
    if batch.mask is not None:
        padding = [batch.num_frames - 1]
        batch = _with_little_padding(batch)
    return [select_frames(batch, [*smallest[:n], *padding]) for n in (1, 2, 3)]


def _with_little_padding(batch: Batch) -> Batch:
    """A padded batch whose atoms of padding but for the first two and the last are in no frame that can be selected."""
    assert batch.mask is not None
    number = (~batch.mask).cumsum(0)
    surplus = ~batch.mask & (number > 2) & (number < number.max())
    return batch.replace(frame=batch.frame.masked_fill(surplus, batch.num_frames))
