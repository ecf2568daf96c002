"""Compiled steps on several ranks, each a process of its own."""

import contextlib
import warnings
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from toy import Toy, random_batch

import ddpkit
from ddpkit.errors import ParityError
from ddpkit.ranks import agree
from ddpkit.ranks.group import store
from ddpkit.testing import run_ranks

SIZES = [[[6, 5], [4]], [[3, 7, 5], [9, 2]], [[5], [8, 4]]]  # frames by step and rank
ARMS = {
    "custom": {},
    "ingraph": {},
    "ingraph_3": {"strategy": "ingraph", "buckets": 3},
    "ingraph_optimizer": {"strategy": "ingraph", "optimizer_in_graph": True},
    "standard": {"find_unused_parameters": True},
    "overlap": {"bucket_mb": 1e-4, "first_bucket_mb": 1e-4},
}


def totals(step):
    frames = [n for rank in SIZES[step] for n in rank]
    return len(frames), sum(frames)


def batches(step):
    return [random_batch(sizes, seed=10 * step + rank, totals=totals(step)) for rank, sizes in enumerate(SIZES[step])]


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def train(here, arm, options, compile_):
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    strategy = options.get("strategy", arm)
    rest = {k: v for k, v in options.items() if k != "strategy"}
    step = ddpkit.make_step(model, ddpkit.EnergyForcesLoss(), optimizer, strategy=strategy, compile=compile_, **rest)
    found = []
    for number in range(len(SIZES)):
        loss = step(batches(number)[here])["loss"]
        found.append({"loss": loss, "norm": step.grad_norm, **gradients(model)})
    two = [random_batch([4, 3], seed=5 + here, totals=(8, 26)), random_batch([6], seed=7 + here, totals=(8, 26))]
    step([*two, random_batch([4 - here, 3 + here][:1], seed=9 + here, totals=(8, 26))])
    found.append(
        {
            "norm": step.grad_norm,
            **gradients(model),
            **{f"{n}'": p.detach().clone() for n, p in model.named_parameters()},
        }
    )
    stats = step.sync.stats
    step.sync.close()
    return found, (stats.calls, stats.collectives)


def all_arms():
    here = torch.distributed.get_rank()
    results = {"eager": train(here, "custom", {}, False)}
    for arm, options in ARMS.items():
        results[arm] = train(here, arm, options, True)
    return results


def union_gradients():
    """The same steps by one process over the union of batches, eagerly."""
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss_of = ddpkit.EnergyForcesLoss()
    found = []
    for number in range(len(SIZES)):
        optimizer.zero_grad()
        for batch in batches(number):
            loss_of(model(batch), batch)["loss"].backward()
        found.append(gradients(model))
        optimizer.step()
    return found


@pytest.fixture(scope="module")
def results():
    return run_ranks(all_arms, 2, timeout=400)


@pytest.mark.parametrize("arm", ARMS)
def test_gradients_are_those_of_the_union(results, arm):
    for rank in range(2):
        for mine, theirs in zip(results[rank][arm][0], union_gradients(), strict=False):
            for name, value in theirs.items():
                if value is None:
                    assert mine[name] is None or not mine[name].any(), name
                else:
                    torch.testing.assert_close(mine[name], value, rtol=1e-10, atol=1e-10 * float(value.norm()))


@pytest.mark.parametrize("arm", ARMS)
def test_accumulated_gradients_are_those_of_eager_code(results, arm):
    for rank in range(2):
        mine, theirs = results[rank][arm][0][-1], results[rank]["eager"][0][-1]
        for name, value in theirs.items():
            if value is not None:
                torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-9 * float(value.norm()))


@pytest.mark.parametrize("arm", ARMS)
def test_ranks_agree_to_the_bit(results, arm):
    for one, two in zip(results[0][arm][0], results[1][arm][0], strict=True):
        for name in set(one) - {"loss"}:
            assert (one[name] is None and two[name] is None) or torch.equal(one[name], two[name]), name


def test_averages_in_the_graph_are_those_of_custom_to_the_bit(results):
    """What the graph computes locally is the same code; at two ranks a sum has one order."""
    for arm in ("ingraph", "ingraph_3", "ingraph_optimizer"):
        for one, two in zip(results[0]["custom"][0][:3], results[0][arm][0][:3], strict=True):
            for name in set(one) - {"norm", "unused"}:
                if one[name] is not None:
                    torch.testing.assert_close(one[name], two[name], rtol=1e-14, atol=1e-14)


def test_one_communication_a_step(results):
    assert results[0]["custom"][1] == (4, 1)
    assert results[0]["ingraph"][1] == (4, 1)
    assert results[0]["ingraph_3"][1] == (4, 3)


def compile_and_count(own_form):
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    rank = torch.distributed.get_rank()
    if own_form:
        model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 1))
        criterion, batch = (lambda y, _: y.square().mean()), torch.randn(7 + 3 * rank, 6)
    else:
        model, criterion, batch = Toy(width=9), ddpkit.EnergyForcesLoss(), random_batch([4, 5 + rank])
    step = ddpkit.make_step(model, criterion, torch.optim.SGD(model.parameters()), compile=True)
    step.prepare(batch)
    return {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss")}


@pytest.mark.parametrize("own_form", [True, pytest.param(False, marks=pytest.mark.long)])
def test_one_rank_compiles_and_the_others_read_its_cache(tmp_path, own_form):
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    first, second = run_ranks(compile_and_count, 2, own_form, timeout=300, environment=cache)
    assert first == {"hit": 0, "miss": 1}
    assert second == {"hit": 1, "miss": 0}
    assert run_ranks(compile_and_count, 2, own_form, timeout=300, environment=cache) == [{"hit": 1, "miss": 0}] * 2


def differ_on_one_rank():
    from ddpkit.compile import gradients as module
    from ddpkit.compile.parity import Difference

    model = torch.nn.Linear(6, 1)
    step = ddpkit.make_step(
        model, lambda y, _: y.square().mean(), torch.optim.SGD(model.parameters()), strategy="ingraph", compile=True
    )
    if torch.distributed.get_rank() == 1:
        module.parity.differences = lambda *_: [Difference("weight", 1.0, 1e-4, "6 rows")]
    try:
        step.prepare(torch.randn(6, 6))
    except (RuntimeError, ParityError) as error:
        return str(error)
    return ""


def test_a_difference_on_one_rank_stops_all():
    first, second = run_ranks(differ_on_one_rank, 2, timeout=300)
    assert "Rank 1 failed in comparing compiled with eager code: ParityError" in first
    for said in (first, second):
        assert "'weight' by 1 relative" in said


def break_one_rank():
    from ddpkit.compile import gradients as module

    model = torch.nn.Linear(6, 1)
    step = ddpkit.make_step(model, lambda y, _: y.square().mean(), torch.optim.SGD(model.parameters()), compile=True)
    if torch.distributed.get_rank() == 1:

        def broken(*_):
            raise ValueError("no compiler here")

        module.lower = broken
    try:
        step.prepare(torch.randn(6, 6))
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def test_a_rank_that_cannot_compile_stops_all():
    first, second = run_ranks(break_one_rank, 2, timeout=300)
    assert "Rank 1 failed in compiling the model: ValueError: no compiler here" in first
    assert "no compiler here" in second


class Lopsided(torch.nn.Module):
    """Has a layer that one rank alone uses."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank
        self.a, self.b = torch.nn.Linear(6, 1), torch.nn.Linear(6, 1)

    def forward(self, batch):
        return self.a(batch["x"]) + (self.b(batch["x"]) if self.rank == 0 else 0)


def train_lopsided():
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    model = Lopsided(rank)
    step = ddpkit.make_step(
        model, lambda y, _: y.square().mean(), torch.optim.AdamW(model.parameters()), strategy="ingraph", compile=True
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for seed in range(2):
            generator = torch.Generator().manual_seed(10 * seed + rank)
            step({"x": torch.randn(7 + rank, 6, generator=generator)})
    told = [str(w.message) for w in said]
    return [p.detach().numpy().tobytes() for p in model.parameters()], told


def test_a_parameter_that_one_rank_uses_is_updated_on_all():
    (one, told_one), (two, told_two) = run_ranks(train_lopsided, 2, timeout=300)
    assert one == two
    assert not any("b.weight" in said for said in told_one)
    assert any("'b.weight' has no gradient on rank 1" in said for said in told_two)


def compiles_for(device):
    """Which rank of the two compiled before the other, where each waits a while for the other to begin."""
    here, began = agree.environment(), []
    agree.environment = lambda: replace(here, device=torch.device(device))
    other = f"began {1 - here.rank}"

    def lower(_):
        store().set(f"began {here.rank}", "")
        with contextlib.suppress(torch.distributed.DistStoreError):
            store().wait([other], timedelta(seconds=2 if device == "cpu" else 60))
            began.append(other)

    agree.in_turn(lambda: None, lower)
    return began


@pytest.mark.parametrize(("device", "first", "second"), [("cpu", [], ["began 0"]), ("cuda", ["began 1"], ["began 0"])])
def test_ranks_with_a_gpu_each_compile_at_the_same_time(device, first, second):
    assert run_ranks(compiles_for, 2, device) == [first, second]
