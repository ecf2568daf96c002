"""Every strategy through the conformance suite; ranks are started once for each world size and kind of communication."""

from functools import cache

import pytest

from ddpkit.sync import conformance
from ddpkit.testing import run_ranks

MANY_BUCKETS = "tests.sync.strategies.ManyBuckets"
RUNS = [(size, "torch", s) for size in (1, 2, 3, 4) for s in ("custom", "overlap", MANY_BUCKETS, "standard")]
RUNS += [(2, "mpi", s) for s in ("custom", "overlap", MANY_BUCKETS)]
LONG = [(size, "mpi", s) for size in (1, 3, 4) for s in ("custom", "overlap", MANY_BUCKETS)]


def all_strategies(strategies, names, comm):
    return {strategy: conformance.run_cases(strategy, names, comm, {}) for strategy in strategies}


@cache
def outcomes(size, comm):
    strategies = [s for n, c, s in RUNS + LONG if (n, c) == (size, comm)]
    launcher = "mpirun" if comm == "mpi" else "torchrun"
    names = conformance.applicable(size)
    return run_ranks(all_strategies, size, strategies, names, comm, launcher=launcher, timeout=200)


@pytest.mark.parametrize(
    ("size", "comm", "strategy"), [*RUNS, *(pytest.param(*run, marks=pytest.mark.long) for run in LONG)]
)
def test_strategy_conforms(size, comm, strategy):
    reports = outcomes(size, comm)[0][strategy]
    assert [report for report in reports if report[1] == "failed"] == []
    assert [report[0] for report in reports] == conformance.applicable(size)
    cannot = {report[0] for report in reports if report[1] == "cannot"}
    assert cannot <= set(conformance.CANNOT.get(strategy, {}))


COMPILED = ("custom", "standard", "overlap", "ingraph")


@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.long) for size in (1, 3, 4))])
def test_compiled_steps_conform(size):
    names = conformance.applicable(size, compiled=True)
    assert names
    found = run_ranks(all_strategies, size, COMPILED, names, "torch", timeout=400)[0]
    assert found == {strategy: [(name, "passed", "") for name in names] for strategy in COMPILED}
