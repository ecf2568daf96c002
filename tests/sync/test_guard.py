"""Optimizers under guard: a bad update is skipped, a parameter that nobody averages is refused."""

import gc
import weakref

import pytest
import torch
from strategies import LikeGpu
from torch import nn

import ddpkit
from ddpkit.errors import InputError, NonFiniteGradientError, RankDisagreementError
from ddpkit.sync import guard
from ddpkit.testing import run_ranks


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def fused(*models, **options):
    return torch.optim.AdamW([p for m in models for p in m.parameters()], lr=0.1, fused=True, **options)


def synchronised(model, sync, *, bad=False):
    model.zero_grad()
    model(torch.randn(4, 5)).square().sum().backward()
    if bad:
        next(model.parameters()).grad.fill_(torch.nan)
    sync.synchronize()


def moves(model, *optimizers):
    """Whether a step changes the model."""
    before = [p.detach().clone() for p in model.parameters()]
    for optimizer in optimizers:
        optimizer.step()
    return not all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("change", ["unfreeze", "freeze", "freeze all in between"])
def test_optimizers_obey_the_flag_of_a_new_layout(change):
    model = network()
    model[2].requires_grad_(change == "freeze")
    sync = ddpkit.make_sync(LikeGpu, model)
    optimizer = fused(model)
    for _ in range(2):
        synchronised(model, sync)
        assert moves(model, optimizer)
    if change == "freeze all in between":
        model.requires_grad_(False)
        sync.synchronize()
        model[0].requires_grad_(True)
    else:
        model[2].requires_grad_(change == "unfreeze")
    for bad in (False, True):
        synchronised(model, sync, bad=bad)
        assert moves(model, optimizer) is not bad
    with pytest.raises(NonFiniteGradientError, match="the update was not applied"):
        sync.synchronize()


@pytest.mark.parametrize("how", ["close", "collect"])
@pytest.mark.parametrize("next_one", [LikeGpu, "custom", "standard", None])
def test_a_strategy_that_is_gone_skips_nothing(how, next_one):
    model = network()
    sync = ddpkit.make_sync(LikeGpu, model)
    optimizer = fused(model)
    for bad in (False, True):
        synchronised(model, sync, bad=bad)
        assert moves(model, optimizer) is not bad
    assert optimizer.found_inf == 1
    if how == "close":
        sync.close()
    else:
        del sync
        gc.collect()
    assert not hasattr(optimizer, "found_inf")
    sync = next_one and ddpkit.make_sync(next_one, model)
    for _ in range(2):
        model.zero_grad()
        model(torch.randn(4, 5)).square().sum().backward()
        if sync is not None:
            sync.synchronize()
        assert moves(model, optimizer)


def test_an_optimizer_that_comes_later_and_looks_at_no_flag_is_kept_from_a_bad_update():
    model = network()
    sync = ddpkit.make_sync(LikeGpu, model)
    first, second = fused(model[0]), torch.optim.SGD(model[2].parameters())
    synchronised(model, sync)
    first.step()
    synchronised(model, sync, bad=True)
    assert not moves(model, first)
    with pytest.raises(NonFiniteGradientError, match="number 2"):
        second.step()


def test_an_optimizer_that_is_no_longer_fused_is_asked_no_more():
    model = network()
    sync = ddpkit.make_sync(LikeGpu, model)
    optimizer = fused(model)
    for _ in range(2):
        synchronised(model, sync)
        assert moves(model, optimizer)
    optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    synchronised(model, sync)
    assert moves(model, optimizer)
    with pytest.raises(NonFiniteGradientError, match="number 4"):
        synchronised(model, sync, bad=True)


@pytest.mark.parametrize("bad", [0, 1])
def test_an_optimizer_of_two_models_obeys_both_flags(bad):
    models = [network(), network()]
    syncs = [ddpkit.make_sync(LikeGpu, model) for model in models]
    optimizer = fused(*models)
    for step in range(3):
        for n, (model, sync) in enumerate(zip(models, syncs, strict=True)):
            synchronised(model, sync, bad=step == 2 and n == bad)
        assert moves(models[0], optimizer) is (step < 2)
    with pytest.raises(NonFiniteGradientError):
        syncs[bad].synchronize()
    syncs[bad].close()
    synchronised(models[1 - bad], syncs[1 - bad])
    assert moves(models[1 - bad], optimizer)


def test_the_flag_of_a_scaler_is_left_alone():
    model = network()
    sync = ddpkit.make_sync(LikeGpu, model)
    optimizer = fused(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    for bad in (False, True, False):
        model.zero_grad()
        scaler.scale(model(torch.randn(4, 5)).square().sum()).backward()
        sync.synchronize()
        if bad:
            model[0].weight.grad[0, 0] = torch.inf
        before = model[2].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, model[2].weight) is bad


def test_another_list_of_the_same_length_is_noticed():
    one, two = network(), network()
    sync, other = ddpkit.make_sync("custom", one), ddpkit.make_sync("custom", two)
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    synchronised(one, sync)
    optimizer.step()
    assert (sync._guard.steps, other._guard.steps) == (1, 0)
    optimizer.param_groups[0]["params"] = list(two.parameters())
    synchronised(two, other)
    optimizer.step()
    assert (sync._guard.steps, other._guard.steps) == (1, 1)


def test_optimizers_and_strategies_are_let_go():
    model = network()
    sync = ddpkit.make_sync("custom", model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    synchronised(model, sync)
    optimizer.step()
    gone = [weakref.ref(optimizer), weakref.ref(sync), weakref.ref(sync._guard)]
    held = len(guard._held)
    del optimizer, sync
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    assert len(guard._held) < held


class Criterion(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, y):
        return (self.scale * y).square().sum()


def refusals(strategy):
    """What is said of each kind of optimizer that steps what nobody averages; empty where it may step."""

    def outcome(*extra, synced=(), prepare=None, backward=True):
        model, criterion = network(), Criterion()
        sync = ddpkit.make_sync(strategy, model, *(m for m in (criterion,) if "criterion" in synced))
        others = [ddpkit.make_sync(strategy, criterion)] if "alone" in synced else []
        if prepare is not None:
            prepare(model)
        tensors = [criterion.scale if e == "criterion" else e for e in extra]
        optimizer = torch.optim.SGD([{"params": list(model.parameters())}, {"params": tensors}], lr=0.1)
        y = (sync.module if prepare is None else model)(torch.randn(4, 5))
        (criterion(y) if backward else y.sum() + sum(t.sum() for t in tensors if t.requires_grad)).backward()
        try:
            for s in (sync, *others):
                s.synchronize()
            optimizer.step()
        except (InputError, RankDisagreementError) as error:
            return str(error)
        finally:
            for s in (sync, *others):
                s.close()
        return ""

    def replace(model):
        model[2] = nn.Linear(7, 3)

    def add(model):
        model.append(nn.Linear(3, 3))

    bare = torch.zeros(2, 4, requires_grad=True)
    frozen = torch.zeros(2)
    return {
        "criterion": outcome("criterion"),
        "bare": outcome(bare, backward=False),
        "known": outcome("criterion", synced=["criterion"]),
        "frozen": outcome(frozen),
        "without a gradient": outcome(torch.zeros(2, requires_grad=True)),
        "of another": outcome("criterion", synced=["alone"]) if strategy != "standard" else "",
        "replaced": outcome(prepare=replace) if strategy not in ("standard", "none") else "",
        "added": outcome(prepare=add) if strategy not in ("standard", "none") else "",
    }


def all_refusals():
    return {strategy: refusals(strategy) for strategy in ("custom", "overlap", "standard", "none")}


def test_a_parameter_that_is_stepped_but_not_averaged_is_named():
    for said in run_ranks(all_refusals, 2):
        assert not any(said.pop("none").values())
        for strategy, found in said.items():
            assert "SGD steps a parameter of shape (3,) (number 0 of parameter group 1)" in found["criterion"], strategy
            assert "make_sync(name, model, criterion)" in found["criterion"]
            assert "shape (2, 4)" in found["bare"]
            assert (found["known"], found["frozen"], found["without a gradient"], found["of another"]) == ("",) * 4
            if strategy != "standard":
                assert "on ranks 0, 1 held other parameters" in found["replaced"]
                assert "'2.weight'" in found["replaced"]
                assert "'3.weight', which SGD steps, was put into its module after make_sync()" in found["added"]


def test_on_one_rank_nothing_is_averaged_and_nothing_refused():
    assert set(refusals("custom").values()) == {""}
