import pytest
import torch

from ddpkit.train import moving_average


def test_the_average_starts_from_the_weights_as_they_were_given():
    """A second stage goes on from the first one's, not from where Adam's first step leaves the model."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = moving_average(model, 0.9)
    for weight, expected in ((3.0, 1.2), (2.0, 1.28)):
        model.weight.data.fill_(weight)
        average.update_parameters(model)
        assert average.module.weight.item() == pytest.approx(expected)


def test_no_average_without_decay():
    assert moving_average(torch.nn.Linear(1, 1), 0.0) is None
