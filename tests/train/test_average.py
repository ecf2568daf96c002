import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddpkit.average import moving_average


def test_the_average_starts_from_the_weights_as_they_were_given():
    """A second stage goes on from the first one's, not from where Adam's first step leaves the model."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = moving_average(model, 0.9)
    for weight, expected in ((3.0, 1.2), (2.0, 1.28)):
        model.weight.data.fill_(weight)
        average.update()
        assert average.module.weight.item() == pytest.approx(expected)


def test_no_average_without_decay():
    assert moving_average(torch.nn.Linear(1, 1), 0.0) is None


class Odd(nn.Module):
    """Weights of several kinds: tied, frozen, complex, empty; buffers that are tied, integer, missing and replaced."""

    def __init__(self, dtype):
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(3, 3, dtype=dtype) for _ in range(3))
        self.inner[2].weight = self.inner[0].weight
        self.inner[1].bias.requires_grad_(False)
        self.norm = nn.BatchNorm1d(3, dtype=dtype)
        self.phase = nn.Parameter(torch.randn(2, dtype=torch.complex64))
        self.small = nn.Parameter(torch.randn(2, dtype=torch.float16))
        self.none = nn.Parameter(torch.randn(0, dtype=dtype))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("absent", None)
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.norm.register_buffer("table", self.table)


def reference(model, decay):
    """As torch averages, from the weights as they are."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=False)
    average.n_averaged.fill_(1)
    return average


def bits(state):
    return {name: (tensor.dtype, tensor.tolist()) for name, tensor in state.items()}


@settings(max_examples=8, deadline=None)
@given(st.floats(0.01, 0.9999), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 9))
def test_it_averages_as_torch_does_bit_for_bit(decay, dtype, seed):
    torch.manual_seed(seed)
    model = Odd(dtype)
    ours, torchs = moving_average(model, decay), reference(model, decay)
    for step in range(50):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight))
            for buffer in (model.norm.running_mean, model.norm.running_var, model.table):
                buffer.add_(0.1)
        model.seen = model.seen + 1  # another tensor, as a model may do
        if step == 20:
            model.inner[0].requires_grad_(False)
        ours.update()
        torchs.update_parameters(model)
        assert bits(ours.state_dict()) == bits(torchs.state_dict())
        assert torch.equal(ours.module.table, model.table)
    assert ours.module.inner[0].weight is ours.module.inner[2].weight


def test_states_of_either_are_loaded_by_the_other():
    model = Odd(torch.float32)
    ours, torchs = moving_average(model, 0.9), reference(copy.deepcopy(model), 0.9)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    nn.init.ones_(model.inner[0].weight)
    torchs.update_parameters(model)
    ours.load_state_dict(torchs.state_dict())
    assert bits(ours.state_dict()) == bits(torchs.state_dict())
    ours.update()
    torchs.load_state_dict(ours.state_dict())
    assert (int(torchs.n_averaged), bits(ours.state_dict())) == (3, bits(torchs.state_dict()))


def test_the_model_is_no_part_of_its_average():
    model = Odd(torch.float64)
    average = moving_average(model, 0.9)
    assert len(list(average.parameters())) == len(list(model.parameters()))
    assert not {id(p) for p in average.parameters()} & {id(p) for p in model.parameters()}
    average.eval()
    assert model.training
