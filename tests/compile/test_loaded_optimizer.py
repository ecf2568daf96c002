"""A fused optimizer that has loaded the state of another one steps as that did."""

import copy

import pytest
import torch
from torch import nn

import ddpkit
from ddpkit.capture.steps import STEADY
from ddpkit.compile.backend import using

STEPS = STEADY + 6


def criterion(output, batch):
    return (output - batch[:, :1]).square().mean()


def batch_of(number):
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_it_no_longer_skips_by_a_flag_on_the_device(kind):
    model = nn.Linear(3, 1)
    reference = copy.deepcopy(model)
    optimizer, other = kind(model.parameters(), lr=0.01, fused=True), kind(reference.parameters(), lr=0.01)
    optimizer.load_state_dict(other.state_dict())
    with using("interpreted"):
        step = ddpkit.make_step(model, criterion, optimizer, compile=True, cuda_graphs=True)
        plain = ddpkit.make_step(reference, criterion, other)
        for number in range(STEPS):
            step(batch_of(number))
            plain(batch_of(number))
    assert step.captured_steps
    torch.testing.assert_close([*model.parameters()], [*reference.parameters()])
