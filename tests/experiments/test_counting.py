"""Counted operations and bytes, and the values of a sweep."""

import argparse

import pytest
import torch

from ddpkit.errors import InputError
from ddpkit.experiments import bench_step
from ddpkit.experiments.counting import count, measure_ceilings


def test_products_and_their_gradients_are_counted():
    a, b = torch.ones(30, 20, requires_grad=True), torch.ones(20, 50, requires_grad=True)
    forward = 2 * 30 * 20 * 50
    assert count(lambda: a @ b).operations == forward
    assert count(lambda: (a @ b).sum().backward()).operations == 3 * forward


def test_bytes_are_those_of_inputs_and_results():
    x = torch.ones(100, dtype=torch.float64)
    assert count(lambda: x + x[:1]).bytes == 8 * (100 + 1 + 100)
    assert count(lambda: x.add_(1)).bytes == 8 * 100
    assert count(lambda: x.reshape(10, 10).t()[2:]).bytes == 0


def test_ceilings_are_finite():
    operations, moved = measure_ceilings(torch.device("cpu"), torch.float32)
    assert 1e6 < operations < 1e16
    assert 1e6 < moved < 1e14


def options(*words):
    parser = argparse.ArgumentParser()
    bench_step.add_arguments(parser)
    return parser.parse_args(words)


def test_a_sweep_changes_one_thing():
    args = options("--frames", "3", "model.parity=false", "--sweep", "frames=1,8")
    assert [(value, one.frames, one.overrides) for value, one in bench_step._sweep(args)] == [
        ("1", 1, ["model.parity=false"]),
        ("8", 8, ["model.parity=false"]),
    ]
    args = options("--frames", "3", "--sweep", "model.l_max=1,2")
    assert [(one.frames, one.overrides) for _, one in bench_step._sweep(args)] == [
        (3, ["model.l_max=1"]),
        (3, ["model.l_max=2"]),
    ]
    assert [value for value, _ in bench_step._sweep(options())] == [None]


@pytest.mark.parametrize(
    "words",
    [
        ["--plot", "x.png"],
        ["--sweep", "frames"],
        ["--sweep", "frames=1,a"],
        ["--sweep", "frames=0"],
        ["--sweep", "l_max=1"],
    ],
)
def test_a_sweep_that_cannot_be_read_is_refused(words):
    with pytest.raises(InputError, match="--sweep"):
        bench_step._sweep(options(*words))
