import math

import pytest
import torch
from toy import Toy, random_batch

import ddpkit
from ddpkit.compile import parity
from ddpkit.errors import InputError, ParityError


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


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_finite_in_neither_is_no_difference(bad):
    eager = {"loss": torch.tensor(bad), "forces": torch.ones(3), "a": torch.tensor([1.0, bad]), "b": torch.ones(4)}
    compiled = {**eager, "a": torch.tensor([math.nan, 1.0])}
    found = parity.differences(compiled, eager, ["a", "b"], 1e-4, "2 atoms")
    assert {d.name: d.is_finite for d in found} == {"loss": False, "forces": True, "a": False, "b": True}
    parity.require(found)
    with pytest.raises(
        InputError, match=r"The loss \(and 1 other tensors\) is NaN or infinite on a batch of 2 atoms, in eager"
    ):
        parity.require_finite(found)
    good = parity.differences({"a": torch.ones(2)}, {"a": torch.ones(2)}, ["a"], 1e-4, "3 atoms")
    parity.require_finite([*found, *good])


@pytest.mark.parametrize("name", ["loss", "forces", "a"])
@pytest.mark.parametrize("swap", [False, True])
def test_what_is_finite_in_one_of_them_is_a_difference(name, swap):
    good = {"loss": torch.ones(()), "forces": torch.ones(3), "a": torch.ones(2)}
    bad = {**good, name: good[name] * math.nan}
    both = (good, bad) if swap else (bad, good)
    with pytest.raises(ParityError, match=f"'{name}' by inf"):
        parity.require(parity.differences(*both, ["a"], 1e-4, ""))


def test_a_stress_that_neither_knows_is_left_out():
    stress = torch.eye(3).repeat(2, 1, 1)
    stress[1] = math.nan
    found = parity.differences({"stress": stress}, {"stress": stress.clone()}, [], 1e-4, "")
    assert [(d.error, d.is_fine) for d in found] == [(0.0, True)]
    other = stress.clone()
    other[0] *= 1.01
    with pytest.raises(ParityError, match=r"'stress' by 0\.01"):
        parity.require(parity.differences({"stress": other}, {"stress": stress}, [], 1e-4, ""))


def test_complex_gradients_are_compared_whole():
    eager, compiled = torch.tensor([1 + 1j]), torch.tensor([1 + 2j])
    with pytest.raises(ParityError, match="'a'"):
        parity.require(parity.differences({"a": compiled}, {"a": eager}, ["a"], 1e-4, ""))


def overflowing(out, batch):
    return (out["energy"] - batch.energy).square().mean() + (out["forces"] * 1e200).square().mean()


@pytest.mark.parametrize("strategy", ["custom", "standard"])
def test_a_loss_that_is_not_finite_is_told_before_training(strategy, request):
    model = Toy()
    batch = random_batch([4, 5])
    if strategy == "standard":
        request.getfixturevalue("interpreted")
        model.first.data[0] = math.inf
    step = ddpkit.make_step(
        model, overflowing, torch.optim.SGD(model.parameters(), lr=0.1), strategy=strategy, compile=True
    )
    with pytest.raises(
        InputError, match=r"(loss|gradient of '\w+').* is NaN or infinite on a batch of .* in eager code as in"
    ):
        step.prepare(batch)
