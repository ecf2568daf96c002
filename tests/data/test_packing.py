import numpy as np
import pytest
import torch
from helpers import crystal, molecule
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddpkit import InputError
from ddpkit.data import Capacity, GlobalStep, collate, write_prepared
from ddpkit.data.assembly import ALIGNMENT, Assembler, Layout
from ddpkit.packing import unpack
from ddpkit.padding import own_sizes, pad

SPECIES = ("H", "C", "O")


def made(frames, step, numbers):
    """A batch, and the memory that it lies in, which was not empty before."""
    kept = []

    def allocate(size):
        kept.append(np.full(size, 0xA5, dtype=np.uint8))
        return kept[0]

    layout = Assembler(frames, SPECIES, 2.5).make(step, numbers, allocate)
    memory = torch.from_numpy(kept[0])
    return memory, layout, unpack(memory, layout)


def expected(frames, step, numbers):
    batch = collate([frames.frame(n) for n in numbers], SPECIES, 2.5)
    totals = {"frames_total": step.frames, "atoms_total": step.atoms, "stress_total": step.stresses}
    totals = {k: torch.tensor(float(v), dtype=torch.float64) for k, v in totals.items() if v is not None}
    batch = batch.replace(**totals)
    return pad(batch, step.capacity or own_sizes(batch), 2.5) if step.is_padded else batch


def require_same_bits(batch, other):
    assert (batch.num_frames, batch.tensors().keys()) == (other.num_frames, other.tensors().keys())
    for name, value in other.tensors().items():
        part = getattr(batch, name)
        assert (part.dtype, part.shape) == (value.dtype, value.shape), name
        assert part.numpy().tobytes() == value.contiguous().numpy().tobytes(), name


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), kinds=st.lists(st.sampled_from("mcsw"), min_size=1, max_size=6), data=st.data())
def test_a_batch_is_collated_and_filled_up_in_one_go(tmp_path_factory, seed, kinds, data):
    """Molecules, crystals, those without a stress, and wires whose cell is incomplete; alone and mixed."""
    rng = np.random.default_rng(seed)
    make = {
        "m": lambda n: molecule(rng, n),
        "c": lambda n: crystal(rng, n, edge=2.2),
        "s": lambda n: crystal(rng, n, stress=None),
        "w": lambda n: crystal(rng, n, pbc=(True, False, False), cell=np.diag([3.0, 0.0, 0.0])),
    }
    frames = write_prepared(
        tmp_path_factory.mktemp("set") / "set", [make[kind](int(rng.integers(2, 9))) for kind in kinds], r_max=2.5
    )
    numbers = data.draw(st.lists(st.integers(0, len(kinds) - 1), min_size=1, max_size=5))
    stresses = data.draw(st.sampled_from([None, 3]))
    plain = GlobalStep((np.array(numbers),), 9, 77, 5, stresses)
    bare = expected(frames, plain, numbers)
    own = own_sizes(bare)
    extra = data.draw(st.tuples(*[st.integers(0, 9)] * 3))
    most = max(1, own.most) + extra[2]
    edges = own.edges + extra[1]
    capacity = Capacity(own.atoms + -(-extra[1] // most) + extra[0], edges, own.frames + extra[2], most)
    for step in (
        plain,
        GlobalStep((np.array(numbers),), 9, 77, 5, stresses, is_padded=True),
        GlobalStep((np.array(numbers),), 9, 77, 5, stresses, is_padded=True, capacity=capacity),
    ):
        require_same_bits(made(frames, step, numbers)[2], expected(frames, step, numbers))


def test_a_batch_lies_in_one_aligned_piece_of_memory_field_by_field(tmp_path):
    rng = np.random.default_rng(0)
    frames = write_prepared(tmp_path / "set", [crystal(rng, n) for n in (3, 2, 7)], r_max=2.5)
    memory, layout, batch = made(frames, GlobalStep((), 3, 12, 0, 3, is_padded=True), [2, 0, 1])
    assert [*batch.tensors()] == [*layout.parts]
    ends = [0]
    for part in batch.tensors().values():
        assert part.is_contiguous()
        assert part.untyped_storage().data_ptr() == memory.data_ptr()
        first = part.storage_offset() * part.itemsize
        assert first % ALIGNMENT == 0
        assert first >= ends[-1]
        ends.append(first + part.nbytes)
    assert ends[-1] <= len(memory) == layout.size <= ends[-1] + ALIGNMENT


def test_the_same_memory_elsewhere_is_the_same_batch(tmp_path):
    frames = write_prepared(tmp_path / "set", [molecule(np.random.default_rng(0), 2)], r_max=2.5)
    frames._arrays["positions"] = np.array([[0.0, 0, 0], [9, 0, 0]])  # without an edge
    memory, layout, batch = made(frames, GlobalStep((), 1, 2, 0), [0])
    assert batch.edge_index.shape == (2, 0)
    require_same_bits(unpack(memory.clone(), layout), batch)
    away = unpack(memory.to("meta"), layout)
    assert {k: (v.shape, v.dtype, v.stride()) for k, v in away.tensors().items()} == {
        k: (v.shape, v.dtype, torch.empty(v.shape).stride()) for k, v in batch.tensors().items()
    }


def test_what_no_batch_can_hold_is_refused_as_collate_does(tmp_path):
    rng = np.random.default_rng(0)
    gold = molecule(rng, 3, numbers=np.array([1, 79, 8]))
    lost = molecule(rng, 3, positions=np.array([[0.0, 0, 0], [np.inf, 0, 0], [0, 1, 0]]))
    for n, bad in enumerate((gold, lost)):
        if bad is lost:
            frames = write_prepared(tmp_path / str(n), [molecule(rng, 3)], r_max=2.5)
            frames._arrays["positions"] = lost.positions
        else:
            frames = write_prepared(tmp_path / str(n), [bad], r_max=2.5)
        with pytest.raises(InputError) as told:
            collate([frames.frame(0)], SPECIES, 2.5)
        with pytest.raises(InputError) as also:
            made(frames, GlobalStep((), 1, 3, 0), [0])
        assert str(also.value) == str(told.value)
    frames = write_prepared(tmp_path / "set", [molecule(rng, 6)], r_max=2.5)
    with pytest.raises(InputError, match="does not fit into a capacity of 3 atoms"):
        made(frames, GlobalStep((), 1, 6, 0, None, is_padded=True, capacity=Capacity(3, 100, 2, 9)), [0])


def test_a_layout_of_nothing_is_empty():
    assert Layout.of({}, 0).size == 0
