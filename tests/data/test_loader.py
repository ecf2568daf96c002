import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import molecule

from ddpkit import InputError
from ddpkit.data import Loader, Sampler, Sweep, collate, write_prepared


@pytest.fixture
def frames(tmp_path):
    rng = np.random.default_rng(0)
    return write_prepared(tmp_path / "set", [molecule(rng, int(n)) for n in rng.integers(2, 12, size=40)], r_max=3.0)


def loader(frames, kind=Sampler, **options):
    sampler = kind(np.arange(len(frames)), frames.atoms, frames.edges(3.0), 8, **options)
    return Loader(frames, sampler, frames.species, 3.0)


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
