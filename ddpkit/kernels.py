"""The gate before training with fast kernels: a model must compute what its reference does.

The gate before compiled training compares compiled with eager code, both on the same kernels. This one compares the kernels: the
model as it is going to be trained with one that computes the same literally, in plain PyTorch and float64.

A model takes part by a method `with_reference_kernels()`. It returns a module that is called with the same batches, frames
without edges among them, and returns the same tensors in float64; its parameters have the same names and share no memory with
the model's. An attribute `kernels` of the model names them in messages.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ddpkit.batch import Batch
from ddpkit.compile.layout import Layout, describe, sizes_of
from ddpkit.compile.parity import Difference, differences, named, samples
from ddpkit.errors import InputError, ParityError
from ddpkit.ranks.switches import tf32

# Rounding of float32 was at most 2e-5 on our models, the smallest fault that was published 1e-2.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 5e-4, torch.float16: 5e-2, torch.bfloat16: 5e-2}


def check_kernels(model: nn.Module, batch: Any, tolerance: float | None = None) -> list[Difference]:
    """Compares a model with its reference on small batches of a batch's frames, with TF32 off; leaves everything as it was.

    Compared are the outputs (energies without those of the same atoms apart), and the gradient of each output by every parameter,
    which for forces and stress is a second derivative.

    Args:
        model: in training mode; one without `with_reference_kernels` is not compared.
        batch: a `Batch`, or what else the model is called with.
        tolerance: by how much they may differ, relative; by default 1e-9 in float64 and 5e-4 in float32.

    Returns:
        What was compared, good or bad.

    Raises:
        InputError: the kernels cannot be run here.
    """
    make_reference: Callable[[], nn.Module] | None = getattr(model, "with_reference_kernels", None)
    if make_reference is None:
        return []
    reference = make_reference()
    compared: list[Difference] = []
    chosen = samples(batch)
    # Rounding to TF32 would hide what a kernel does wrong.
    with tf32(allowed=False), _buffers_kept(model):
        for small in [chosen[0], chosen[-1]] if len(chosen) > 1 else chosen:
            shape = describe(sizes_of(Layout.of([small]), small))
            try:
                ours = _outputs(model, small)
                gradients = _gradients(model, ours)
            except RuntimeError as error:
                raise InputError(
                    f"{_name(model)} cannot be run here ({str(error).splitlines()[0]}): choose other kernels, or another device."
                ) from error
            theirs = _outputs(reference, small)
            expected = _gradients(reference, theirs)
            allowed = tolerance or max(_TOLERANCES.get(x.dtype, 0.0) for x in (*model.parameters(), *ours.values()))
            alone = _apart(reference, small)
            for name in set(alone) & set(theirs):
                ours[name], theirs[name] = ours[name] - alone[name], theirs[name] - alone[name]
            compared += differences(_detached(ours), _detached(theirs), [], allowed, shape)
            for name, by in expected.items():
                label = f"{name}, its gradient by "
                fast = {label + k: g for k, g in gradients.get(name, {}).items()}
                compared += differences(
                    fast, {label + k: g for k, g in by.items()}, [label + k for k in by], allowed, shape
                )
    return compared


def require_kernels(model: nn.Module, compared: Sequence[Difference]) -> None:
    """Raises where kernels differ from the reference.

    Args:
        model: whose they are.
        compared: what `check_kernels` returned.

    Raises:
        ParityError: names the kernels, the worst tensor, and by how much it differs.
    """
    bad = [d for d in compared if not d.is_fine]
    if not bad:
        return
    outputs = [d for d in bad if ", its gradient by " not in d.name]
    worst = max(outputs or bad, key=lambda d: d.error)
    others = len({d.name for d in bad}) - 1
    raise ParityError(
        f"{_name(model)} compute something else than its reference in plain PyTorch: {worst.name} by {worst.error:.2g} relative "
        f"(allowed {worst.tolerance:.0e}) on a batch of {worst.shape}, and {others} other tensors: choose other kernels, and "
        "report this with the versions of their package and of the GPU."
    )


def _name(model: nn.Module) -> str:
    kernels = getattr(model, "kernels", None)
    return f"The kernels of {type(model).__name__}" + (f" (kernels={kernels})" if isinstance(kernels, str) else "")


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Puts back what happens to the model's buffers inside."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _outputs(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    return named(model(batch))


def _detached(outputs: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    return {name: value.detach() for name, value in outputs.items()}


def _gradients(model: nn.Module, outputs: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor | None]]:
    """For each output, the gradient of its finite numbers, weighted, by every parameter."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    result: dict[str, dict[str, Tensor | None]] = {}
    for name, value in outputs.items():
        if value.requires_grad and parameters:
            finite = torch.where(torch.isfinite(value), value, 0)
            weights = torch.cos(torch.arange(value.numel(), dtype=torch.float64, device=value.device)).reshape(
                value.shape
            )
            total = (finite.double() * weights).sum()
            by = torch.autograd.grad(total, list(parameters.values()), retain_graph=True, allow_unused=True)
            result[name] = dict(zip(parameters, by, strict=True))
    return result


def _apart(reference: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The energies of the atoms without neighbours, which would hide what kernels do to the rest."""
    if not isinstance(batch, Batch):
        return {}
    none = batch.replace(
        edge_index=batch.edge_index[:, :0], edge_shift=batch.edge_shift[:0], neighbours=None, incoming=None
    ).with_neighbours()
    return {name: value.detach() for name, value in _outputs(reference, none).items() if name == "energy"}
