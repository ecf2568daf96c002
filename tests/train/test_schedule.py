"""How the learning rate moves."""

import math

import pandas as pd
import pytest
import torch

from ddpkit.errors import InputError
from ddpkit.schedule import Schedule


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)


def rates(schedule, moved, steps, steps_per_epoch=3, losses=()):
    losses, found = iter(losses), []
    for step in range(1, steps + 1):
        found.append(moved.param_groups[0]["lr"])
        moved.step()
        schedule.after_step()
        if step % steps_per_epoch == 0:
            schedule.after_epoch(next(losses, None))
    return found


def cosine(n, length, high=0.4, low=0.0):
    return low + (high - low) * (1 + math.cos(math.pi * n / length)) / 2


def test_a_warm_up_rises_linearly_and_what_follows_begins_after_it():
    moved = optimizer()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(moved, 6)
    found = rates(Schedule(moved, scheduler, per="step", warmup_steps=4), moved, 10)
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4, *(cosine(n, 6) for n in range(6))])


@pytest.mark.parametrize("warmup", [0, 1])
def test_without_a_warm_up_the_first_step_has_the_whole_rate(warmup):
    moved = optimizer()
    assert rates(Schedule(moved, warmup_steps=warmup), moved, 4) == [0.4] * 4


def test_epochs_that_end_after_the_warm_up_count():
    moved = optimizer()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(moved, 0.5)
    found = rates(Schedule(moved, scheduler, warmup_steps=4), moved, 12)
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1])


def test_a_plateau_hears_the_losses_of_validation():
    moved = optimizer()
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(moved, factor=0.5, patience=0)
    found = rates(Schedule(moved, plateau), moved, 4, steps_per_epoch=1, losses=[1.0, 2.0, None])
    assert found == [0.4, 0.4, 0.2, 0.2]


@pytest.mark.parametrize("stop", [2, 5])
def test_a_schedule_goes_on_where_it_was(stop):
    def make():
        moved = optimizer()
        scheduler = torch.optim.lr_scheduler.OneCycleLR(moved, 0.4, total_steps=9)
        return moved, Schedule(moved, scheduler, per="step", warmup_steps=4, length=9)

    whole = rates(*reversed(make()), 12)
    moved, schedule = make()
    first = rates(schedule, moved, stop)
    again, resumed = make()
    again.load_state_dict(moved.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    assert first + rates(resumed, again, 12 - stop) == whole


def test_another_length_is_refused():
    moved = optimizer()
    with pytest.raises(InputError, match=r"scheduled for 9 steps and now would be for 8"):
        Schedule(moved, per="step", length=8).load_state_dict(Schedule(moved, per="step", length=9).state_dict())


@pytest.mark.parametrize("strategy", ["custom", "ingraph"])
def test_runs_follow_it(run_here, tmp_path, strategy):
    compiled = ["compile=true", "compiler=interpreted", "model._target_=pairs.Pairs"]
    words = ["strategy=" + strategy, *compiled * (strategy == "ingraph")]
    schedule = [
        "scheduler=cosine",
        "scheduler.eta_min=0",
        "optimizer.lr=0.4e-3",
        "train.warmup_steps=3",
        "train.max_steps=11",
    ]
    run_here(*words, *schedule, "train.validate=false", f"run_dir={tmp_path / 'run'}")
    found = pd.read_csv(tmp_path / "run" / "steps.csv").lr.to_numpy() * 1e3
    rising = [0.4 / 3, 0.8 / 3, 0.4]
    assert found == pytest.approx([*rising, *(cosine(n, 8) for n in range(8))])


def test_a_resumed_run_follows_the_same_or_is_refused(run_here, tmp_path):
    words = ["scheduler=cosine", "train.warmup_steps=3", "train.validate=false", "train.checkpoint_every=4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_here(*words, f"run_dir={whole}")
    run_here(*words, "train.max_seconds=1e-3", f"run_dir={parts}")
    with pytest.raises(InputError, match="scheduled for 9 steps and now would be for 15"):
        run_here(f"resume={parts}", "train.max_epochs=3", "train.max_seconds=null")
    run_here(f"resume={parts}", "train.max_seconds=null")
    rows = [pd.read_csv(path / "steps.csv") for path in (whole, parts)]
    assert rows[0].lr.tolist() == rows[1].lr.tolist()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["scheduler=cosine", "train.warmup_steps=12"],
            r"train\.warmup_steps=12 is not less than the 12 steps of the run",
        ),
        (["scheduler._target_=builtins.id"], r"scheduler\._target_=builtins\.id is no scheduler"),
        (["scheduler._target_=torch.optim.lr_scheduler.StepLR"], r"The scheduler cannot be built \(.*step_size"),
        (["scheduler=cosine", "scheduler.per=frame"], r"scheduler\.per=frame is unknown: use step or epoch"),
    ],
)
def test_what_is_no_schedule_is_refused(run_here, tmp_path, words, said):
    with pytest.raises(InputError, match=said):
        run_here(*words, f"run_dir={tmp_path / 'run'}")
