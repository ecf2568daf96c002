import pytest
import torch
from torch.utils import _pytree as pytree
from toy import as_dict, random_batch

from ddpkit.compile.layout import Layout, sizes_of
from ddpkit.errors import InputError


def test_sizes_of_a_batch_have_their_names():
    batch = random_batch([4, 3])
    sizes = sizes_of(Layout.of([batch]), batch)
    assert sizes["atoms"] == 7
    assert sizes["frames"] == 2
    assert sizes["edges"] == batch.edge_index.shape[1]


def test_a_batch_whose_frames_equal_its_atoms_is_told_apart():
    batch = random_batch([1, 1, 1])
    other = random_batch([5, 4])
    layout = Layout.of([batch])
    assert layout.sizes(*pytree.tree_flatten(other)) is not None


def test_fields_that_disagree_do_not_fit():
    batch = random_batch([4, 3])
    layout = Layout.of([batch])
    assert layout.sizes(*pytree.tree_flatten(batch.replace(forces=batch.forces[:-1]))) is None
    assert layout.sizes(*pytree.tree_flatten(batch.replace(forces=None))) is None
    assert layout.sizes(*pytree.tree_flatten(batch.replace(positions=batch.positions.float()))) is None


def test_what_varies_in_other_batches_is_learned_from_examples():
    one, two = as_dict(random_batch([3, 2])), as_dict(random_batch([4, 4, 1], seed=1))
    layout = Layout.of([one, two])
    shapes = dict(zip(one, (leaf.dims for leaf in layout.leaves), strict=True))
    assert shapes["pos"][1] == 3
    assert shapes["edge_index"][0] == 2
    assert shapes["pos"][0] == shapes["z"][0] == shapes["batch"][0] != shapes["y"][0]
    assert layout.sizes(*pytree.tree_flatten(as_dict(random_batch([6, 2, 2, 9])))) is not None


def test_fill_puts_a_batch_together():
    batch = random_batch([4, 3], cell=True)
    layout = Layout.of([batch])
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    again = layout.fill(sizes_of(layout, batch), leaves)
    assert again.num_frames == 2
    assert again.cell is batch.cell
    assert again.mask is None


def test_an_opaque_batch_is_refused_in_a_sentence():
    with pytest.raises(InputError, match="holds a object"):
        Layout.of([object()])
