import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
from helpers import crystal, molecule

from ddpkit import InputError
from ddpkit.data import PreparedSet, write_prepared
from ddpkit.data.neighbours import count_edges, neighbour_list
from ddpkit.data.once import made_once
from ddpkit.data.prepared import Block, Filters, Writer


def frames(count=20, kind=molecule, seed=0):
    rng = np.random.default_rng(seed)
    return [
        kind(rng, int(rng.integers(2, 9)), charge=i % 3 - 1, subset=f"s{i % 2}", group=f"g\n{i // 4}")
        for i in range(count)
    ]


def same(a, b):
    assert (a.energy, a.charge, a.subset, a.group) == (b.energy, b.charge, b.subset, b.group)
    for name in ("numbers", "positions", "forces", "cell", "pbc", "stress"):
        mine, theirs = getattr(a, name), getattr(b, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("kind", [molecule, crystal])
def test_what_is_written_is_read(tmp_path, kind):
    given = frames(kind=kind)
    made = write_prepared(tmp_path / "set", given, r_max=3.0, labels="theory", atom_energies={"H": -1.0})
    read = PreparedSet(tmp_path / "set")
    assert len(made) == len(read) == len(given)
    for i, frame in enumerate(given):
        same(read.frame(i), frame)
    assert read.species == tuple(s for s, z in (("H", 1), ("C", 6), ("O", 8)) if any(z in f.numbers for f in given))
    assert read.edges(3.0).tolist() == [count_edges(f, 3.0)[0] for f in given]
    assert read.charge.tolist() == [f.charge for f in given]
    assert read.manifest["subsets"] == {"s0": 10, "s1": 10}
    assert read.manifest["groups"] == 5
    assert read.manifest["atoms"] == sum(map(len, given))
    assert read.atom_energies == {"H": -1.0}
    assert (read.periodic, (tmp_path / "set" / "cell.npy").exists()) == (kind is crystal, kind is crystal)
    read.verify()
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    with pytest.raises(IndexError):
        read.frame(len(given))


def test_molecules_among_crystals_stay_molecules(tmp_path):
    given = [frames(3)[1], crystal(np.random.default_rng(0)), crystal(np.random.default_rng(1), stress=None)]
    read = write_prepared(tmp_path / "set", given, r_max=3.0)
    for i, frame in enumerate(given):
        same(read.frame(i), frame)


def test_the_same_frames_give_the_same_bytes(tmp_path):
    for name in "ab":
        write_prepared(tmp_path / name, frames(), r_max=3.0)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_most_neighbours_are_those_of_the_lists(tmp_path):
    given = [*frames(12), *frames(12, kind=crystal)]
    read = write_prepared(tmp_path / "set", given, r_max=3.0)
    for r_max in (3.0, 1.7):
        rows = [
            np.bincount(np.stack(neighbour_list(f, r_max)[:2])[end], minlength=1).max() for f in given for end in (0, 1)
        ]
        assert np.repeat(read.most_neighbours(r_max), 2).tolist() == rows
    assert not (tmp_path / "set" / "most_3.npy").exists()


def test_both_counts_are_made_at_once_and_a_set_of_an_older_version_gets_its_own(tmp_path, monkeypatch):
    given = frames(30)
    write_prepared(tmp_path / "set", given, r_max=3.0)
    expected = [count_edges(f, 1.7) for f in given]
    assert PreparedSet(tmp_path / "set").most_neighbours(1.7).tolist() == [c.most for c in expected]
    monkeypatch.setattr(PreparedSet, "_count", None)
    assert PreparedSet(tmp_path / "set").edges(1.7).tolist() == [c.edges for c in expected]
    monkeypatch.undo()
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    del manifest["arrays"]["most"]
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "set" / "most.npy").unlink()
    (tmp_path / "set" / "most_1.7.npy").unlink()
    np.save(tmp_path / "set" / "edges_1.7.npy", np.arange(30))
    old = PreparedSet(tmp_path / "set")
    old.verify()
    assert old.most_neighbours(3.0).tolist() == [count_edges(f, 3.0).most for f in given]
    assert old.most_neighbours(1.7).tolist() == [c.most for c in expected]
    assert old.edges(1.7).tolist() == list(range(30))
    assert sorted(p.name for p in (tmp_path / "set").glob("*_*.npy")) == [
        "edges_1.7.npy", "most_1.7.npy", "most_3.npy",
    ]  # fmt: skip
    assert not [p for p in (tmp_path / "set").iterdir() if p.name.endswith((".tmp", ".beside"))]


def test_edges_of_another_cutoff_are_counted_once_and_kept(tmp_path):
    given = frames(30)
    read = write_prepared(tmp_path / "set", given, r_max=3.0)
    expected = [count_edges(f, 1.7)[0] for f in given]
    assert read.edges(1.7).tolist() == expected
    np.save(tmp_path / "set" / "edges_1.7.npy", np.arange(30))
    assert read.edges(1.7).tolist() == list(range(30))


def test_an_interrupted_writer_goes_on_from_its_checkpoint(tmp_path):
    given = frames(30, crystal)
    blocks = [Block.of(given[i : i + 5], 3.0, Filters()) for i in range(0, 30, 5)]
    whole = write_prepared(tmp_path / "whole", given, r_max=3.0, source={})
    first = Writer(tmp_path / "set", {"made_by": "write_prepared"}, 3.0)
    for block in blocks[:2]:
        first.append(block)
    first.checkpoint(2)
    first.append(blocks[2])  # lost
    first.close()
    with Writer(tmp_path / "set", {"made_by": "write_prepared"}, 3.0) as second:
        assert second.position == 2
        for block in blocks[2:]:
            second.append(block)
        second.finish()
    for file in whole.path.iterdir():
        assert file.read_bytes() == (tmp_path / "set" / file.name).read_bytes()
    with Writer(tmp_path / "other", {"made_by": "a"}, 3.0) as writer:
        writer.append(blocks[0])
        writer.checkpoint(1)
    assert Writer(tmp_path / "other", {"made_by": "b"}, 3.0).position is None  # other settings start anew


def test_filters_count_what_they_drop(tmp_path):
    rng = np.random.default_rng(0)
    close = {"positions": np.arange(4)[:, None] * np.ones(3)}
    good = molecule(rng, 4, **close)
    far = molecule(rng, 2, positions=np.array([[0.0, 0, 0], [0, 0, 50]]))
    atom = molecule(rng, 1, numbers=np.array([8]), energy=-400.0)
    nan = replace(good, energy=float("nan"))
    charged = replace(nan, charge=1)
    every = Block.of([good, far, atom, nan, charged], 3.0, Filters(charged=True, isolated=True, unlabelled=True))
    assert every.dropped == {"charged": 1, "unlabelled": 1, "isolated atoms": 1, "free atoms": 1}
    assert (every.read, len(every.subset), every.atom_energies) == (5, 1, {"O": -400.0})
    none = Block.of([good, far, nan, charged], 3.0, Filters())
    assert (none.dropped, len(none.subset)) == ({}, 4)
    read = write_prepared(tmp_path / "set", [good, atom], r_max=3.0)
    assert read.atom_energies == {"O": -400.0}


def test_what_is_no_set_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no prepared set"):
        PreparedSet(tmp_path / "missing")
    made = write_prepared(tmp_path / "set", frames(), r_max=3.0)
    with pytest.raises(InputError, match="exists already"):
        write_prepared(tmp_path / "set", frames(), r_max=3.0)
    with pytest.raises(InputError, match="no frames are left"):
        write_prepared(tmp_path / "empty", [], r_max=3.0)
    manifest = made.path / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(InputError, match="version"):
        PreparedSet(made.path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set"]


def test_damage_is_found(tmp_path):
    made = write_prepared(tmp_path / "set", frames(), r_max=3.0)
    file = made.path / "forces.npy"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"forces\.npy does not match its checksum"):
        PreparedSet(made.path).verify()
    file.write_bytes(content[:-8])
    with pytest.raises(InputError, match=r"forces\.npy"):
        PreparedSet(made.path)


def test_a_failing_reader_leaves_nothing(tmp_path):
    def broken():
        yield from frames(3)
        raise InputError("a bad frame")

    with pytest.raises(InputError, match="a bad frame"):
        write_prepared(tmp_path / "set", broken(), r_max=3.0)
    assert not list(tmp_path.iterdir())


def _make_slowly(path):
    with path.with_name("count").open("a") as file:
        file.write("x")
    time.sleep(0.5)
    path.write_text("made")


def _ask(target):
    made_once(target, _make_slowly)
    assert target.read_text() == "made"


def _die_while_making(target):
    made_once(target, lambda _: os.kill(os.getpid(), signal.SIGKILL))


def test_of_many_processes_one_makes_a_thing(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_die_while_making, args=(tmp_path / "thing",))]
    processes[0].start()
    processes[0].join()
    assert processes[0].exitcode == -signal.SIGKILL
    processes = [context.Process(target=_ask, args=(tmp_path / "thing",)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "count").read_text() == "x"


def test_where_nothing_can_be_written_it_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        made_once(tmp_path / "file" / "thing", lambda _: None)
