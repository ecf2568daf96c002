"""Strategies of one's own inside the compiled step, through the conformance suite."""

import pytest
from in_graph import Compressing, OneByOne
from keeping import SparseInGraph

from ddpkit.sync import conformance
from ddpkit.testing import run_ranks

# The other cases compile, and tests/sync/test_in_graph.py does.
RUNS = {
    "recorded steps": (OneByOne, "recorded_steps", 0.0, {}),
    "changing steps": (OneByOne, "changing_steps", 0.0, {}),
    "one that keeps what it does not send": (SparseInGraph, "changing_steps", 0.0, {"fraction": 1.0}),
    "one that rounds": (Compressing, "changing_steps", 2e-2, {}),
    "one that rounds, without a tolerance": (Compressing, "changing_steps", 0.0, {}),
}


def all_runs():
    return {
        what: conformance.run_cases(strategy, [name], "torch", options, tolerance)[0]
        for what, (strategy, name, tolerance, options) in RUNS.items()
    }


@pytest.fixture(scope="module")
def reports():
    return run_ranks(all_runs, 2, timeout=200)[0]


@pytest.mark.parametrize("what", list(RUNS)[:-1])
def test_a_strategy_of_ones_own_in_the_graph_conforms(reports, what):
    assert reports[what] == (RUNS[what][1], "passed", "")


def test_without_a_tolerance_one_that_rounds_fails(reports):
    _, state, why = reports["one that rounds, without a tolerance"]
    assert state == "failed"
    assert "not close" in why
