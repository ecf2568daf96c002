"""A system divided among ranks computes what it does on one: each rank has its atoms, and copies of others'."""

import numpy as np
import pytest
import torch
from cases import R_MAX, make_batch, make_frame, make_model
from divided import compute

from ddpkit import InputError
from ddpkit.inference.exchange import Mirrored, exchanging, from_owners, to_owners

CUTOFFS = [[4.0, 3.0, 2.5], [3.5, 4.0, 3.0], [2.0, 3.0, 4.0]]
KINDS = {
    "allegro": {"num_layers": 2, "zbl": True, "scales": [0.5, 1.0, 2.0], "avg_num_neighbors": [9.0, 12.0, 15.0]},
    "nequip": {"num_layers": 4, "zbl": True, "scales": [0.5, 1.0, 2.0], "avg_num_neighbors": [9.0, 12.0, 15.0]},
    "nequip-one-layer": {"num_layers": 1},
    "nequip-parity-cutoffs": {"parity": True, "cutoffs": CUTOFFS, "num_layers": 2},
    "allegro-cutoffs": {"cutoffs": CUTOFFS},
    "nequip-e3nn": {"kernels": "e3nn", "num_layers": 2},
}


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return make_model(request.param.split("-")[0], **KINDS[request.param]).eval()


def halves(frame):
    return (np.linalg.solve(frame.cell.T, frame.positions.T)[0] % 1 > 0.5).astype(int)


@pytest.mark.parametrize(
    "ranks",
    {
        "one": lambda frame: np.zeros(len(frame), int),
        "two": halves,
        "two of three": lambda frame: 2 * halves(frame),  # the second has nothing
        "five": lambda frame: np.arange(len(frame)) % 5,
        "one each": lambda frame: np.arange(len(frame)),
    }.items(),
    ids=lambda item: item[0],
)
def test_ranks_together_compute_what_one_does(model, ranks):
    frame = make_frame(11, periodic=True)
    batch = make_batch([frame])
    whole = model(batch)
    module = model.for_inference()
    energies, forces, calls = compute(module, frame, batch.species, R_MAX, ranks[1](frame))
    assert float(energies.sum() - whole["energy"][0]) == pytest.approx(0, abs=1e-12 * float(whole["energy"][0].abs()))
    torch.testing.assert_close(forces, whole["forces"], rtol=0, atol=1e-12 * float(whole["forces"].abs().max()))
    exchanges = len(model.layers) - 1 if module.message_passing else 0
    assert calls == ["from_owners"] * exchanges + ["to_owners"] * exchanges
    assert (module.exchange_width > 0) == (exchanges > 0)


@pytest.mark.parametrize("precision", ["mixed", "float32"])
@pytest.mark.parametrize("name", ["allegro", "nequip"])
def test_precision_of_layers_is_that_of_the_rows(name, precision):
    model = make_model(name, precision, zbl=True).eval()
    frame = make_frame(11, periodic=True)
    batch = make_batch([frame])
    whole = model(batch)
    energies, forces, _ = compute(model.for_inference(), frame, batch.species, R_MAX, halves(frame))
    assert energies.dtype == forces.dtype == torch.float64
    torch.testing.assert_close(energies.sum()[None], whole["energy"], rtol=1e-5, atol=0)
    torch.testing.assert_close(forces, whole["forces"], rtol=0, atol=1e-4 * float(whole["forces"].abs().max()))


def test_a_copy_for_inference_leaves_the_model_as_it_is():
    model = make_model("nequip", kernels="e3nn")
    module = model.for_inference()
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert model.layers[0].kernel is not model.layers[0].convolution
    assert not any(p.requires_grad for p in module.parameters())
    mine, its = next(model.parameters()), next(module.parameters())
    assert mine.data_ptr() != its.data_ptr()


def test_width_of_rows():
    model = make_model("nequip", num_layers=3, l_max=2, num_features=[6, 4, 2])
    assert model.for_inference().exchange_width == 6 + 3 * 4 + 5 * 2
    assert make_model("nequip", num_layers=1).for_inference().exchange_width == 0
    assert make_model("allegro").for_inference().exchange_width == 0


class TestOperators:
    def test_are_each_others_transpose(self):
        rows, ghosts = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.tensor([2, 2, 0])
        with exchanging(Mirrored(ghosts)):
            every = from_owners(rows, 7)
            assert torch.equal(every, rows[[0, 1, 2, 3, 2, 2, 0]])
            weights = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
            (back,) = torch.autograd.grad((every * weights).sum(), rows, create_graph=True)
            assert torch.equal(back, to_owners(weights, 4))
            assert torch.autograd.gradcheck(lambda x: from_owners(x, 7), rows)
            assert torch.autograd.gradcheck(lambda x: to_owners(x, 4), weights)

    def test_pass_torchs_own_checks(self):
        for operator in (from_owners, to_owners):
            torch.library.opcheck(operator, (torch.randn(4, 3, requires_grad=True), 4))

    def test_copy_where_there_are_no_ghosts(self):
        rows = torch.randn(4, 3)
        every = from_owners(rows, 4)
        assert torch.equal(every, rows)
        assert every.data_ptr() != rows.data_ptr()

    def test_refuse_ghosts_without_an_exchange(self):
        for operator in (from_owners, to_owners):
            with pytest.raises(InputError, match="has no exchange between ranks"):
                operator(torch.randn(4, 3), 6)

    def test_have_an_exchange_in_each_thread(self):
        """What one thread has installed is not what another computes with."""
        with exchanging(Mirrored(torch.tensor([1]))):
            import threading

            seen = []

            def other():
                try:
                    from_owners(torch.ones(2, 1), 3)
                except InputError as error:
                    seen.append(error)

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            assert seen
            assert from_owners(torch.ones(2, 1), 3).shape == (3, 1)
