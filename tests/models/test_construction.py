"""Parameter counts, bad input, traces, and the commands and calculator on top of the models."""

import csv

import numpy as np
import pytest
import torch
from ase import Atoms
from cases import R_MAX, SPECIES, make_batch, make_frame, make_model, relative
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from ddpkit.batch import Batch
from ddpkit.calculator import Calculator
from ddpkit.errors import InputError
from ddpkit.experiments import bench_step, cli, models_table
from ddpkit.models import Allegro, NequIP

PUBLISHED = {
    ("allegro_small", ""): 392_992,
    ("allegro_medium", ""): 426_592,
    ("allegro_large", ""): 3_121_056,
    ("allegro_small", "model.scalar_embed_dim=64"): 360_224,
    ("allegro_medium", "model.scalar_embed_dim=64"): 385_632,
    ("nequip_xl", ""): 32_136_288,
    ("nequip_xl", "model.type_embedding_dim=128"): 114_870_720,
}


@pytest.mark.parametrize(("name", "override"), PUBLISHED)
def test_parameters(name, override, tmp_path):
    path = tmp_path / "models.csv"
    cli._dispatch(["models", name, *override.split(), "--csv", str(path)])
    rows = list(csv.DictReader(path.open()))
    assert rows == [{"model": name, "parameters": str(PUBLISHED[name, override])}]


def test_counted_without_weights_as_with():
    spec = models_table.model_spec("allegro_tiny", [])
    built = models_table.build(spec, SPECIES)
    assert models_table.count(spec, SPECIES) == sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (Allegro, {"r_max": -1.0}),
        (Allegro, {"precision": "float16"}),
        (Allegro, {"num_layers": 0}),
        (Allegro, {"embed_dim": 7}),
        (Allegro, {"mlp_nonlinearity": "relu"}),
        (Allegro, {"shifts": [1.0]}),
        (Allegro, {"scales": float("nan")}),
        (Allegro, {"polynomial_cutoff_p": 1}),
        (Allegro, {"avg_num_neighbors": 0.0}),
        (Allegro, {"cutoffs": [[1.0]]}),
        (Allegro, {"cutoffs": [[9.0] * 3] * 3}),
        (NequIP, {"num_features": [4, 4, 4]}),
        (NequIP, {"num_layers": 0}),
        (NequIP, {"kernels": "fast"}),
        (NequIP, {"kernels": "openequivariance"}),
        (NequIP, {"zbl": ["H"]}),
    ],
)
def test_bad_settings_are_refused(make, settings):
    if settings.get("kernels") == "openequivariance" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError):
        make(SPECIES, **{"avg_num_neighbors": 10.0, **settings})


def test_unknown_symbol_for_zbl():
    with pytest.raises(InputError, match="zbl"):
        Allegro(("A", "B"), avg_num_neighbors=10.0, zbl=True)
    with pytest.raises(InputError, match="species"):
        Allegro(("H", "H"), avg_num_neighbors=10.0)


@pytest.mark.parametrize("name", ["allegro", "nequip"])
def test_whole_step_traces_with_symbolic_sizes(name):
    """A trace made on one batch gives the eager gradients of another."""
    model = make_model(name, num_layers=2, l_max=1, zbl=True)
    names = [n for n, _ in model.named_parameters()]
    values = [p.detach() for p in model.parameters()]

    def gradients(parameters, tensors):
        batch = Batch(**tensors, num_frames=2)
        parameters = [p.detach().requires_grad_() for p in parameters]
        out = functional_call(model, dict(zip(names, parameters, strict=True)), (batch,))
        loss = out["energy"].square().sum() + out["forces"].square().sum() + out["stress"].square().sum()
        return torch.autograd.grad(loss, parameters)

    def batch(atoms, seed):
        return make_batch([make_frame(atoms, periodic=True, seed=s) for s in (seed, seed + 1)]).tensors()

    traced = make_fx(gradients, tracing_mode="symbolic", _allow_non_fake_inputs=True)(values, batch(7, 0))
    other = batch(11, 5)
    for a, b in zip(traced(values, other), gradients(values, other), strict=True):
        assert relative(a, b) < 1e-10


@pytest.mark.parametrize("name", ["allegro", "nequip"])
def test_every_parameter_has_a_gradient(name):
    model = make_model(name, parity=True)
    out = model(make_batch([make_frame(9)]))
    (out["energy"].sum() + out["forces"].square().sum()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["allegro", "nequip"])
def test_training_lowers_the_loss(name):
    model = make_model(name, "mixed")
    batch = make_batch([make_frame(9), make_frame(7, seed=1)])
    target = torch.randn_like(batch.positions) * 0.1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = (model(batch)["forces"] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_no_graph_is_kept_in_evaluation():
    model = make_model("allegro").eval()
    with torch.no_grad():
        out = model(make_batch([make_frame(6)]))
    assert not any(value.requires_grad for value in out.values())
    assert out["forces"].abs().max() > 0


def test_calculator():
    model = make_model("nequip")
    frame = make_frame(7, periodic=True)
    atoms = Atoms(numbers=frame.numbers, positions=frame.positions, cell=frame.cell, pbc=True)
    atoms.calc = Calculator(model, device="cpu")
    out = model.eval()(make_batch([frame]))
    assert atoms.get_potential_energy() == pytest.approx(float(out["energy"][0]))
    assert np.allclose(atoms.get_forces(), out["forces"].numpy())
    assert np.allclose(atoms.get_stress(voigt=False), out["stress"][0].numpy())
    energy = atoms.get_potential_energy()
    atoms.positions += 0.1 * np.random.default_rng(0).normal(size=atoms.positions.shape)
    assert atoms.get_potential_energy() != energy


def test_calculator_says_what_it_cannot_do():
    calculator = Calculator(make_model("allegro"), device="cpu")
    water = Atoms("H2O", positions=[[0.0, 0.0, 0.0], [1.5, 0.0, 0.0], [0.7, 0.6, 0.0]], calculator=calculator)
    assert water.get_forces().shape == (3, 3)
    with pytest.raises(NotImplementedError, match="cell"):
        water.get_stress()
    with pytest.raises(InputError, match="Au"):
        Atoms("Au", calculator=calculator).get_potential_energy()
    for atoms, problem in (
        (Atoms(), "no atoms"),
        (Atoms("H", pbc=True), "no lattice vector"),
        (Atoms("H2", positions=np.zeros((2, 3))), "on top of one another"),
    ):
        atoms.calc = calculator
        with pytest.raises(InputError, match=problem):
            atoms.get_potential_energy()
    with pytest.raises(InputError, match="species"):
        Calculator(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["allegro_tiny", pytest.param("nequip_tiny", marks=pytest.mark.long)])
def test_bench_step(name, tmp_path, capsys):
    path = tmp_path / "step.csv"
    options = [
        "--frames",
        "1",
        "--repeats",
        "1",
        "--kind",
        "crystals",
        "--peer",
        "nequip",
        "--device",
        "cpu",
        "--batches",
        "2",
    ]
    cli._dispatch(["bench", "step", "--model", name, *options, "--csv", str(path)])
    (row,) = csv.DictReader(path.open())
    assert tuple(row) == bench_step.COLUMNS
    assert min(float(row["ratio"]), float(row["ratio_train"])) > 0
    assert int(row["peer_peak_bytes"]) > 0
    assert name in capsys.readouterr().out


def test_bench_step_compares_like_with_like():
    args = bench_step.argparse.ArgumentParser()
    bench_step.add_arguments(args)
    options = ["--frames", "1", "--peer", "nequip", "--device", "cpu", "--precision", "float64", "--kind", "crystals"]
    for name in ("allegro_tiny", "nequip_tiny"):
        case = bench_step.case(name, args.parse_args(options))
        assert len({batch.edge_index.shape for batch in case.batches}) > 1
        for batch in case.batches:
            ours, theirs = case.ours(batch), case.peer(batch)
            for key, value in ours.items():
                assert relative(value, theirs[key]) < 1e-10
    assert case.ours.r_max == R_MAX
