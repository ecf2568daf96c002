import itertools

import numpy as np
import pytest
from ase import Atoms
from ase.neighborlist import neighbor_list
from helpers import crystal, molecule
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpkit.data import neighbour_list
from ddpkit.data.neighbours import KeptLists, count_edges, shifts


def reference(frame, r_max):
    """ASE's list, which is written independently, in the canonical order."""
    atoms = Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.pbc)
    i, j, images = neighbor_list("ijS", atoms, r_max)
    order = np.lexsort((*images.T[::-1], j, i))
    return i[order], j[order], images[order] @ atoms.cell[:]


def compare(frame, r_max):
    for ours, theirs in zip(neighbour_list(frame, r_max), reference(frame, r_max), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("pbc", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize(("atoms", "edge", "r_max"), [(1, 2.0, 5.0), (5, 3.0, 5.0), (40, 9.0, 4.0)])
def test_any_periodicity_cells_smaller_than_the_cutoff_and_atoms_outside(pbc, atoms, edge, r_max):
    compare(crystal(np.random.default_rng(7), atoms, edge, pbc), r_max)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), atoms=st.integers(1, 20), edge=st.floats(1.5, 8), r_max=st.floats(0.5, 6))
def test_random_cells(seed, atoms, edge, r_max):
    compare(crystal(np.random.default_rng(seed), atoms, edge), r_max)


def test_a_slab_without_a_third_lattice_vector():
    frame = crystal(np.random.default_rng(1), 6, 4.0, (True, True, False), cell=np.diag([3.0, 4.0, 0.0]))
    compare(frame, 5.0)


def test_molecules_and_counts():
    frame = molecule(np.random.default_rng(3), 30)
    compare(frame, 3.0)
    distances = np.linalg.norm(frame.positions[:, None] - frame.positions, axis=-1)
    close = (distances < 1.2) & ~np.eye(30, dtype=bool)
    degree = close.sum(axis=1)
    assert count_edges(frame, 1.2) == (degree.sum(), (degree == 0).sum(), degree.max())
    assert count_edges(frame, 1.2)[1] > 0


@pytest.mark.parametrize("limit", [1 << 20, 2000, 0])
def test_kept_lists_are_those_that_are_found(limit):
    rng = np.random.default_rng(5)
    frames = [molecule(rng, 1), molecule(rng, 300), crystal(rng, 4, edge=1.9), crystal(rng, pbc=(True, False, True))]
    kept = KeptLists(3.0, limit)
    for _ in range(3):
        for key, frame in enumerate(frames):
            degree, neighbour, images = kept.of(key, frames.__getitem__)
            centre, other, shift = neighbour_list(frame, 3.0)
            np.testing.assert_array_equal(np.repeat(np.arange(len(frame)), degree), centre)
            np.testing.assert_array_equal(neighbour, other)
            np.testing.assert_array_equal(shift, 0 if images is None else shifts(images, frame.cell))
            assert neighbour.dtype == (np.uint8 if len(frame) <= 256 else np.uint16)
    assert len(kept._kept) == {1 << 20: 4, 2000: 2, 0: 0}[limit]
