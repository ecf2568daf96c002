"""TorchScript inside a model: functions are traced as the Python they were; modules are refused with what helps."""

import pytest
import torch
from torch import nn
from toy import random_batch

import ddpkit
from ddpkit.errors import InputError


@torch.jit.script
def lengths(x):
    """Takes a size for a number, as TorchScript does."""
    return torch.zeros(x.size(0), dtype=x.dtype) + x.square().sum(1)


class Lengths(nn.Module):
    def forward(self, x):
        return torch.zeros(x.size(0), dtype=x.dtype) + x.square().sum(1)


class Pairs(nn.Module):
    """Energies of pairs; what it does not compute it returns as None, as MACE does."""

    def __init__(self, of):
        super().__init__()
        self.of = of
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, data):
        positions = data["pos"].detach().requires_grad_()
        i, j = data["edge_index"]
        energy = torch.exp(-self.weight * self.of(positions[j] - positions[i])).sum()
        (slope,) = torch.autograd.grad(energy, positions, create_graph=self.training)
        return {"energy": energy, "forces": -slope, "stress": None}


def as_dict(sizes):
    batch = random_batch(sizes)
    return {"pos": batch.positions, "edge_index": batch.edge_index}


def test_a_scripted_function_keeps_sizes_open():
    compiled = ddpkit.compile_forces(Pairs(lengths), as_dict([6, 5]))
    for sizes in ([7], [4, 5, 6]):
        compiled(as_dict(sizes))["forces"].square().sum().backward()
    assert len(compiled._situations.now().variants.codes) == 1
    assert isinstance(lengths(torch.ones(2, 3)), torch.Tensor)
    assert type(lengths) is torch.jit.ScriptFunction


def test_a_scripted_module_is_refused_with_the_remedy():
    model = Pairs(torch.jit.script(Lengths()))
    with pytest.raises(InputError, match=r"TorchScript in it \(Lengths\).*jit_script_fx=False"):
        ddpkit.compile_forces(model, as_dict([6, 5]))


def test_a_whole_step_leaves_out_what_is_none():
    model = Pairs(lengths)
    step = ddpkit.make_step(
        model,
        lambda output, _: output["forces"].square().sum(),
        torch.optim.SGD(model.parameters(), lr=1e-3),
        strategy="none",
        compile=True,
    )
    step(as_dict([6, 5]))
    assert {d.name for d in step.differences} == {"loss", "energy", "forces", "weight"}
