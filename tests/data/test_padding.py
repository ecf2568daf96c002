"""What `pad` makes of a batch, without a model; see tests/models/test_padded.py for what models make of that."""

import numpy as np
import pytest
import torch
from helpers import crystal, molecule
from hypothesis import given, settings
from hypothesis import strategies as st

import ddpkit
from ddpkit import InputError
from ddpkit.batch import Batch, neighbour_table, select_frames
from ddpkit.compile.parity import samples
from ddpkit.data import collate
from ddpkit.data.capacities import padding_atoms
from ddpkit.evaluate import Errors
from ddpkit.padding import Capacity, own_sizes, pad

R_MAX = 2.5


def batch_of(sizes, *, periodic=False, seed=0):
    rng = np.random.default_rng(seed)
    return collate([(crystal if periodic else molecule)(rng, n) for n in sizes], ("H", "C", "O"), R_MAX)


@st.composite
def padded_batches(draw):
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    batch = batch_of(sizes, periodic=draw(st.booleans()), seed=draw(st.integers(0, 99)))
    own = own_sizes(batch)
    most = own.most + draw(st.integers(0, 3))
    extra = draw(st.sampled_from([0, 1, 2, 7, 40])) if most else 0
    atoms = own.atoms + padding_atoms(extra, most) + draw(st.integers(0, 5))
    return batch, Capacity(atoms, own.edges + extra, own.frames + draw(st.integers(0, 3)), most)


@settings(max_examples=150, deadline=None)
@given(padded_batches())
def test_a_padded_batch_is_a_batch(case):
    batch, capacity = case
    filled = pad(batch, capacity, R_MAX)
    atoms, edges, frames = len(batch.positions), batch.edge_index.shape[1], batch.num_frames
    assert own_sizes(filled)._replace(frames=capacity.frames) == capacity
    assert filled.num_frames == capacity.frames
    assert filled.tensors().keys() == batch.tensors().keys() | {"mask"}
    # what was there before is there still
    for name, rows in {"atoms": atoms, "edges": edges, "frames": frames}.items():
        for field in {"atoms": "positions species frame forces", "edges": "edge_shift", "frames": "energy cell stress"}[
            name
        ].split():
            before = getattr(batch, field)
            if before is not None:
                torch.testing.assert_close(getattr(filled, field)[:rows], before, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(filled.edge_index[:, :edges], batch.edge_index)
    # the frame of padding is the last, and never a real one
    assert torch.equal(filled.mask, torch.arange(capacity.atoms) < atoms)
    assert (filled.frame[atoms:] == capacity.frames - 1).all()
    assert (filled.frame[:atoms] < batch.num_frames).all()
    assert torch.equal(filled.real_frames(), torch.arange(capacity.frames) < frames)
    # edges are sorted, and those of padding keep to padding, beyond the cutoff
    centre, neighbour = filled.edge_index
    assert (centre.diff() >= 0).all()
    assert (centre[edges:] >= atoms).all()
    assert torch.equal(centre[edges:], neighbour[edges:])
    vectors = filled.positions[neighbour] + filled.edge_shift - filled.positions[centre]
    assert (vectors[edges:].norm(dim=1) > R_MAX).all()
    # tables list every edge once, at its ends
    assert torch.equal(filled.neighbours, neighbour_table(centre, capacity.atoms, capacity.most))
    assert torch.equal(filled.incoming, neighbour_table(neighbour, capacity.atoms, capacity.most))
    for table in (filled.neighbours, filled.incoming):
        listed = table[table < capacity.edges]
        assert torch.equal(listed.sort().values, torch.arange(capacity.edges))
    if batch.cell is not None:
        assert (torch.linalg.det(filled.cell[frames:]) == 1).all()
    if batch.stress is not None:
        assert filled.stress[frames:].isnan().all()


@settings(max_examples=60, deadline=None)
@given(padded_batches(), st.integers(0, 5), st.integers(0, 5))
def test_a_capacity_that_is_too_small_is_refused(case, which, less):
    batch, capacity = case
    own = own_sizes(batch)
    smaller = {0: {"atoms": own.atoms - 1}, 1: {"edges": own.edges - 1 - less}, 2: {"frames": own.frames - 1}}.get(
        which
    )
    if which == 3:
        smaller = {"most": own.most - 1}
    if which >= 4:  # padding edges without an atom for the last of them
        smaller = {"edges": own.edges + own.most * less + 1, "atoms": own.atoms + less, "most": own.most}
    capacity = capacity._replace(**smaller)
    assert not capacity.holds(own.atoms, own.edges, batch.num_frames, own.most)
    with pytest.raises(InputError, match=r"A batch of .* does not fit into a capacity of"):
        pad(batch, capacity, R_MAX)


def test_a_batch_that_is_padded_can_be_filled_up_further():
    batch = batch_of([4, 5])
    own = own_sizes(batch)
    first = pad(batch, Capacity(own.atoms + 3, own.edges + 2, own.frames + 1, own.most), R_MAX)
    filled = pad(first, Capacity(own.atoms + 9, own.edges + 9, own.frames + 5, own.most + 1), R_MAX)
    assert filled.mask.sum() == own.atoms
    assert filled.real_frames().nonzero()[:, 0].tolist() == [0, 1]
    assert filled.frame[-1] == filled.num_frames - 1


def test_nothing_waits_for_a_device():
    """A tensor without data can tell no number."""
    batch = batch_of([4, 5], periodic=True)
    own = own_sizes(batch)
    capacity = Capacity(own.atoms + 9, own.edges + 9, own.frames + 2, own.most + 1)
    filled = pad(batch.to("meta"), capacity, R_MAX)
    expected = pad(batch, capacity, R_MAX)
    assert {k: v.shape for k, v in filled.tensors().items()} == {k: v.shape for k, v in expected.tensors().items()}


def outputs_for(batch, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return {
        "energy": torch.randn(batch.num_frames, generator=draw, dtype=torch.float64),
        "forces": torch.randn(batch.positions.shape, generator=draw, dtype=torch.float64),
        "stress": torch.randn((batch.num_frames, 3, 3), generator=draw, dtype=torch.float64),
    }


def filled_case():
    batch = batch_of([4, 3, 5], periodic=True)
    batch.stress[1] = torch.nan
    own = own_sizes(batch)
    filled = pad(batch, Capacity(own.atoms + 4, own.edges + 5, own.frames + 1, own.most), R_MAX)
    plain, output = outputs_for(batch), outputs_for(filled, seed=2)
    for name, value in plain.items():
        output[name][: len(value)] = value
    return batch, plain, filled, output


@pytest.mark.parametrize("delta", [None, 0.1])
@pytest.mark.parametrize("totals", [False, True])
@pytest.mark.parametrize("content", [0.0, 7.0, float("nan"), float("inf")])
def test_a_loss_leaves_out_what_only_fills_up(delta, totals, content):
    batch, plain, filled, output = filled_case()
    if totals:
        given = {n: torch.tensor(v, dtype=torch.float64) for n, v in (("frames_total", 6), ("atoms_total", 30))}
        batch, filled = (
            b.replace(**given, stress_total=torch.tensor(4.0, dtype=torch.float64)) for b in (batch, filled)
        )
    atoms, frames = len(batch.positions), batch.num_frames
    for name, first in (("energy", frames), ("forces", atoms), ("stress", frames)):
        getattr(filled, name)[first:] = content
        output[name].requires_grad_()
    criterion = ddpkit.EnergyForcesLoss(1.0, 2.0, 3.0, huber_delta=delta)
    terms, expected = criterion(output, filled), criterion(plain, batch)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-14, atol=0)
    for slope, first in zip(
        torch.autograd.grad(terms["loss"], list(output.values())), (frames, atoms, frames), strict=True
    ):
        assert (slope[first:] == 0).all()
        assert (slope[:first] != 0).any()


def test_errors_leave_out_what_only_fills_up():
    batch, plain, filled, output = filled_case()
    expected, found = Errors(), Errors()
    expected.add(plain, batch)
    found.add(output, filled)
    np.testing.assert_allclose(found.sums, expected.sums, rtol=1e-14)


def test_the_gate_compares_real_frames_and_padding():
    batch = batch_of([6, 3, 5, 4], periodic=True)
    own = own_sizes(batch)
    filled = pad(batch, Capacity(own.atoms + 60, own.edges + 40 * own.most, own.frames + 2, own.most), R_MAX)
    found = samples(filled)
    assert [int(sample.real_frames().sum()) for sample in found] == [1, 2, 3]
    for sample, plain in zip(found, samples(batch), strict=True):
        assert sample.num_frames == plain.num_frames + 1
        real = int(sample.mask.sum())
        assert torch.equal(sample.positions[:real], plain.positions)
        assert (sample.frame[~sample.mask] == sample.num_frames - 1).all()
        assert sample.mask.sum() == len(sample.mask) - 3
        assert sample.edge_index.shape[1] == plain.edge_index.shape[1] + 2 * own.most
        assert sample.tensors().keys() == filled.tensors().keys()
    (alone, *_) = samples(pad(batch, own, R_MAX))
    assert alone.num_frames == 2
    assert alone.mask.all()


def test_a_selection_of_a_padded_batch_is_padded():
    batch = batch_of([3, 4])
    own = own_sizes(batch)
    filled = pad(batch, own._replace(atoms=own.atoms + 2), R_MAX)
    chosen = select_frames(filled, [1, 2])
    assert isinstance(chosen, Batch)
    assert chosen.mask.tolist() == [True] * 4 + [False] * 2
    assert chosen.frame.tolist() == [0] * 4 + [1] * 2
