"""The traced graph without the compiler, and which code was compiled."""

import copy

import pytest
import torch
from toy import Toy, random_batch

import ddpkit
from ddpkit.compile import digest
from ddpkit.compile.backend import using


def criterion(output, batch):
    return (output["energy"] - batch.energy).square().mean() + (output["forces"] - batch.forces).square().mean()


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(digest, "_kernels", [])
    with using("interpreted"):
        yield


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("strategy", ["custom", "overlap", "standard", "none"])
def test_interpreted_steps_train_like_eager_ones(strategy):
    model = Toy()
    eager = copy.deepcopy(model)
    steps = [
        ddpkit.make_step(m, criterion, torch.optim.SGD(m.parameters(), lr=0.01), strategy=strategy, compile=compiled)
        for m, compiled in ((model, True), (eager, False))
    ]
    for seed in range(3):
        batch = random_batch([4 + seed, 5], seed=seed)
        mine, theirs = (step(batch) for step in steps)
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)
    assert digest.digest() is None


class Code:
    def __init__(self, source):
        self.source_code = source


def test_a_digest_is_of_the_code_alone(monkeypatch):
    def of(*sources):
        monkeypatch.setattr(digest, "_kernels", [Code(source) for source in sources])
        return digest.digest()

    first = of("# kernel path: /tmp/a.py\nx = 1\n", "y = 2\n")
    assert first == of("y = 2\n", "# kernel path: /tmp/other/b.py\nx = 1\n")
    assert first != of("x = 1\n", "y = 3\n")
    assert of() is None
    assert of(None) is None


def test_compiled_code_has_a_digest(monkeypatch):
    monkeypatch.setattr(digest, "_kernels", [])
    model = Toy(width=4)
    step = ddpkit.make_step(model, criterion, torch.optim.SGD(model.parameters(), lr=0.01), compile=True)
    step(random_batch([4, 5]))
    found = digest.digest()
    assert found is not None
    assert len(found) == 12
