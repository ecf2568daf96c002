"""Strategies of one's own inside the compiled step, through the conformance suite."""

import pytest
import torch
from in_graph import Asking, Compressing, OneByOne
from keeping import SparseInGraph

import ddpkit
from ddpkit.compile.backend import using
from ddpkit.errors import InputError
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


@pytest.mark.parametrize(
    ("asks", "why"),
    [(True, r"depends on the values of tensors \(.*in_graph.py"), (False, r".*in_graph.py.*fails where")],
)
def test_what_cannot_be_traced_of_a_strategy_is_not_laid_to_the_model(asks, why):
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    said = rf"^AskingForNorms.trace\(\) cannot be compiled: .*{why}"
    with using("interpreted"):
        step = ddpkit.make_step(model, lambda y, _: y.sum(), optimizer, strategy=Asking, compile=True, asks=asks)
        with pytest.raises(InputError, match=said) as raised:
            step(torch.randn(7, 3))
    assert "compile=False" not in str(raised.value)
