"""Runs and `ddpkit check` with kernels that compute something else, on the command line."""

import sys
import types

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from ddpkit.errors import InputError, ParityError
from ddpkit.experiments import check
from ddpkit.experiments.cli import _dispatch
from ddpkit.models.kernels import KERNELS, E3nnConvolution


class Scaled(E3nnConvolution):
    """A kernel that is off by one percent."""

    def _compute(self, x, harmonics, weights, graph, by_neighbour):
        return 1.01 * super()._compute(x, harmonics, weights, graph, by_neighbour)


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    frames = []
    for _ in range(20):
        atoms = Atoms("CH4", random.uniform(0, 3, (5, 3)))
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=random.normal(size=(5, 3)))
        frames.append(atoms)
    write("frames.xyz", frames, format="extxyz")
    data = ["data=files", "data.path=frames.xyz", f"data.cache={tmp_path}", "device=cpu", "train.batch_size=4"]
    return ["model=nequip_tiny", "model.kernels=e3nn", "train.max_epochs=1", "train.max_steps=1", *data]


def test_a_run_with_wrong_kernels_does_not_begin(words, tmp_path, monkeypatch):
    monkeypatch.setitem(KERNELS, "e3nn", Scaled)
    with pytest.raises(ParityError, match=r"kernels of NequIP \(kernels=e3nn\) compute something else"):
        _dispatch(["run", *words, f"run_dir={tmp_path}/run"])
    assert not list((tmp_path / "run").rglob("*.pt"))
    _dispatch(["run", *words, "check_kernels=false", f"run_dir={tmp_path}/unchecked"])


class FakeStep:
    """A step that has been compared with eager code, or fails to be."""

    def __init__(self, failure=None):
        self.failure, self.seconds_compile = failure, 1.0
        self.differences = [check.Difference("loss", 1e-12, 1e-10, "2 atoms")]

    def prepare(self, _):
        if self.failure is not None:
            raise self.failure


@pytest.mark.parametrize("kernel", [E3nnConvolution, Scaled])
@pytest.mark.parametrize("failure", [None, ParityError("the step differs"), InputError("the step is refused")])
def test_check_says_what_was_compared(kernel, failure, words, monkeypatch, capsys):
    monkeypatch.setitem(KERNELS, "e3nn", kernel)
    monkeypatch.setattr(check, "make_step", lambda *_, **__: FakeStep(failure))
    expected = ParityError("kernels of NequIP") if kernel is Scaled else failure
    if expected is None:
        _dispatch(["check", *words])
    else:
        with pytest.raises(type(expected), match=str(expected)):
            _dispatch(["check", *words])
    printed = capsys.readouterr().out
    assert (
        "nequip: its kernels (kernels=e3nn, precision=mixed, on cpu) against its reference in plain PyTorch" in printed
    )
    assert "forces, its gradient by layers.0.linear_in.weight" in printed
    assert "nequip: the step of strategy custom, compiled" in printed
    assert ("<- too large" in printed) == (kernel is Scaled)


@pytest.mark.parametrize(
    ("package", "expected"),
    [
        (None, "needs that package: pip install openequivariance"),
        (ImportError("no nvcc\nmore"), r"could not build its extension \(no nvcc\): it needs nvcc"),
        (
            RuntimeError("unsupported architecture sm_50"),
            r"on this GPU \(Some card: unsupported .*\): use kernels=ddpkit",
        ),
    ],
)
def test_openequivariance_that_cannot_be_used_is_refused(package, expected, words, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise package

    module = types.SimpleNamespace(
        torch_to_oeq_dtype=lambda _: None, TPProblem=lambda *_, **__: None, TensorProductConv=fail
    )
    monkeypatch.setitem(sys.modules, "openequivariance", module if package is not None else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some card")
    with pytest.raises(InputError, match=expected):
        _dispatch(["run", *words, "model.kernels=openequivariance", f"run_dir={tmp_path}/run"])
