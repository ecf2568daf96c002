import pytest
import torch
from cases import R_MAX, SPECIES, make_model

from ddpkit.testing import validate_model
from ddpkit.testing.model import CASES


def verdicts(model, **options):
    return {o.case: (o.state, o.why) for o in validate_model(model, SPECIES, R_MAX, **options)}


@pytest.mark.parametrize("name", ["allegro", "nequip"])
@pytest.mark.parametrize("precision", ["float64", "mixed"])
def test_our_models_pass(name, precision):
    model = make_model(name, precision, l_max=2)
    dtype = torch.float64 if precision == "float64" else torch.float32
    before = [p.detach().clone() for p in model.parameters()]
    verdict = verdicts(model, dtype=dtype)
    assert verdict == dict.fromkeys(CASES, ("passed", "")), verdict
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert model.training


class Wrong(torch.nn.Module):
    """A model with one fault."""

    def __init__(self, change):
        super().__init__()
        self.inner, self.change = make_model("allegro", l_max=1), change

    def forward(self, batch):
        return self.change(dict(self.inner(batch)), batch)


def leaves_out_stress(out, _):
    del out["stress"]
    return out


def detaches(out, _):
    return {name: value.detach() for name, value in out.items()}


def scales_forces(out, _):
    return out | {"forces": 1.01 * out["forces"]}


def cuts_second_derivatives(out, _):
    return out | {"forces": (out["forces"] + out["forces"].detach()) / 2}


def counts_edges(out, batch):
    return out | {"energy": out["energy"] + batch.edge_index.shape[1]}


def depends_on_place(out, batch):
    return out | {"energy": out["energy"] + batch.positions[:, 0].sum()}


def depends_on_the_batch(out, batch):
    return out | {"energy": out["energy"] * batch.num_frames}


def has_half_the_stress(out, _):
    return out | {"stress": out["stress"] / 2} if "stress" in out else out


def writes_into_its_batch(out, batch):
    batch.positions += 1
    return out


@pytest.mark.parametrize(
    ("change", "case", "words"),
    [
        (leaves_out_stress, "contract", "'stress' is missing"),
        (writes_into_its_batch, "contract", "wrote into 'positions'"),
        (detaches, "parameters", "detached"),
        (scales_forces, "forces", "finite differences"),
        (cuts_second_derivatives, "parameters", "finite differences"),
        (counts_edges, "cutoff", "energy on both sides"),
        (depends_on_place, "translation", "energy"),
        (depends_on_place, "rotation", "energy"),
        (depends_on_the_batch, "batching", "energy"),
        (has_half_the_stress, "stress", "finite differences"),
    ],
)
def test_a_fault_is_seen_by_its_case(change, case, words):
    state, why = verdicts(Wrong(change), cases=[case])[case]
    assert state == "failed"
    assert words in why
