"""Models of ours as models of the packages that they come from."""

import math
import subprocess
import sys

import pytest
import torch
from cases import PRECISIONS, SPECIES, make_batch, make_frame, make_model, relative
from test_peer import ALLEGRO, NEQUIP, TOLERANCE, allegro, nequip

import ddpkit
from ddpkit.errors import InputError
from ddpkit.experiments.peers import peer_input
from ddpkit.models import from_nequip, save_nequip, to_nequip
from ddpkit.models.as_nequip import _neighbours

CUTOFFS = [[2.5, 3.0, 4.0], [3.0, 3.3, 3.7], [4.0, 3.7, 3.9]]
COMMON = {
    "cutoffs": {"cutoffs": CUTOFFS, "avg_num_neighbors": [10.0, 12.3, 14.7]},
    "zbl": {"zbl": True, "zbl_cutoff_p": 5, "polynomial_cutoff_p": 7.5},
    "named nuclei": {"zbl": ["He", "N", "F"], "scales": [0.7, 1.1, 1.3], "scales_trainable": True},
    "trained": {"shifts_trainable": True, "bessel_trainable": True, "num_bessels": 5},
    "no parity": {"parity": False},
    "scalars only": {"l_max": 0},
    "one layer": {"num_layers": 1},
}
OURS = {
    **{(name, case): settings for name in ("allegro", "nequip") for case, settings in COMMON.items()},
    ("allegro", "embedding"): {"scalar_embed_dim": None},
    ("allegro", "backward"): {"forward_normalize": False, "mlp_nonlinearity": "mish", "l_max": 3, "num_layers": 3},
    ("allegro", "linear"): {"mlp_nonlinearity": None, "path_channel_coupling": False, "readout_nonlinearity": "gelu"},
    ("allegro", "shallow"): {"mlp_depth": 0, "scalar_embed_depth": 0, "readout_depth": 0},
    ("allegro", "one channel"): {"num_tensor_features": 1},
    ("nequip", "parity"): {"parity": True, "l_max": 3, "num_layers": 2},
    ("nequip", "unequal"): {"num_features": [8, 6, 4], "type_embedding_dim": 5, "self_connection": False},
    ("nequip", "readout"): {"readout_depth": 2, "readout_width": 7, "readout_nonlinearity": "tanh", "radial_depth": 2},
    ("nequip", "shallow"): {"radial_depth": 0},
}


@pytest.fixture(scope="module")
def batches():
    crystals = make_batch([make_frame(8, periodic=True, box=5.0), make_frame(5, periodic=True, seed=2, box=3.5)])
    return crystals, make_batch([make_frame(8, box=5.0), make_frame(1)])


def assert_same_outputs(ours, theirs, batch, tolerance):
    out, back = ours(batch), theirs(peer_input(batch))
    assert relative(back["total_energy"].squeeze(1), out["energy"]) < tolerance
    assert relative(back["forces"], out["forces"]) < tolerance
    if batch.cell is not None:
        assert relative(back["stress"], out["stress"]) < tolerance


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert torch.equal(value, b[name]), name


def trained_names(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize(("name", "case"), OURS)
def test_our_model_there_and_back(name, case, batches):
    ours = make_model(name, **OURS[name, case])
    theirs = to_nequip(ours)
    for batch in batches:
        assert_same_outputs(ours, theirs, batch, TOLERANCE["float64"])
    back = from_nequip(theirs)
    assert_same_state(ours, back)
    assert trained_names(back) == trained_names(ours)
    assert back.radial_basis.roots.requires_grad == ours.radial_basis.roots.requires_grad


THEIRS = {
    "allegro": (allegro, ALLEGRO, ("zbl", "uncoupled", "backward-normalised", "pairs", "bare", "linear")),
    "nequip": (nequip, NEQUIP, ("zbl", "readout", "pairs", "bare", "bessel", "l1-o3-1")),
}


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        pytest.param(build, cases[c], id=f"{name}-{c}")
        for name, (build, cases, chosen) in THEIRS.items()
        for c in chosen
    ],
)
def test_their_model_here_and_back(build, settings, batches):
    theirs = build(**settings)
    again = to_nequip(from_nequip(theirs))
    for batch in batches:
        one, other = theirs(peer_input(batch)), again(peer_input(batch))
        for quantity in ("total_energy", "forces", *(["stress"] if batch.cell is not None else [])):
            assert relative(one[quantity], other[quantity]) < TOLERANCE["float64"]
    count = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (theirs, again)]
    assert count[0] == count[1]


@pytest.mark.parametrize("name", ["allegro", "nequip"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(name, precision, batches):
    ours = make_model(name, precision, zbl=True)
    theirs = to_nequip(ours)
    dtype = torch.float64 if precision == "float64" else torch.float32
    assert theirs.model_dtype == dtype
    tolerance = TOLERANCE["float64" if precision == "float64" else "float32"]
    assert_same_outputs(ours, theirs, batches[0], tolerance)
    if precision != "float32":  # whose geometry is in float64 there
        assert_same_state(ours, from_nequip(theirs))


@pytest.mark.parametrize("name", ["allegro", "nequip"])
def test_cutoffs_survive_to_the_bit(name):
    r_max = next(r for r in (3 + n / 100 for n in range(100)) if 1 / (1 / r) > r)
    ours = make_model(name, "mixed", r_max=r_max, cutoffs=[[r_max] * 3] * 3)
    assert_same_state(ours, from_nequip(to_nequip(ours)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_of_neighbours_survive_to_the_bit(dtype):
    for n in range(1, 300):
        factor = torch.tensor(n / 7, dtype=torch.float64).rsqrt().to(dtype)
        assert torch.tensor(1 / math.sqrt(_neighbours(factor)), dtype=dtype) == factor


def test_kernels_are_theirs(batches):
    theirs = to_nequip(make_model("nequip", kernels="e3nn"))
    assert_same_outputs(make_model("nequip"), theirs, batches[0], TOLERANCE["float64"])


def test_random_numbers_go_on_as_before():
    code = """
import numpy, torch
from ddpkit.models import NequIP, to_nequip
model = NequIP(["H"], avg_num_neighbors=3.0, num_layers=2, num_features=2)
torch.manual_seed(5), numpy.random.seed(5)
to_nequip(model)
print(torch.rand(1, dtype=torch.float32).item(), numpy.random.rand())
torch.manual_seed(5), numpy.random.seed(5)
print(torch.rand(1, dtype=torch.float32).item(), numpy.random.rand())
"""
    printed = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    one, other = printed.stdout.splitlines()
    assert one == other


def test_mode_and_frozen_weights_are_kept():
    ours = make_model("allegro").eval()
    ours.centre_embedding.requires_grad_(False)
    theirs = to_nequip(ours)
    assert not theirs.training
    assert to_nequip(ours.train()).training
    assert trained_names(from_nequip(theirs)) == trained_names(ours)
    theirs_weights = list(theirs.parameters())
    before = [p.clone() for p in ours.parameters()]
    with torch.no_grad():
        for p in theirs_weights:
            p.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))


class Mine(type(make_model("nequip"))):
    """A model that may compute something else."""


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda: torch.nn.Linear(2, 2), "Linear"),
        (lambda: torch.nn.DataParallel(make_model("nequip")), "DataParallel"),
        (lambda: Mine(SPECIES, avg_num_neighbors=12.0), "Mine"),
        (lambda: type(make_model("nequip"))(("H_1", "C"), avg_num_neighbors=12.0), "'H_1'"),
    ],
)
def test_what_nequip_does_not_have_is_refused(model, named):
    with pytest.raises(InputError, match=f"{named}.* has no counterpart in nequip"):
        to_nequip(model())


def test_a_missing_package_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "allegro"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="pip install nequip nequip-allegro"):
        to_nequip(make_model("allegro", scalar_embed_dim=None))


@pytest.fixture
def _as_nequip_sets_it():
    torch.set_default_dtype(torch.float64)  # which tests/conftest.py puts back


def compare_calculators(theirs, ours, periodic):
    from ase import Atoms

    frame = make_frame(9, periodic=periodic, box=5.0)
    atoms = Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=periodic)
    results = []
    for calculator in (ddpkit.Calculator(ours, device="cpu"), theirs):
        atoms.calc = calculator
        results.append((atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress() if periodic else 0))
    for one, other in zip(*results, strict=True):
        assert one == pytest.approx(other, rel=1e-10, abs=1e-10)


@pytest.mark.usefixtures("_as_nequip_sets_it")
@pytest.mark.parametrize(
    ("name", "settings"),
    [("allegro", {"avg_num_neighbors": [10.1, 12.3, 14.7]}), ("allegro", {"scalar_embed_dim": None}), ("nequip", {})],
)
def test_their_calculator_and_package_take_the_checkpoint(name, settings, tmp_path):
    from nequip.integrations.ase import NequIPCalculator
    from nequip.scripts.package import main as package

    ours = make_model(name, **settings).eval()
    save_nequip(ours, tmp_path / "model.ckpt")
    load = NequIPCalculator._from_saved_model
    options = {"chemical_species_to_atom_type_map": True}
    for periodic in (True, False):
        compare_calculators(load(tmp_path / "model.ckpt", **options), ours, periodic)
    package(["build", str(tmp_path / "model.ckpt"), str(tmp_path / "model.nequip.zip")])
    compare_calculators(load(tmp_path / "model.nequip.zip", **options), ours, True)


@pytest.mark.long
@pytest.mark.usefixtures("_as_nequip_sets_it")
def test_their_compiler_takes_the_checkpoint(tmp_path):
    from nequip.integrations.ase import NequIPCalculator
    from nequip.scripts.compile import main as compile_

    ours = make_model("allegro", zbl=True, cutoffs=CUTOFFS).eval()
    save_nequip(ours, tmp_path / "model.ckpt")
    compiled = tmp_path / "model.nequip.pt2"
    compile_(
        [str(tmp_path / "model.ckpt"), str(compiled), "--mode", "aotinductor", "--device", "cpu", "--target", "ase"]
    )
    theirs = NequIPCalculator.from_compiled_model(compiled, device="cpu", chemical_species_to_atom_type_map=True)
    compare_calculators(theirs, ours, True)


def test_a_checkpoint_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_nequip(make_model("nequip"), tmp_path / "file" / "model.ckpt")


def test_the_example_has_every_species_and_edges():
    from ddpkit.models.nequip_builder import Example

    (data,) = Example([f"X{n}" for n in range(20)], 4.0).train_dataloader()
    assert sorted(set(data["atom_types"].tolist())) == list(range(20))
    assert data["edge_index"].shape[1] > 6 * len(data["pos"])
