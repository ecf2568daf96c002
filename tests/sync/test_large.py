"""Gradients so large that each is brought to its slice on its own, in `overlap` while the next one is computed."""

import copy

import pytest
import torch
from torch import nn

import ddpkit
from ddpkit.errors import NonFiniteGradientError, RankDisagreementError
from ddpkit.testing import run_ranks

WIDTH = 160  # squared, more than ddpkit.sync.buckets.LARGE
STRATEGIES = ["custom", "overlap"]


class Chain(nn.Module):
    """Layers, some of which may be left out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64) for _ in range(4))

    def forward(self, x, leave_out=()):
        for number, layer in enumerate(self.layers):
            x = x if number in leave_out else torch.tanh(layer(x))
        return x.square().mean()


def attach(strategy, model, **options):
    if strategy == "overlap":
        options |= {"bucket_mb": 0.3, "first_bucket_mb": 0.1}  # several buckets
    sync = ddpkit.make_sync(strategy, model, **options)
    assert all(bucket.one_by_one for bucket in sync._buckets)
    return sync


def begin(strategy, **options):
    """This rank's number, and a model of its own with the strategy attached."""
    model = Chain()
    return torch.distributed.get_rank(), model, attach(strategy, model, **options)


def batches(step, count=2):
    """One for each rank."""
    return torch.randn(count, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def local_gradients(model, *batches, leave_out=()):
    twin = copy.deepcopy(model)
    twin.zero_grad()
    for batch in batches:
        twin(batch, leave_out).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in twin.parameters()]


def assert_average(model, first, second):
    for p, a, b in zip(model.parameters(), first, second, strict=True):
        assert torch.equal(p.grad, (a + b) / 2)


def averages(strategy):
    rank, model, sync = begin(strategy)
    for step in range(6):
        batch = batches(step)
        model(batch[rank]).backward()
        sync.synchronize()
        assert_average(model, *(local_gradients(model, b) for b in batch))
        slices = {view.data_ptr() for view in sync.views.values()}
        assert {p.grad.data_ptr() for p in model.parameters()} == slices
        model.zero_grad(set_to_none=step % 3 == 0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_averages_after_either_zero_grad(strategy):
    run_ranks(averages, 2, strategy)


def accumulates(strategy):
    rank, model, sync = begin(strategy)
    for step in range(4):
        one, two = batches(step), batches(100 + step)
        with sync.no_sync():
            model(one[rank]).backward()
        model(two[rank]).backward()
        sync.synchronize()
        assert_average(model, *(local_gradients(model, a, b) for a, b in zip(one, two, strict=True)))
        model.zero_grad(set_to_none=step % 2 == 0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_accumulation(strategy):
    run_ranks(accumulates, 2, strategy)


def uses_less(strategy):
    rank, model, sync = begin(strategy)
    left_out = [(1, 3), (3,)]
    for step in range(4):
        batch = batches(step)
        model(batch[rank], left_out[rank]).backward()
        sync.synchronize()
        assert model.layers[3].weight.grad is None
        expected = [local_gradients(model, b, leave_out=l)[:3] for b, l in zip(batch, left_out, strict=True)]
        assert_average(model.layers[:3], *expected)
        model.zero_grad()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.filterwarnings("ignore:Parameter 'layers.1.weight' has no gradient")
def test_what_is_not_used_counts_as_zero(strategy):
    run_ranks(uses_less, 2, strategy)


def freezes(strategy):
    """Between the backward pass and `synchronize()`, when `overlap` has sent some gradients already."""
    rank, model, sync = begin(strategy)
    for step in range(6):
        batch = batches(step)
        model(batch[rank]).backward()
        expected = [local_gradients(model, b) for b in batch]
        model.layers[1].requires_grad_(step % 2 == 1)
        sync.synchronize()
        for n in (0, 2, 3):
            assert_average(model.layers[n], expected[0][n : n + 1], expected[1][n : n + 1])
        model.zero_grad(set_to_none=step % 3 == 0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_freezing_after_the_backward_pass(strategy):
    run_ranks(freezes, 2, strategy)


def spoils(strategy, options):
    rank, model, sync = begin(strategy, **options)
    said = []
    for step in range(4):
        batch = batches(step)
        loss = model(batch[rank])
        if step == 2 and rank == 1:
            weight = model.layers[2].weight
            loss = loss + torch.where(torch.arange(WIDTH) == 7, torch.nan, 0.0).mul(weight[3]).sum()
        loss.backward()
        try:
            sync.synchronize()
        except NonFiniteGradientError as error:
            said.append((step, str(error)))
        else:
            if not options:
                assert_average(model, *(local_gradients(model, b) for b in batch))
        model.zero_grad()
    return said


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("options", [{}, {"reduce_dtype": "bfloat16"}], ids=["as it is", "bfloat16"])
def test_a_number_that_is_none_is_found_and_the_next_step_is_fine(strategy, options):
    for said in run_ranks(spoils, 2, strategy, options):
        ((step, sentence),) = said
        assert step == 2
        assert "'layers.2.weight' is NaN or infinite on rank 1" in sentence


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_in_an_imaginary_part(strategy):
    model = nn.Module()
    model.z = nn.Parameter(torch.ones(WIDTH, WIDTH, dtype=torch.complex64))
    sync = ddpkit.make_sync(strategy, model)
    (model.z.imag[3, 7] * torch.nan + model.z.real.sum()).backward()
    with pytest.raises(NonFiniteGradientError, match="'z' is NaN"):
        sync.synchronize()


def test_a_second_gradient_is_refused_even_if_nothing_travels_yet():
    model = Chain()
    sync = attach("overlap", model)
    batch = batches(0)[0]
    for _ in range(2):
        model(batch).backward()
        sync.synchronize()
        model.zero_grad()
    model(batch, leave_out=[3]).backward()  # whose gradient would go first
    assert not any(bucket.launched for bucket in sync._buckets)
    with pytest.raises(RankDisagreementError, match=r"second gradient.*no_sync"):
        model(batch).backward()
    sync.close()


def test_gradients_lie_in_their_slices_before_the_backward_pass_ends():
    model = Chain()
    sync = attach("overlap", model)
    model(batches(0)[0]).backward()
    assert {p.grad.data_ptr() for p in model.parameters()} == {view.data_ptr() for view in sync.views.values()}
    sync.close()
