import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpkit import InputError
from ddpkit.data import Capacity, Sampler, choose_capacities
from ddpkit.data.capacities import _divided
from ddpkit.sync.emulated import EveryRank


def facts(n, seed, spread=0.3):
    """Atoms, edges and most neighbours of frames."""
    rng = np.random.default_rng(seed)
    atoms = np.maximum(1, rng.normal(30, 30 * spread, size=n).astype(int))
    most = np.minimum(atoms - 1, rng.integers(8, 24, size=n))
    return atoms, (atoms * most * rng.uniform(0.5, 1.0, size=n)).astype(int), most


def make(n, batch_size, seed=0, kind=Sampler, capacities=None, spread=0.3, **options):
    atoms, edges, most = facts(n, seed, spread)
    return kind(
        7 * np.arange(n), atoms, edges, batch_size, most_neighbours=most, capacities=capacities, seed=seed, **options
    )


def sizes_of(sampler, frames):
    places = frames // 7
    return (
        int(sampler.atoms[places].sum()), int(sampler.edges[places].sum()), len(frames),
        int(sampler.most_neighbours[places].max()),
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(12, 60),
    batch=st.integers(8, 20),
    world=st.integers(1, 4),
    accumulate=st.integers(1, 2),
    seed=st.integers(0, 99),
    spread=st.sampled_from([0.0, 0.1, 2.0]),
)
def test_a_step_has_the_first_capacity_that_holds_it_on_all_ranks(n, batch, world, accumulate, seed, spread):
    batch = min(n, batch)
    plan = {"world_size": world, "accumulate": accumulate, "seed": seed, "spread": spread}
    choice = choose_capacities(make(n, batch, **plan))
    assert 1 <= len(choice.levels) <= 8
    assert list(choice.levels) == sorted(choice.levels, key=lambda c: c.edges)
    epochs = (0, 1000)
    ranks = [make(n, batch, rank=rank, capacities=choice.levels, **plan) for rank in range(world)]
    for steps in zip(*([s for e in epochs for s in rank.epoch(e)] for rank in ranks), strict=True):
        assert len({step.capacity for step in steps}) == 1
        assert all(step.is_padded for step in steps)
        batches = [sizes_of(ranks[0], part) for step in steps for part in step.micro_batches]
        holding = [c for c in choice.levels if all(c.holds(*batch) for batch in batches)]
        assert steps[0].capacity == (holding[0] if holding else None)
    plain = [s for e in epochs for s in make(n, batch, **plan).epoch(e)]
    assert all(step.capacity is None and not step.is_padded for step in plain)
    padded = [s for e in epochs for s in ranks[0].epoch(e)]
    assert [s.indices.tolist() for s in plain] == [s.indices.tolist() for s in padded]


def test_the_waste_stays_below_its_bound_with_few_capacities():
    sampler = make(2000, 64, world_size=4)
    choice = choose_capacities(sampler, waste=0.1)
    assert len(choice.levels) <= 2
    assert choice.edges < 0.1
    assert choose_capacities(sampler).edges < 0.05
    ranks = [make(2000, 64, world_size=4, rank=rank, capacities=choice.levels) for rank in range(4)]
    wasted, unheld = [], 0
    for steps in zip(*([s for e in range(20, 24) for s in rank.epoch(e)] for rank in ranks), strict=True):
        capacity = steps[0].capacity
        unheld += capacity is None
        if capacity is not None:
            wasted.append(capacity.edges / max(sizes_of(ranks[0], step.indices)[1] for step in steps) - 1)
    assert np.mean(wasted) < 0.1
    assert unheld <= 1
    stricter = choose_capacities(sampler, waste=0.03)
    assert len(stricter.levels) > len(choice.levels)
    assert stricter.edges < 0.03
    assert "capacities; mean waste" in str(stricter)


def test_frames_of_one_size_need_one_capacity():
    choice = choose_capacities(
        Sampler(np.arange(40), np.full(40, 9), np.full(40, 54), 8, most_neighbours=np.full(40, 8))
    )
    assert len(choice.levels) == 1
    assert choice.levels[0].edges == 8 * 54
    assert choice.unheld == 0


def test_no_more_capacities_than_are_allowed():
    assert len(choose_capacities(make(500, 2, spread=3.0), levels=3).levels) == 3


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_parts_are_those_of_least_waste(levels):
    rng = np.random.default_rng(levels)
    fullest = np.sort(rng.integers(10, 1000, size=9))
    steps = [np.array([[3, edges, 2, 5]]) for edges in rng.permutation(fullest)]

    def waste(parts):
        return sum((part[-1] / part - 1).sum() for part in parts)

    best = min(waste(np.split(fullest, cuts)) for cuts in itertools.combinations(range(1, len(fullest)), levels - 1))
    *_, found = itertools.islice(_divided(steps, 8), levels)
    found = [np.array([step[0, 1] for step in part]) for part in found]
    assert np.concatenate(found).tolist() == fullest.tolist()
    assert waste(found) == pytest.approx(best)


def test_a_step_that_fits_nowhere_has_no_capacity_but_is_padded():
    sampler = make(40, 8, capacities=[Capacity(10, 10, 3, 4)])
    assert all(step.capacity is None and step.is_padded for step in sampler.epoch(0))
    with pytest.raises(InputError, match="most_neighbours"):
        Sampler(np.arange(9), np.ones(9), np.ones(9), 2, capacities=[])
    with pytest.raises(InputError, match="most_neighbours"):
        choose_capacities(Sampler(np.arange(9), np.ones(9), np.ones(9), 2))


def test_one_process_that_stands_for_all_ranks_has_their_capacities():
    choice = choose_capacities(make(60, 16, world_size=4))
    assert choose_capacities(make(60, 16, kind=EveryRank, world_size=4)) == choice
    one = make(60, 16, kind=EveryRank, world_size=4, capacities=choice.levels)
    for step, alone in zip(one.epoch(1), make(60, 16, world_size=4, capacities=choice.levels).epoch(1), strict=True):
        assert step.capacity == alone.capacity
        assert all(step.capacity.holds(*sizes_of(one, part)) for part in step.micro_batches)
