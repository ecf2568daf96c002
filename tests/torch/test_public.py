"""The way without private names of torch: traced by make_fx, compiled by torch.compile."""

import contextlib
import copy
from unittest import mock

import pytest
import torch
from torch import nn

import ddpkit
from ddpkit.compile import backend
from ddpkit.compile.conditions import Conditions
from ddpkit.compile.graph import Interpreted, trace
from ddpkit.compile.layout import Layout, sizes_of
from ddpkit.compile.public import Public
from ddpkit.errors import InputError, ParityError
from ddpkit.testing import run_ranks

FAR = torch.tensor([0.5, 1.5], dtype=torch.float64)


class Pairs(nn.Module):
    """Energies of pairs, with a tensor that is no part of its state, and a buffer that counts after it is used."""

    def __init__(self, counts=False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = nn.Parameter(torch.randn(2, 3, generator=generator, dtype=torch.float64))
        self.out = nn.Parameter(torch.randn(3, 1, generator=generator, dtype=torch.float64))
        self.unused = nn.Parameter(torch.zeros(2))
        self.register_buffer("calls", torch.ones(1, dtype=torch.float64))
        self.counts = counts

    def forward(self, data):
        positions = data["pos"].detach().requires_grad_()
        i, j = data["edge_index"]
        length = (positions[j] - positions[i]).square().sum(1, keepdim=True)
        edge = torch.tanh(torch.exp(-length * FAR) @ self.mix) * (self.calls * 0.5)
        energy = edge.new_zeros(len(data["pos"].unbind(1)[0:1]), 3).sum() + (edge @ self.out).sum()
        if self.counts:
            self.calls.add_(1)
        (slope,) = torch.autograd.grad(energy, positions, create_graph=self.training)
        return {"energy": energy, "forces": -slope, "stress": None, "name": "pairs"}


def batch_of(atoms, edges):
    generator = torch.Generator().manual_seed(atoms)
    return {
        "pos": torch.randn(atoms, 3, generator=generator, dtype=torch.float64),
        "edge_index": torch.randint(0, atoms, (2, edges), generator=generator),
    }


def criterion(output, _):
    return output["energy"].square() + output["forces"].square().sum()


SHAPES = [(7, 15), (9, 16), (9, 12), (11, 11), (7, 15)]


def train(strategy, model, steps=SHAPES, **options):
    """Steps of a model and of an eager copy of it, which must agree."""
    eager = copy.deepcopy(model)
    two = [
        ddpkit.make_step(m, criterion, torch.optim.SGD(m.parameters(), 0.01), strategy=s, compile=c, **o)
        for m, c, s, o in ((model, True, strategy, options), (eager, False, "custom", {}))
    ]
    shift = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    for atoms, edges in steps:
        one, other = (step(batch_of(atoms + shift, edges)) for step in two)
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    for (name, p), q in zip(model.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12, msg=name)
    return two[0]


def interpreted_after(way):
    """Graphs are interpreted, after the private or the public trace."""
    without = (
        contextlib.nullcontext() if way == "private" else mock.patch.object(backend, "_inductor", return_value=None)
    )
    together = contextlib.ExitStack()
    together.enter_context(without)
    together.enter_context(backend.using("interpreted"))
    return together


@pytest.mark.parametrize("way", ["private", "public"])
@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("strategy", ["custom", "standard", "ingraph"])
def test_what_is_traced_computes_what_eager_code_does(strategy, counts, way):
    with interpreted_after(way):
        step = train(strategy, Pairs(counts), examples=[batch_of(*SHAPES[1])])
    assert step.differences
    assert all(d.is_fine for d in step.differences)


def with_an_optimizer_in_the_graph():
    with interpreted_after("public"):
        train("ingraph", Pairs(), examples=[batch_of(*SHAPES[1])], optimizer_in_graph=True)


def test_the_all_reduce_is_part_of_the_graph_on_two_ranks():
    run_ranks(with_an_optimizer_in_the_graph, 2, timeout=300)


@pytest.mark.parametrize("strategy", ["standard", pytest.param("custom", marks=pytest.mark.long)])
def test_steps_are_compiled(strategy):
    with backend.using("public"):
        step = train(strategy, Pairs(counts=True), SHAPES[:3], examples=[batch_of(*SHAPES[1])])
        assert all(d.is_fine for d in step.differences)


def test_the_parity_check_stands_before_it(monkeypatch):
    def wrong(_, graph, *__, **___):
        code = Interpreted(graph)
        return lambda inputs: [1.01 * x if x.is_floating_point() else x for x in code(inputs)]

    monkeypatch.setattr(Public, "compile", wrong)
    with backend.using("public"), pytest.raises(ParityError):
        train("custom", Pairs())


def traced(function, x, fixed=()):
    layout = Layout.of([x])
    with backend.using("public"):
        return trace(lambda batch, fixed: function(batch, *fixed), layout, sizes_of(layout, x), list(fixed))


def test_graphs_hold_for_the_sizes_that_nothing_was_asked_of():
    def sums(x, y):
        return [x.new_zeros(x.shape[0]) + y.sum(), x[:-1] if x.shape[0] % 2 == 0 else x]  # asks

    conditions = Conditions(traced(sums, torch.randn(12), [torch.randn(12)]).symbols)
    (name,) = conditions.not_one
    assert conditions.hold({name: 30})
    assert not any(conditions.hold({name: n}) for n in (0, 1, 31))
    assert conditions.hold({name: 30})
    assert conditions.broken_at({name: 31}).endswith("# asks")


def test_sizes_that_are_the_same_by_chance_stay_so():
    layout = Layout.of([{"a": torch.zeros(7), "b": torch.zeros(7)}, {"a": torch.zeros(8), "b": torch.zeros(9)}])
    with backend.using("public"):
        graph = trace(lambda batch, _: [batch["a"] * 2, batch["b"] * 3], layout, dict.fromkeys(layout.names, 7), [])
    conditions = Conditions(graph.symbols)
    a, b = layout.names
    assert conditions.hold({a: 9, b: 9})
    assert not conditions.hold({a: 9, b: 8})


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda x: [x.add_(1)], "changes its batch in place"),
        (lambda x: [x + torch.rand_like(x)], "draws random numbers"),
        (lambda x: [x * float(x.sum())], "depends on the values of tensors"),
        (lambda x: [x * {x.shape[0]: 2.0}[12]], "fails where sizes are symbols"),
    ],
)
def test_what_no_graph_can_hold_is_refused(function, says):
    with pytest.raises(InputError, match=says):
        traced(function, torch.randn(12))
