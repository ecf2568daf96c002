"""Recorded steps of strategies that act during the backward pass, against the same steps as they are, bit for bit."""

import pytest
import torch
from in_memory import interpreted_once
from test_recorded_steps import BATCHES, BUCKETS, Criterion, Scaled, Training, assert_same
from torch import nn
from toy import Toy

import ddpkit
from ddpkit.errors import InputError
from ddpkit.sync.overlap import OverlapSync

DURING = {"standard": {}, "overlap": BUCKETS}


@pytest.fixture(autouse=True, scope="module")
def _compiler():
    with interpreted_once():
        yield


def both(number, before=None, **options):
    """The same training as it is and from recordings; the second."""
    plain, recorded = Training(cuda_graphs=False, **options), Training(cuda_graphs=True, **options)
    for training in (plain, recorded):
        training.run(number, before)
    assert_same(plain, recorded)
    return recorded.step


class Learned(Criterion):
    """With a weight of its own that is trained, a count on the device, and a mark that it leaves at every call."""

    def __init__(self):
        super().__init__()
        self.log_weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.last = torch.zeros((), dtype=torch.float64)

    def forward(self, output, batch):
        parts = super().forward(output, batch)
        self.seen += 1
        self.last = parts["loss_energy"].detach().clone()
        return {**parts, "loss": parts["loss"] * torch.exp(-self.log_weight) + self.log_weight}


class Tied(Criterion):
    """Looks at the model's weights too."""

    def forward(self, output, batch):
        parts = super().forward(output, batch)
        return {**parts, "loss": parts["loss"] + 0.1 * self.model.first.double().square().sum()}


@pytest.mark.parametrize("strategy", DURING)
def test_a_criterion_that_learns(strategy):
    trainings = []
    for graphs in (False, True):
        made = []

        class Kept(Learned):
            def __init__(self, made=made):
                super().__init__()
                made.append(self)

        def optimizer(parameters, made=made, **settings):
            return torch.optim.AdamW([*parameters, *made[0].parameters()], **settings)

        training = Training(
            cuda_graphs=graphs,
            strategy=strategy,
            criterion=Kept,
            optimizer=optimizer,
            clip_norm=1.0,
            **DURING[strategy],
        )
        training.run(40)
        trainings.append(training)
    assert_same(*trainings)
    plain, recorded = (training.criterion for training in trainings)
    assert torch.equal(plain.log_weight, recorded.log_weight)
    assert plain.log_weight != 0
    assert torch.equal(plain.seen, recorded.seen)
    assert torch.equal(plain.last, recorded.last)
    assert trainings[1].step.captured_steps >= 30


@pytest.mark.parametrize("strategy", DURING)
def test_a_criterion_that_looks_at_weights_of_the_model(strategy):
    def before(training, n):
        if n == 0:
            training.criterion.model = training.model

    assert both(30, before, strategy=strategy, criterion=Tied, **DURING[strategy]).captured_steps >= 26


@pytest.mark.parametrize("strategy", DURING)
def test_a_tensor_on_the_host_is_obeyed(strategy):
    def before(training, n):
        if n in (12, 13, 20):
            training.criterion.scale.mul_(1.5)

    assert both(30, before, strategy=strategy, criterion=Scaled, **DURING[strategy]).captured_steps >= 20


@pytest.mark.parametrize("strategy", DURING)
def test_a_weight_that_changes_at_every_step(strategy):
    """No recording holds for two of them, and there is nothing to gain from one."""

    def before(training, n):
        training.criterion.weight = 10.0 - 0.1 * min(n, 20)

    with pytest.warns(UserWarning, match=r"criterion.weight has had 5 values, and steps had to be recorded for each"):
        step = both(80, before, strategy=strategy, **DURING[strategy])
    assert 0 < step.captured_steps < 80 - 20


@pytest.mark.parametrize("strategy", DURING)
def test_hooks_on_parameters_are_called_once_a_step(strategy):
    calls = []

    def before(training, n):
        if n == 10:
            first = training.model.first
            first.register_hook(lambda g: g * 2)
            first.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.clone()))

    assert both(30, before, strategy=strategy, **DURING[strategy]).captured_steps >= 20
    assert len(calls) == 2 * 20


class Halved(ddpkit.GradientSync):
    """Halves each gradient as it comes, and counts them."""

    acts = "during backward"

    def attach(self):
        self.seen = 0
        for p in self.parameters.values():
            p.register_post_accumulate_grad_hook(self.halve)

    def halve(self, p):
        self.seen += 1
        if p.grad is not None and not self._paused:
            p.grad.mul_(0.5)

    def reduce(self):
        """Leaves that to the hooks."""


def test_a_strategy_of_ones_own():
    step = both(30, strategy=Halved)
    assert step.captured_steps == 27
    assert step.sync.seen > 30


class Doubled(ddpkit.FlatSync):
    """Does more than `custom` after the average."""

    def reduce(self):
        super().reduce()
        for p in self.parameters.values():
            if p.grad is not None:
                p.grad.mul_(2)


class DoubledBuckets(OverlapSync):
    """Does more than `overlap`."""

    def reduce(self):
        super().reduce()
        for p in self.parameters.values():
            if p.grad is not None:
                p.grad.mul_(2)


@pytest.mark.parametrize("strategy", [Doubled, DoubledBuckets])
def test_a_strategy_that_adds_to_a_built_in_one(strategy):
    assert both(30, strategy=strategy).captured_steps == 27


def test_micro_batches_of_emulated_ranks():
    batches = [BATCHES[:2], BATCHES[1:3], [BATCHES[2], BATCHES[0]]]
    step = both(30, strategy="emulated", ranks=2, batches=batches)
    assert step.captured_steps == 27


def test_what_only_a_closure_holds_is_refused():
    model, free = Toy(), nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.AdamW([*model.parameters(), free], fused=True)

    def criterion(output, batch):
        return (output["energy"] - batch.energy).square().mean() + free

    ddpkit.make_step(model, criterion, optimizer, strategy="overlap", compile=True)
    with pytest.raises(InputError, match="neither the model nor the criterion holds, so a recording would lack its"):
        ddpkit.make_step(model, criterion, optimizer, strategy="overlap", compile=True, cuda_graphs=True)
