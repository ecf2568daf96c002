import contextlib
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import molecule

from ddpkit import InputError
from ddpkit.data import Capacity, Loader, Sampler, Sweep, choose_capacities, collate, write_prepared
from ddpkit.padding import own_sizes, pad


@pytest.fixture
def frames(tmp_path):
    rng = np.random.default_rng(0)
    return write_prepared(tmp_path / "set", [molecule(rng, int(n)) for n in rng.integers(2, 12, size=40)], r_max=3.0)


def loader(frames, kind=Sampler, *, epochs=0, workers=0, **options):
    sampler = kind(np.arange(len(frames)), frames.atoms, frames.edges(3.0), 8, **options)
    return Loader(frames, sampler, frames.species, 3.0, epochs=epochs, workers=workers)


def same(batch, other):
    assert batch.tensors().keys() == other.tensors().keys()
    assert all(torch.equal(value, getattr(other, name)) for name, value in batch.tensors().items())


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come about"
        time.sleep(0.01)


def threads():
    return [t for t in threading.enumerate() if t.name == "ddpkit-loader"]


def test_batches_are_those_of_the_sampler_with_global_counts(frames):
    made = loader(frames, world_size=2, rank=1, accumulate=2, seed=4)
    assert made.steps_per_epoch() == 5
    for (step, batches), expected in zip(made.epoch(1), made.sampler.epoch(1), strict=True):
        assert [p.tolist() for p in step.micro_batches] == [p.tolist() for p in expected.micro_batches]
        for batch, part in zip(batches, step.micro_batches, strict=True):
            alone = collate([frames.frame(int(i)) for i in part], frames.species, 3.0)
            for name, value in alone.tensors().items():
                assert torch.equal(getattr(batch, name), value)
            assert batch.frames_total == 8
            assert batch.atoms_total == step.atoms
    assert not threads()


def test_leaving_early_ends_the_thread(frames):
    epoch = loader(frames).epoch(0, 1)
    next(epoch)
    epoch.close()
    assert not threads()


def test_a_sweep_sums_to_the_whole_set(frames):
    seen = [
        b.energy for rank in range(3) for _, bs in loader(frames, Sweep, world_size=3, rank=rank).epoch(0) for b in bs
    ]
    assert torch.cat(seen).sort().values.tolist() == sorted(frames.array("energy").tolist())


def test_an_error_in_the_thread_is_raised_where_the_batch_is_asked_for(tmp_path):
    rng = np.random.default_rng(0)
    bad = [molecule(rng) for _ in range(16)]
    bad[11] = replace(bad[11], energy=float("nan"))
    frames = write_prepared(tmp_path / "bad", bad, r_max=3.0)
    with pytest.raises(InputError, match=r"frame 11 of .* NaN"):
        list(loader(frames).epoch(0))
    assert not threads()


def test_the_next_epoch_is_made_while_nobody_asks_and_is_what_it_would_be(frames):
    made, plain = loader(frames, epochs=3), loader(frames)
    for epoch in range(3):
        if epoch:
            until(made._ahead[1].items.full)
        batches = [batch for _, [batch] in made.epoch(epoch)]
        for batch, (_, [expected]) in zip(batches, plain.epoch(epoch), strict=True):
            same(batch, expected)
    assert not threads()


@pytest.mark.parametrize("position", [(1, 2), (2, 0), (0, 0)])
def test_going_on_elsewhere_gives_up_what_was_made_ahead(frames, position):
    made = loader(frames, epochs=3)
    list(made.epoch(0))
    (before,) = threads()
    epoch = made.epoch(*position)
    for (_, [batch]), (_, [expected]) in zip(epoch, loader(frames).epoch(*position), strict=True):
        same(batch, expected)
        assert not before.is_alive()
    made.close()
    assert not threads()


def test_leaving_within_an_epoch_ends_the_thread_that_went_on(frames):
    made = loader(frames, epochs=3)
    list(made.epoch(0))
    epoch = made.epoch(1)
    next(epoch)
    epoch.close()
    assert not threads()
    list(made.epoch(1, 3))
    assert len(threads()) == 1
    made.close()
    made.close()
    assert not threads()


def test_an_error_of_the_next_epoch_is_raised_there(frames, monkeypatch):
    made = loader(frames, epochs=2)
    second = [step.indices for step in made.sampler.epoch(1)][3]
    fine, make = [], made._make

    def fail(step):
        if np.array_equal(step.indices, second):
            raise InputError("that one")
        return make(step)

    monkeypatch.setattr(made, "_make", fail)
    assert len(list(made.epoch(0))) == 5
    with pytest.raises(InputError, match="that one"):
        fine.extend(made.epoch(1))
    assert len(fine) == 3
    assert not threads()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_are_filled_up_to_the_capacity_of_the_step(frames, accumulate):
    plan = {"world_size": 2, "accumulate": accumulate, "most_neighbours": frames.most_neighbours(3.0)}
    choice = choose_capacities(loader(frames, **plan).sampler)
    small = choice.levels[0]
    few = [Capacity(small.atoms * 3 // 4, small.edges * 3 // 4, small.frames, small.most), small]
    seen = set()
    for epoch in range(6):
        ranks = [loader(frames, rank=rank, capacities=few, **plan).epoch(epoch) for rank in (0, 1)]
        plain = [loader(frames, rank=rank, **plan).epoch(epoch) for rank in (0, 1)]
        for (one, first), (two, second), (_, third), (_, fourth) in zip(*ranks, *plain, strict=True):
            assert one.capacity == two.capacity
            seen.add(one.capacity)
            for batch, bare in zip(first + second, third + fourth, strict=True):
                same(batch, pad(bare, one.capacity or own_sizes(bare), 3.0))
                assert batch.mask is not None
                assert (batch.frames_total, batch.atoms_total) == (8, one.atoms)
    assert None in seen
    assert len(seen) > 1


def test_copies_to_a_gpu_go_ahead_and_steps_wait_for_them_on_the_device(frames, monkeypatch):
    """With stand-ins for streams, which note in which order things are asked of them."""
    notes = []

    class Stream:
        def __init__(self, name="copies"):
            self.name = name

        def record_event(self):
            notes.append(f"{self.name} record")
            return "copied"

        def wait_event(self, event):
            notes.append(f"{self.name} waits until {event}")

    def copy(memory, device, *, non_blocking):
        assert non_blocking
        notes.append(f"copy to {device}")
        return memory.clone()

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("step"))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: notes.append(f"kept for {stream.name}"))
    monkeypatch.setattr(torch.Tensor, "to", copy)
    plan = {"accumulate": 2, "capacities": [], "most_neighbours": frames.most_neighbours(3.0)}
    expected = [batches for _, batches in loader(frames, **plan).epoch(0)]
    sampler = loader(frames, **plan).sampler
    epoch = Loader(frames, sampler, frames.species, 3.0, device="cuda:0", epochs=1).epoch(0)
    first = next(epoch)
    sent = ["copy to cuda:0", "copy to cuda:0", "copies record"]
    ready = ["step waits until copied", "kept for step", "kept for step"]
    assert notes in ([*sent, *ready], [*sent, *sent, *ready])
    notes.clear()
    second = next(epoch)
    assert notes[-3:] == ready
    for (_, batches), others in zip([first, second, *epoch], expected, strict=True):
        for batch, other in zip(batches, others, strict=True):
            same(batch, other)
            assert len({tensor.untyped_storage().data_ptr() for tensor in batch.tensors().values()}) == 1


@pytest.mark.gpu
def test_no_host_waits_for_a_copy_to_a_gpu(frames):
    plan = {"capacities": [], "most_neighbours": frames.most_neighbours(3.0)}
    expected = [batch for _, [batch] in loader(frames, **plan).epoch(0)]
    epoch = Loader(frames, loader(frames, **plan).sampler, frames.species, 3.0, device="cuda").epoch(0)
    total = torch.zeros((), dtype=torch.float64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = []
        for _, [batch] in epoch:
            total += batch.positions.sum()
            found.append(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for batch, other in zip(found, expected, strict=True):
        same(batch.to("cpu"), other)
    torch.testing.assert_close(float(total), sum(float(other.positions.sum()) for other in expected))
