"""Whether models that do not conserve energy or momentum are told from those that do."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import write

import ddpkit
from ddpkit import checkpoint
from ddpkit.errors import InputError, ParityError
from ddpkit.experiments import conservation, md_check, structures
from ddpkit.experiments.cli import _dispatch
from ddpkit.experiments.models_table import build, model_spec

SPECIES = ("H", "O")


def model_of(name="nequip_tiny", precision="float64", species=SPECIES):
    torch.manual_seed(3)
    return build({**model_spec(name, []), "precision": precision}, species)


class Waves(torch.nn.Module):
    """A bounded pair potential, as a model that takes no time."""

    def __init__(self, species=SPECIES, dtype=torch.float64):
        super().__init__()
        self.species, self.r_max, self.dtype = species, 4.0, dtype
        self.precision = "float64" if dtype == torch.float64 else "mixed"

    def forward(self, batch):
        positions = batch.positions.clone().requires_grad_()
        centre, neighbour = batch.edge_index
        x = ((positions[neighbour] + batch.edge_shift - positions[centre]).norm(dim=1) / self.r_max).to(self.dtype)
        energy = 0.1 * (torch.cos(6 * x) * (1 - x.square()).pow(3)).double().sum().reshape(1)
        return {"energy": energy.detach(), "forces": -torch.autograd.grad(energy.sum(), positions)[0]}


class Wrong(torch.nn.Module):
    """A model whose forces are not quite those of its energy."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change
        self.species, self.r_max, self.precision = model.species, model.r_max, model.precision

    def forward(self, batch):
        out = dict(self.model(batch))
        return out | {"forces": self.change(out["forces"], batch.positions)}


def turned(forces, positions):
    """Forces with a curl."""
    centred = positions - positions.mean(0)
    field = torch.linalg.cross(torch.tensor([[0.0, 0.0, 1.0]], dtype=positions.dtype).expand_as(centred), centred)
    return forces + 0.02 * forces.norm() / field.norm() * field


WRONG = {
    "scaled": (lambda forces, _: 1.01 * forces, {"forces"}),
    "turned": (turned, {"forces"}),
    "pushed": (lambda forces, _: forces + 0.05, {"forces", "momentum", "energy"}),
    "noisy": (lambda forces, _: forces + 0.2 * torch.randn_like(forces), {"forces", "energy", "momentum"}),
    "halved": (lambda forces, _: 0.5 * forces, {"forces", "energy"}),
}


def verdicts(model, atoms=None, **options):
    calculator = ddpkit.Calculator(model, device="cpu")
    atoms = structures.fitting(model.species) if atoms is None else atoms
    return {v.what: v for v in conservation.check(atoms, calculator, md_check.bounds(model), **options)}


def failures(model):
    results = verdicts(model)
    print(md_check.table(list(results.values())))
    return {name for name, verdict in results.items() if not verdict.passes}


@pytest.mark.parametrize(("name", "precision"), [("allegro_tiny", "float64"), ("nequip_tiny", "mixed")])
def test_our_models_pass(name, precision):
    results = verdicts(model_of(name, precision))
    assert list(results) == ["forces", "energy", "momentum"]
    for verdict in results.values():
        assert verdict.passes, verdict


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_forces_are_caught(name, dtype):
    change, expected = WRONG[name]
    assert expected <= failures(Wrong(Waves(dtype=dtype), change))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_right_forces_pass(dtype):
    assert not failures(Waves(dtype=dtype))


@pytest.mark.parametrize("species", [("Na", "Cl"), ("Cu",), ("H", "C", "N", "O", "S"), ("O", "C", "H"), ("C", "H")])
def test_a_configuration_fits_every_species(species):
    atoms = structures.fitting(species)
    assert set(atoms.get_chemical_symbols()) <= set(species)
    assert 8 <= len(atoms) <= 40
    assert not failures(Waves(species))


class Repelling(torch.nn.Module):
    """Atoms that push each other away with all their might."""

    species, r_max = SPECIES, 4.0

    def forward(self, batch):
        positions = batch.positions.clone().requires_grad_()
        centre, neighbour = batch.edge_index
        lengths = (positions[neighbour] + batch.edge_shift - positions[centre]).norm(dim=1)
        energy = (500 * (4 - lengths) ** 2).sum().reshape(1)
        return {"energy": energy, "forces": -torch.autograd.grad(energy.sum(), positions)[0]}


def test_atoms_that_fly_apart_are_told_as_that():
    cluster = Atoms("OHHOHH", np.random.default_rng(1).normal(size=(6, 3)) * 1.2)
    results = verdicts(Repelling(), cluster)
    assert not results["stability"].passes
    assert "the atoms fly apart" in results["stability"].figure


def test_without_forces_energy_is_kept():
    class Still(torch.nn.Module):
        species, r_max = SPECIES, 4.0

        def forward(self, batch):
            return {"energy": torch.ones(1, dtype=torch.float64), "forces": torch.zeros_like(batch.positions)}

    assert not failures(Still())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    spec = model_spec("nequip_tiny", ["model.num_layers=1"])
    spec |= {"precision": "mixed", "species": list(SPECIES), "avg_num_neighbors": 12.0}
    model = build(spec, SPECIES)
    state = {"model_spec": spec, "model": model.state_dict(), "ema": None, "optimizer": {}, "scheduler": None}
    checkpoint.save(path, {**state, "progress": {"step": 0, "epoch": 0}})
    return path


def test_the_command_prints_a_verdict_for_each_quantity(saved, capsys, tmp_path):
    write(tmp_path / "water.xyz", structures.water(2))
    _dispatch(["md-check", str(saved), "--device", "cpu", "--structure", str(tmp_path / "water.xyz")])
    said = capsys.readouterr().out
    assert "NequIP, mixed, on cpu; 24 atoms" in said
    assert [line.split()[:2] for line in said.splitlines() if " passes " in f"{line} "] == [
        ["forces", "passes"], ["energy", "passes"], ["momentum", "passes"],
    ]  # fmt: skip


def test_the_command_fails_where_something_is_not_conserved(saved, capsys, monkeypatch):
    monkeypatch.setattr(
        conservation, "_energy_at", lambda atoms, move: 1.01 * conservation._at(atoms, move).get_potential_energy()
    )
    with pytest.raises(ParityError, match="fails md-check: forces"):
        _dispatch(["md-check", str(saved), "--device", "cpu"])
    assert "forces    FAILS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{folder}/nothing"], "nothing"),
        (["{saved}", "--structure", "{folder}/none.xyz"], "none.xyz is no file"),
        (["{saved}", "--structure", "{folder}/garbage.xyz"], "garbage.xyz cannot be read"),
        (["{saved}", "--structure", "{folder}/salt.xyz"], r"Na|species"),
        (["{saved}", "--structure", "{folder}/alone.xyz"], "alone.xyz holds one atom"),
        (["{saved}", "--temperature", "-3"], "--temperature -3"),
        (["{saved}", "--temperature", "nan"], "--temperature nan"),
        (["{saved}", "--seed", "-1"], "--seed -1"),
        (["{saved}", "--device", "abacus"], "--device abacus"),
    ],
)
def test_bad_input_is_one_sentence(arguments, said, saved, tmp_path):
    (tmp_path / "garbage.xyz").write_text("these are\nno atoms\n")
    write(tmp_path / "alone.xyz", Atoms("O"))
    write(tmp_path / "salt.xyz", structures.crystal(["Na", "Cl"]))
    with pytest.raises(InputError, match=said) as raised:
        _dispatch(["md-check", *(word.format(saved=saved, folder=tmp_path) for word in arguments)])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("error", "passes"), [(0.0, True), (1e-12, True), (1e-8, False)])
def test_forces_of_several_ranks_that_differ_are_told(error, passes):
    atoms = structures.fitting(SPECIES)
    calculator = ddpkit.Calculator(Waves(), device="cpu")

    def in_lammps(shaken, ranks):
        shaken = shaken.copy()
        shaken.calc = calculator
        forces = shaken.get_forces()
        return forces + (ranks == 3) * error * np.abs(forces).max()

    verdict = conservation.ranks_verdict(atoms, calculator, conservation.DOUBLE, in_lammps, 3, 1)
    assert verdict.passes is passes
    assert "on 1 rank by 0.0e+00 and on 3 ranks by " in verdict.figure


def test_ranks_take_an_exported_file(tmp_path):
    for words, said in (
        (["--ranks", "2"], "takes an exported file: `ddpkit export .*run`"),
        (["--ranks", "0"], "--ranks 0 is no number of ranks"),
    ):
        with pytest.raises(InputError, match=said):
            _dispatch(["md-check", str(tmp_path / "run"), *words])
