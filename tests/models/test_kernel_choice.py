"""The kernels of NequIP behind one interface, and the settings that all potentials share."""

import dataclasses

import pytest
import torch
from cases import SPECIES, make_batch, make_frame, make_model, relative

import ddpkit
from ddpkit import nvrtc
from ddpkit.kernels import check_kernels, require_kernels
from ddpkit.models import Allegro, NequIP
from ddpkit.models.config import PotentialConfig
from ddpkit.models.convolution import BlockConvolution
from ddpkit.models.graph import graph_of
from ddpkit.models.kernels import KERNELS, OpenEquivarianceConvolution
from ddpkit.models.potential import Edges
from ddpkit.models.reference import ReferenceConvolution


class Own(ReferenceConvolution):
    """A kernel as somebody else would add it: one class."""

    calls = 0

    def forward(self, x, hidden, matrix, shared):
        Own.calls += 1
        return super().forward(x, hidden, matrix, shared)


class Elsewhere(Own):
    @staticmethod
    def runs_on(device):
        return device.type == "cuda"


@pytest.fixture(scope="module")
def batch():
    return make_batch([make_frame(9, periodic=True, box=5.0), make_frame(4, periodic=True, seed=2, box=3.5)])


@pytest.mark.parametrize(("kernel", "calls"), [(Own, 3), (Elsewhere, 0)])
def test_a_new_kernel_is_one_class(kernel, calls, batch, monkeypatch):
    monkeypatch.setitem(KERNELS, "own", kernel)
    monkeypatch.setattr(Own, "calls", 0)
    model, expected = make_model("nequip", kernels="own"), make_model("nequip")
    assert list(model.state_dict()) == list(expected.state_dict())
    out = model(batch)
    assert Own.calls == calls  # one for each layer, or where it does not run the kernel that runs everywhere
    assert all(relative(out[name], value) < 1e-11 for name, value in expected(batch).items())
    require_kernels(model, check_kernels(model, batch))


def test_layers_that_are_alike_share_a_kernel():
    layers = make_model("nequip", num_layers=5, num_features=4, kernels="e3nn", type_embedding_dim=4).layers
    assert layers[1].kernel is layers[2].kernel is layers[3].kernel
    assert layers[1].convolution is layers[2].convolution
    assert len({layer.kernel for layer in layers}) == 3
    assert all(isinstance(layer.convolution, BlockConvolution) for layer in layers)


def test_the_reference_has_no_other_kernel():
    for kernels in ("ddpkit", "e3nn"):
        model = make_model("nequip", kernels=kernels)
        reference = model.with_reference_kernels()
        assert all(type(layer.kernel) is ReferenceConvolution for layer in reference.layers)
        assert [name for name, _ in reference.named_parameters()] == [name for name, _ in model.named_parameters()]
        assert not any(isinstance(layer.kernel, ReferenceConvolution) for layer in model.layers)


def test_openequivariance_gives_nan_on_a_graph_that_is_not_symmetric(batch):
    """Its kernels read the transpose off the graph, and would silently compute something else."""
    norm = torch.ones(len(batch.species), 1)
    for edges, finite in ((slice(None), True), (slice(1, None), False)):
        part = batch.replace(
            edge_index=batch.edge_index[:, edges], edge_shift=batch.edge_shift[edges], neighbours=None, incoming=None
        )
        harmonics = torch.ones(part.edge_index.shape[1], 1)
        seen = Edges(graph_of(part), torch.zeros(0), torch.zeros(0), harmonics, leaf=True)
        shared = OpenEquivarianceConvolution.prepare([], seen, norm)
        assert bool(torch.isfinite(shared.norm).all()) is finite


def test_a_step_with_kernels_of_e3nn_can_be_compiled():
    """e3nn's irreps are tuples that refuse to tell their length."""
    model = make_model("nequip", kernels="e3nn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ddpkit.make_step(model, ddpkit.EnergyForcesLoss(), optimizer, strategy="none", compile=True)


@pytest.mark.parametrize("kind", [Allegro, NequIP])
def test_every_shared_setting_is_a_keyword(kind):
    given = {"avg_num_neighbors": 9.0, "r_max": 3.0, "l_max": 1, "cutoffs": [[2.0] * 3] * 3, "zbl": list(SPECIES)}
    config = PotentialConfig(species=SPECIES, **given)
    model = kind(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
    assert model.species == SPECIES
    assert model.r_max == 3.0
    assert model.zbl
    with pytest.raises(TypeError, match="r_maximum"):
        kind(SPECIES, avg_num_neighbors=9.0, r_maximum=3.0)
    with pytest.raises(TypeError, match="avg_num_neighbors"):
        kind(SPECIES)


@pytest.mark.parametrize(
    ("has_compiler", "l_max", "chosen"), [(True, 4, "cuda"), (True, 5, "ddpkit"), (False, 1, "ddpkit")]
)
def test_the_fastest_are_taken_that_can_be_made(has_compiler, l_max, chosen, monkeypatch):
    monkeypatch.setattr(nvrtc, "is_available", lambda: has_compiler)
    model = make_model("nequip", kernels="auto", num_layers=1, num_features=2, l_max=l_max)
    assert model.kernels == model.kernels_of(torch.device("cuda")) == chosen
    assert model.kernels_of(torch.device("cpu")) == "ddpkit"


def test_without_a_build_for_nvidia_there_is_no_compiler(monkeypatch):
    monkeypatch.setattr(nvrtc, "_compiler", object)
    for version, available in ((None, False), ("13.0", True)):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert nvrtc.is_available() is available
