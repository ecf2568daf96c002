"""Ranks that hold different models or options, or that call differently."""

import torch
from torch import nn

from ddpkit.errors import RankDisagreementError
from ddpkit.sync.conformance.setting import Potential, Setting, backward, case, expects, force_loss


def _expect_disagreement(setting: Setting, model: nn.Module, *words: str) -> None:
    with expects(RankDisagreementError, f"rank {setting.size - 1}", *words):
        setting.sync(model)


@case(ranks=2)
def mismatch_of_names(setting: Setting) -> None:
    """A parameter that one rank lacks or has in excess."""
    odd = setting.rank == setting.size - 1
    _expect_disagreement(setting, nn.Linear(3, 2, bias=not odd), "'bias'")
    _expect_disagreement(setting, nn.Linear(3, 2, bias=odd), "'bias'")


@case(ranks=2)
def mismatch_of_shapes(setting: Setting) -> None:
    """A parameter of another shape, even of the same length."""
    odd = setting.rank == setting.size - 1
    _expect_disagreement(setting, nn.Linear(*((2, 3) if odd else (3, 2)), bias=False), "weight", "shape", "(3, 2)")


@case(ranks=2)
def mismatch_of_dtypes(setting: Setting) -> None:
    """A parameter of another dtype."""
    odd = setting.rank == setting.size - 1
    _expect_disagreement(setting, nn.Linear(3, 2, dtype=torch.float64 if odd else None), "weight", "float64")


@case(ranks=2)
def mismatch_of_frozen(setting: Setting) -> None:
    """A parameter that one rank does not train."""
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(setting.rank != setting.size - 1)
    _expect_disagreement(setting, model, "bias", "requires_grad")


@case(ranks=2)
def mismatch_of_options(setting: Setting) -> None:
    """Options that differ on one rank, and a strategy that one rank alone has not come to make."""
    odd = setting.rank == setting.size - 1
    with expects(RankDisagreementError, f"rank {setting.size - 1}", "check_every"):
        setting.sync(Potential(), check_every=3 if odd else 2)


@case(ranks=2)
def calls(setting: Setting) -> None:
    """A rank that synchronises twice where the others do once."""
    model = Potential()
    sync = setting.sync(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with expects(RankDisagreementError, "number of optimizer steps"):
        for step in range(2):
            backward(force_loss(setting, sync.module, setting.points(setting.rank)))
            sync.synchronize()
            if setting.rank != 0 or step:
                optimizer.step()
        sync.stats  # noqa: B018  (looks at the flags)


@case(ranks=2)
def zero_grad_on_some(setting: Setting) -> None:
    """A rank that forgets `zero_grad()` would bring the last average in again."""
    model = Potential()
    sync = setting.sync(model)
    with expects(RankDisagreementError, f"rank {setting.size - 1}", "zero_grad"):
        for step in range(3):
            backward(force_loss(setting, sync.module, setting.points(setting.rank, step), step))
            sync.synchronize()
            if setting.rank < setting.size - 1 or step == 0:
                model.zero_grad()
        sync.stats  # noqa: B018  (looks at the flags)


@case()
def no_gradient(setting: Setting) -> None:
    """`synchronize()` without any backward pass."""
    sync = setting.sync(Potential())
    with expects(ValueError, "backward"):
        sync.synchronize()


@case(ranks=2)
def drift(setting: Setting) -> None:
    """`check_every` finds parameters that differ between ranks."""
    model = Potential()
    sync = setting.sync(model, check_every=2)
    backward(force_loss(setting, sync.module, setting.points(setting.rank)))
    sync.synchronize()
    if setting.rank == setting.size - 1:
        with torch.no_grad():
            model.outer.weight[0, 0].add_(1e-9)
    model.zero_grad()
    with expects(RankDisagreementError, f"rank {setting.size - 1}", "outer.weight"):
        backward(force_loss(setting, sync.module, setting.points(setting.rank)))
        sync.synchronize()
