import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from strategies import LikeGpu
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

import ddpkit
from ddpkit.compile.backend import using
from ddpkit.errors import InputError, NonFiniteGradientError, RankDisagreementError
from ddpkit.testing import run_ranks


def network():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def backward(model, batch=None):
    model(torch.randn(4, 5) if batch is None else batch).square().sum().backward()


def addresses(model):
    return [p.grad.data_ptr() for p in model.parameters()]


def test_gradients_are_slices_of_one_persistent_buffer_after_either_zero_grad():
    model = network()
    sync = ddpkit.make_sync("custom", model)
    (flat,) = sync.flat
    begin, end = flat.data_ptr(), flat.data_ptr() + flat.nbytes
    seen = set()
    for set_to_none in (True, False, True, True, False):
        backward(model)
        expected = [p.grad.clone() for p in model.parameters()]
        sync.synchronize()
        assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
        assert all(begin <= address < end for address in addresses(model))
        seen.add(tuple(addresses(model)))
        model.zero_grad(set_to_none=set_to_none)
    assert len(seen) == 1


def test_in_place_zero_grad_leaves_nothing_to_copy():
    model = network()
    sync = ddpkit.make_sync("custom", model)
    backward(model)
    sync.synchronize()
    before = addresses(model)
    model.zero_grad(set_to_none=False)
    backward(model)
    assert addresses(model) == before


def test_layouts_of_channels_last_and_transposed_parameters_are_kept():
    model = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    model.turned = nn.Parameter(torch.randn(6, 5).t())
    sync = ddpkit.make_sync("custom", model)
    (model(torch.randn(2, 3, 5, 5)).sum() + model.turned.square().sum()).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    sync.synchronize()
    for p, e in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p.grad, e)
        assert p.grad.stride() == p.stride()


def test_complex_parameters():
    model = nn.Module()
    model.z = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
    model.x = nn.Parameter(torch.randn(4))
    sync = ddpkit.make_sync("custom", model)
    (model.z.abs().square().sum() + model.x.sum()).backward()
    expected = model.z.grad.clone()
    sync.synchronize()
    assert torch.equal(model.z.grad, expected)
    assert len(sync.flat) == 1


def test_sparse_gradients_are_refused():
    model = nn.Embedding(5, 2, sparse=True)
    sync = ddpkit.make_sync("custom", model)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(InputError, match=r"'weight'.*sparse"):
        sync.synchronize()


@pytest.mark.parametrize("strategy", ["custom", "overlap", "standard"])
def test_the_model_can_still_be_copied_and_pickled(strategy):
    model = network()
    sync = ddpkit.make_sync(strategy, model)
    backward(model)
    sync.synchronize()
    twin = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(model))  # noqa: S301
    for other in (twin, again):
        other.zero_grad()
        backward(other)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_nothing_keeps_a_strategy_alive_once_it_is_closed():
    model = network()
    sync = ddpkit.make_sync("overlap", model)
    reference = weakref.ref(sync)
    sync.close()
    del sync
    gc.collect()
    assert reference() is None
    backward(model)


@pytest.mark.parametrize("steps_before", [0, 1, 2])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("change", ["backward", "clip", "replace"])
def test_overlap_refuses_gradients_that_come_after_they_have_left(steps_before, set_to_none, change):
    model = network()
    sync = ddpkit.make_sync("overlap", model, bucket_mb=5e-5, first_bucket_mb=1e-5)
    for _ in range(steps_before):
        backward(model)
        sync.synchronize()
        model.zero_grad(set_to_none=set_to_none)
    backward(model)
    if change == "backward":
        backward(model)
    elif change == "clip":
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    else:
        model[0].weight.grad = torch.ones_like(model[0].weight)
    with pytest.raises(RankDisagreementError, match=r"received a second gradient.*no_sync"):
        sync.synchronize()
    sync.close()


def test_overlap_with_one_bucket_sends_it_in_synchronize():
    model = network()
    sync = ddpkit.make_sync("overlap", model)
    batch = torch.randn(4, 5)
    backward(model, batch)
    once = [p.grad.clone() for p in model.parameters()]
    backward(model, batch)
    sync.synchronize()
    for p, gradient in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * gradient)
    sync.close()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_a_gradient_that_adds_up_in_its_slice_does_not_pass_for_its_neighbours(dtype):
    model = nn.Module()
    model.parts = nn.ParameterList(torch.ones(2, dtype=dtype) for _ in range(6))
    sync = ddpkit.make_sync("overlap", model, bucket_mb=6e-5, first_bucket_mb=6e-5)  # of two or more

    def loss(order):
        total = torch.zeros((), dtype=torch.float64)
        for n in order:  # the gradient of the last comes first
            total = (n + 1) * (model.parts[n].abs().square().sum() + total)
        return total

    for order in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [1, 0, 3, 2, 5, 4]):
        model.zero_grad(set_to_none=False)
        expected = torch.autograd.grad(loss(order), list(model.parts))
        loss(order).backward()
        sync.synchronize()
        for p, gradient in zip(model.parts, expected, strict=True):
            torch.testing.assert_close(p.grad, gradient)
    assert max(len(bucket.numbers) for bucket in sync._buckets) > 1
    sync.close()


class Shuffled(nn.Module):
    """Layers whose gradients come in another order from step to step, some not at all."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8, dtype=torch.float64) for _ in range(6))

    def forward(self, x, order):
        for number in order:
            x = torch.tanh(self.layers[number](x))
        return x.square().mean()


def other_orders(set_to_none):
    rank = torch.distributed.get_rank()
    model, twin = Shuffled(), Shuffled()
    sync = ddpkit.make_sync("overlap", model, bucket_mb=8e-4, first_bucket_mb=8e-4)
    launched = []
    for order in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 2, 4], [3, 1, 5, 0, 2, 4]):
        batches = torch.randn(2, 3, 8, dtype=torch.float64)
        for module in (model, twin):
            module.zero_grad(set_to_none=set_to_none)
        model(batches[rank], order).backward()
        launched.append(sum(bucket.launched for bucket in sync._buckets))
        sync.synchronize()
        sum(twin(batch, order) for batch in batches).div(2).backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-15)
    sync.close()
    return len(sync._hooks), launched


@pytest.mark.parametrize("set_to_none", [True, False])
def test_overlap_bears_gradients_in_another_order(set_to_none):
    (hooks, launched), other = run_ranks(other_orders, 2, set_to_none)
    assert (hooks, launched) == other
    assert hooks < 12  # not every parameter's
    assert launched[1] == max(launched) > launched[2]


def late_flags(fused, bad):
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    model = network()
    sync = ddpkit.make_sync(LikeGpu, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    if rank == size - 1:
        model[2].bias.register_hook(lambda g: g * bad if step == 2 else g)
    unchanged = False
    for step in range(4):
        if rank == 0 and step == 2 and bad == 1.0:
            sync._guard.steps += 1  # as if this rank had taken a step more
        before = [p.detach().clone() for p in model.parameters()]
        try:
            backward(model)
            sync.synchronize()
        except (NonFiniteGradientError, RankDisagreementError) as error:
            return step, str(error), unchanged
        optimizer.step()
        unchanged = all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert unchanged == (step == 2)
        optimizer.zero_grad(set_to_none=step != 2)
        if step == 2:
            model.zero_grad()
    return None


def test_memory_for_the_flags_is_made_once(monkeypatch):
    model = network()
    sync = ddpkit.make_sync(LikeGpu, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        backward(model)
        sync.synchronize()
        optimizer.step()
    made = []
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **k: made.append(a) or make(*a, **k))
    for _ in range(2):
        backward(model)
        sync.synchronize()
    assert not made


def test_memory_of_the_host_belongs_to_the_tensor_and_goes_with_it():
    from ddpkit.sync.comm import MpiComm

    comm = MpiComm.__new__(MpiComm)
    comm._host = WeakTensorKeyDictionary()
    one, two = torch.zeros(3), torch.zeros(3)
    assert comm._host_of(one) is comm._host_of(one) is not comm._host_of(two)
    del one
    gc.collect()
    assert len(comm._host) == 1


CAUSES = ((torch.nan, "'2.bias'"), (torch.inf, "'2.bias'"), (1.0, "optimizer steps"))


def all_late_flags():
    return [late_flags(True, bad) for bad, _ in CAUSES], late_flags(False, torch.nan)


def test_a_device_flag_keeps_a_bad_update_from_being_applied():
    """With a fused optimizer nobody waits: the update is skipped, and the next call raises on all ranks.

    Other optimizers make the host look at once.
    """
    for fused, unfused in run_ranks(all_late_flags, 2):
        for (step, message, unchanged), (_, words) in zip(fused, CAUSES, strict=True):
            assert (step, unchanged) == (3, True)
            assert words in message
            assert "synchronize() number 3" in message
            assert "rank 1" in message
        assert unfused[0] == 2
        assert "'2.bias'" in unfused[1]


def rounded(strategy):
    torch.manual_seed(torch.distributed.get_rank())
    model = nn.Sequential(*(nn.Linear(11, 11, bias=False, dtype=torch.float64) for _ in range(4)))
    sync = ddpkit.make_sync(strategy, model, reduce_dtype="bfloat16")
    found = []
    for _ in range(3):
        model.zero_grad()
        twin = copy.deepcopy(model)
        batch = torch.randn(3, 11, dtype=torch.float64)
        twin(batch).square().sum().backward()
        sync.module(batch).square().sum().backward()
        sync.synchronize()
        found += [
            (p.grad.numpy(), q.grad.clone().numpy()) for p, q in zip(twin.parameters(), model.parameters(), strict=True)
        ]
    return found, sync.stats.bytes


LOSSY = ("custom", "overlap", "standard")


def all_rounded():
    return {strategy: rounded(strategy) for strategy in LOSSY}


def test_bfloat16_on_the_wire_is_a_rounded_average():
    first, second = run_ranks(all_rounded, 2)
    for strategy in LOSSY:
        for (a, mine), (b, theirs) in zip(first[strategy][0], second[strategy][0], strict=True):
            assert (mine == theirs).all()
            error = abs(mine - (a + b) / 2)
            assert 0 < error.max() <= 2**-7 * max(abs(a).max(), abs(b).max())
        assert first[strategy][1] < 4 * 121 * 8 / 2


def two_models(strategy):
    torch.manual_seed(0)
    models = [network(), network()]
    syncs = [ddpkit.make_sync(strategy, m) for m in models]
    for _ in range(2):
        for model in models:
            backward(model)
        for sync in syncs:
            sync.synchronize()
        gradients = [p.grad.clone() for m in models for p in m.parameters()]
        for model in models:
            model.zero_grad()
    return [g.numpy().tobytes() for g in gradients]


@pytest.mark.parametrize("strategy", ["custom", "overlap"])
def test_two_models_side_by_side(strategy):
    first, second = run_ranks(two_models, 2, strategy)
    assert first == second


def small_buckets():
    torch.manual_seed(torch.distributed.get_rank())
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(8)))
    sync = ddpkit.make_sync("overlap", model, bucket_mb=1e-3, first_bucket_mb=1e-3)
    for _ in range(3):
        twin = copy.deepcopy(model)
        batch = torch.randn(2, 16)
        twin(batch).square().sum().backward()
        model.zero_grad()
        model(batch).square().sum().backward()
        started = sum(bucket.launched for bucket in sync._buckets)
        local = [p.grad.clone() for p in twin.parameters()]
        sync.synchronize()
    return (
        started,
        sync.stats.collectives,
        [g.numpy() for g in local],
        [p.grad.clone().numpy() for p in model.parameters()],
    )


def test_overlap_sends_every_bucket_during_the_backward_pass():
    one, two = run_ranks(small_buckets, 2)
    assert one[0] == one[1] > 4
    for a, b, mine, theirs in zip(one[2], two[2], one[3], two[3], strict=True):
        assert (mine == theirs).all()
        assert (mine == (a + b) / 2).all()


def past_the_wrapper():
    model = network()
    sync = ddpkit.make_sync("standard", model)
    backward(model)
    try:
        sync.synchronize()
    except InputError as error:
        return str(error)
    return ""


def test_standard_notices_a_call_past_its_wrapper():
    assert all("sync.module" in said for said in run_ranks(past_the_wrapper, 2))


def refuse_unfrozen():
    said = []
    for whole in (False, True):
        model = network()
        (model if whole else model[0]).requires_grad_(False)
        sync = ddpkit.make_sync("standard", model)
        model.requires_grad_(True)
        backward(sync.module)
        try:
            sync.synchronize()
        except InputError as error:
            said.append(str(error))
        sync.close()
    return said


def test_standard_refuses_what_was_frozen_when_it_was_made():
    for said in run_ranks(refuse_unfrozen, 2):
        assert len(said) == 2
        assert all("'0.weight' was frozen" in sentence for sentence in said)


def skipped(strategy, **options):
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    step = ddpkit.make_step(model, lambda y, _: y.square().mean(), optimizer, strategy=strategy, **options)
    changes = []
    for number in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        batch = torch.randn(4, 5)
        batch[0, 0] = torch.nan if (number, rank) == (1, 1) else 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                step(batch)
            except NonFiniteGradientError:
                break
        changes.append(not all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)))
    step.sync.close()
    return int(step.skipped), changes


def skipped_under_all():
    return {
        "standard": skipped("standard"),
        "none": skipped("none"),
        "custom": skipped("custom", check_finite=False),
        "overlap": skipped("overlap", check_finite=False),
        "like a GPU": skipped(LikeGpu),
    }


def test_updates_that_are_not_applied_are_counted_under_every_strategy():
    first, second = run_ranks(skipped_under_all, 2)
    assert (first.pop("none"), second.pop("none")) == ((0, [True] * 3), (1, [True, False, True]))
    assert first.pop("like a GPU") == second.pop("like a GPU") == (1, [True, False])
    assert set(map(str, [*first.values(), *second.values()])) == {str((1, [True, False, True]))}


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("custom", {}),
        ("overlap", {}),
        ("standard", {}),
        ("none", {}),
        ("custom", {"compile": True}),
        ("ingraph", {"compile": True, "optimizer_in_graph": True}),
    ],
)
def test_float32_trains_where_float64_is_the_default_of_the_process(strategy, options):
    """As nequip makes it before it builds or loads a model."""
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    batch = torch.randn(4, 5)
    torch.set_default_dtype(torch.float64)
    with using("interpreted"):
        step = ddpkit.make_step(model, lambda y, _: y.square().mean(), optimizer, strategy=strategy, **options)
        for _ in range(3):
            step(batch)
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}
    step.sync.close()
