"""Batches made in processes: the same bits, an end in every case."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import crystal, molecule

from ddpkit import InputError
from ddpkit.data import Loader, Sampler, Sweep, choose_capacities, write_prepared
from ddpkit.data.makers import suggested
from ddpkit.ranks.processes import below


def written(path, frames):
    return write_prepared(path, frames, r_max=3.0)


@pytest.fixture
def frames(tmp_path):
    rng = np.random.default_rng(0)
    made = [crystal(rng, int(n)) if n % 3 == 0 else molecule(rng, int(n)) for n in rng.integers(2, 12, size=40)]
    return written(tmp_path / "set", made)


def loader(frames, workers, *, kind=Sampler, epochs=0, **options):
    sampler = kind(np.arange(len(frames)), frames.atoms, frames.edges(3.0), 8, **options)
    return Loader(frames, sampler, frames.species, 3.0, epochs=epochs, workers=workers)


def require_same(made, expected):
    count = 0
    for (step, batches), (other, others) in zip(made, expected, strict=True):
        assert [part.tolist() for part in step.micro_batches] == [part.tolist() for part in other.micro_batches]
        assert (step.frames, step.atoms, step.edges, step.capacity) == (
            other.frames, other.atoms, other.edges, other.capacity,
        )  # fmt: skip
        for batch, one in zip(batches, others, strict=True):
            assert batch.num_frames == one.num_frames
            assert batch.tensors().keys() == one.tensors().keys()
            for name, value in one.tensors().items():
                assert getattr(batch, name).numpy().tobytes() == value.numpy().tobytes()
        count += 1
    return count


def gone(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come about"
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_those_of_a_thread(frames, workers):
    plan = {"world_size": 2, "rank": 1, "accumulate": 2, "seed": 3, "stresses": frames.has_stress(np.arange(40))}
    most = frames.most_neighbours(3.0)
    levels = choose_capacities(loader(frames, 0, most_neighbours=most, **plan).sampler).levels
    for extra in ({}, {"most_neighbours": most, "capacities": levels[:1]}):
        made, plain = (loader(frames, w, epochs=3, **plan, **extra) for w in (workers, 0))
        before = set(below(os.getpid()))
        assert [require_same(made.epoch(e, start), plain.epoch(e, start)) for e, start in ((0, 2), (1, 0), (2, 0))] == [
            3, 5, 5,
        ]  # fmt: skip
        assert all(gone(process) for process in set(below(os.getpid())) - before)


def test_a_run_goes_on_in_the_middle_of_an_epoch_and_elsewhere(frames):
    made, plain = loader(frames, 2, epochs=3), loader(frames, 0)
    made.begin(1, 3)
    assert require_same(made.epoch(1, 3), plain.epoch(1, 3)) == 2
    epoch = made.epoch(2)
    next(epoch)
    started = set(below(os.getpid()))
    assert len(started) >= 2
    epoch.close()
    assert all(map(gone, started))
    assert require_same(made.epoch(0), plain.epoch(0)) == 5
    made.close()
    assert require_same(loader(frames, 2, kind=Sweep).epoch(0), loader(frames, 0, kind=Sweep).epoch(0)) == 5


def test_an_example_starts_no_process(frames):
    before = set(below(os.getpid()))
    made = loader(frames, 2)
    (batch,) = made.example()
    (_, (expected,)), *_ = loader(frames, 0).epoch(0)
    assert torch.equal(batch.positions, expected.positions)
    assert set(below(os.getpid())) == before


def test_what_is_wrong_with_a_frame_is_told_where_its_batch_is_asked_for(tmp_path):
    rng = np.random.default_rng(0)
    bad = [molecule(rng) for _ in range(16)]
    bad[11] = replace(bad[11], energy=float("nan"))
    with pytest.raises(InputError, match=r"frame 11 of .* NaN"):
        list(loader(written(tmp_path / "bad", bad), 2).epoch(0))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_process_that_is_killed_is_told(frames, number):
    made = loader(frames, 2, epochs=200)
    epoch = made.epoch(0)
    next(epoch)
    ours = [process.pid for process in made_by(epoch)]
    os.kill(ours[1], number)

    def go_on(epoch):
        for following in range(1, 200):  # what it had sent before is read first
            list(epoch)
            epoch = made.epoch(following)

    with pytest.raises(
        InputError, match=rf"makes batches \(number {ours[1]}\) was ended by {number.name}.*train.workers=0"
    ):
        go_on(epoch)
    assert all(map(gone, ours))


def made_by(epoch):
    return epoch.gi_frame.f_locals["ahead"]._makers._processes


_STARTER = """
    import sys, time
    import numpy as np
    from ddpkit.data import Loader, PreparedSet, Sampler
    frames = PreparedSet(sys.argv[1])
    sampler = Sampler(np.arange(len(frames)), frames.atoms, frames.edges(3.0), 8)
    epoch = Loader(frames, sampler, frames.species, 3.0, epochs=10**6, workers=2, prefetch=10**6).epoch(0)
    next(epoch)
    print(*(p.pid for p in epoch.gi_frame.f_locals["ahead"]._makers._processes), flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("number", [None, signal.SIGKILL, signal.SIGTERM])
def test_they_end_with_the_process_that_started_them(frames, number):
    command = [sys.executable, "-c", textwrap.dedent(_STARTER), str(frames.path), "0" if number is None else "1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:
        ours = [*map(int, starter.stdout.readline().split())]
        assert len(ours) == 2
        for process in ours:  # these leave signals to the one that trains
            os.kill(process, signal.SIGTERM)
            os.kill(process, signal.SIGINT)
        if number is not None:
            assert not any(map(gone, ours))
            starter.send_signal(number)
        try:
            starter.wait(60)
        finally:
            starter.kill()
    until(lambda: all(map(gone, ours)))


_SEEN = """
    import atexit, os, threading, time
    waitpid, main = os.waitpid, threading.get_ident()

    def slowly(*arguments):
        if threading.get_ident() != main:
            time.sleep(1)
        return waitpid(*arguments)

    def tell():
        time.sleep(0.2)
        print(*(thread.name for thread in threading.enumerate()), flush=True)

    os.waitpid = slowly
    atexit.register(tell)  # which runs last
"""


def test_a_program_that_ends_waits_for_its_thread(frames):
    """Python stops threads wherever they are: with a lock that the end of the program waits for, or in C++ code, which aborts."""
    program = textwrap.dedent(_SEEN) + textwrap.dedent(_STARTER)
    command = [sys.executable, "-c", program, str(frames.path), "0"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=100, check=True)
    assert done.stdout.splitlines()[1] == "MainThread"


def test_they_need_no_torch(frames):
    made = loader(frames, 1, epochs=10**6)
    epoch = made.epoch(0)
    next(epoch)
    (process,) = made_by(epoch)
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
    epoch.close()


@pytest.mark.parametrize(
    ("device", "cores", "ranks", "expected"),
    [("cpu", 64, 1, 0), ("cuda", 64, 4, 2), ("cuda", 4, 2, 1), ("cuda", 2, 2, 0)],
)
def test_processes_are_suggested_where_there_are_cores(monkeypatch, device, cores, ranks, expected):
    monkeypatch.setattr("ddpkit.data.makers.of_job", lambda: set(range(cores)))
    assert suggested(device, ranks) == expected
