"""The gate before compiled training: compiled and eager code must agree on outputs and on every parameter gradient."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ddpkit.batch import Batch
from ddpkit.errors import ParityError

# A parameter's gradient is measured against its own norm, but no less than this part of what its size makes one expect: where
# gradients cancel, rounding is all that is left.
_FLOOR = 1e-2


@dataclass(frozen=True)
class Difference:
    """How far one tensor differs.

    Attributes:
        name: `loss`, `energy`, `forces` or a parameter.
        error: norm of the difference over the norm of the eager value.
        tolerance: what is allowed.
        shape: the sizes of the batch.
    """

    name: str
    error: float
    tolerance: float
    shape: str

    @property
    def is_fine(self) -> bool:
        """Whether it is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


def tolerance_for(tensors: Sequence[Tensor]) -> float:
    """What rounding explains: 1e-10 relative where all is float64, 1e-4 for float32, more for TF32 and what is coarser."""
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

    Args:
        compiled: of the compiled code.
        eager: of eager code; None where a parameter is unused.
        gradients: which names are gradients of parameters.
        tolerance: allowed.
        shape: the sizes of the batch, in words.
    """
    norms = {name: float(value.double().norm()) for name, value in eager.items() if value is not None}
    there = {name: value for name in gradients if (value := eager[name]) is not None}
    numbers = sum(value.numel() for value in there.values())
    typical = sum(norms[name] ** 2 for name in there) ** 0.5 / max(1, numbers) ** 0.5
    result = []
    for name, value in eager.items():
        mine = compiled.get(name)
        if name not in there and value is not None and mine is not None and not (value.any() or mine.any()):
            continue  # a buffer that stays as it is
        if value is None or mine is None:
            error = 0.0 if value is None and mine is None else float("inf")
        else:
            floor = _FLOOR * typical * value.numel() ** 0.5 if name in there else 0.0
            scale = max(norms[name], floor)
            gap = float((mine.double() - value.double()).norm())
            error = gap / scale if scale else gap
        result.append(Difference(name, error, tolerance, shape))
    return result


def named(output: Any) -> dict[str, Tensor]:
    """The tensors in a model's output, by name."""
    leaves = pytree.tree_flatten_with_path(output)[0]
    return {pytree.keystr(path).strip("[]'.") or "output": x for path, x in leaves if isinstance(x, Tensor)}


def probe(outputs: Mapping[str, Tensor]) -> Tensor:
    """A loss that depends on every number that has a derivative, each with a weight of its own."""
    differentiable = [x for x in outputs.values() if x.requires_grad]
    losses = []
    for x in differentiable:
        weights = torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape)
        losses.append((x * weights).square().sum().double() + (x * weights).sum().double())
    return torch.stack(losses).sum()


def require(found: Sequence[Difference]) -> None:
    """Raises where compiled code differs.

    Raises:
        ParityError: names the worst tensor.
    """
    bad = [d for d in found if not d.is_fine]
    if not bad:
        return
    worst = max(bad, key=lambda d: float("inf") if math.isnan(d.error) else d.error)
    raise ParityError(
        f"Compiled and eager code differ: {worst.name!r} by {worst.error:.2g} relative (allowed {worst.tolerance:.0e}) on a "
        f"batch of {worst.shape}, and {len(bad) - 1} other tensors: train with compile=false, and see what in the model depends "
        "on sizes, random numbers or Python state."
    )


def samples(batch: Any) -> list[Any]:
    """Small batches of several shapes made of a batch's frames: one frame, two, and three; any other batch as it is.

    Eager code needs many times the memory of compiled code, so whole batches are not compared.
    """
    if not isinstance(batch, Batch):
        return [batch]
    atoms = torch.bincount(batch.frame, minlength=batch.num_frames)
    edges = torch.bincount(batch.frame[batch.edge_index[0]], minlength=batch.num_frames)
    usable = [n for n in torch.argsort(atoms, stable=True).tolist() if atoms[n] > 1 and edges[n] > 1]
    if not usable:
        return [batch]
    smallest = (usable * 3)[:3]
    return [select_frames(batch, smallest[:n]) for n in (1, 2, 3)]


def select_frames(batch: Batch, frames: Sequence[int]) -> Batch:
    """A batch of some of a batch's frames; a frame may come several times."""
    atoms = [torch.nonzero(batch.frame == n)[:, 0] for n in frames]
    edges = [torch.nonzero(batch.frame[batch.edge_index[0]] == n)[:, 0] for n in frames]
    starts = [sum(len(a) for a in atoms[:n]) for n in range(len(frames))]
    edge_index = torch.cat(
        [
            torch.searchsorted(a, batch.edge_index[:, e].contiguous()) + start
            for a, e, start in zip(atoms, edges, starts, strict=True)
        ],
        1,
    )
    by_atom, by_edge = torch.cat(atoms), torch.cat(edges)
    by_frame = torch.tensor(frames, device=batch.frame.device)
    index = {"positions": by_atom, "species": by_atom, "mask": by_atom, "forces": by_atom, "edge_shift": by_edge}
    index |= {"cell": by_frame, "energy": by_frame, "stress": by_frame}
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return batch.replace(
        **{name: fields[name][where] for name, where in index.items() if fields[name] is not None},
        frame=torch.cat([torch.full_like(a, n) for n, a in enumerate(atoms)]),
        edge_index=edge_index,
        num_frames=len(frames),
        neighbours=None,
        incoming=None,
    ).with_neighbours()
