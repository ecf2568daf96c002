"""Allegro and NequIP as files: compiled, they compute what they do in eager code, alone and divided among ranks."""

import numpy as np
import pytest
import torch
from cases import R_MAX, make_batch, make_frame, make_model
from divided import compute

import ddpkit
from ddpkit.data import Frame

pytestmark = pytest.mark.long  # a minute for each

CUTOFFS = [[4.0, 3.0, 2.5], [3.5, 4.0, 3.0], [2.0, 3.0, 4.0]]
KINDS = {
    ("allegro", "float64"): {"l_max": 2, "cutoffs": CUTOFFS, "scales": [0.5, 1.0, 2.0]},
    ("allegro", "mixed"): {"l_max": 1},
    ("nequip", "float64"): {"l_max": 1, "num_layers": 3, "scales": [0.5, 1.0, 2.0]},
    ("nequip", "mixed"): {"l_max": 1, "num_layers": 2, "cutoffs": CUTOFFS},
}
TOLERANCE = {"float64": 1e-10, "mixed": 1e-5}


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def model(request):
    return make_model(*request.param, zbl=True, **KINDS[request.param]).eval()


@pytest.fixture(scope="module")
def package(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    ddpkit.export(model, path)
    return path


def alone(distance=None):
    """An atom, or two that are so far from each other."""
    positions = np.array([[0.0, 0, 0]] + ([] if distance is None else [[distance, 0, 0]]))
    return Frame(np.array([8, 1])[: len(positions)], positions, 0.0, np.zeros_like(positions))


def test_computes_what_the_model_does(package, model):
    exported = ddpkit.load_exported(package)
    for frames in (
        [make_frame(40, periodic=True, box=9.0)],
        [make_frame(7, seed=2)],
        [make_frame(n, periodic=True, seed=n) for n in (1, 12, 3)],
        [alone()],
        [alone(1.1)],
        [alone(9.0)],
        [alone(), make_frame(5, periodic=True), alone(1.1)],
    ):
        batch = make_batch(frames)
        ours, theirs = exported(batch), model(batch)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            scale = max(1.0, float(value.abs().max()))
            torch.testing.assert_close(ours[name], value, rtol=0, atol=TOLERANCE[model.precision] * scale)


def test_ranks_together_compute_what_one_does(package, model):
    frame = make_frame(11, periodic=True)
    batch = make_batch([frame])
    whole = model(batch)

    class OfEachRank:
        """Ranks are processes: each has the code for itself."""

        def __init__(self, ranks):
            self.codes = [ddpkit.load_exported(package) for _ in range(ranks)]
            self.message_passing = self.codes[0].metadata.message_passing

        def __call__(self, *inputs):
            return self.codes.pop()._run(*inputs)

    rank_of = np.arange(11) % 3
    energies, forces, _ = compute(OfEachRank(3), frame, batch.species, R_MAX, rank_of)
    tolerance = TOLERANCE[model.precision]
    torch.testing.assert_close(energies.sum()[None], whole["energy"], rtol=tolerance, atol=0)
    torch.testing.assert_close(forces, whole["forces"], rtol=0, atol=tolerance * float(whole["forces"].abs().max()))


def test_precision_and_cutoffs_are_told(package, model):
    told = ddpkit.load_exported(package).metadata
    assert (told.model, told.precision) == (type(model).__name__, model.precision)
    assert told.dtype == ("float64" if model.precision == "float64" else "float32")
    assert told.message_passing == (told.model == "NequIP")
    assert (told.exchange_width > 0) == told.message_passing
    if told.cutoffs is not None:
        np.testing.assert_allclose(told.cutoffs, CUTOFFS)
