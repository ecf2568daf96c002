"""A strategy of one's own inside the compiled step, written from the docstrings alone, against `custom`."""

import contextlib
import functools
import warnings

import pytest
import torch
from in_graph import Compressing, OneByOne, SumAndScale, Wrong
from torch import nn

import ddpkit
from ddpkit.compile.backend import using
from ddpkit.errors import InputError, ParityError
from ddpkit.sync.standard import StandardSync
from ddpkit.testing import run_ranks

COMPILED = "sum and scale"  # the others' graphs are interpreted
OWN = {"sum and scale": SumAndScale, "one by one": OneByOne, "compressing": Compressing}


class Net(nn.Module):
    """Forces by a derivative inside, a buffer that counts, and a layer that rank 0 alone uses."""

    def __init__(self, rank=0):
        super().__init__()
        torch.manual_seed(0)
        self.rank = rank
        self.first, self.second, self.lonely = nn.Linear(3, 8), nn.Linear(8, 1), nn.Linear(3, 1)
        self.double()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.second(torch.tanh(self.first(x)))
            if self.rank == 0:
                energy = energy + self.lonely(x) ** 2
            (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return {"energy": energy, "forces": -slope}


def interpreted():
    """Inside, graphs are not compiled."""
    return using("interpreted")


def criterion(output, batch):
    return (output["energy"].square().sum() + (output["forces"] - batch).square().sum()) / 8


def rows(number, count):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def train(strategy, rank):
    """Batches of several shapes, two micro-batches, one for which rank 1 has no compiled code, and one with a layer frozen."""
    model = Net(rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = ddpkit.make_step(model, criterion, optimizer, strategy=strategy, compile=True, clip_norm=1.0, timeout=200.0)
    seen = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        several = [rows(4 + rank, 6), rows(6 + rank, 5)]
        for batch in (rows(rank, 7 + rank), rows(2 + rank, 9), several, rows(8 + rank, 0 if rank else 6)):
            step(batch)
            seen.append({n: p.grad.clone() for n, p in model.named_parameters()} | {"norm": step.grad_norm.clone()})
        model.second.requires_grad_(False)
        step(rows(10 + rank, 8))
    stats, eager = step.sync.stats, step.eager_batches
    step.sync.close()
    told = sorted({str(w.message).split("'")[1] for w in said if "has no gradient on rank" in str(w.message)})
    counted = {"calls": stats.calls, "bytes": stats.bytes, "collectives": stats.collectives, "eager": eager}
    return seen, [p.detach().clone() for p in model.parameters()], counted, told


def refuse_wrong(rank):
    model = Net()
    step = ddpkit.make_step(model, criterion, torch.optim.SGD(model.parameters()), strategy=Wrong, compile=True)
    try:
        step.prepare(rows(rank, 6))
    except (ParityError, RuntimeError) as error:
        return str(error)
    return ""


def all_of_them():
    rank = torch.distributed.get_rank()
    results = {}
    for name, strategy in {**OWN, "custom": "custom"}.items():
        with contextlib.nullcontext() if name == COMPILED else interpreted():
            results[name] = train(strategy, rank)
    with interpreted():
        return results, refuse_wrong(rank)


@pytest.fixture(scope="module")
def results():
    return run_ranks(all_of_them, 2, timeout=300)


@pytest.mark.parametrize("name", OWN)
def test_an_own_strategy_in_the_graph_trains_as_custom_does(results, name):
    tolerance = 2e-2 if name == "compressing" else 1e-10
    for (ours, _), rank in zip(results, range(2), strict=True):
        seen, parameters, stats, told = ours[name]
        expected, theirs, _, _ = ours["custom"]
        for one, two in zip(seen, expected, strict=True):
            assert one.keys() == two.keys()
            for key, value in two.items():
                torch.testing.assert_close(one[key], value, rtol=tolerance, atol=tolerance * float(value.norm()))
        if name != "compressing":  # AdamW makes much of the signs of small gradients
            torch.testing.assert_close(parameters, theirs, rtol=1e-8, atol=1e-10)
        assert (stats["calls"], stats["eager"]) == (5, rank)
        assert told == (["lonely.bias", "lonely.weight"] if rank else [])


@pytest.mark.parametrize("name", OWN)
def test_ranks_stay_alike_to_the_bit(results, name):
    (one, _), (two, _) = results
    for p, q in zip(one[name][1], two[name][1], strict=True):
        assert torch.equal(p, q)


def test_traffic_is_what_the_strategy_says(results):
    count = sum(p.numel() for p in [*Net().first.parameters(), *Net().lonely.parameters()])
    stats = results[0][0]["sum and scale"][2]
    assert (stats["bytes"], stats["collectives"]) == (8 * count, 1)


def test_one_that_does_not_average_is_refused_by_the_gate(results):
    assert all("Compiled and eager code differ" in said for _, said in results)


@pytest.mark.parametrize("strategy", [SumAndScale, OneByOne, Compressing, "in_graph.SumAndScale"])
@interpreted()
def test_on_one_rank_it_changes_nothing(strategy):
    found = []
    for compiled, kind in ((True, strategy), (False, "none")):
        model = Net()
        step = ddpkit.make_step(
            model, criterion, torch.optim.SGD(model.parameters(), lr=0.1), strategy=kind, compile=compiled
        )
        step(rows(0, 6))
        step([rows(1, 6), rows(2, 5)])
        found.append([*model.parameters()])
    rough = strategy is Compressing
    torch.testing.assert_close(*found, rtol=1e-2 if rough else 1e-10, atol=1e-2 if rough else 1e-12)


def made(module, **options):
    return SumAndScale(module, **options)


@interpreted()
def test_it_is_part_of_compiled_steps_alone():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(InputError, match=r"strategy=SumAndScale is part of the compiled step: use compile=True"):
        ddpkit.make_step(model, criterion, optimizer, strategy=SumAndScale)
    with pytest.raises(InputError, match=r"strategy=Compressing is part of the compiled step and has no synchronize"):
        ddpkit.make_sync(Compressing, model)
    with pytest.raises(InputError, match="use compile=True"):
        ddpkit.make_step(model, criterion, optimizer, strategy=made)
    ddpkit.make_step(model, criterion, optimizer, strategy=made, compile=True)(rows(0, 6))
    model(rows(0, 6))["energy"].sum().backward()
    with pytest.raises(InputError, match=r"strategy=SumAndScale averages inside the compiled step"):
        made(model).synchronize()


def wrapped(module, **options):
    return StandardSync(module, **options)


def test_a_function_does_not_tell_that_its_strategy_acts_during_the_backward_pass():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ddpkit.make_step(model, criterion, optimizer, strategy=wrapped)(rows(0, 6))
    with pytest.raises(
        InputError, match=r"strategy=wrapped makes a standard, which acts .*: give its class, or a functools.partial"
    ):
        ddpkit.make_step(model, criterion, optimizer, strategy=wrapped, compile=True)
    with interpreted():
        partial = functools.partial(StandardSync)
        ddpkit.make_step(model, criterion, optimizer, strategy=partial, compile=True)(rows(0, 6))


def test_one_that_does_not_say_what_follows_is_refused():
    silent = type("Silent", (ddpkit.GradientSync,), {"acts": "in graph"})
    model = Net()
    with pytest.raises(InputError, match=r"Silent acts in the graph, so it must override after_gradients"):
        ddpkit.make_step(model, criterion, torch.optim.SGD(model.parameters()), strategy=silent, compile=True)
    with pytest.raises(
        InputError, match=r"Odd sets acts = 'inside': use one of 'after backward', 'during backward', 'in"
    ):
        type("Odd", (ddpkit.GradientSync,), {"acts": "inside"})


@pytest.mark.parametrize("flag", ["separable", "plain_loop"])
def test_flags_that_acts_replaces_are_refused(flag):
    with pytest.raises(InputError, match=f'Old sets {flag}.*acts = "during backward"'):
        type("Old", (ddpkit.GradientSync,), {flag: False})
