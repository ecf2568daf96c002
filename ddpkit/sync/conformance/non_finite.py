"""Gradients that are NaN or infinite."""

import torch

from ddpkit.errors import NonFiniteGradientError
from ddpkit.sync.conformance.setting import Setting, Switched, backward, case, expects


@case()
def not_finite(setting: Setting) -> None:
    """NaN or inf on one rank is an error on all, names rank and parameter, and is not applied."""
    for bad in (torch.nan, torch.inf):
        _expect_not_finite(setting, bad, setting.size - 1)


def _expect_not_finite(setting: Setting, bad: float, guilty: int) -> None:
    model = Switched()
    sync = setting.sync(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    if setting.rank == guilty:
        model.get_parameter("layers.b.weight").register_hook(lambda g: g * bad)  # type: ignore[no-untyped-call]
    before = [p.detach().clone() for p in model.parameters()]
    backward(sync.module(setting.points(setting.rank), "abc").sum())
    with expects(NonFiniteGradientError, f"rank {guilty}", "layers.b.weight"):
        sync.synchronize()
        optimizer.step()
        sync.stats  # noqa: B018  (looks at the flags)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "the update was applied"
