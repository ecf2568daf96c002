"""What physics asks of a potential, for both models, in every precision."""

import dataclasses

import numpy as np
import pytest
import torch
from cases import PRECISIONS, R_MAX, SPECIES, make_batch, make_frame, make_model, relative
from e3nn import o3

TOLERANCE = {"float64": 1e-10, "mixed": 2e-4, "float32": 5e-4}
KINDS = {
    "allegro": {"l_max": 2, "parity": True, "zbl": True, "num_layers": 3},
    "nequip": {"l_max": 2, "parity": True, "zbl": True},
}


@pytest.fixture(scope="module", params=[(name, p) for name in KINDS for p in PRECISIONS], ids="-".join)
def model(request):
    name, precision = request.param
    return make_model(name, precision, **KINDS[name]).eval()


@pytest.fixture(scope="module", params=KINDS)
def exact(request):
    return make_model(request.param, "float64", **KINDS[request.param]).eval()


def transformed(frame, matrix, shift=0.0):
    cell = None if frame.cell is None else frame.cell @ matrix.T
    return dataclasses.replace(frame, positions=frame.positions @ matrix.T + shift, cell=cell)


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("mirror", [1, -1], ids=["rotation", "reflection"])
def test_rotation_and_reflection(model, periodic, mirror):
    frame = make_frame(periodic=periodic)
    matrix = mirror * o3.rand_matrix(dtype=torch.float64)
    plain, turned = model(make_batch([frame])), model(make_batch([transformed(frame, matrix.numpy())]))
    tolerance = TOLERANCE[model.precision]
    assert relative(turned["energy"], plain["energy"]) < tolerance
    assert relative(turned["forces"], plain["forces"] @ matrix.T) < tolerance
    if periodic:
        assert relative(turned["stress"], matrix @ plain["stress"] @ matrix.T) < tolerance


def test_translation(model):
    frame = make_frame(periodic=True)
    plain = model(make_batch([frame]))
    translated = model(make_batch([transformed(frame, np.eye(3), np.array([3.1, -7.0, 0.4]))]))
    for name, value in plain.items():
        assert relative(translated[name], value) < TOLERANCE[model.precision]


def test_permutation(model):
    frame = make_frame()
    order = np.random.default_rng(5).permutation(len(frame))
    mixed = dataclasses.replace(
        frame, numbers=frame.numbers[order], positions=frame.positions[order], forces=frame.forces[order]
    )
    plain, out = model(make_batch([frame])), model(make_batch([mixed]))
    assert relative(out["energy"], plain["energy"]) < TOLERANCE[model.precision]
    assert relative(out["forces"], plain["forces"][torch.from_numpy(order)]) < TOLERANCE[model.precision]


def test_batch_is_its_frames(model):
    frames = [make_frame(n, periodic=True, seed=n) for n in (3, 12, 1, 7)]
    together = model(make_batch(frames))
    alone = [model(make_batch([frame])) for frame in frames]
    for name in ("energy", "forces", "stress"):
        assert relative(together[name], torch.cat([out[name] for out in alone])) < TOLERANCE[model.precision]


def padded(batch, atoms, edges):
    """The batch with more atoms in its last frame, and edges among those that are longer than the cutoff."""
    first = batch.positions.shape[0]
    far = torch.arange(1, atoms + 1, dtype=torch.float64)[:, None] * 50.0
    ends = torch.tensor([[first] * edges, [first + 1] * edges])
    return batch.replace(
        positions=torch.cat((batch.positions, far.expand(-1, 3))),
        species=torch.cat((batch.species, torch.zeros(atoms, dtype=torch.int64))),
        frame=torch.cat((batch.frame, torch.full((atoms,), batch.num_frames - 1))),
        edge_index=torch.cat((batch.edge_index, ends), 1),
        edge_shift=torch.cat((batch.edge_shift, torch.zeros(edges, 3, dtype=torch.float64))),
        mask=torch.arange(first + atoms) < first,
        neighbours=None,
        incoming=None,
    )


def test_padding_changes_nothing(model):
    batch = make_batch([make_frame(8), make_frame(5, seed=3)])
    plain, out = model(batch), model(padded(batch, 3, 4))
    first = batch.positions.shape[0]
    shift = 3 * -1.0  # isolated atoms of the first species
    assert relative(out["forces"][:first], plain["forces"]) < TOLERANCE[model.precision]
    assert out["forces"][first:].abs().max() == 0
    assert relative(out["energy"], plain["energy"] + torch.tensor([0.0, shift])) < TOLERANCE[model.precision]


def test_padding_leaves_gradients_of_parameters(exact):
    exact.train()
    batch = make_batch([make_frame(8), make_frame(5, seed=3)])
    parameters = [p for p in exact.parameters() if p.requires_grad]
    gradients = []
    for b in (batch, padded(batch, 3, 4)):
        out = exact(b)
        loss = out["energy"].sum() + out["forces"].square().sum()
        gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    for a, b in zip(*gradients, strict=True):
        assert (a is None and b is None) or relative(b, a) < 1e-9
    exact.eval()


@pytest.mark.parametrize("symbols", [(1, 1), (6, 8)])
def test_nuclei_repel_smoothly(symbols):
    """The repulsion alone against its formula, and its end at the cutoff."""
    with_zbl, without = (make_model("allegro", "float64", zbl=zbl).eval() for zbl in (True, False))

    def repulsion(distance):
        positions = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, distance]])
        frame = dataclasses.replace(make_frame(2), numbers=np.array(symbols), positions=positions)
        batch = make_batch([frame], r_max=2 * R_MAX)
        a, b = with_zbl(batch), without(batch)
        return float((a["energy"] - b["energy"])[0]), float((a["forces"] - b["forces"])[1, 2])

    z1, z2 = symbols
    distance = 0.7
    scaled = distance * (z1**0.23 + z2**0.23) / 0.4685
    factors, decays = (0.02817, 0.28022, 0.50986, 0.18175), (0.20162, 0.40290, 0.94229, 3.19980)
    screening = sum(c * np.exp(-d * scaled) for c, d in zip(factors, decays, strict=True))
    x = distance / R_MAX
    envelope = 1 - 28 * x**6 + 48 * x**7 - 21 * x**8
    assert repulsion(distance)[0] == pytest.approx(14.399645 * z1 * z2 / distance * screening * envelope, rel=1e-10)
    for r in (0.3, 1.0, 2.5, R_MAX - 0.01):
        h = 1e-4
        slope = derivative([repulsion(r + n * h)[0] for n in (-2, -1, 1, 2)], h)
        assert repulsion(r)[1] == pytest.approx(-slope, rel=1e-5, abs=1e-8)
    inside = [repulsion(R_MAX - d) for d in (2e-2, 1e-2)]
    assert repulsion(R_MAX) == repulsion(R_MAX + 0.1) == (0.0, 0.0)
    # three zeros: the energy falls as the third power of what is left, the force as the second
    assert inside[0][0] / inside[1][0] == pytest.approx(8, rel=0.1)
    assert inside[0][1] / inside[1][1] == pytest.approx(4, rel=0.1)


def test_smooth_at_the_cutoff(model):
    """A pair drawn apart: the energy ends with vanishing slope and curvature, and there is no force beyond."""

    def pair(distance):
        frame = make_frame(2)
        return dataclasses.replace(
            frame, numbers=np.array([6, 8]), positions=np.array([[0.0, 0.0, 0.0], [distance, 0.0, 0.0]])
        )

    step = 1e-3
    # one list with the edges of all, so that the cutoff of the neighbour list plays no part
    inside, at, outside = (model(make_batch([pair(R_MAX + d)], r_max=2 * R_MAX)) for d in (-step, 0.0, step))
    apart = model(make_batch([pair(3 * R_MAX)]))["energy"]
    assert outside["energy"] == at["energy"] == apart
    assert outside["forces"].abs().max() == 0
    assert abs(float(inside["energy"] - apart)) < 1e-6
    assert float(inside["forces"].abs().max()) < 1e-4
    assert float(model(make_batch([pair(0.5 * R_MAX)]))["forces"].abs().max()) > 1e-4


# step in Å or of strain, and error allowed relative to the largest component: energies of float32 layers carry noise
DIFFERENCES = {"float64": (1e-4, 1e-6), "mixed": (1e-2, 2e-3), "float32": (1e-2, 3e-3)}


@pytest.mark.parametrize("periodic", [False, True])
def test_forces_against_finite_differences(model, periodic):
    frame = make_frame(6, periodic=periodic, box=4.0)
    forces = model(make_batch([frame]))["forces"]
    h, tolerance = DIFFERENCES[model.precision]
    for atom, axis in ((0, 0), (3, 2), (5, 1)):
        energies = []
        for steps in (-2, -1, 1, 2):
            positions = frame.positions.copy()
            positions[atom, axis] += steps * h
            energies.append(float(model(make_batch([dataclasses.replace(frame, positions=positions)]))["energy"][0]))
        numerical = -derivative(energies, h)
        assert abs(numerical - float(forces[atom, axis])) < tolerance * float(forces.abs().max())


def test_stress_against_finite_differences(model):
    frame = make_frame(5, periodic=True, box=4.0)
    stress = model(make_batch([frame]))["stress"][0]
    volume = abs(np.linalg.det(frame.cell))
    h, tolerance = DIFFERENCES[model.precision]
    h /= 4
    for a, b in ((0, 0), (1, 2), (2, 2)):
        energies = []
        for steps in (-2, -1, 1, 2):
            strain = np.zeros((3, 3))
            strain[a, b] += steps * h / 2
            strain[b, a] += steps * h / 2
            energies.append(float(model(make_batch([transformed(frame, np.eye(3) + strain)]))["energy"][0]))
        numerical = derivative(energies, h) / volume
        assert abs(numerical - float(stress[a, b])) < tolerance * float(stress.abs().max())


def derivative(values, h):
    """By the five-point rule, from values at -2 h, -h, h, 2 h."""
    return (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)


def test_forces_are_the_derivative_by_positions(exact):
    """For positions that require gradients, to the second order."""
    exact.train()
    batch = make_batch([make_frame(5, box=3.5)])
    positions = batch.positions.clone().requires_grad_()
    out = exact(batch.replace(positions=positions))
    (slope,) = torch.autograd.grad(out["energy"].sum(), positions, create_graph=True)
    assert relative(-slope.detach(), out["forces"].detach()) < 1e-10
    (row,) = torch.autograd.grad(out["forces"][1, 0], positions)
    h, forces = 1e-4, []
    for steps in (-2, -1, 1, 2):
        at = batch.positions.clone()
        at[2, 1] += steps * h
        forces.append(float(exact(batch.replace(positions=at))["forces"][1, 0].detach()))
    assert derivative(forces, h) == pytest.approx(float(row[2, 1]), rel=1e-5, abs=1e-8)
    exact.eval()


def test_isolated_atoms(model):
    frames = [make_frame(1), make_frame(1, seed=4)]
    frames = [dataclasses.replace(f, numbers=np.array([z])) for f, z in zip(frames, (1, 8), strict=True)]
    out = model(make_batch(frames))
    assert out["energy"].tolist() == [-1.0, 3.0]
    assert out["forces"].abs().max() == 0


def test_isolated_atoms_train(model):
    model.train()
    out = model(make_batch([make_frame(1)]))
    (out["energy"].sum() + out["forces"].square().sum()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    model.zero_grad()
    model.eval()


def test_one_atom_cell_is_its_supercell(model):
    cell = np.array([[2.1, 0.1, 0.0], [0.0, 2.3, 0.2], [0.3, 0.0, 2.2]])
    one = dataclasses.replace(make_frame(1, periodic=True), numbers=np.array([6]), cell=cell)
    two = dataclasses.replace(
        one,
        numbers=np.array([6, 6]),
        positions=np.vstack((one.positions, one.positions + cell[0])),
        forces=np.zeros((2, 3)),
        cell=cell * np.array([[2.0], [1.0], [1.0]]),
    )
    a, b = model(make_batch([one])), model(make_batch([two]))
    tolerance = TOLERANCE[model.precision]
    assert relative(2 * a["energy"], b["energy"]) < tolerance
    assert relative(a["stress"], b["stress"]) < tolerance
    assert b["forces"].abs().max() < tolerance


def test_molecule_beside_crystal_has_no_stress(exact):
    batch = make_batch([make_frame(4, periodic=True)])
    out = exact(batch.replace(cell=torch.zeros_like(batch.cell)))
    assert torch.isnan(out["stress"]).all()
    assert torch.isfinite(out["forces"]).all()


def test_each_species_counts(exact):
    energies = set()
    for symbol in SPECIES:
        energies.add(float(exact(make_batch([make_frame(6, symbols=[symbol])]))["energy"][0]))
    assert len(energies) == len(SPECIES)


def test_same_weights_at_every_precision():
    for name, settings in KINDS.items():
        batch = make_batch([make_frame(12, periodic=True)])
        outs = {}
        reference = make_model(name, "float64", **settings).eval()
        for precision in PRECISIONS:
            model = make_model(name, precision, **settings).eval()
            model.load_state_dict(reference.state_dict())
            outs[precision] = model(batch)
            assert outs[precision]["energy"].dtype == outs[precision]["forces"].dtype == torch.float64
        for precision in ("mixed", "float32"):
            for key in ("energy", "forces", "stress"):
                assert relative(outs[precision][key], outs["float64"][key]) < 1e-4
                assert relative(outs[precision][key], outs["float64"][key]) > 0
