"""Compiled code from the disk: when it is used, when it is not, and that nothing shows whether it was."""

import hashlib
import importlib.util
import os
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from toy import Toy, random_batch

import ddpkit
from ddpkit.compile import gradients, stored
from ddpkit.testing import run_ranks

MODULE = """
import torch
from torch import nn

SCALE = 2.0
TABLE = torch.tensor([1.0, 2.0])


def bent(x):
    return x.tanh()


class Model(nn.Module):
    slope = 1.0

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 1, dtype=dtype)
        self.power = 2

    def forward(self, x):
        return bent(self.linear(x)) ** self.power * SCALE * self.slope * TABLE.sum().item()
"""


class TracedError(Exception):
    pass


def loaded(folder, source=MODULE, name="of_a_user"):
    """A module of a user's, from a file."""
    path = Path(folder) / f"{name}.py"
    path.write_text(source)
    # Python would take the compiled form of another text of this length, written within the same second.
    shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def criterion(output, batch):
    return (output - batch.sum(1, keepdim=True)).square().mean()


def prepared(model, batch, loss=criterion, **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = ddpkit.make_step(model, loss, optimizer, compile=True, **{"strategy": "none", **options})
    step.prepare(batch)
    return step


def batch(rows=7, dtype=torch.float64):
    return torch.linspace(-1, 1, rows * 3, dtype=dtype).reshape(rows, 3)


def entries(folder):
    return [path for path in (Path(folder) / "ddpkit").rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cache that holds the code of `MODULE`."""
    folder = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "cache"))
        prepared(loaded(folder).Model(), batch())
    assert len(entries(folder / "cache")) == 1
    return folder


@pytest.fixture
def hits(folder, monkeypatch):
    """Whether code for a model comes from the disk."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "cache"))

    def trace(*_):
        raise TracedError

    monkeypatch.setattr(gradients, "trace", trace)

    def hits(model, *arguments, **options):
        try:
            prepared(model, *arguments, **options)
        except TracedError:
            return False
        return True

    return hits


def test_the_same_is_taken_from_the_disk(folder, hits):
    assert hits(loaded(folder).Model(), batch())


def test_other_values_of_parameters_are_no_other_code(folder, hits):
    model = loaded(folder).Model()
    with torch.no_grad():
        model.linear.weight.add_(0.5)
    assert hits(model, batch())


@pytest.mark.parametrize(
    ("line", "other"),
    [
        ("x.tanh()", "x.sin()"),  # a function that the model calls
        ("SCALE = 2.0", "SCALE = 3.0"),  # a constant of the module
        ("[1.0, 2.0]", "[1.0, 2.5]"),  # a tensor of the module
        ("slope = 1.0", "slope = 1.5"),  # of the class
        ("self.power = 2", "self.power = 3"),  # of the object
        ("* SCALE *", "+ SCALE *"),  # the model's own line
        ("import torch\n", "import torch\n\n"),  # messages name lines
    ],
)
def test_a_line_that_has_changed_is_traced(folder, hits, line, other):
    assert MODULE.count(line) >= 1
    assert not hits(loaded(folder, MODULE.replace(line, other, 1)).Model(), batch())
    assert hits(loaded(folder).Model(), batch())


def test_what_is_exchanged_in_memory_is_traced(folder, hits, monkeypatch):
    module = loaded(folder)
    monkeypatch.setattr(module, "bent", torch.sin)
    assert not hits(module.Model(), batch())
    module = loaded(folder)
    module.Model.slope = 2.0
    assert not hits(module.Model(), batch())


def test_other_options_dtypes_and_criteria_are_traced(folder, hits):
    model = loaded(folder).Model
    assert not hits(model(torch.float32), batch(dtype=torch.float32))
    assert not hits(model(), batch(), strategy="ingraph")
    assert not hits(model(), batch(), loss=lambda y, _: y.square().mean())
    frozen = model()
    frozen.linear.bias.requires_grad_(False)
    assert not hits(frozen, batch())


def test_another_release_or_setting_is_traced(folder, hits, monkeypatch):
    model = loaded(folder).Model
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", torch.__version__ + ".post1")
        assert not hits(model(), batch())
    with torch._inductor.config.patch(epilogue_fusion=False):
        assert not hits(model(), batch())
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert not hits(model(), batch())
    finally:
        torch.set_num_threads(threads)
    assert hits(model(), batch())


def test_another_package_is_traced(folder, hits, monkeypatch, tmp_path):
    (tmp_path / "site-packages" / "new_package-1.0.dist-info").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    stored._releases.cache_clear()
    try:
        assert not hits(loaded(folder).Model(), batch())
    finally:
        stored._releases.cache_clear()


def test_much_larger_batches_are_code_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    sizes = []
    original = gradients.trace
    monkeypatch.setattr(gradients, "trace", lambda *a: sizes.append(a[2]["atoms"]) or original(*a))
    loss = ddpkit.EnergyForcesLoss()
    small, similar, large = random_batch([6, 5]), random_batch([7, 6], seed=3), random_batch([9] * 12)
    for one in (small, similar, large, large):
        prepared(Toy(width=3), one, loss)
    assert sizes == [11, 108]


@pytest.mark.parametrize(
    "damage",
    [lambda x: x[: len(x) // 2], lambda x: x[:0], lambda x: x[:900] + b"????" + x[904:], lambda x: x + b"x"],
    ids=["cut", "empty", "spoilt", "longer"],
)
def test_a_damaged_entry_is_removed_and_compiled_anew(folder, hits, damage):
    (path,) = entries(folder / "cache")
    content = path.read_bytes()
    path.write_bytes(damage(content))
    try:
        assert not hits(loaded(folder).Model(), batch())
        assert not path.exists()
    finally:
        path.write_bytes(content)
    assert hits(loaded(folder).Model(), batch())


def test_an_entry_of_something_else_is_compiled_anew(folder, hits):
    (path,) = entries(folder / "cache")
    content = path.read_bytes()
    other = b"\x80\x04N."  # None
    path.write_bytes(hashlib.sha256(other).digest() + other)
    try:
        assert not hits(loaded(folder).Model(), batch())
    finally:
        path.write_bytes(content)


def test_wrong_code_on_the_disk_is_found_by_the_check_and_replaced(monkeypatch, tmp_path):
    """Two modules that the digest is made to take for one."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(gradients, "described", lambda *_: "the same")
    prepared(loaded(tmp_path).Model(), batch())
    other = loaded(tmp_path, MODULE.replace("tanh", "sin")).Model()
    step = prepared(other, batch())
    assert all(difference.is_fine for difference in step._gradients.tally.differences)
    expected = criterion(other(batch()), batch())
    torch.testing.assert_close(step(batch()), expected.detach())
    (path,) = entries(tmp_path / "cache")
    prepared(loaded(tmp_path, MODULE.replace("tanh", "sin")).Model(), batch())
    assert entries(tmp_path / "cache") == [path]


def test_what_cannot_be_told_apart_is_traced_at_every_start(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    model = loaded(tmp_path).Model()
    model.file = (tmp_path / "open").open("w")
    prepared(model, batch())
    model.file.close()
    assert entries(tmp_path / "cache") == []


@pytest.mark.usefixtures("interpreted")
def test_nothing_is_stored_of_what_is_only_interpreted(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    prepared(loaded(tmp_path).Model(), batch())
    assert entries(tmp_path / "cache") == []


# --- in processes of their own ------------------------------------------------------------------------------------------


def trained(strategy, compile_):
    """Losses, the last parameters and how often was traced, of a few steps."""
    traces = []
    original = gradients.trace
    gradients.trace = lambda *a: traces.append(1) or original(*a)
    model = Toy(width=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = ddpkit.make_step(model, ddpkit.EnergyForcesLoss(), optimizer, strategy=strategy, compile=compile_)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    losses = [float(step(random_batch(sizes, seed=rank))["loss"]) for sizes in ([6, 5], [4, 4, 3], [7])]
    parameters = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    return losses, hashlib.sha256(parameters).hexdigest(), len(traces)


@pytest.mark.parametrize("strategy", ["custom", "ingraph", "standard"])
def test_two_ranks_that_start_at_once_share_entries_and_get_the_same(tmp_path, strategy):
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    cold = run_ranks(trained, 2, strategy, True, timeout=300, environment=environment)
    written = {path: path.read_bytes() for path in entries(tmp_path)}
    assert len(written) == 1
    warm = run_ranks(trained, 2, strategy, True, timeout=300, environment=environment)
    assert [result[:2] for result in warm] == [result[:2] for result in cold]
    assert warm[0][1] == warm[1][1]
    assert {path: path.read_bytes() for path in entries(tmp_path)} == written
    if strategy != "standard":  # which compiles the model alone
        assert [result[2] for result in (*cold, *warm)] == [1, 1, 0, 0]


def test_a_rank_without_the_entry_gets_the_same(tmp_path):
    """As on a second host, whose disk has nothing."""
    cold = run_ranks(with_own_disk, 2, str(tmp_path), False, timeout=300)
    half = run_ranks(with_own_disk, 2, str(tmp_path), True, timeout=300)
    assert [result[:2] for result in half] == [result[:2] for result in cold]
    assert [result[2] for result in (*cold, *half)] == [1, 1, 0, 1]


def test_damaged_libraries_are_compiled_anew_without_a_trace(tmp_path):
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    (cold,) = run_ranks(trained, 1, "none", True, timeout=300, environment=environment)
    libraries = [path for path in tmp_path.rglob("*.so") if not path.name.startswith(".")]
    assert libraries
    for path in libraries:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (warm,) = run_ranks(trained, 1, "none", True, timeout=300, environment=environment)
    assert warm == (*cold[:2], 0)


def with_own_disk(folder, is_lost):
    rank = torch.distributed.get_rank()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/{rank}"
    if is_lost and rank == 1:
        for path in entries(f"{folder}/1"):
            path.unlink()
    return trained("ingraph", True)


# --- variants of Triton's kernels, without a GPU --------------------------------------------------------------------------


class Timed:
    """As Inductor's autotuner, as far as variants go."""

    def __init__(self, *configs):
        self.launchers = [types.SimpleNamespace(config=config) for config in configs]


@pytest.mark.parametrize(
    ("kept", "left"),
    [
        ({"kernel": "XBLOCK: 2"}, ["XBLOCK: 2"]),
        ({"kernel": "XBLOCK: 9"}, ["XBLOCK: 1", "XBLOCK: 2"]),  # is there no longer: both are timed
        ({}, ["XBLOCK: 1", "XBLOCK: 2"]),
    ],
    ids=["chosen", "gone", "unknown"],
)
def test_the_variant_that_was_chosen_is_left(monkeypatch, kept, left):
    from ddpkit.compile import inductor

    module = types.ModuleType("code")
    module.key, module.kernel, module.other = "key", Timed("XBLOCK: 1", "XBLOCK: 2"), Timed("XBLOCK: 4")
    monkeypatch.setattr(inductor.PyCodeCache, "modules", [module])
    code = types.SimpleNamespace(cache_key="key")
    assert inductor._chosen(code) == {"other": "XBLOCK: 4"}
    inductor._choose(code, kept)
    assert [launcher.config for launcher in module.kernel.launchers] == left
    assert [launcher.config for launcher in module.other.launchers] == ["XBLOCK: 4"]
