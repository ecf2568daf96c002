"""The convolution in CUDA kernels, its text run on a CPU by `simulated_cuda`, and on a GPU where there is one."""

import math
import re
import shutil
import subprocess

import pytest
import simulated_cuda
import torch
from cases import R_MAX, make_batch, make_frame, make_model, relative
from test_padded import labelled, larger, on_padding, run
from torch.autograd import gradcheck, gradgradcheck

from ddpkit import InputError, make_step
from ddpkit.batch import neighbour_table
from ddpkit.compile.backend import using
from ddpkit.kernels import check_kernels, require_kernels
from ddpkit.models import cuda_convolution, cuda_source
from ddpkit.models.cuda_convolution import CudaConvolution
from ddpkit.models.graph import graph_from, graph_of
from ddpkit.models.irreps import product_irreps
from ddpkit.models.potential import Edges
from ddpkit.models.reference import ReferenceConvolution
from ddpkit.padding import pad

IRREPS = {
    "l = 1": ({(0, 1): 5, (1, -1): 3}, 1, None),
    "both parities": ({(0, 1): 3, (0, -1): 2, (1, 1): 4, (1, -1): 1}, 2, None),
    "two warps, one not full": ({(0, 1): 40, (1, -1): 33}, 1, None),
    "full warps": ({(0, 1): 64, (1, -1): 32}, 1, None),
    "scalars in": ({(0, 1): 8}, 3, None),
    "scalars out": ({(0, 1): 3, (1, -1): 2, (2, 1): 2}, 2, {(0, 1): 4}),
    "l = 4": ({(0, 1): 2, (1, -1): 2, (2, 1): 1, (3, -1): 1, (4, 1): 1}, 4, None),
}


@pytest.fixture(autouse=True)
def _simulated(monkeypatch):
    monkeypatch.setitem(cuda_convolution.LAUNCH, "cpu", simulated_cuda.launch)


def neighbourhoods(device="cpu"):
    """A graph of atoms with many neighbours, few and none."""
    frames = [
        make_frame(9, periodic=True, box=5.0),
        make_frame(4, periodic=True, seed=2, box=3.5),
        make_frame(1),
        make_frame(2),
    ]
    return graph_of(make_batch(frames).to(device))


def every_irrep(irreps, l_max):
    return {c: 1 for a in irreps for l in range(l_max + 1) for c in product_irreps(a, (l, (-1) ** l)) if c[0] <= l_max}


def factors(irreps, l_max, out, graph, *, leaf, dtype=torch.float64, device="cpu"):
    """Both convolutions, and numbers for x, hidden, matrix and harmonics."""
    torch.manual_seed(3)
    out = out or every_irrep(irreps, l_max)
    pair = [kind(irreps, l_max, out, dtype).to(device) for kind in (CudaConvolution, ReferenceConvolution)]
    edges, atoms, h = len(graph.centre), graph.atoms, (l_max + 1) ** 2
    sizes = [
        (atoms, sum((2 * a[0] + 1) * mul for a, mul in irreps.items())),
        (edges, 6),
        (6, sum(pair[0].sizes)),
        (edges, h),
    ]
    numbers = [torch.randn(*size, dtype=torch.float64).to(device, dtype).requires_grad_() for size in sizes]
    norm = torch.rand(atoms, 1, dtype=torch.float64).to(device, dtype)

    def convolve(kernel, x, hidden, matrix, harmonics):
        split = x.split([(2 * a[0] + 1) * mul for a, mul in irreps.items()], 1)
        features = {
            a: part.reshape(-1, 2 * a[0] + 1, mul) for (a, mul), part in zip(irreps.items(), split, strict=True)
        }
        shared = kernel.prepare([kernel], Edges(graph, None, None, harmonics, leaf), norm)
        result = kernel(features, hidden, matrix, shared)
        return torch.cat([result[c].flatten(1) for c in kernel.irreps_out], 1)

    return pair, numbers, convolve


def first_and_second(convolve, kernel, numbers):
    """The output, a function of its derivatives like forces, and the derivative of both by all but harmonics."""
    out = convolve(kernel, *numbers)
    pulled = torch.autograd.grad(out.square().sum(), (numbers[0], numbers[1], numbers[3]), create_graph=True)
    loss = sum(  # of numbers around 1: the sine of large ones would be that of their rounding
        (part / part.detach().abs().max() * torch.linspace(1, 3, part.numel()).to(part).reshape(part.shape)).sin().sum()
        for part in pulled
    )
    return out, *pulled, *torch.autograd.grad(loss + out.cos().sum(), numbers[:3])


@pytest.mark.parametrize(
    ("part", "room"), [(1 << 26, 0), (300, 0), (300, 1 << 20)], ids=["whole", "in parts", "shared"]
)
@pytest.mark.parametrize("name", IRREPS)
def test_output_and_derivatives_are_those_of_the_reference(name, part, room, monkeypatch):
    monkeypatch.setattr(cuda_convolution, "PART", part)
    monkeypatch.setattr(cuda_convolution, "ROOM", room)
    pair, numbers, convolve = factors(*IRREPS[name], neighbourhoods(), leaf=True)
    ours, theirs = (first_and_second(convolve, kernel, numbers) for kernel in pair)
    assert [relative(a, b) < 1e-11 for a, b in zip(ours, theirs, strict=True)] == [True] * len(theirs)


def test_warps_share_an_atom_that_would_outlast_the_others(monkeypatch):
    """A star: one warp goes on for 16 edges, and two that share all 32 as well."""
    shared = []
    monkeypatch.setitem(cuda_convolution.LAUNCH, "cpu", lambda *given: shared.append(given[4][9]))
    hub, tips = torch.zeros(16, dtype=torch.int64), torch.arange(1, 17)
    ends = torch.cat((hub, tips)), torch.cat((tips, hub))
    graph = graph_from(*ends, *(neighbour_table(end, 17) for end in ends))
    pair, numbers, convolve = factors({(0, 1): 32}, 1, None, graph, leaf=True)
    for room in (2, 3):
        monkeypatch.setattr(cuda_convolution, "ROOM", room)
        convolve(pair[0], *numbers)
    assert shared == [0, 1]


def test_harmonics_have_second_derivatives_where_edges_are_no_leaf():
    (kernel, _), (x, hidden, matrix, y), convolve = factors(*IRREPS["scalars out"], neighbourhoods(), leaf=False)
    matrix = matrix.detach()
    assert gradcheck(lambda *v: convolve(kernel, v[0], v[1], matrix, v[2]), (x, hidden, y), fast_mode=True)
    assert gradgradcheck(lambda *v: convolve(kernel, v[0], v[1], matrix, v[2]), (x, hidden, y), fast_mode=True)


def test_only_what_is_asked_for_is_computed(monkeypatch):
    names = []

    def launch(text, function, *arguments):
        names.append(function)
        simulated_cuda.launch(text, function, *arguments)

    monkeypatch.setitem(cuda_convolution.LAUNCH, "cpu", launch)
    model = make_model("nequip", kernels="cuda", num_layers=2)
    out = model(make_batch([make_frame(5)]))
    assert names == ["convolve"] * 2 + ["gradient_y", "collect"] * 2
    names.clear()
    torch.autograd.grad(out["forces"].square().sum() + out["energy"].sum(), list(model.parameters()), allow_unused=True)
    assert sorted(set(names)) == ["collect", "gradient", "second"]


def test_the_gate_before_training_takes_them():
    model = make_model("nequip", kernels="cuda")
    compared = check_kernels(model, make_batch([make_frame(6), make_frame(4, seed=1)]))
    assert compared
    require_kernels(model, compared)


def test_a_wrong_coefficient_is_told(monkeypatch):
    monkeypatch.setattr(cuda_source, "_literal", lambda value: f"(real){value * 1.001!r}")
    cuda_convolution._text.cache_clear()
    model = make_model("nequip", kernels="cuda", l_max=1, num_features=2)
    compared = check_kernels(model, make_batch([make_frame(4)]))
    cuda_convolution._text.cache_clear()
    with pytest.raises(Exception, match="reference"):
        require_kernels(model, compared)


def loss_of(out, batch):
    del batch
    return out["energy"].square().mean() + out["forces"].square().mean()


@pytest.mark.parametrize("compiler", ["interpreted", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_and_recorded_steps_are_those_of_other_kernels(compiler):
    batches = [make_batch([make_frame(6, seed=n), make_frame(3, seed=n + 1)]) for n in range(3)]
    losses = []
    for kernels, settings in (("cuda", {"compile": True, "cuda_graphs": True}), ("ddpkit", {})):
        model = make_model("nequip", kernels=kernels, l_max=1, num_layers=2, num_features=4, radial_width=8)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with using(compiler):
            step = make_step(model, loss_of, optimizer, strategy="none", **settings)
            losses.append([float(step(batch)) for batch in batches])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_what_fills_a_batch_up_changes_no_bit():
    model = make_model("nequip", kernels="cuda", l_max=1, num_layers=2)
    batch = labelled(periodic=True)
    filled = pad(batch, larger(batch, 33), R_MAX)
    plain = run(model, batch)
    output, terms, gradients = run(model, filled)
    assert relative(output["forces"][: len(batch.positions)], plain[0]["forces"]) < 1e-11
    assert [relative(a, b) < 1e-11 for a, b in zip(gradients, plain[2], strict=True)] == [True] * len(gradients)
    found, found_terms, found_gradients = run(model, on_padding(filled, batch, torch.Generator().manual_seed(3)))
    assert torch.equal(found["forces"], output["forces"])
    assert all(torch.equal(found_terms[key], value) for key, value in terms.items())
    assert all(torch.equal(a, b) for a, b in zip(found_gradients, gradients, strict=True))


def test_harmonics_beyond_a_warp_are_refused():
    with pytest.raises(InputError, match="kernels=cuda goes up to l_max 4"):
        make_model("nequip", kernels="cuda", l_max=5)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize(
    ("name", "kernels", "card", "real"),
    [
        ("two warps, one not full", ("convolve", "gradient_y", "second", "collect"), "sm_90", "float"),
        ("l = 1", ("gradient", "second_y"), "sm_80", "double"),
    ],
)
def test_the_text_is_cuda(name, kernels, card, real, tmp_path):
    irreps, l_max, out = IRREPS[name]
    key = CudaConvolution(irreps, l_max, out or every_irrep(irreps, l_max), torch.float32).key
    for kernel in kernels:
        file = tmp_path / f"{kernel}.cu"
        file.write_text(cuda_convolution._text(key, kernel, real))
        command = ["nvcc", f"-arch={card}", "-cubin", "-Werror", "all-warnings", "-o", file.with_suffix(".cubin"), file]
        subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize(("real", "size"), [("float", 4), ("double", 8)])
def test_a_block_fits_into_the_memory_that_it_shares(real, size):
    irreps = {(l, p): 32 for l in range(5) for p in (1, -1)}
    key = CudaConvolution(irreps, 4, every_irrep(irreps, 4), torch.float32).key
    text = re.sub(r"SUMS\(\d+\)", str(cuda_source.SUMMED), cuda_convolution._text(key, "second_y", real))
    warps = int(re.search(r"#define WARPS (\d+)", text)[1])
    shared = [[int(n) for n in re.findall(r"\[(\d+)\]", line)] for line in text.splitlines() if "__shared__" in line]
    assert len(shared) == 3
    assert 1 <= warps <= 4
    assert sum(warps * math.prod(sizes) * size for sizes in shared) <= 48 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("room", [0, 1 << 20], ids=["an atom a warp", "shared"])
@pytest.mark.parametrize("name", IRREPS)
def test_on_a_gpu(name, room, dtype, monkeypatch):
    monkeypatch.setattr(cuda_convolution, "ROOM", room)
    graph = neighbourhoods("cuda")
    pair, numbers, convolve = factors(*IRREPS[name], graph, leaf=True, dtype=dtype, device="cuda")
    ours, again, theirs = (first_and_second(convolve, kernel, numbers) for kernel in (pair[0], *pair))
    bound = 1e-11 if dtype == torch.float64 else 1e-4
    assert [relative(a, b) < bound for a, b in zip(ours, theirs, strict=True)] == [True] * len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
