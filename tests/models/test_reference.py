"""Models against themselves written down literally, and the gate that trains with no kernel that differs from it."""

import pytest
import torch
from cases import PRECISIONS, make_batch, make_frame, make_model

from ddpkit.errors import InputError, ParityError
from ddpkit.kernels import check_kernels, require_kernels
from ddpkit.models.kernels import KERNELS, E3nnConvolution

SETTINGS = {
    "allegro": ("allegro", {}),
    "allegro, others": (
        "allegro",
        {"parity": False, "num_layers": 3, "l_max": 3, "path_channel_coupling": False, "readout_nonlinearity": "silu"},
    ),
    "allegro, pairs": ("allegro", {"zbl": True, "cutoffs": [[3.0, 4.0, 4.0], [4.0, 4.0, 4.0], [4.0, 4.0, 3.5]]}),
    "nequip": ("nequip", {}),
    "nequip, others": (
        "nequip",
        {"l_max": 3, "parity": True, "zbl": True, "bessel_trainable": True, "readout_depth": 1},
    ),
    "nequip, e3nn": ("nequip", {"kernels": "e3nn"}),
}


@pytest.fixture(scope="module", params=["crystals", "molecules"])
def batch(request):
    if request.param == "molecules":
        return make_batch([make_frame(9), make_frame(4, seed=2, box=3.5), make_frame(1)])
    return make_batch([make_frame(9, periodic=True, box=5.0), make_frame(4, periodic=True, seed=2, box=3.5)])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", SETTINGS)
def test_models_are_what_is_written_in_the_papers(case, precision, batch):
    name, settings = SETTINGS[case]
    model = make_model(name, precision, **settings)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    compared = check_kernels(model, batch)
    require_kernels(model, compared)
    names = {d.name for d in compared}
    assert {"energy", "forces"} <= names
    assert all(f"forces, its gradient by {key}" in names for key, _ in model.named_parameters())
    if precision == "float64":
        assert max(d.error for d in compared) < 1e-11
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Scaled(E3nnConvolution):
    """A kernel whose paths from the harmonics of the highest degree are off by a few percent."""

    factor = 1.02

    def _compute(self, x, harmonics, weights, graph, by_neighbour):
        degrees = torch.ones_like(harmonics)
        degrees[:, 9:] = self.factor
        return super()._compute(x, harmonics * degrees, weights, graph, by_neighbour)


class _Wrong(torch.autograd.Function):
    """The identity, with a derivative that is off: the first one, or the second."""

    @staticmethod
    def forward(ctx, x, order):
        ctx.order = order
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return (1.02 * grad if ctx.order == 1 else _Wrong.apply(grad, ctx.order - 1)), None


class WrongFirst(E3nnConvolution):
    """Right energies, wrong forces."""

    order = 1

    def _compute(self, x, harmonics, weights, graph, by_neighbour):
        wrong = _Wrong.apply(harmonics, self.order)
        return super()._compute(x, wrong, weights, graph, by_neighbour)


class WrongSecond(WrongFirst):
    """Right energies and forces, wrong gradients of a loss on forces."""

    order = 2


@pytest.mark.parametrize(
    ("kernel", "named"),
    [
        (Scaled, "(energy|forces|stress).*"),
        (WrongFirst, "(forces|stress).*"),
        (WrongSecond, r"(forces|stress), its gradient by \S+"),
    ],
)
@pytest.mark.parametrize("precision", ["float64", "mixed"])
def test_a_wrong_kernel_is_named(kernel, named, precision, batch, monkeypatch):
    monkeypatch.setitem(KERNELS, "e3nn", kernel)
    model = make_model("nequip", precision, kernels="e3nn", l_max=3)
    compared = check_kernels(model, batch)
    bad = {d.name for d in compared if not d.is_fine}
    assert "energy" not in bad or kernel is Scaled
    assert "forces" not in bad or kernel is not WrongSecond
    if precision == "float64":
        assert ("energy" in bad, "forces" in bad) == (kernel is Scaled, kernel is not WrongSecond)
    message = (
        rf"The kernels of NequIP \(kernels=e3nn\) compute something else .*: {named} by [\d.e-]+ relative \(allowed"
    )
    with pytest.raises(ParityError, match=message):
        require_kernels(model, compared)


def test_large_energies_of_atoms_hide_nothing(batch, monkeypatch):
    monkeypatch.setitem(KERNELS, "e3nn", Scaled)
    monkeypatch.setattr(Scaled, "factor", 1.5)
    model = make_model("nequip", "mixed", kernels="e3nn", l_max=3, shifts=[-1e6, -2e6, -3e6])
    assert any(d.name == "energy" and not d.is_fine for d in check_kernels(model, batch))


def test_a_kernel_that_cannot_run_is_told(batch, monkeypatch):
    class Broken(E3nnConvolution):
        def _compute(self, *_):
            raise RuntimeError("no kernel image is available for execution on the device\nand more")

    monkeypatch.setitem(KERNELS, "e3nn", Broken)
    with pytest.raises(
        InputError, match=r"kernels=e3nn\) cannot be run here \(no kernel image .* device\): choose other"
    ):
        check_kernels(make_model("nequip", kernels="e3nn"), batch)


def test_other_models_are_not_compared(batch):
    assert check_kernels(torch.nn.Linear(2, 2), batch) == []
