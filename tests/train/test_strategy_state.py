"""What a strategy keeps from step to step is in checkpoints, for each rank."""

import json
import shutil

import pandas as pd
import pytest
import torch
from keeping import KeepsASet, Resharded, Sparse

import ddpkit
from ddpkit import checkpoint
from ddpkit.errors import InputError
from ddpkit.ranks.gather import Gather
from ddpkit.ranks.group import environment
from ddpkit.sync import state
from ddpkit.testing import run_ranks

SHORT = ("train.max_epochs=3", "train.checkpoint_every=3", "model.num_layers=1")
GOES_ON = ("train.max_steps=null", "train.max_epochs=3", "model.num_layers=1")
STRATEGIES = {
    "eager": ("strategy._target_=keeping.Sparse",),
    "in the graph": ("strategy._target_=keeping.SparseInGraph", "compile=true", "compiler=interpreted"),
}


def last(run):
    return checkpoint.load(run / "checkpoints" / "last.pt")


def assert_same_bits(value, expected):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(value, expected)
    elif isinstance(expected, dict):
        assert value.keys() == expected.keys()
        for key in expected:
            assert_same_bits(value[key], expected[key])
    elif isinstance(expected, list):
        assert len(value) == len(expected)
        for one, other in zip(value, expected, strict=True):
            assert_same_bits(one, other)
    else:
        assert value == expected


@pytest.fixture(scope="module", params=list(STRATEGIES))
def stopped(request, ddpkit_run, tmp_path_factory):
    """A run of two ranks that stopped within an epoch, and what the same run is like if it does not stop."""
    folder = tmp_path_factory.mktemp("state")
    words = (*SHORT, *STRATEGIES[request.param])
    ddpkit_run(*words, f"run_dir={folder / 'whole'}", ranks=2)
    whole = json.loads((folder / "whole" / "summary.json").read_text())["steps"]
    ddpkit_run(*words, f"train.max_steps={whole // 2 + 1}", f"run_dir={folder / 'parts'}", ranks=2)
    return folder


def test_it_is_there_for_each_rank(stopped):
    saved = last(stopped / "parts")
    first, second = (one["residuals"] for one in saved["sync"])
    assert first.keys() == second.keys() == saved["model"].keys() & first.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert all(any(bool(r.any()) for r in rank.values()) for rank in (first, second))


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("stopped", ["eager"], indirect=True)
def test_on_another_number_of_ranks_it_is_refused_and_the_folder_left_alone(stopped, ranks, ddpkit_run, tmp_path):
    run = shutil.copytree(stopped / "parts", tmp_path / "parts")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"status": "running"}))  # as if it had been killed
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = ddpkit_run(f"resume={run}", *GOES_ON, ranks=ranks, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "state" in line]
    assert line.startswith(f"ddpkit: strategy=Sparse has kept a state for each of 2 ranks, and {ranks} are to go on")
    assert "resume on 2" in line
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(stopped, ddpkit_run):
    ddpkit_run(f"resume={stopped / 'parts'}", *GOES_ON, ranks=2)
    whole, parts = last(stopped / "whole"), last(stopped / "parts")
    for key in ("model", "ema", "optimizer", "sync", "random_states"):
        assert_same_bits(parts[key], whole[key])
    whole, parts = (
        pd.read_csv(stopped / name / "steps.csv", float_precision="round_trip") for name in ("whole", "parts")
    )
    columns = ["step", "loss", "grad_norm"]
    assert (whole[columns] == parts[columns]).all(axis=None)


def of_two_ranks():
    """Saves on two ranks; pieces of what travels are small."""
    here = environment()
    sync = ddpkit.make_sync(Resharded, torch.nn.Linear(3, 2))
    for number, residual in enumerate(sync.residuals.values()):
        residual.fill_(1 + here.rank + 10 * number)
    from ddpkit.ranks import gather

    gather._PIECE = 7
    saved = state.collect(sync, Gather(here, timeout=20.0).objects_on_first)
    sync.close()
    return saved


def test_a_strategy_may_say_how_it_goes_on_on_another_number_of_ranks():
    saved, nothing = run_ranks(of_two_ranks, 2)
    assert nothing == []
    assert [float(one["residuals"]["weight"][0, 0]) for one in saved] == [1, 2]
    sync = ddpkit.make_sync(Resharded, torch.nn.Linear(3, 2))
    state.restore(sync, saved)
    assert {name: float(r.flatten()[0]) for name, r in sync.residuals.items()} == {"weight": 1.5, "bias": 11.5}
    assert all(bool((r == r.flatten()[0]).all()) for r in sync.residuals.values())


def test_checkpoints_without_it_leave_a_strategy_at_its_start():
    sync = ddpkit.make_sync(Sparse, torch.nn.Linear(3, 2))
    state.restore(sync, [])
    assert not any(bool(r.any()) for r in sync.residuals.values())


def test_what_another_strategy_has_kept_is_refused():
    sync = ddpkit.make_sync("custom", torch.nn.Linear(3, 2))
    assert state.collect(sync, lambda value: [value]) == []
    with pytest.raises(InputError, match=r"strategy=custom keeps nothing.*'residuals'.*use that one"):
        state.restore(sync, [{"residuals": {}}])


def test_what_checkpoints_cannot_hold_is_refused():
    sync = ddpkit.make_sync(KeepsASet, torch.nn.Linear(3, 2))
    with pytest.raises(InputError, match=r"keeps a set in state_dict\(\)\['seen'\].*use tensors"):
        state.collect(sync, lambda value: [value])
