"""Recorded steps on two ranks against plain ones, bit for bit."""

import pytest
import torch
from toy import Toy, random_batch

import ddpkit
from ddpkit.compile.backend import use
from ddpkit.testing import run_ranks

ARMS = {
    "none": {"strategy": "none"},
    "custom": {"strategy": "custom"},
    "bfloat16 on the wire": {"strategy": "custom", "reduce_dtype": "bfloat16"},
    "ingraph": {"strategy": "ingraph"},
    "ingraph with the update": {"strategy": "ingraph", "optimizer_in_graph": True, "buckets": 2},
}
SIZES = [[6, 5, 4], [3, 7], [4, 4, 4]]
STEPS = 45


def batch_of(step, rank, totals=(30, 120)):
    """Of the same sizes on both ranks, but for every tenth, of which rank 1's is another (as if it were over capacity)."""
    number = step % len(SIZES)
    if step % 10 == 9 and rank == 1:
        return random_batch([5, 2 + step % 7], seed=step, totals=totals)
    alike = random_batch(SIZES[number], seed=number, totals=totals)
    return alike.replace(positions=alike.positions * (1 + 0.01 * step + 0.1 * rank), energy=alike.energy + rank)


def planned(step):
    return step % 10 != 9


def train(options, *, cuda_graphs, plan=planned, bad_at=None):
    rank = torch.distributed.get_rank()
    model = Toy(dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    step = ddpkit.make_step(
        model,
        ddpkit.EnergyForcesLoss(),
        optimizer,
        compile=True,
        cuda_graphs=cuda_graphs,
        timeout=30.0,
        clip_norm=1.0,
        **options,
    )
    seen = []
    try:
        for n in range(STEPS):
            batch = batch_of(n, rank)
            if n == bad_at and rank == 1:
                batch = batch.replace(energy=batch.energy * torch.nan)
            output = step(batch, planned=plan(n))
            seen.append({**output, "norm": step.grad_norm.clone(), "first": model.first.detach().clone()})
    finally:
        captured, calls = step.captured_steps, step.sync.stats.calls if bad_at is None else 0
        step.sync.close()
    return seen, captured, calls


def all_arms():
    use("interpreted")
    results = {}
    for arm, options in ARMS.items():
        results[arm] = [train(options, cuda_graphs=recorded) for recorded in (False, True)]
    results["no plan"] = [
        train(ARMS["custom"], cuda_graphs=recorded, plan=lambda _: False) for recorded in (False, True)
    ]
    return results


@pytest.fixture(scope="module")
def results():
    return run_ranks(all_arms, 2, timeout=400)


@pytest.mark.parametrize("arm", [*ARMS, "no plan"])
def test_bits_are_those_of_plain_steps(results, arm):
    for rank in range(2):
        (plain, none, calls), (recorded, captured, calls_too) = results[rank][arm]
        assert none == 0
        assert calls == calls_too
        assert captured >= STEPS - len(SIZES) - STEPS // 10
        for n, (one, two) in enumerate(zip(plain, recorded, strict=True)):
            for name, value in one.items():
                assert torch.equal(value, two[name]), (n, name)


def test_ranks_train_the_same_model(results):
    for arm in ["custom", "ingraph", "no plan"]:
        one, two = (results[rank][arm][1][0] for rank in range(2))
        assert all(torch.equal(a["first"], b["first"]) for a, b in zip(one, two, strict=True))


def meets_a_bad_gradient():
    use("interpreted")
    train(ARMS["custom"], cuda_graphs=True, bad_at=37)


def test_a_bad_gradient_is_named_with_its_rank():
    with pytest.raises(Exception, match=r"number 38 the gradient of .* is NaN or infinite on rank 1"):
        run_ranks(meets_a_bad_gradient, 2, timeout=120)
