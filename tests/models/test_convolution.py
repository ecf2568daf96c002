"""The convolution against e3nn's, and the sums over edges against plain ones."""

import pytest
import torch
from cases import make_batch, make_frame, make_model, relative

from ddpkit.models.convolution import BlockConvolution
from ddpkit.models.graph import (
    BLOCK,
    EAGER_ON_CPU,
    EAGER_ON_GPU,
    TRACED,
    at_centre,
    at_neighbour,
    blocks_of,
    computing_by,
    graph_of,
    pad,
    sum_rows,
    sum_to_centre,
    sum_to_neighbour,
    unpad,
)
from ddpkit.models.layers import Groups, SelfConnection, groups_of
from ddpkit.models.mlp import silu


@pytest.fixture(scope="module")
def batch():
    return make_batch([make_frame(9, periodic=True, box=5.0), make_frame(4, periodic=True, seed=2, box=3.5)])


@pytest.mark.parametrize(
    ("l_max", "parity", "by"),
    [
        (1, True, EAGER_ON_CPU),
        (2, False, EAGER_ON_CPU),
        (2, True, EAGER_ON_GPU),
        (3, False, EAGER_ON_CPU),
        (1, False, TRACED),
    ],
)
def test_own_convolution_is_that_of_e3nn(batch, l_max, parity, by):
    own = make_model("nequip", l_max=l_max, parity=parity)
    reference = make_model("nequip", l_max=l_max, parity=parity, kernels="e3nn")
    reference.load_state_dict(own.state_dict(), strict=False)
    gradients = []
    with computing_by(by):
        outs = [own(batch), reference(batch)]
        for model, out in zip((own, reference), outs, strict=True):
            loss = out["energy"].square().sum() + out["forces"].square().sum() + out["stress"].square().sum()
            parameters = [p for p in model.parameters() if p.requires_grad]
            gradients.append(torch.autograd.grad(loss, parameters))
    for name, value in outs[0].items():
        assert relative(value, outs[1][name]) < 1e-10
    for a, b in zip(*gradients, strict=True):
        assert relative(a, b) < 1e-9


def test_atoms_without_edges_as_on_a_gpu():
    model = make_model("nequip")
    with computing_by(EAGER_ON_GPU):
        out = model(make_batch([make_frame(1), make_frame(1, seed=4)]))
        assert out["forces"].abs().max() == 0
        (out["energy"].sum() + out["forces"].square().sum()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_parts_do_not_matter(batch, monkeypatch):
    model = make_model("nequip")
    whole = model(batch)["forces"]
    monkeypatch.setattr("ddpkit.models.convolution.CACHE", 1)
    assert relative(model(batch)["forces"], whole) < 1e-12


def test_paths_are_those_of_e3nn():
    convolution = BlockConvolution({(0, 1): 4, (1, -1): 3}, 2, {(0, 1): 5, (1, -1): 2, (1, 1): 2}, torch.float64)
    assert convolution.paths[0, 1] == ((0, (0, 1)), (1, (1, -1)))
    assert convolution.paths[1, -1] == ((0, (1, -1)), (1, (0, 1)), (1, (1, 1)), (2, (1, -1)))
    assert convolution.irreps_out == {(0, 1): 7, (1, -1): 10, (1, 1): 3}


def test_gathers_and_sums(batch):
    graph = graph_of(batch)
    atoms, edges = batch.positions.shape[0], batch.edge_index.shape[1]
    of_atoms = torch.randn(atoms, 2, 3, dtype=torch.float64)
    of_edges = torch.randn(edges, 2, 3, dtype=torch.float64)
    centre, neighbour = batch.edge_index
    assert torch.equal(at_centre(of_atoms, graph), of_atoms[centre])
    assert torch.equal(at_neighbour(of_atoms, graph), of_atoms[neighbour])
    zeros = torch.zeros_like(of_atoms)
    assert torch.allclose(sum_to_centre(of_edges, graph), zeros.index_add(0, centre, of_edges))
    assert torch.allclose(sum_to_neighbour(of_edges, graph), zeros.index_add(0, neighbour, of_edges))
    assert torch.equal(unpad(pad(of_edges, graph), graph), of_edges)
    assert pad(of_edges, graph).sum() == pytest.approx(float(of_edges.sum()))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("end", ["centre", "neighbour"])
def test_blocks_of_edges(batch, exact, end):
    graph = graph_of(batch)
    table, ends, slot = {
        "centre": (graph.outgoing, graph.centre, graph.slot),
        "neighbour": (graph.incoming, graph.neighbour, graph.incoming_slot),
    }[end]
    edges = ends.shape[0]
    blocks = blocks_of(table, ends, slot, exact=exact)
    rows = blocks.rows.rows.flatten()
    assert torch.equal(rows[blocks.slot], torch.arange(edges))
    assert (rows == edges).sum() == len(rows) - edges
    used = [row[row < edges] for row in blocks.rows.rows if (row < edges).any()]
    assert all(len(set(ends[row].tolist())) == 1 for row in used)
    if exact:
        assert len(used) == len(blocks.rows.rows) == sum(-(-n // BLOCK) for n in torch.bincount(ends).tolist())
    x = torch.randn(edges, 3, dtype=torch.float64)
    total = sum_rows(sum_rows(x, blocks.rows), blocks.of_atom)
    assert torch.allclose(total, x.new_zeros(len(table.rows), 3).index_add(0, ends, x))


@pytest.mark.parametrize("function", [at_centre, at_neighbour, sum_to_centre, sum_to_neighbour, pad])
def test_their_derivatives(batch, function):
    graph = graph_of(batch)
    rows = batch.positions.shape[0] if function in (at_centre, at_neighbour) else batch.edge_index.shape[1]
    x = torch.randn(rows, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: function(x, graph).square(), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: function(x, graph).square(), x, fast_mode=True)


def test_silu():
    x = torch.linspace(-6, 6, 13, dtype=torch.float64, requires_grad=True)
    assert torch.equal(silu(x), torch.nn.functional.silu(x))
    assert torch.autograd.gradcheck(silu, x)
    assert torch.autograd.gradgradcheck(silu, x)


def test_self_connection_is_a_tensor_product_with_the_embedding():
    torch.manual_seed(0)
    species = torch.randint(0, 5, (40,))
    one_hot = torch.nn.functional.one_hot(species, 7).double()
    embedding = torch.randn(7, 3, dtype=torch.float64)
    module = SelfConnection({(0, 1): 4, (1, -1): 2}, 3, {(0, 1): 5, (1, -1): 6}, torch.float64)
    x = {
        (0, 1): torch.randn(40, 1, 4, dtype=torch.float64),
        (1, -1): torch.randn(40, 3, 2, dtype=torch.float64),
    }
    out = module(x, embedding, groups_of(one_hot))
    blocks = module.weight.split([a * b for a, b in module.shapes], 1)
    for ir, shape, block in zip(module.irreps, module.shapes, blocks, strict=True):
        weight = block.reshape(3, *shape)
        scale = (weight.shape[0] * weight.shape[1]) ** -0.5
        expected = torch.einsum("ndi,nt,tio->ndo", x[ir], embedding[species], weight) * scale
        assert relative(out[ir], expected) < 1e-12


@pytest.mark.parametrize("by", [EAGER_ON_CPU, EAGER_ON_GPU])
def test_blocks_hold_one_species(by):
    species = torch.randint(0, 4, (50,))
    with computing_by(by):
        groups: Groups = groups_of(torch.nn.functional.one_hot(species, 6))
    held = groups.atoms.flatten()
    assert sorted(held[held < 50].tolist()) == list(range(50))
    for row, kind in zip(groups.atoms, groups.species, strict=True):
        assert (species[row[row < 50]] == groups.present[kind]).all()
    assert torch.equal(held[groups.slot], torch.arange(50))
