import math

import pytest
import torch
from toy import Toy, random_batch

from ddpkit.compile import parity
from ddpkit.errors import ParityError


def test_the_worst_gradient_is_named():
    eager = {"loss": torch.tensor(1.0), "a": torch.ones(3), "b": torch.ones(4)}
    compiled = {"loss": torch.tensor(1.0), "a": torch.ones(3) * (1 + 1e-3), "b": torch.ones(4) * 2}
    found = parity.differences(compiled, eager, ["a", "b"], 1e-4, "2 atoms")
    assert {d.name: d.is_fine for d in found} == {"loss": True, "a": False, "b": False}
    with pytest.raises(ParityError, match="'b' by 1 relative"):
        parity.require(found)


@pytest.mark.parametrize("bad", [None, torch.full((3,), math.nan)])
def test_missing_and_nan_gradients_are_differences(bad):
    found = parity.differences({"a": bad}, {"a": torch.ones(3)}, ["a"], 1e-4, "")
    with pytest.raises(ParityError, match="'a'"):
        parity.require(found)


def test_a_gradient_that_cancels_is_measured_against_the_others():
    eager = {"a": torch.ones(1000), "b": torch.full((1000,), 1e-8)}
    compiled = {"a": torch.ones(1000), "b": torch.full((1000,), 2e-8)}
    assert all(d.is_fine for d in parity.differences(compiled, eager, ["a", "b"], 1e-4, ""))


def test_tolerance_follows_the_coarsest_dtype():
    assert parity.tolerance_for([torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.int64)]) == 1e-10
    assert parity.tolerance_for([torch.ones(1, dtype=torch.float64), torch.ones(1)]) == 1e-4


def test_selected_frames_have_their_energies_and_forces():
    batch = random_batch([5, 3, 6], cell=True)
    model = Toy().eval()
    whole = model(batch)
    part = parity.select_frames(batch, [2, 0, 2])
    output = model(part)
    torch.testing.assert_close(output["energy"], whole["energy"][[2, 0, 2]])
    torch.testing.assert_close(
        output["forces"], torch.cat([whole["forces"][8:], whole["forces"][:5], whole["forces"][8:]])
    )
    torch.testing.assert_close(part.stress, batch.stress[[2, 0, 2]])
    assert part.num_frames == 3


def test_samples_have_one_two_and_three_frames_with_edges():
    samples = parity.samples(random_batch([1, 9, 4]))
    assert [sample.num_frames for sample in samples] == [1, 2, 3]
    assert all(sample.edge_index.shape[1] for sample in samples)
