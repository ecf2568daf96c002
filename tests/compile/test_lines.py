"""What a model does that no graph can hold is told with its line."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy import Molecules, Toy, as_dict, random_batch

import ddpkit
from ddpkit.compile.conditions import Conditions
from ddpkit.compile.graph import trace
from ddpkit.compile.layout import Layout, sizes_of
from ddpkit.errors import InputError


def traced(function, tensors, fixed=()):
    layout = Layout.of([tensors])
    return trace(lambda batch, fixed: function(batch, *fixed), layout, sizes_of(layout, tensors), list(fixed))


FIXING = {
    "len": lambda x: [x.new_zeros(len(x)) + x.sum()],  # len
    "int": lambda x: [x * int(x.shape[0])],  # int
    "range": lambda x: [sum(x[n] for n in range(x.shape[0]))],  # range
    "list": lambda x: [x * torch.tensor([1.0] * x.shape[0], dtype=x.dtype)],  # list
    "compares": lambda x: [x if x.numel() == 12 else 2 * x],  # compares
    "orders": lambda x: [x if x.shape[0] < 20 else 2 * x],  # orders
    "iterates": lambda x: [torch.stack([row * 2 for row in x])],  # iterates
    "unbind": lambda x: [torch.stack(x.unbind())],  # unbind
}


@pytest.mark.parametrize("name", FIXING)
def test_the_line_that_fixed_a_size_is_known(name):
    graph = traced(FIXING[name], torch.randn(12, dtype=torch.float64))
    conditions = Conditions(graph.symbols)
    (size,) = graph.symbols.sizes
    assert conditions.broken_at({size: 12}) is None
    line = conditions.broken_at({size: 31})
    assert line is not None
    assert f"{__file__}, line " in line
    assert line.endswith(f"# {name}")


def test_sizes_taken_as_they_are_hold_for_every_batch():
    graph = traced(lambda x: [x.new_zeros(x.shape[0]) + x.sum() * x.shape[0]], torch.randn(12))
    conditions = Conditions(graph.symbols)
    (size,) = graph.symbols.sizes
    assert conditions.hold({size: 31})
    assert conditions.broken_at({size: 31}) is None


DRAWING = {
    "native_dropout": lambda x: [F.dropout(x, 0.5, training=True)],  # native_dropout
    "rand": lambda x: [x * torch.rand(x.shape[0])],  # rand
    "rand_like": lambda x: [x + torch.rand_like(x)],  # rand_like
    "randn_like": lambda x: [x + torch.randn_like(x)],  # randn_like
    "bernoulli": lambda x: [x * torch.bernoulli(torch.sigmoid(x))],  # bernoulli
    "normal": lambda x: [x + torch.empty_like(x).normal_()],  # normal
    "uniform": lambda x: [x + torch.empty_like(x).uniform_(-1, 1)],  # uniform
    "randperm": lambda x: [x[torch.randperm(x.shape[0])]],  # randperm
    "multinomial": lambda x: [x[torch.multinomial(x.abs(), 3)]],  # multinomial
    "randint": lambda x: [x * torch.randint(3, x.shape)],  # randint
}


@pytest.mark.parametrize("name", DRAWING)
def test_random_numbers_are_refused_with_their_line(name):
    with pytest.raises(InputError, match=rf"draws random numbers \({name}\w* at .*{__file__}, line \d+: .*# {name}\)"):
        traced(DRAWING[name], torch.randn(12))


def test_random_numbers_that_change_a_fixed_tensor_are_refused():
    def noisy(x, buffer):
        buffer.add_(torch.randn_like(buffer))  # changes
        return [x * 2]

    with pytest.raises(InputError, match="# changes"):
        traced(noisy, torch.randn(12), [torch.zeros(3)])


@pytest.mark.parametrize(
    "harmless",
    [
        lambda x: [F.dropout(x, 0.0, training=True)],
        lambda x: [F.dropout(x, 0.5, training=False)],
        lambda x: [F.rrelu(x, training=False)],
        lambda x: [x * 2, torch.rand_like(x)][:1],
        lambda x: [F.scaled_dot_product_attention(x[None, :, None], x[None, :, None], x[None, :, None], dropout_p=0.0)],
    ],
    ids=["p is 0", "evaluation", "rrelu", "dropped", "attention"],
)
def test_what_draws_nothing_that_counts_is_compiled(harmless):
    traced(harmless, torch.randn(12))


def test_modules_of_torch_are_named():
    network = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    step = ddpkit.make_step(network, lambda out, _: out.square().mean(), optimizer, strategy="none", compile=True)
    with pytest.raises(InputError, match=r"draws random numbers \(native_dropout at torch's Dropout\)"):
        step(torch.ones(6, 1))


@pytest.mark.parametrize(
    "function", [lambda x: [x * {x.shape[0]: 2.0}[12]], lambda x: [x + torch.from_numpy(x.numpy())]]
)
def test_what_else_fails_in_a_trace_is_told_with_its_line(function):
    with pytest.raises(
        InputError, match=rf"cannot be compiled: {__file__}, line \d+: .* fails where sizes are symbols"
    ):
        traced(function, torch.randn(12))


class Fixed(Toy):
    """Takes a size for fixed."""

    def forward(self, batch):
        out = super().forward(batch)
        out["energy"] = out["energy"] + 0 * torch.zeros(len(batch.positions), dtype=torch.float64).sum()  # len
        return out


def loss(out, batch):
    return (out["energy"] - batch.energy).square().mean() + out["forces"].square().mean()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("strategy", ["custom", "standard"])
def test_a_model_that_fixes_sizes_is_refused_for_batches_whose_sizes_are_known_to_vary(strategy):
    model = Fixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = ddpkit.make_step(model, loss, optimizer, strategy=strategy, compile=True)
    with pytest.raises(InputError, match=rf"other sizes than the first, because .*{__file__}, line \d+: .*# len\)"):
        step.prepare(random_batch([4, 5, 6, 5]))


class FixedMolecules(Molecules):
    """The same, called with a dict."""

    def forward(self, data):
        out = super().forward(data)
        return out | {"y": out["y"] + 0 * sum(range(data["pos"].shape[0]))}  # range


@pytest.mark.usefixtures("interpreted")
def test_a_model_that_fixes_sizes_is_compiled_anew_with_the_line_told():
    model = FixedMolecules()
    compiled = ddpkit.compile_forces(model, as_dict(random_batch([5, 6])))
    with pytest.warns(
        UserWarning, match=rf"compiled anew .* because the model fixes or compares a size \({__file__}, .*# range\)"
    ):
        compiled(as_dict(random_batch([7, 8])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(as_dict(random_batch([5, 6])))
