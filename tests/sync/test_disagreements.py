"""The campaign of disagreements: a short one, and that it notices what it is there for."""

import torch

from ddpkit.testing import disagreements
from ddpkit.testing.disagreements import Outcome, Trial, draw, judge, run


def test_a_short_campaign():
    trials = draw(24, 7)
    assert len({trial.kind for trial in trials}) > 12
    verdicts = list(run(trials))
    assert [trial for trial, _, _ in verdicts] == trials
    assert [(trial, why) for trial, verdict, why in verdicts if verdict == "failed"] == []
    assert {verdict for _, verdict, _ in verdicts} == {"detected", "harmless"}


def test_every_kind_is_drawn_for_every_strategy():
    drawn = {(trial.strategy, trial.way, trial.kind) for trial in draw(400, 0)}
    for strategy in disagreements.STRATEGIES:
        for kind in disagreements.STEP:
            assert (strategy, "step", kind) in drawn
    for kind in (*disagreements.BUILD, *disagreements.RUN):
        assert ("custom", "plain", kind) in drawn


def ended(gradient, averaged, weight, **others):
    tensors = [{"w": torch.tensor([value], dtype=torch.float64)} for value in (gradient, averaged, weight)]
    return Outcome(expected=[tensors[0]], averaged=[tensors[1]], weights=tensors[2], **others)


def raised(said):
    return Outcome(state="raised", said=said)


def test_the_verdict_is_none_too_kind():
    nan = float("nan")
    cases = {
        "harmless": [ended(1.0, 2.0, 5.0), ended(3.0, 2.0, 5.0)],
        "drifted": [ended(1.0, 2.0, 5.0), ended(3.0, 2.0, 5.1)],
        "average": [ended(1.0, 2.5, 5.0), ended(3.0, 2.5, 5.0)],
        "bad": [ended(nan, nan, 5.0), ended(1.0, nan, 5.0)],
        "skipped": [ended(nan, nan, 5.0, skipped=1), ended(1.0, nan, 5.0, skipped=1)],
        "hung": [None, ended(1.0, 1.0, 5.0)],
        "crashed": [Outcome(state="crashed", said="ValueError"), raised("rank 0")],
        "both": [raised("rank 1 differs"), raised("rank 1 differs")],
        "left": [raised("waited for rank 1"), ended(1.0, 1.0, 5.0)],
        "one alone": [raised("waited for somebody"), ended(1.0, 1.0, 5.0)],
        "no name": [raised("something went wrong"), raised("something went wrong")],
    }
    found = {name: judge(outcomes)[0] for name, outcomes in cases.items()}
    right = {"harmless": "harmless", "skipped": "detected", "both": "detected", "left": "detected"}
    assert found == {name: right.get(name, "failed") for name in cases}


def test_a_strategy_that_leaves_a_parameter_out_fails(monkeypatch):
    strategies = {"forgetful": ("tests.sync.strategies.Forgetful", {})}
    monkeypatch.setattr(disagreements, "STRATEGIES", strategies)
    outcomes = [verdict for _, verdict, _ in run([Trial(0, 5, "forgetful", "plain", "other criterion")])]
    assert outcomes == ["failed"]
