"""The launcher for tests itself."""

import os
import time
from pathlib import Path

import pytest
import torch

from ddpkit.ranks.group import environment
from ddpkit.testing import RankFailure, run_ranks


def whoami(word, *, number):
    here = environment()
    total = torch.tensor([here.rank + 1.0])
    torch.distributed.all_reduce(total)
    return here.rank, here.world_size, here.launcher, word, number, float(total)


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_each_rank_returns_its_result(launcher):
    assert run_ranks(whoami, 3, "a", launcher=launcher, number=5) == [(r, 3, launcher, "a", 5, 6.0) for r in range(3)]


def fail_on_one():
    if environment().rank == 1:
        raise ValueError("only here")
    time.sleep(60)


def test_a_traceback_is_reported_and_the_others_are_ended():
    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"(?s)rank 1: Traceback.*ValueError: only here"):
        run_ranks(fail_on_one, 2)
    assert time.monotonic() - start < 40


def hang(path):
    with open(f"{path}/{os.getpid()}", "w"):  # noqa: PTH123
        time.sleep(600)


def test_time_is_limited_and_nothing_is_left_behind(tmp_path):
    with pytest.raises(RankFailure, match="no result within"):
        run_ranks(hang, 2, str(tmp_path), timeout=10, initialize=False)
    left = [int(p.name) for p in tmp_path.iterdir()]
    assert len(left) == 2
    for pid in left:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def facts_of_process():
    return (
        os.getpid() == os.getsid(0),
        os.environ.get("OF_THIS_CALL"),
        Path.cwd(),
        len([*Path("/proc/self/fd").iterdir()]),
    )


def test_ranks_inherit_nothing_but_what_they_are_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = run_ranks(facts_of_process, 2, initialize=False, environment={"OF_THIS_CALL": "1"})
    second = run_ranks(facts_of_process, 2, initialize=False)
    assert [facts[:3] for facts in first] == [(True, "1", tmp_path)] * 2
    assert [facts[:3] for facts in second] == [(True, None, tmp_path)] * 2
    assert {facts[3] for facts in (*first, *second)} == {first[0][3]}  # no descriptors pile up


def test_other_settings_of_libraries_have_ranks_that_loaded_them_so():
    assert run_ranks(threads_of_torch, 1, initialize=False, environment={"OMP_NUM_THREADS": "2"}) == [2]
    assert run_ranks(threads_of_torch, 1, initialize=False) == [1]


def threads_of_torch():
    return torch.get_num_threads()
