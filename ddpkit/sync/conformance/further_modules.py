"""Modules with trained parameters beside the model, such as a criterion."""

import copy

import torch
from torch import nn

from ddpkit.errors import RankDisagreementError
from ddpkit.sync.conformance.setting import (
    Potential,
    Setting,
    Switched,
    Weights,
    assert_equal_on_ranks,
    assert_gradients,
    backward,
    case,
    expects,
)


@case()
def further_modules(setting: Setting) -> None:
    """A criterion's trained parameters are made alike, and follow the gradient over the union; likewise with micro-batches."""
    torch.manual_seed(setting.rank)
    model, criterion, second = Potential(), Weights(start=setting.rank / 10), Weights()
    criterion.shared, second.frozen = model.outer.bias, nn.Parameter(torch.ones(2), requires_grad=False)
    sync = setting.sync(model, criterion, second)
    expected = [
        *dict(model.named_parameters()),
        *(f"{kind}.{n}" for kind in ("Weights", "Weights_2") for n in ("energy", "forces")),
    ]
    assert list(sync.parameters) == expected, f"{list(sync.parameters)} instead of {expected}"
    trained = nn.ModuleList([model, criterion, second])
    assert_equal_on_ranks(setting, [*trained.parameters(), *trained.buffers()])
    reference = copy.deepcopy(trained)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.5) for m in (trained, reference)]
    for step in range(4):
        parts = setting.points(setting.rank, step).tensor_split(1 + step % 2)
        for part in parts[:-1]:
            with sync.no_sync():
                backward(setting.share(criterion(sync.module(part), part) + second(sync.module(part), part), step))
                sync.synchronize()
        backward(
            setting.share(
                criterion(sync.module(parts[-1]), parts[-1]) + second(sync.module(parts[-1]), parts[-1]), step
            )
        )
        sync.synchronize()
        points = setting.all_points(step)
        output = reference[0](points)
        backward((reference[1](output, points) + reference[2](output, points)).sum() / len(points))
        assert_gradients(setting, trained, reference)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
    assert_equal_on_ranks(setting, list(trained.parameters()))


@case(ranks=2)
def further_modules_partly_used(setting: Setting) -> None:
    """Of a further module that some ranks do not use, or none."""
    model, beside = nn.Linear(3, 1, dtype=torch.float64), Switched()
    sync = setting.sync(model, beside)
    reference = copy.deepcopy(beside)
    rest = setting.size - 1
    for step, used in enumerate([["ab"] + ["a"] * rest, [""] * (rest + 1), ["c"] * rest + [""], ["abc"] * (rest + 1)]):
        for m in (model, beside, reference):
            m.zero_grad()
        points = setting.points(setting.rank, step)
        backward(setting.share(sync.module(points) ** 2 + beside(points, used[setting.rank]) ** 2, step))
        sync.synchronize()
        terms = [(reference(setting.points(rank, step), used[rank]) ** 2).sum() for rank in range(setting.size)]
        if any(used):
            backward(torch.stack(terms).sum() / len(setting.all_points(step)))
        assert_gradients(setting, beside, reference)


@case(ranks=2)
def mismatch_of_further_modules(setting: Setting) -> None:
    """A further module that differs on one rank, or that it lacks; and one that drifts away."""
    odd = setting.rank == setting.size - 1
    last = f"rank {setting.size - 1}"
    beside = nn.Linear(*((2, 3) if odd else (3, 2)), bias=False)
    with expects(RankDisagreementError, last, "'Linear.weight'", "shape"):
        setting.sync(Potential(), beside)
    with expects(RankDisagreementError, last, "'Weights.energy'"):
        setting.sync(Potential(), *([] if odd else [Weights()]))
    criterion, model = Weights(), Potential()
    sync = setting.sync(model, criterion, check_every=1)
    if odd:
        criterion.energy.data += 1e-9
    points = setting.points(setting.rank)
    with expects(RankDisagreementError, last, "'Weights.energy'"):
        backward(setting.share(criterion(sync.module(points), points)))
        sync.synchronize()
