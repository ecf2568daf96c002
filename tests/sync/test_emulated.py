"""The order of sums on one process is that of the real collectives, to the last bit."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import ddpkit
from ddpkit.data.sampler import Sampler
from ddpkit.errors import InputError
from ddpkit.sync.emulated import EmulatedSync, EveryRank
from ddpkit.sync.flat import FlatSync
from ddpkit.sync.orders import ORDERS
from ddpkit.testing import run_ranks

SIZES = (1, 2, 5, 7, 64, 1000, 4099, 1_500_007)


def held(size, rank, dtype=torch.float32):
    return torch.randn(size, generator=torch.Generator().manual_seed(100 * size + rank), dtype=dtype)


def gloo_sums():
    sums = [held(size, dist.get_rank()) for size in SIZES]
    sums.append(held(1001, dist.get_rank(), torch.float64))
    for tensor in sums:
        dist.all_reduce(tensor)
    return sums if dist.get_rank() == 0 else None


def mpi_sums():
    from mpi4py import MPI

    sums = [held(size, MPI.COMM_WORLD.rank).numpy() for size in SIZES]
    for array in sums:
        MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, array)
    return sums if MPI.COMM_WORLD.rank == 0 else None


def emulated(order, ranks, size, dtype=torch.float32):
    return ORDERS[order](torch.stack([held(size, rank, dtype) for rank in range(ranks)]))


@pytest.mark.parametrize("ranks", [2, 3, 4])  # of two, a sum has one order
def test_ring_is_gloos(ranks):
    *singles, double = run_ranks(gloo_sums, ranks)[0]
    for size, real in zip(SIZES, singles, strict=True):
        assert torch.equal(emulated("ring", ranks, size), real), size
    assert torch.equal(emulated("ring", ranks, 1001, torch.float64), double)


@pytest.mark.parametrize(("order", "number", "ranks"), [("halving_doubling", 3, 3), ("ring_up", 4, 4)])
def test_orders_are_open_mpis(order, number, ranks):
    forced = {
        "OMPI_MCA_coll": "self,tuned,basic,libnbc",
        "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
        "OMPI_MCA_coll_tuned_allreduce_algorithm": str(number),
    }
    sums = run_ranks(mpi_sums, ranks, launcher="mpirun", initialize=False, environment=forced)[0]
    for size, real in zip(SIZES, sums, strict=True):
        assert np.array_equal(emulated(order, ranks, size).numpy(), real), size


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 7, 13, 64])
def test_every_order_adds_every_rank_once(order, ranks):
    for size in (1, 10, 129):
        parts = (2.0 ** torch.arange(ranks, dtype=torch.float64) % 8191).repeat(size, 1).T.contiguous()
        parts *= torch.arange(1, size + 1)  # whole numbers: exact in any order
        assert torch.equal(ORDERS[order](parts), parts.sum(0))


def test_orders_differ_on_many_ranks_and_cannot_on_two():
    for ranks, kinds in ((2, 1), (64, len(ORDERS))):
        sums = [emulated(order, ranks, 10_000) for order in ORDERS]
        assert len({tuple(x.tolist()) for x in sums}) == kinds


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 1))


def gradients_of(sync, module, shares):
    """What one step leaves in `.grad`, with one share for each micro-batch."""
    for share in shares[:-1]:
        with sync.no_sync():
            module(share).square().sum().backward()
    module(shares[-1]).square().sum().backward()
    sync.synchronize()
    return [p.grad.clone() for p in module.parameters()]


def real_step():
    module = network()
    sync = FlatSync(module)
    rng = torch.Generator().manual_seed(5)
    share = [torch.randn(6, 7, generator=rng) for _ in range(dist.get_world_size())][dist.get_rank()]
    (module(share).square().sum() * dist.get_world_size()).backward()
    sync.synchronize()
    return [p.grad.clone() for p in module.parameters()]


def test_a_step_has_the_bits_of_custom_on_four_ranks():
    real = run_ranks(real_step, 4)
    module = network()
    sync = ddpkit.make_sync("emulated", module, ranks=4, order="ring")
    rng = torch.Generator().manual_seed(5)
    shares = [torch.randn(6, 7, generator=rng) for _ in range(4)]
    for _ in range(2):
        module.zero_grad()
        mine = gradients_of(sync, module, shares)
        assert all(torch.equal(a, b) for a, b in zip(mine, real[0], strict=True))
    assert sync.stats.collectives == 1
    in_buckets = ddpkit.make_sync("emulated", copy.deepcopy(module), ranks=4, bucket_mb=1e-5)
    other = gradients_of(in_buckets, in_buckets.module, shares)
    assert in_buckets.stats.collectives > 1
    assert any(not torch.equal(a, b) for a, b in zip(other, mine, strict=True))
    torch.testing.assert_close(other, mine)


def test_a_parameter_without_gradient_keeps_none():
    module = nn.ModuleDict({"used": nn.Linear(3, 1), "idle": nn.Linear(2, 2)})
    sync = EmulatedSync(module, ranks=2)
    with sync.no_sync():
        module["used"](torch.ones(1, 3)).sum().backward()
    module["used"](torch.ones(1, 3)).sum().backward()
    sync.synchronize()
    assert module["idle"].weight.grad is None
    assert torch.equal(module["used"].weight.grad, torch.full((1, 3), 2.0))


def test_what_it_cannot_do_is_said():
    for options, said in (({"order": "star"}, "strategy.order=star is unknown"), ({"ranks": 0}, "at least 1")):
        with pytest.raises(InputError, match=said):
            EmulatedSync(network(), **options)
    module = network()
    sync = EmulatedSync(module, ranks=3)
    with pytest.raises(InputError, match="adds 3 shards a step and got 2"):
        gradients_of(sync, module, [torch.ones(1, 7)] * 2)


def test_every_rank_gets_what_it_would_get():
    rng = np.random.default_rng(0)
    atoms = rng.integers(3, 30, 40)
    common = (np.arange(40), atoms, atoms**2, 16)
    ranks = [list(Sampler(*common, world_size=4, rank=rank, seed=3).epoch(1)) for rank in range(4)]
    for number, step in enumerate(EveryRank(*common, world_size=4, seed=3).epoch(1)):
        assert [part.tolist() for part in step.micro_batches] == [r[number].indices.tolist() for r in ranks]
        assert step.frames == 16


def nccl_sums(sizes):
    device = torch.device("cuda", dist.get_rank())
    sums = [held(size, dist.get_rank()).to(device) for size in sizes]
    for tensor in sums:
        dist.all_reduce(tensor)
    return [tensor.cpu() for tensor in sums] if dist.get_rank() == 0 else None


@pytest.mark.long
@pytest.mark.gpu(2)
@pytest.mark.parametrize("algorithm", ["Ring", "Tree"])
def test_nccl_adds_in_chains(algorithm):
    """On one host NCCL's ring adds along the ring from some rank on, and its tree is a chain: which start, its chunks decide.

    At two ranks there is one order; at more, each number must be that of a chain along the ranks as NCCL orders them.
    """
    ranks, sizes = min(4, torch.cuda.device_count()), (1000, 1_500_007)
    forced = {"NCCL_ALGO": algorithm, "NCCL_PROTO": "Simple", "NCCL_NVLS_ENABLE": "0"}
    for size, real in zip(sizes, run_ranks(nccl_sums, ranks, sizes, environment=forced)[0], strict=True):
        parts = [held(size, rank) for rank in range(ranks)]
        explained = torch.zeros(size, dtype=torch.bool)
        for order in itertools.permutations(range(ranks)):
            total = parts[order[0]].clone()
            for rank in order[1:]:
                total += parts[rank]
            explained |= total == real
        assert explained.all(), f"{int((~explained).sum())} of {size} numbers are no sum along any chain of ranks"


def hello():
    total = torch.ones(3)
    dist.all_reduce(total)
    return int(total[0]), dist.get_backend()


def test_64_real_ranks_start():
    """Processes of gloo on one host: a test of starting, not of numerics."""
    assert run_ranks(hello, 64, timeout=300.0) == [(64, "gloo")] * 64
