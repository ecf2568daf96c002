"""Parameters that are frozen and unfrozen while training goes on."""

import copy

from ddpkit.errors import RankDisagreementError
from ddpkit.sync.conformance.setting import (
    Potential,
    Setting,
    assert_gradients,
    backward,
    case,
    expects,
    force_loss,
    reference_loss,
)


@case()
def unfrozen(setting: Setting) -> None:
    """A parameter that is frozen at first is synchronised once it is not, and left alone once it is frozen again."""
    model = Potential()
    model.inner.requires_grad_(False)
    sync = setting.sync(model)
    reference = copy.deepcopy(model)
    for step in range(6):
        for m in (model, reference):
            m.inner.requires_grad_(2 <= step < 4)
            m.zero_grad()
        backward(force_loss(setting, sync.module, setting.points(setting.rank, step), step))
        sync.synchronize()
        backward(reference_loss(setting, reference, step))
        assert_gradients(setting, model, reference)


@case(ranks=2)
def unfrozen_on_one_rank(setting: Setting) -> None:
    """A parameter that one rank alone begins to train."""
    model = Potential()
    model.inner.requires_grad_(False)
    sync = setting.sync(model)
    if setting.rank == setting.size - 1:
        model.inner.requires_grad_(True)
    backward(force_loss(setting, sync.module, setting.points(setting.rank)))
    with expects(RankDisagreementError, f"rank {setting.size - 1}"):
        sync.synchronize()
        sync.stats  # noqa: B018  (looks at the flags)


@case(ranks=2)
def unfrozen_on_one_rank_from_nothing(setting: Setting) -> None:
    """A rank that begins to train where no rank has trained anything."""
    model = Potential().requires_grad_(False)
    sync = setting.sync(model)
    sync.synchronize()
    if setting.rank == setting.size - 1:
        model.requires_grad_(True)
        backward(force_loss(setting, sync.module, setting.points(setting.rank)))
    with expects(RankDisagreementError, f"rank {setting.size - 1}", "requires_grad"):
        sync.synchronize()


@case(ranks=2)
def frozen_after_backward(setting: Setting) -> None:
    """What is frozen between the backward pass and `synchronize()`, on all ranks or on one, is agreed upon first."""
    model = Potential()
    sync = setting.sync(model)
    reference = copy.deepcopy(model)
    for step in range(4):
        model.zero_grad()
        reference.zero_grad()
        backward(force_loss(setting, sync.module, setting.points(setting.rank, step), step))
        if step == 1:
            model.inner.weight.requires_grad_(False)
        sync.synchronize()
        for rank in range(setting.size):
            backward(force_loss(setting, reference, setting.points(rank, step), step) / setting.size)
        if step:
            model.inner.weight.grad = reference.inner.weight.grad
        assert_gradients(setting, model, reference)
    model.zero_grad()
    backward(force_loss(setting, sync.module, setting.points(setting.rank)))
    if setting.rank == 0:
        model.outer.bias.requires_grad_(False)
    with expects(RankDisagreementError, "rank 0", "requires_grad"):
        sync.synchronize()
        backward(force_loss(setting, sync.module, setting.points(setting.rank)))
        sync.synchronize()
