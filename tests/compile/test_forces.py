import copy
import warnings

import pytest
import torch
from toy import Molecules, Toy, as_dict, random_batch

import ddpkit
from ddpkit.compile import forces as compiled_forces
from ddpkit.errors import ParityError


def loss_of(output, data):
    return (output["y"] - data["y"]).square().sum() + (output["neg_dy"] - data["dy"]).square().sum()


@pytest.fixture(scope="module")
def molecules():
    model = Molecules()
    examples = [as_dict(random_batch([6, 5, 4])), as_dict(random_batch([4, 4], seed=1))]
    return model, ddpkit.compile_forces(model, examples[0], examples=examples[1:])


@pytest.mark.parametrize("sizes", [[6, 5, 4], [3, 8], [2, 9, 3, 5]], ids=str)
def test_a_third_party_model_trains_through_it(molecules, sizes):
    model, compiled = molecules
    data = as_dict(random_batch(sizes, seed=7))
    reference = copy.deepcopy(model)
    expected = reference(data)
    loss_of(expected, data).backward()
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = compiled(data)
    assert output["name"] == "toy"
    torch.testing.assert_close(output["neg_dy"], expected["neg_dy"])
    assert not output["pos"].requires_grad
    loss_of(output, data).backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, name
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10 * float(q.grad.norm()))


def test_only_a_part_of_the_outputs_may_enter_the_loss(molecules):
    model, compiled = molecules
    data = as_dict(random_batch([6, 5, 4]))
    mine = torch.autograd.grad(compiled(data)["neg_dy"].square().sum(), model.inner.first)
    theirs = torch.autograd.grad(model(data)["neg_dy"].square().sum(), model.inner.first)
    torch.testing.assert_close(mine, theirs)


def test_its_parameters_are_the_models(molecules):
    model, compiled = molecules
    assert [id(p) for p in compiled.parameters()] == [id(p) for p in model.parameters()]
    assert list(compiled.children()) == [model]


def test_evaluation_runs_the_model(molecules):
    model, compiled = molecules
    data = as_dict(random_batch([5]))
    compiled.eval()
    try:
        torch.testing.assert_close(compiled(data)["neg_dy"], model(data)["neg_dy"])
    finally:
        compiled.train()


def test_a_copy_compiles_anew(molecules):
    _, compiled = molecules
    other = copy.deepcopy(compiled)
    data = as_dict(random_batch([6, 5, 4]))
    torch.testing.assert_close(other(data)["neg_dy"], compiled(data)["neg_dy"])


@pytest.mark.usefixtures("interpreted")
def test_buffers_change():
    model = Toy()
    compiled = ddpkit.compile_forces(model, random_batch([4, 5]))
    assert model.calls == 0
    compiled(random_batch([3, 4]))["forces"].sum().backward()
    assert model.calls == 1


@pytest.mark.usefixtures("interpreted")
def test_a_sabotaged_graph_is_refused(monkeypatch):
    honest = compiled_forces.trace

    def sabotage(*arguments):
        traced = honest(*arguments)
        graph = traced.graph.graph
        output = graph.output_node()
        values = list(output.args[0])
        with graph.inserting_before(output):
            twice = graph.call_function(torch.ops.aten.mul.Tensor, (values[-1], 2.0))
            twice.meta["val"] = values[-1].meta["val"]
        output.args = ([*values[:-1], twice],)
        return traced

    monkeypatch.setattr(compiled_forces, "trace", sabotage)
    with pytest.raises(ParityError, match="'shift'"):
        ddpkit.compile_forces(Toy(), random_batch([4, 5]))


class Cut(torch.nn.Module):
    """Slices what it has computed, so that the compiler stores the slices otherwise in memory than eager code does."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = torch.nn.Parameter(torch.randn(3, 24, generator=generator, dtype=torch.float64))
        self.mix = torch.nn.Parameter(torch.randn(8, 24, generator=generator, dtype=torch.float64))

    def forward(self, data):
        positions = data["pos"].detach().requires_grad_()
        a, b = (self.mix * 0.3).split([8, 16], 1)
        x, y = (positions @ self.first).split([8, 16], 1)
        energy = (torch.tanh(x @ a.t()) @ a).square().sum(1) + torch.tanh(y @ b.t()).sum(1)
        (slope,) = torch.autograd.grad(energy.sum(), positions, create_graph=self.training)
        return {"y": energy, "neg_dy": -slope}


def test_what_is_kept_for_the_backward_code_may_lie_otherwise_than_in_the_trace(monkeypatch):
    moved = []
    honest = compiled_forces.strides_of

    def strides_of(kernel, symbols):
        found = honest(kernel, symbols)
        moved.append((1, 8) in found)  # (1, 24) in the trace
        return found

    monkeypatch.setattr(compiled_forces, "strides_of", strides_of)
    one, two = ({"pos": random_batch(sizes).positions} for sizes in ([6, 5], [4, 5]))
    compiled = ddpkit.compile_forces(Cut(), one, examples=[two])
    assert moved == [True]
    assert compiled.differences
    assert all(d.is_fine for d in compiled.differences)
