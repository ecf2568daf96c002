"""Recorded steps on several ranks against plain ones, bit for bit: on CPUs through gloo, on GPUs through NCCL."""

import pytest
import torch
from in_memory import keep_in_memory
from toy import Toy, random_batch

import ddpkit
from ddpkit.capture.recording import Pretended
from ddpkit.capture.steps import RecordedSteps
from ddpkit.compile.backend import use
from ddpkit.errors import RecordingError
from ddpkit.ranks.group import environment
from ddpkit.testing import run_ranks

ARMS = {
    "none": {"strategy": "none"},
    "custom": {"strategy": "custom"},
    "bfloat16 on the wire": {"strategy": "custom", "reduce_dtype": "bfloat16"},
    "standard": {"strategy": "standard", "find_unused_parameters": True},
    "standard in buckets": {
        "strategy": "standard",
        "find_unused_parameters": True,
        "bucket_cap_mb": 1e-4,
        "reduce_dtype": "bfloat16",
    },
    "standard with views": {"strategy": "standard", "static_graph": True, "gradient_as_bucket_view": True},
    "overlap": {"strategy": "overlap"},
    "overlap in buckets": {"strategy": "overlap", "bucket_mb": 1e-4, "first_bucket_mb": 1e-4},
    "ingraph": {"strategy": "ingraph"},
    "ingraph with the update": {"strategy": "ingraph", "optimizer_in_graph": True, "buckets": 2},
}
SIZES = [[6, 5, 4], [3, 7], [4, 4, 4]]
STEPS = 45


def batch_of(step, rank, totals=(30, 120)):
    """Of the same sizes on all ranks, but for every tenth, of which rank 1's is another (as if it were over capacity)."""
    number = step % len(SIZES)
    if step % 10 == 9 and rank == 1:
        return random_batch([5, 2 + step % 7], seed=step, totals=totals)
    alike = random_batch(SIZES[number], seed=number, totals=totals)
    return alike.replace(positions=alike.positions * (1 + 0.01 * step + 0.1 * rank), energy=alike.energy + rank)


def planned(step):
    return step % 10 != 9


def begin():
    """What a process does first. On a GPU the toy's sums over edges have no order otherwise."""
    torch.use_deterministic_algorithms(True)
    if environment().device.type == "cpu":
        use("interpreted")
        keep_in_memory()


def train(options, *, cuda_graphs, plan=planned, bad_at=None, timeout=200.0):
    rank, device = torch.distributed.get_rank(), environment().device
    model = Toy(dtype=torch.float32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    step = ddpkit.make_step(
        model,
        ddpkit.EnergyForcesLoss(),
        optimizer,
        compile=True,
        cuda_graphs=cuda_graphs,
        timeout=timeout,
        clip_norm=1.0,
        **options,
    )
    seen = []
    try:
        for n in range(STEPS):
            batch = batch_of(n, rank)
            if n == bad_at and rank == 1:
                batch = batch.replace(energy=batch.energy * torch.nan)
            output = step(batch.to(device), planned=plan(n))
            values = {**output, "norm": step.grad_norm, "first": model.first.detach()}
            if n % 11 == 1 and bad_at is None:  # not at all: to read them waits for the device
                values["sent"] = torch.tensor(
                    [step.sync.stats.calls, step.sync.stats.bytes, step.sync.stats.collectives]
                )
            seen.append({name: value.cpu().clone() for name, value in values.items()})
    finally:
        captured = step.captured_steps
        step.sync.close()
    return seen, captured


def all_arms():
    begin()
    results = {}
    for arm, options in ARMS.items():
        results[arm] = [train(options, cuda_graphs=recorded) for recorded in (False, True)]
    for arm in ("custom", "overlap in buckets"):
        results[f"{arm}, no plan"] = [
            train(ARMS[arm], cuda_graphs=recorded, plan=lambda _: False) for recorded in (False, True)
        ]
    return results


SIZED = [
    (2, "cpu"),
    pytest.param((2, "cuda"), marks=pytest.mark.gpu(2)),
    pytest.param((4, "cuda"), marks=pytest.mark.gpu(4)),
]


def variables(device):
    """Of ranks: without a GPU in sight, or with one each."""
    if device == "cuda":
        return {"NCCL_ALGO": "Ring"}
    return {"CUDA_VISIBLE_DEVICES": ""} if torch.cuda.is_available() else {}


@pytest.fixture(scope="module", params=SIZED, ids=lambda size: f"{size[0]}-{size[1]}")
def results(request):
    size, device = request.param
    return run_ranks(all_arms, size, timeout=400, environment=variables(device))


@pytest.mark.parametrize("arm", [*ARMS, "custom, no plan", "overlap in buckets, no plan"])
def test_bits_are_those_of_plain_steps(results, arm):
    for rank in range(len(results)):
        (plain, none), (recorded, captured) = results[rank][arm]
        assert none == 0
        assert captured >= STEPS - len(SIZES) - STEPS // 10
        for n, (one, two) in enumerate(zip(plain, recorded, strict=True)):
            for name, value in one.items():
                assert torch.equal(value, two[name]), (n, name)


def test_ranks_train_the_same_model(results):
    for arm in results[0].keys() - {"none"}:
        first, *others = (ranks[arm][1][0] for ranks in results)
        for other in others:
            assert all(torch.equal(a["first"], b["first"]) for a, b in zip(first, other, strict=True))


def meets_a_bad_gradient():
    begin()
    train(ARMS["custom"], cuda_graphs=True, bad_at=31)  # soon enough for a GPU, where flags are read late


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(2))])
def test_a_bad_gradient_is_named_with_its_rank(device):
    with pytest.raises(Exception, match=r"number 32 the gradient of .* is NaN or infinite on rank 1"):
        run_ranks(meets_a_bad_gradient, 2, timeout=300, environment=variables(device))


def fails_to_record():
    begin()
    if torch.distributed.get_rank() == 1:

        def record(_):
            raise RecordingError("no memory left")

        Pretended.record = record
    train(ARMS["custom"], cuda_graphs=True)


def test_all_ranks_record_or_none():
    """On a GPU all go on without recordings then; here they stop."""
    with pytest.raises(Exception, match="On rank 1: no memory left"):
        run_ranks(fails_to_record, 2, timeout=300, environment=variables("cpu"))


def goes_on_without():
    """As on a GPU: what cannot be recorded there runs as it is from then on."""
    begin()
    plain, _ = train(ARMS["standard"], cuda_graphs=False)
    if torch.distributed.get_rank() == 1:

        def record(_):
            raise RecordingError("no memory left")

        def give_up(steps, error):
            assert "no memory left" in str(error)
            steps._refused = True
            steps.close()

        Pretended.record, RecordedSteps._give_up = record, give_up
    recorded, captured = train(ARMS["standard"], cuda_graphs=True)
    return plain, recorded, captured


def test_a_rank_goes_on_alone_where_the_average_is_in_no_recording():
    for rank, (plain, recorded, captured) in enumerate(
        run_ranks(goes_on_without, 2, timeout=300, environment=variables("cpu"))
    ):
        assert (captured == 0) == (rank == 1)
        for one, two in zip(plain, recorded, strict=True):
            assert all(torch.equal(value, two[name]) for name, value in one.items())


def plans_alone():
    begin()
    rank = torch.distributed.get_rank()
    train(ARMS["custom"], cuda_graphs=True, plan=lambda _: rank == 0, timeout=5.0)


def test_a_plan_on_one_rank_alone_is_refused():
    with pytest.raises(Exception, match=r"say planned=True on all ranks or on none"):
        run_ranks(plans_alone, 2, timeout=300, environment=variables("cpu"))
