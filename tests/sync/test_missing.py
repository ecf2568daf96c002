"""A rank that never arrives: the others say who."""

import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import ddpkit
from ddpkit.errors import RankDisagreementError
from ddpkit.ranks.group import environment, store
from ddpkit.ranks.mpirun import mpirun
from ddpkit.testing import RankFailure, run_ranks


def leave_early(strategy, how):
    here = environment()
    model = nn.Linear(4, 4)
    sync = ddpkit.make_sync(strategy, model, timeout=4.0)
    for step in range(3):
        if here.rank == 1 and step == 2:
            if how == "dies":
                import os

                os._exit(0)
            while not store().check(
                ["said 0", "said 2"]
            ):  # `wait` would keep the store from the thread that tells of this rank
                time.sleep(0.05)
            return "late"
        model(torch.randn(2, 4)).sum().backward()
        try:
            sync.synchronize()
        except RankDisagreementError as error:
            if how == "dies":
                raise
            store().set(f"said {here.rank}", "")
            return str(error)
        model.zero_grad()
    return "nothing"


def test_a_timeout_says_who_is_missing():
    first, late, third = run_ranks(leave_early, 3, "custom", "sleeps", timeout=300)
    assert late == "late"
    for rank, said in ((0, first), (2, third)):
        assert f"Rank {rank} waited" in said
        assert "number 3 for rank 1 (last heard of after number 2)" in said


def test_a_rank_that_died_is_named_at_once():
    with pytest.raises(RankFailure) as raised:
        run_ranks(leave_early, 3, "custom", "dies", timeout=300)
    assert "ended without one" in str(raised.value)
    assert "number 3 for rank 1 (last heard of after" in str(raised.value)


def leave_a_wrapped_step():
    here = environment()
    model = nn.Linear(4, 4)
    step = ddpkit.make_step(
        model, lambda y, _: y.square().mean(), torch.optim.SGD(model.parameters()), strategy="standard"
    )
    for number in range(3):
        if here.rank == 1 and number == 2:
            import os

            os._exit(0)
        step(torch.randn(2, 4))


def test_a_rank_that_left_is_named_where_torchs_wrapper_communicates():
    with pytest.raises(RankFailure) as raised:
        run_ranks(leave_a_wrapped_step, 2, timeout=300)
    assert "number 3 for rank 1 (last heard of after" in str(raised.value)


def break_the_model():
    model = nn.Linear(4, 4)
    step = ddpkit.make_step(
        model, lambda y, _: y.square().mean(), torch.optim.SGD(model.parameters()), strategy="standard"
    )
    try:
        step(torch.randn(2, 5))
    except RuntimeError as error:
        return type(error) is RuntimeError and "shapes" in str(error)
    return False


def test_an_error_of_the_model_stays_what_it_is():
    assert run_ranks(break_the_model, 2, timeout=300) == [True, True]


MPI_PROGRAM = """
import time, torch, ddpkit
here = ddpkit.init_process_group()
model = torch.nn.Linear(4, 4)
sync = ddpkit.make_sync("custom", model, comm="mpi", timeout=3.0)
model(torch.randn(2, 4)).sum().backward()
if here.rank == 1:
    time.sleep(30)
sync.synchronize()
"""


def test_a_wait_inside_mpi_ends_too(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(MPI_PROGRAM)
    head, variables = mpirun(2)
    done = subprocess.run(
        [*head, sys.executable, str(program)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Rank 0 waited" in done.stderr
    assert "rank 1 (last heard of after number 0)" in done.stderr
