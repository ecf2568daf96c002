"""The same through a compiled step, recorded steps included."""

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ddpkit.ranks.group import environment
from ddpkit.sync import acts_of
from ddpkit.sync.conformance.setting import (
    UNUSED,
    Potential,
    Setting,
    Weights,
    assert_equal_on_ranks,
    backward,
    case,
)


def _compiled_step(setting: Setting, parts: int, steps: int = 3, **options: Any) -> int:
    """Takes compiled steps of SGD, and compares what they change with gradients over the union of the ranks' batches.

    Returns:
        How many were replayed.
    """
    from ddpkit.step import make_step

    def batches(rank: int, step: int) -> list[dict[str, Tensor]]:
        count = torch.tensor(float(len(setting.all_points(step))), dtype=torch.float64)
        doubled = torch.cat([setting.points(rank, step)] * 2)
        return [{"points": part, "count": 2 * count} for part in doubled.tensor_split(parts)]

    def criterion(output: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> Tensor:
        energy, forces = output
        terms = (energy - 1) ** 2 + ((forces - batch["points"]) ** 2).sum(-1)
        return terms.sum() * (setting.size / batch["count"])

    torch.manual_seed(setting.rank)
    model = _OfDict(Potential())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    step = make_step(
        model, criterion, optimizer, strategy=setting.strategy, compile=True, comm=setting.comm,
        examples=batches(setting.rank, 9), **({"timeout": 60.0} | setting.options | options),
    )  # fmt: skip
    setting.made.append(step.sync)
    for number in range(steps):
        before = copy.deepcopy(model)
        step(batches(setting.rank, number), planned=True)
        for rank in range(setting.size):
            for batch in batches(rank, number):
                backward(criterion(before(batch), batch) / setting.size)
        for (name, after), start in zip(model.named_parameters(), before.parameters(), strict=True):
            assert start.grad is not None
            setting.assert_close((start - after).detach(), start.grad, 1e-9, name)
        with torch.no_grad():  # a small step from where it was, lest it diverges
            for after, start in zip(model.parameters(), before.parameters(), strict=True):
                after.copy_(start - 0.01 * (start - after))
    assert_equal_on_ranks(setting, list(model.parameters()))
    return step.captured_steps


class _OfDict(nn.Module):
    """A potential that takes its points from a dict."""

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self.potential = potential

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.potential(batch["points"])  # type: ignore[no-any-return]


@case(compiled=True)
def compiled_union_batch(setting: Setting) -> None:
    """A compiled step follows the gradient over the union of unequal batches, double backward included."""
    _compiled_step(setting, 1)


@case(compiled=True)
def compiled_accumulation(setting: Setting) -> None:
    """Likewise with micro-batches."""
    _compiled_step(setting, 2)


@case(compiled=True)
def recorded_steps(setting: Setting) -> None:
    """Steps that are recorded and replayed follow it as well."""
    from ddpkit.capture.steps import STEADY
    from ddpkit.compile.backend import using

    steps = STEADY + 6  # in the last ones the update is replayed too
    with using("interpreted") if environment().device.type == "cpu" else nullcontext():
        for parts in (1, 2):
            replayed = _compiled_step(setting, parts, steps, cuda_graphs=True)
            assert replayed >= steps - 2, f"{replayed} of {steps} steps were replayed"


class _Weighted(Weights):
    """With an attribute that is no tensor."""

    factor = 1.0

    def __call__(self, output: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return self.factor * super().__call__(output, batch["points"]).sum() / batch["count"]


def _changing_steps(setting: Setting, *, compile: bool) -> None:  # noqa: A002  (as in make_step)
    """Takes steps between which parameters are frozen, unfrozen and given to the optimizer, and an attribute changes."""
    from ddpkit.compile.backend import using
    from ddpkit.step import make_step

    def optimizer_of(model: _OfDict, criterion: _Weighted) -> torch.optim.Optimizer:
        """Without the last bias."""
        held = [p for p in model.parameters() if p is not model.potential.outer.bias]
        return torch.optim.SGD([*held, *criterion.parameters()], lr=0.1, momentum=0.5, weight_decay=0.01)

    torch.manual_seed(setting.rank)
    model, criterion = _OfDict(Potential()), _Weighted()
    optimizer = optimizer_of(model, criterion)
    with using("interpreted"):  # what is traced counts here, not what is made of it
        step = make_step(
            model, criterion, optimizer, strategy=setting.strategy, compile=compile, comm=setting.comm,
            **({"timeout": 60.0} | (UNUSED if setting.strategy == "standard" else {}) | setting.options),
        )  # fmt: skip
        setting.made.append(step.sync)
        model_2, criterion_2 = copy.deepcopy((model, criterion))
        reference = optimizer_of(model_2, criterion_2)
        both = (model, criterion, optimizer), (model_2, criterion_2, reference)
        trained, expected = nn.ModuleList([model, criterion]), nn.ModuleList([model_2, criterion_2])
        for number in range(6):
            for one, loss_of, opt in both:
                one.potential.inner.requires_grad_(number not in (1, 2))
                loss_of.energy.requires_grad_(number != 3)
                loss_of.factor = 0.5 if number in (2, 4) else 1.0
                if number == 5:
                    opt.add_param_group({"params": [one.potential.outer.bias]})
            count = torch.tensor(float(len(setting.all_points(number))), dtype=torch.float64)
            step({"points": setting.points(setting.rank, number), "count": count / setting.size})
            expected.zero_grad()
            whole = {"points": setting.all_points(number), "count": count}
            backward(criterion_2(model_2(whole), whole))
            reference.step()
            for (name, p), q in zip(trained.named_parameters(), expected.parameters(), strict=True):
                setting.assert_close(p, q, 1e-9, f"{name} at step {number}")
                assert p.requires_grad or p.grad is None, f"{name} is frozen and has a gradient at step {number}"
        assert_equal_on_ranks(setting, list(trained.parameters()))


@case(compiled=True)
def changing_steps(setting: Setting) -> None:
    """What is frozen, unfrozen, given to the optimizer or changed between steps is obeyed; a criterion is trained too."""
    if acts_of(setting.strategy) != "in graph":
        _changing_steps(setting, compile=False)
    _changing_steps(setting, compile=True)
