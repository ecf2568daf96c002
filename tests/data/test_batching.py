from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import crystal, molecule

from ddpkit import InputError
from ddpkit.data import collate, neighbour_list

SPECIES = ("O", "H", "C")


def test_a_batch_is_its_frames_one_after_another():
    rng = np.random.default_rng(0)
    frames = [molecule(rng, 4), crystal(rng, 3), molecule(rng, 5, positions=rng.normal(scale=20, size=(5, 3)))]
    batch = collate(frames, SPECIES, 3.0)
    first = 0
    for number, frame in enumerate(frames):
        mine = torch.arange(first, first + len(frame))
        edges = (batch.edge_index[0] >= first) & (batch.edge_index[0] < first + len(frame))
        centre, neighbour, shift = neighbour_list(frame, 3.0)
        assert torch.equal(batch.edge_index[:, edges] - first, torch.from_numpy(np.stack([centre, neighbour])))
        assert torch.equal(batch.edge_shift[edges], torch.from_numpy(shift))
        assert [SPECIES[s] for s in batch.species[mine]] == [{1: "H", 6: "C", 8: "O"}[z] for z in frame.numbers]
        assert torch.equal(batch.positions[mine], torch.from_numpy(frame.positions))
        assert torch.equal(batch.forces[mine], torch.from_numpy(frame.forces))
        assert (batch.frame[mine] == number).all()
        assert batch.energy[number] == frame.energy
        first += len(frame)
    assert (batch.edge_index[0].diff() >= 0).all()
    assert batch.neighbours.shape[0] == first
    assert torch.equal(batch.cell[1], torch.from_numpy(frames[1].cell))
    assert torch.equal(batch.stress[1], torch.from_numpy(frames[1].stress))
    assert batch.stress[[0, 2]].isnan().all()
    assert torch.linalg.det(batch.cell).abs().min() > 0


@pytest.mark.parametrize("sizes", [(1,), (1, 1), (5, 1, 9), (2, 40, 3)])
@pytest.mark.parametrize("kind", [molecule, crystal])
def test_tables_are_those_of_a_batch_without(sizes, kind):
    batch = collate([kind(np.random.default_rng(n), n) for n in sizes], SPECIES, 3.0)
    expected = batch.replace(neighbours=None, incoming=None).with_neighbours()
    assert batch.neighbours.dtype == batch.incoming.dtype == torch.int64
    assert torch.equal(batch.neighbours, expected.neighbours)
    assert torch.equal(batch.incoming, expected.incoming)


def test_molecules_have_neither_cell_nor_stress():
    batch = collate([molecule(np.random.default_rng(0))], SPECIES, 3.0)
    assert batch.cell is None
    assert batch.stress is None


def test_a_slab_gets_a_complete_cell():
    slab = crystal(np.random.default_rng(0), pbc=(True, True, False), cell=np.diag([3.0, 4.0, 0.0]))
    cell = collate([slab], SPECIES, 3.0).cell[0]
    assert torch.equal(cell, torch.diag(torch.tensor([3.0, 4.0, 1.0], dtype=torch.float64)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"numbers": np.array([1, 6, 79])}, "Au"),
        ({"energy": float("nan")}, "NaN"),
        ({"forces": np.full((3, 3), np.inf)}, "infinite"),
        ({"positions": np.full((3, 3), np.nan)}, "positions"),
    ],
)
def test_what_cannot_be_trained_on_is_named(changes, message):
    frames = [
        molecule(np.random.default_rng(0)),
        replace(molecule(np.random.default_rng(0), 3), name="frame 7 of x", **changes),
    ]
    with pytest.raises(InputError, match=f"frame 7 of x.*{message}"):
        collate(frames, SPECIES, 3.0)


def test_structures_without_labels_can_be_predicted():
    frame = molecule(np.random.default_rng(0), energy=float("nan"))
    batch = collate([frame], SPECIES, 3.0, labels=False)
    assert batch.energy is None
    assert batch.forces is None


def test_no_frames_are_no_batch():
    with pytest.raises(InputError, match="at least one frame"):
        collate([], SPECIES, 3.0)
