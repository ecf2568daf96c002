"""Faults and limits of torch that ddpkit mends or goes round: each shows itself, or this release no longer needs the mend."""

import double_backward
import functional_optimizers
import lost_errors
import pytest
import read_too_early
import scripted_sizes
import torch
import unrounded

from ddpkit.torch_private import release


@pytest.mark.parametrize(
    ("fault", "until"),
    [
        (double_backward, None),
        (scripted_sizes, None),
        (lost_errors, None),
        (functional_optimizers, None),
        (read_too_early, (2, 14)),
        (unrounded, (2, 13)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_shows_itself(fault, until, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if not fault.shown():
        pytest.skip(f"torch {torch.__version__} no longer needs this: {fault.__doc__}")
    assert until is None or release() < until, "the gate's version is wrong: this release needs the mend"
