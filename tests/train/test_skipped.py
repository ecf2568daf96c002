"""An update that is lost ends the run and is counted, under every strategy and however seldom it logs."""

import numpy as np
import pytest
import torch

from ddpkit import checkpoint
from ddpkit.compile.layout import Flat
from ddpkit.compile.parity import Tally
from ddpkit.compile.variants import Code, Variants
from ddpkit.ledger import Ledger, name_bad
from ddpkit.step import Step


@pytest.mark.parametrize("strategy", ["standard", "none", "custom", "overlap"])
def test_a_lost_update_ends_the_run_between_two_rows(strategy, broken, run_here, summary, tmp_path):
    said = run_here(*broken(gradients=[3, 4]), f"strategy={strategy}", "train.log_every=10")
    acts_at_once = strategy in ("custom", "overlap")  # their gradients are looked at as they are averaged
    assert ("step 3" if acts_at_once else "steps 3, 4 on rank 0") in said
    assert "checkpoint" not in said  # there is none
    assert summary() | {"status": "failed", "error": said, "skipped": 1 if acts_at_once else 2} == summary()
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_no_checkpoint_hides_a_lost_update(broken, run_here, summary, tmp_path):
    said = run_here(*broken(gradients=[5]), "strategy=standard", "train.log_every=100", "train.checkpoint_every=3")
    assert "step 5 " in said
    assert "the last checkpoint is good" in said
    assert summary()["skipped"] == 1
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")["progress"]["step"] == 3


def test_a_run_that_lost_nothing_says_so(broken, run_here, summary):
    assert run_here(*broken(), "train.log_every=7", "strategy=standard") == ""
    assert summary() | {"status": "finished", "skipped": 0, "eager_steps": 0} == summary()


def test_eager_steps_of_a_compiled_run_are_counted_and_said(broken, run_here, summary, monkeypatch, capsys):
    # micro-batches that ran eagerly after each of 12 steps: at steps 2, 3 and 9
    ran = [0, 1, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4]
    monkeypatch.setattr(
        Step, "eager_batches", property(lambda step: ran[step.sync.stats.calls - 1] if step.sync.stats.calls else 0)
    )
    assert run_here(*broken(), "train.log_every=5") == ""
    assert summary()["eager_steps"] == 3
    assert "3 of 12 steps ran eager code" in capsys.readouterr().out


def test_batches_without_code_are_counted():
    class Never:
        names = ()

        def sizes(self, *_):
            return None

        def same_form(self, _):
            return True

    tally = Tally([])
    variants = Variants(None, None, None, tally, stored=None)
    variants.cause = lambda *_: ""
    batch = torch.ones(2)
    variants.codes = [Code(Never(), None)] * 8
    for _ in range(2):
        with pytest.warns(UserWarning, match="runs eagerly"):
            assert variants.find(Flat.of(batch)) is None
    assert tally.eager == 2


def failed(done, summary):
    """The one sentence of a run on several ranks, which is in the summary too."""
    (said,) = [line for line in done.stderr.splitlines() if "ddpkit: " in line]
    assert done.returncode == 1
    assert summary["status"] == "failed"
    assert summary["error"] in said
    return summary["error"]


# an average does not tell where it comes from
@pytest.mark.parametrize(
    ("strategy", "where", "launcher"), [("standard", "every rank", "torchrun"), ("none", "rank 1", "mpirun")]
)
def test_the_rank_is_named_where_it_is_known(strategy, where, launcher, broken, ddpkit_run, summary):
    words = (*broken(gradients=[5], ranks=[1]), f"strategy={strategy}", "train.log_every=4")
    done = ddpkit_run(*words, ranks=2, launcher=launcher, check=False)
    assert f"step 5 on {where}" in failed(done, summary())
    assert summary()["skipped"] == 1


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("raises", "Rank 1 failed at step 7: MemoryError: no room"),
        ("NaN", "error of validation was nan at step 6 on rank 1"),
    ],
)
def test_validation_that_fails_on_one_rank_ends_all(what, expected, broken, ddpkit_run, summary):
    done = ddpkit_run(*broken(validation=what, ranks=[1]), ranks=2, check=False)
    assert expected in failed(done, summary())


class Replayed:
    def __init__(self, *plan):
        self.plan, self.grad_norm, self.eager_batches = iter(plan), torch.zeros(()), 0

    def __call__(self):
        norm, eager = next(self.plan)
        self.grad_norm.fill_(norm)  # in place, as a replayed graph does
        self.eager_batches += eager


def test_the_ledger_keeps_each_step():
    step = Replayed((1.0, 0), (2.0, 2), (3.0, 0), (4.0, 1))
    ledger = Ledger(step)
    for _ in range(3):
        step()
        ledger.note()
    norms, eager = ledger.take()
    assert ([*map(float, norms)], eager) == ([1.0, 2.0, 3.0], [0, 1, 0])
    assert len(ledger) == 0
    step()
    ledger.note()
    assert ledger.take()[1] == [1]


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({}, ""),
        ({(0, 2): np.inf}, "The loss was inf at step 10 on rank 0"),
        ({(1, 0): np.nan, (1, 1): np.nan}, "The loss was NaN or infinite at steps 8, 9 on rank 1"),
        ({(0, 1): np.nan, (1, 1): np.nan, (2, 1): np.nan}, "The loss was nan at step 9 on every rank"),
        ({(0, 1): np.nan, (2, 1): np.inf}, "The loss was nan at step 9 on rank 0, 2"),
    ],
)
def test_what_is_bad_is_named(bad, expected):
    values = np.ones((3, 3))
    for place, value in bad.items():
        values[place] = value
    assert name_bad("loss", values, 10) == expected
