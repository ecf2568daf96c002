"""Parameters without a gradient, on some ranks or on all."""

import copy
from collections.abc import Sequence

import torch

from ddpkit.sync.conformance.setting import (
    Potential,
    Setting,
    Switched,
    assert_equal_on_ranks,
    assert_gradients,
    backward,
    case,
    force_loss,
)


def _switched(setting: Setting, uses: Sequence[Sequence[str]]) -> None:
    """Trains with layers that change, `uses[step][rank]`, and compares with the sum over ranks."""
    model = Switched()
    sync = setting.sync(model)
    reference = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
    for step, used in enumerate(uses):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None if step % 2 else p.grad
        backward(setting.share(sync.module(setting.points(setting.rank, step), used[setting.rank]) ** 2, step))
        sync.synchronize()
        total = sum(
            ((reference(setting.points(rank, step), used[rank]) ** 2).sum() for rank in range(setting.size)),
            start=torch.zeros(()),
        )
        backward(total / len(setting.all_points(step)))
        assert_gradients(setting, model, reference)
        for optimizer in optimizers:
            optimizer.step()


@case()
def unused(setting: Setting) -> None:
    """A parameter that no rank uses keeps None."""
    _switched(setting, [["ab"] * setting.size] * 3)


@case(ranks=2)
def partly_used(setting: Setting) -> None:
    """A parameter that some ranks do not use gets the mean over all ranks, theirs being zero."""
    _switched(setting, [["ab"] + ["a"] * (setting.size - 1)] * 3)


@case(ranks=2)
def changing_use(setting: Setting) -> None:
    """What is used, and where, changes from step to step."""
    rest = setting.size - 1
    _switched(
        setting,
        [["abc"] * (rest + 1), ["a"] + ["ab"] * rest, ["c"] * rest + ["a"], ["abc"] * (rest + 1), ["b"] * (rest + 1)],
    )


@case(ranks=2)
def no_backward_on_some(setting: Setting) -> None:
    """A rank without any backward pass counts as zero: in the first step, later, and after another set was trained."""
    last = setting.size - 1
    for away in (0, last):
        _with_ranks_away(setting, away)


def _with_ranks_away(setting: Setting, away: int) -> None:
    """Trains while one rank has no backward pass in some steps, and compares with the sum over the others."""
    model = Potential()
    sync = setting.sync(model)
    reference = copy.deepcopy(model)
    for step in range(7):
        for m in (model, reference):
            m.inner.bias.requires_grad_(not 3 <= step < 5)
            m.zero_grad(set_to_none=step % 2 == 0)
            m.inner.bias.grad = None
        present = [rank for rank in range(setting.size) if rank != away or step in (1, 4)]
        if setting.rank in present:
            backward(force_loss(setting, sync.module, setting.points(setting.rank, step), step))
        sync.synchronize()
        for rank in present:
            backward(force_loss(setting, reference, setting.points(rank, step), step) / setting.size)
        assert_gradients(setting, model, reference)
    assert_equal_on_ranks(setting, [p.grad for p in model.parameters() if p.grad is not None])
