"""Agreement with the packages that the models come from."""

import pytest
import torch
from cases import R_MAX, SPECIES, make_batch, make_frame, relative

from ddpkit.errors import InputError
from ddpkit.experiments.peers import peer_input
from ddpkit.models import from_nequip

pytest.importorskip("allegro")
from allegro.model import AllegroModel
from nequip.model import NequIPGNNModel
from nequip.utils.global_state import set_global_state

ZBL = {"_target_": "nequip.nn.pair_potential.ZBL", "units": "metal", "chemical_species": list(SPECIES)}
PAIRS = {"H": 2.5, "C": {"H": 3.0, "O": 3.5}}
NEIGHBORS = {"H": 10.0, "C": 12.0, "O": 14.0}
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


def common(dtype):
    set_global_state()
    return {
        "seed": 3,
        "model_dtype": dtype,
        "type_names": list(SPECIES),
        "r_max": R_MAX,
        "avg_num_neighbors": 15.0,
        "per_type_energy_shifts": {"H": -1.0, "C": 2.0, "O": 3.0},
        "per_type_energy_scales": 2.0,
    }


def allegro(dtype="float64", **settings):
    embed = {"_target_": "allegro.nn.TwoBodyBesselScalarEmbed", **settings.pop("embed", {})}
    defaults = {
        "l_max": 2,
        "parity": True,
        "num_layers": 2,
        "radial_chemical_embed": embed,
        "radial_chemical_embed_dim": 8,
        "num_scalar_features": 8,
        "num_tensor_features": 4,
        "scalar_embed_mlp_hidden_layers_depth": 2,
        "scalar_embed_mlp_hidden_layers_width": 12,
        "allegro_mlp_hidden_layers_depth": 2,
        "allegro_mlp_hidden_layers_width": 16,
        "readout_mlp_hidden_layers_depth": 1,
        "readout_mlp_hidden_layers_width": 8,
        "readout_mlp_nonlinearity": None,
    }
    return AllegroModel(**{**common(dtype), **defaults, **settings})


def nequip(dtype="float64", **settings):
    defaults = {"l_max": 2, "parity": True, "num_layers": 3, "num_features": 6, "radial_mlp_width": 16}
    return NequIPGNNModel(**{**common(dtype), **defaults, **settings})


def assert_same(peer, batch, tolerance):
    ours = from_nequip(peer).train()
    theirs, out = peer.train()(peer_input(batch)), ours(batch)
    assert relative(out["energy"], theirs["total_energy"].squeeze(1)) < tolerance
    assert relative(out["forces"], theirs["forces"]) < tolerance
    if batch.cell is not None:
        assert relative(out["stress"], theirs["stress"]) < tolerance
    norms = []
    for model, energy, forces in (
        (peer, theirs["total_energy"], theirs["forces"]),
        (ours, out["energy"], out["forces"]),
    ):
        parameters = [p for p in model.parameters() if p.requires_grad]
        loss = energy.double().square().sum() + forces.double().square().sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        squares = [g.double().square().sum() for g in gradients if g is not None]
        norms.append((sum(p.numel() for p in parameters), float(sum(squares))))
    assert norms[0][0] == norms[1][0]
    # what double backward gives
    assert norms[1][1] == pytest.approx(norms[0][1], rel=10 * tolerance)


@pytest.fixture(scope="module")
def crystals():
    return make_batch([make_frame(8, periodic=True, box=5.0), make_frame(5, periodic=True, seed=2, box=3.5)])


@pytest.fixture(scope="module")
def molecules():
    return make_batch([make_frame(8, box=5.0), make_frame(1), make_frame(5, seed=2, box=4.0)])


ALLEGRO = {
    **{
        f"l{l}-{'o3' if parity else 'so3'}-{layers}": {"l_max": l, "parity": parity, "num_layers": layers}
        for l, parity, layers in [(1, True, 1), (1, False, 3), (2, True, 2), (2, False, 2), (3, True, 3), (3, False, 2)]
    },
    "l0": {"l_max": 0},
    "zbl": {"pair_potential": ZBL},
    "uncoupled": {"tp_path_channel_coupling": False, "readout_mlp_nonlinearity": "silu"},
    "backward-normalised": {"forward_normalize": False, "allegro_mlp_nonlinearity": "mish"},
    "pairs": {"per_edge_type_cutoff": PAIRS, "avg_num_neighbors": NEIGHBORS, "per_type_energy_scales_trainable": True},
    "bare": {"per_type_energy_shifts": None, "per_type_energy_scales": None, "readout_mlp_hidden_layers_depth": 0},
    "linear": {"allegro_mlp_nonlinearity": None, "embed": {"num_bessels": 5, "bessel_trainable": True}},
}
NEQUIP = {
    **{
        f"l{l}-{'o3' if parity else 'so3'}-{layers}": {"l_max": l, "parity": parity, "num_layers": layers}
        for l, parity, layers in [(1, True, 1), (1, False, 4), (2, True, 3), (2, False, 2), (3, True, 2), (3, False, 3)]
    },
    "l0": {"l_max": 0},
    "zbl": {"pair_potential": ZBL, "num_features": [8, 6, 4], "type_embed_num_features": 5},
    "readout": {"readout_mlp_hidden_layers_depth": 2, "readout_mlp_hidden_layers_width": 7, "radial_mlp_depth": 2},
    "pairs": {"per_edge_type_cutoff": PAIRS, "avg_num_neighbors": NEIGHBORS, "per_type_energy_shifts_trainable": True},
    "bare": {"per_type_energy_shifts": None, "per_type_energy_scales": None, "radial_mlp_depth": 0},
    "bessel": {"num_bessels": 5, "bessel_trainable": True, "polynomial_cutoff_p": 5, "convnet_sc": False},
}


@pytest.mark.parametrize("name", ALLEGRO)
def test_allegro(name, crystals, molecules):
    assert_same(allegro(**ALLEGRO[name]), molecules if "uncoupled" in name else crystals, TOLERANCE["float64"])


@pytest.mark.parametrize("name", NEQUIP)
def test_nequip(name, crystals, molecules):
    assert_same(nequip(**NEQUIP[name]), molecules if "readout" in name else crystals, TOLERANCE["float64"])


@pytest.mark.parametrize("name", ["l3-o3-3", "zbl"])
def test_allegro_in_float32(name, crystals):
    assert_same(allegro("float32", **ALLEGRO[name]), crystals, TOLERANCE["float32"])


@pytest.mark.parametrize("name", ["l3-o3-2", "zbl"])
def test_nequip_in_float32(name, crystals):
    assert_same(nequip("float32", **NEQUIP[name]), crystals, TOLERANCE["float32"])


def test_a_model_as_checkpoints_hold_it(crystals):
    peer = nequip(l_max=1).eval()
    ours = from_nequip(torch.nn.ModuleDict({"sole_model": peer}).eval())
    assert not ours.training
    assert (
        relative(ours(crystals)["energy"], peer(peer_input(crystals))["total_energy"].squeeze(1)) < TOLERANCE["float64"]
    )


@pytest.mark.parametrize(
    "peer",
    [
        lambda: torch.nn.ModuleDict({"one": nequip(), "other": nequip()}),
        lambda: nequip(convnet_resnet=True, num_layers=4, parity=False),
        lambda: nequip(learnable_shift=True),
        lambda: nequip(convnet_nonlinearity_type="norm"),
        lambda: nequip(convnet_nonlinearity_scalars={"e": "ssp", "o": "tanh"}),
        lambda: nequip(pair_potential={**ZBL, "units": "real"}),
        lambda: nequip(pair_potential={"_target_": "nequip.nn.pair_potential.LennardJones", "lj_sigma": 1.0}),
        lambda: allegro(weight_individual_irreps=False),
        lambda: allegro(radial_chemical_embed={"_target_": "allegro.nn.TwoBodySplineScalarEmbed"}),
        lambda: torch.nn.Linear(2, 2),
        lambda: torch.nn.Sequential(torch.nn.Linear(2, 2)),
    ],
)
def test_what_cannot_be_imported_is_refused(peer):
    with pytest.raises(InputError, match="cannot be imported"):
        from_nequip(peer())
