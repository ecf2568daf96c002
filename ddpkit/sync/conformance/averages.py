"""Gradients are those of one process that holds the batches of all ranks."""

import copy

import torch
from torch import Tensor, nn

from ddpkit.sync.conformance.setting import (
    Potential,
    Setting,
    assert_equal_on_ranks,
    assert_gradients,
    backward,
    case,
    force_loss,
    random,
    reference_loss,
)


def _train_beside_reference(setting: Setting, *, set_to_none: bool) -> None:
    model = Potential()
    sync = setting.sync(model)
    reference = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.5) for m in (model, reference)]
    for step in range(4):
        backward(force_loss(setting, sync.module, setting.points(setting.rank, step), step))
        sync.synchronize()
        backward(reference_loss(setting, reference, step))
        assert_gradients(setting, model, reference)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    assert_equal_on_ranks(setting, list(model.parameters()))


@case()
def union_batch(setting: Setting) -> None:
    """Gradients of energies and forces (double backward) on unequal batches are those of one process with all of them."""
    _train_beside_reference(setting, set_to_none=True)


@case()
def zero_grad_in_place(setting: Setting) -> None:
    """The same with gradients that are set to zero instead of dropped."""
    _train_beside_reference(setting, set_to_none=False)


@case(ranks=2)
def different_seeds(setting: Setting) -> None:
    """Ranks that start from different weights and buffers hold rank 0's afterwards."""
    torch.manual_seed(setting.rank)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model.register_buffer("count", torch.tensor(7 + setting.rank))
    sync = setting.sync(model)
    torch.manual_seed(0)
    expected = nn.Linear(3, 4)
    assert torch.equal(model.get_parameter("0.weight"), expected.weight)
    assert int(model.get_buffer("count")) == 7
    backward(sync.module(torch.randn(5, 3)).sum())
    sync.synchronize()
    assert_equal_on_ranks(setting, [p.grad for p in model.parameters() if p.grad is not None])


@case()
def mixed_dtypes(setting: Setting) -> None:
    """Parameters of several dtypes."""
    dtypes = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16}
    model = nn.ModuleDict({name: nn.Linear(3, 2, dtype=dtype) for name, dtype in dtypes.items()})
    whole = _Sum(model)
    sync = setting.sync(whole)
    reference = copy.deepcopy(whole)
    for step in range(2):
        backward(setting.share(sync.module(setting.points(setting.rank, step)), step))
        sync.synchronize()
        points = setting.all_points(step)
        backward(reference(points).sum() / len(points))
        for (name, p), q in zip(whole.named_parameters(), reference.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert p.grad.dtype == p.dtype
            tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}[p.dtype]
            setting.assert_close(p.grad, q.grad, tolerance, name)
        whole.zero_grad()
        reference.zero_grad()


class _Sum(nn.Module):
    """Adds layers of several dtypes in float64."""

    def __init__(self, layers: nn.ModuleDict) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, points: Tensor) -> Tensor:
        return sum(
            (layer(points.to(next(layer.parameters()).dtype)).double().sin().sum(-1) for layer in self.layers.values()),
            start=torch.zeros(()),
        )


@case()
def shared(setting: Setting) -> None:
    """A parameter that two layers share counts once."""
    model = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), nn.Tanh(), nn.Linear(3, 3, dtype=torch.float64))
    model[2].weight = model[0].weight
    sync = setting.sync(model)
    reference = copy.deepcopy(model)
    for step in range(3):
        backward(setting.share(sync.module(setting.points(setting.rank, step)) ** 2, step))
        sync.synchronize()
        points = setting.all_points(step)
        backward((reference(points) ** 2).sum() / len(points))
        assert_gradients(setting, model, reference)
        model.zero_grad()
        reference.zero_grad()


@case()
def accumulation(setting: Setting) -> None:
    """Micro-batches inside `no_sync()` stay on their rank; the one after them brings the sum of all."""
    model = Potential()
    sync = setting.sync(model)
    reference = copy.deepcopy(model)
    for step in range(3):
        calls = sync.stats.calls
        halves = setting.points(setting.rank, step).tensor_split(3)
        for half in halves[:-1]:
            with sync.no_sync():
                backward(force_loss(setting, sync.module, half, step))
                before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
                sync.synchronize()
                after = [p.grad for p in model.parameters() if p.grad is not None]
                assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "no_sync() communicated"
        backward(force_loss(setting, sync.module, halves[-1], step))
        sync.synchronize()
        assert sync.stats.calls == calls + 1
        points = setting.all_points(step)
        energy, forces = reference(points)
        backward(((energy - 1) ** 2 + ((forces - points) ** 2).sum(-1)).sum() / len(points))
        assert_gradients(setting, model, reference)
        model.zero_grad(set_to_none=step % 2 == 0)
        reference.zero_grad(set_to_none=step % 2 == 0)


@case(ranks=2)
def two_ranks_bitwise(setting: Setting) -> None:
    """At two ranks the average has the bits of (a + b) / 2; at any number of them, all ranks have the same bits."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(17, 17, bias=False) for _ in range(5)))
    sync = setting.sync(model)
    for step in range(3):
        local = []
        for rank in range(setting.size):
            copied = copy.deepcopy(model)
            copied.zero_grad()
            backward(copied(random(9, 17, seed=10 * step + rank).float()).square().sum())
            local.append([p.grad for p in copied.parameters()])
        backward(sync.module(random(9, 17, seed=10 * step + setting.rank).float()).square().sum())
        sync.synchronize()
        gradients = [p.grad for p in model.parameters()]
        if setting.size == 2:
            for value, a, b in zip(gradients, *local, strict=True):
                assert value is not None
                average = (a + b) / 2  # type: ignore[operator]
                setting.assert_close(value, average, 0.0, "the average of two ranks has other bits than (a + b) / 2")
        assert_equal_on_ranks(setting, [g for g in gradients if g is not None])
        model.zero_grad()


@case(ranks=2)
def stats(setting: Setting) -> None:
    """Bytes, collectives and seconds are told."""
    model = Potential()
    sync = setting.sync(model)
    for _ in range(2):
        backward(force_loss(setting, sync.module, setting.points(setting.rank)))
        sync.synchronize()
        model.zero_grad()
    told = sync.stats
    assert told.calls == 2
    assert told.bytes >= sum(p.numel() for p in model.parameters()) * 2
    assert told.collectives >= 1
    assert told.seconds > 0
