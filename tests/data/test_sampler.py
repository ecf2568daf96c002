import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpkit import InputError
from ddpkit.data import Sampler, Sweep, split
from ddpkit.data.sampler import imbalance, pack


def make(n, batch_size, world_size=1, rank=0, kind=Sampler, **options):
    rng = np.random.default_rng(n)
    indices = rng.permutation(10 * n)[:n]
    atoms = rng.integers(2, 150, size=n)
    return kind(
        indices, atoms, atoms * rng.integers(0, 60, size=n), batch_size, world_size=world_size, rank=rank, **options
    )


def global_batches(n, batch_size, world_size, epoch=0, **options):
    ranks = [list(make(n, batch_size, world_size, rank, **options).epoch(epoch)) for rank in range(world_size)]
    return [[step.indices for step in steps] for steps in zip(*ranks, strict=True)], [list(s) for s in ranks]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(8, 120),
    batch=st.integers(8, 40),
    world=st.integers(1, 4),
    accumulate=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_global_batches_do_not_depend_on_the_world_size(n, batch, world, accumulate, seed):
    batch = min(batch, n)
    alone, _ = global_batches(n, batch, 1, epoch=3, seed=seed)
    together, ranks = global_batches(n, batch, world, epoch=3, seed=seed, accumulate=accumulate)
    assert len(alone) == len(together) == n // batch
    for (whole,), parts in zip(alone, together, strict=True):
        assert sorted(np.concatenate(parts)) == sorted(whole)
        assert len(whole) == batch
    for steps in ranks:
        for step in steps:
            assert len(step.micro_batches) == accumulate
            assert all(len(part) for part in step.micro_batches)
    assert {(s.frames, s.atoms, s.edges) for s in ranks[0]} == {(s.frames, s.atoms, s.edges) for s in ranks[-1]}
    drawn = np.concatenate([whole for (whole,) in alone])
    assert len(set(drawn)) == len(drawn)


def test_global_counts_are_those_of_the_frames():
    sampler = make(50, 8, 3, 1)
    place = {index: i for i, index in enumerate(sampler.indices)}
    (whole,), *_ = global_batches(50, 8, 1)[0]
    step = next(iter(sampler.epoch(0)))
    chosen = [place[index] for index in whole]
    assert (step.frames, step.atoms, step.edges) == (8, sampler.atoms[chosen].sum(), sampler.edges[chosen].sum())


def test_epochs_differ_seeds_differ_and_the_same_is_the_same():
    def first(seed, epoch):
        return next(iter(make(50, 8, seed=seed).epoch(epoch))).indices.tolist()

    assert first(1, 0) == first(1, 0)
    assert len({tuple(first(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_starting_within_an_epoch_gives_the_rest_of_it():
    whole = list(make(50, 8, 2, 1).epoch(5))
    rest = list(make(50, 8, 2, 1).epoch(5, 4))
    assert [s.indices.tolist() for s in rest] == [s.indices.tolist() for s in whole[4:]]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 60), batch=st.integers(1, 20), world=st.integers(1, 5))
def test_a_sweep_gives_each_frame_once(n, batch, world):
    sweeps = [make(n, batch, world, rank, kind=Sweep) for rank in range(world)]
    seen = np.concatenate([np.zeros(0, int), *(step.indices for sweep in sweeps for step in sweep.epoch(0))])
    assert sorted(seen) == sorted(sweeps[0].indices)
    for sweep in sweeps:
        assert len(list(sweep.epoch(0))) == sweep.steps_per_epoch
        for step in sweep.epoch(0):
            assert (step.frames, step.atoms) == (n, sweep.atoms.sum())
            assert len(step.indices) <= max(1, batch // world)


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.integers(0, 10**6), min_size=1, max_size=60), bins=st.integers(1, 8))
def test_packing_keeps_the_bound_of_greedy_schedules(weights, bins):
    parts = pack(weights, bins)
    assert sorted(np.concatenate(parts)) == list(range(len(weights)))
    if len(weights) >= bins:
        assert all(len(part) for part in parts)
    loads = [sum(weights[i] for i in part) for part in parts]
    # Graham (1966): what any greedy list schedule keeps.
    assert max(loads) <= sum(weights) / bins + (1 - 1 / bins) * max(weights) + 1e-9


def test_balancing_helps():
    before, after = make(400, 32).imbalance(world_size=4)
    assert after < 1.05 < before
    assert imbalance([2, 2]) == 1
    assert imbalance([3, 1]) == 1.5


@pytest.mark.parametrize(
    ("n", "batch", "world", "message"),
    [(5, 8, 1, "exceeds the 5 training frames"), (50, 3, 4, "cannot be divided over 4 ranks")],
)
def test_impossible_batches_are_refused(n, batch, world, message):
    with pytest.raises(InputError, match=message):
        make(n, batch, world)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(3, 500), seed=st.integers(0, 50), groups=st.integers(0, 30))
def test_a_split_is_a_partition_and_keeps_groups_together(n, seed, groups):
    group = (
        None if groups < 3 else np.concatenate([[0, 1, 2], np.random.default_rng(seed).integers(0, groups, size=n)])[:n]
    )
    fractions = (0.9, 0.05, 0.05)
    parts = split(n, fractions, seed, group)
    assert sorted(np.concatenate(parts)) == list(range(n))
    assert all(len(part) for part in parts)
    assert [p.tolist() for p in parts] == [p.tolist() for p in split(n, fractions, seed, group)]
    if group is None:
        if n >= 40:
            assert all(abs(len(part) - f * n) <= 1 for part, f in zip(parts, fractions, strict=True))
    else:
        members = [set(group[part]) for part in parts]
        assert not members[0] & members[1]
        assert not members[0] & members[2]
        assert not members[1] & members[2]


def test_a_split_may_have_empty_parts_but_no_negative_ones():
    assert [len(part) for part in split(10, (1.0, 0.0, 0.0))] == [10, 0, 0]
    assert [len(part) for part in split(4, (0.5, 0.5))] == [2, 2]
    with pytest.raises(InputError, match="add up"):
        split(10, (0.5, 0.2))
    with pytest.raises(InputError, match="2 frames cannot"):
        split(2, (0.9, 0.05, 0.05))
