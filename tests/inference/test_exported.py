"""A model of one's own, exported once for all tests here: what the file computes, and which files are refused."""

import argparse
import contextlib
import copy
import json
import os
import pickle
import platform
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import sympy
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv
from toys import EmbeddedAtom

import ddpkit
from ddpkit import Calculator, InputError, checkpoint
from ddpkit.data import Frame, collate
from ddpkit.errors import ParityError
from ddpkit.experiments import evaluate
from ddpkit.experiments import export as command
from ddpkit.experiments.models_table import build, model_spec
from ddpkit.inference import addressing
from ddpkit.inference import export as exporting
from ddpkit.inference import package as package_of
from ddpkit.inference.exchange import Mirrored, exchanging, from_owners, passing_errors_on
from ddpkit.inference.inputs import inputs_of, random_inputs
from ddpkit.inference.package import read_metadata

R_MAX = 4.0


@pytest.fixture(scope="module")
def model():
    return EmbeddedAtom().eval()


@pytest.fixture(scope="module")
def lines():
    return []


@pytest.fixture(scope="module")
def package(model, lines, tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    ddpkit.export(model, path, source="a test", averaged=True, say=lines.append)
    return path


@pytest.fixture(scope="module")
def exported(package):
    return ddpkit.load_exported(package)


def copying(package):
    """In place of `compile_package`."""

    def copied(_, metadata, path, __):
        shutil.copy(package, path)
        return metadata

    return copied


@pytest.fixture
def uncompiled(package, monkeypatch):
    """What is exported is the package that there is, whatever the model."""
    monkeypatch.setattr(exporting, "compile_package", copying(package))


def frame_of(atoms):
    return Frame(
        atoms.numbers.astype(np.int64), atoms.positions, 0.0, np.zeros((len(atoms), 3)),
        cell=np.array(atoms.cell) if atoms.pbc.any() else None, pbc=np.array(atoms.pbc),
    )  # fmt: skip


def water(number, *, box=None, seed=0):
    random = np.random.default_rng(seed)
    atoms = Atoms()
    for place in list(np.ndindex(5, 5, 5))[:number]:
        one = molecule("H2O")
        one.rotate(random.uniform(0, 360), random.normal(size=3))
        one.translate(3.0 * np.array(place))
        atoms += one
    if box is not None:
        atoms.cell, atoms.pbc = box, True
    return atoms


TRICLINIC = [[9.0, 0.0, 0.0], [2.0, 8.5, 0.0], [-1.0, 1.5, 9.5]]
SYSTEMS = {
    "periodic": [water(27, box=[9.0, 9.0, 9.0])],
    "triclinic": [water(8, box=TRICLINIC)],
    "one direction": [Atoms("OHH", [[0, 0, 0], [1, 0, 0], [0, 1, 0.2]], cell=[3.0, 0, 0], pbc=[True, False, False])],
    "cell smaller than the cutoff": [bulk("O", "fcc", a=2.9)],
    "molecule": [water(1)],
    "an atom alone": [Atoms("O", [[1.0, 2.0, 3.0]])],
    "an atom alone in a cell": [Atoms("H", [[0, 0, 0]], cell=[20, 20, 20], pbc=True)],
    "two atoms": [Atoms("OH", [[0, 0, 0], [0, 0, 1]])],
    "two atoms apart": [Atoms("OH", [[0, 0, 0], [0, 0, 10]])],
    "frames": [water(n, box=[9.0, 10.0, 11.0], seed=n) for n in (1, 27, 5, 2)],
    "frames of both kinds": [water(2), Atoms("O", [[0, 0, 0]]), water(4, box=TRICLINIC)],
}


@pytest.mark.parametrize("images", SYSTEMS.values(), ids=SYSTEMS)
def test_computes_what_the_model_does(exported, model, images):
    batch = collate([frame_of(atoms) for atoms in images], model.species, R_MAX, labels=False)
    ours, theirs = exported(batch), model(batch)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        has_cell = torch.ones(value.shape, dtype=bool)
        if name == "stress":
            has_cell = torch.tensor([bool(atoms.pbc.any()) for atoms in images])[:, None, None].expand(value.shape)
        torch.testing.assert_close(ours[name][has_cell], value[has_cell], rtol=1e-10, atol=1e-12)
        assert not ours[name].requires_grad


def test_takes_batches_without_tables_and_in_float32(exported, model):
    batch = collate([frame_of(water(4))], model.species, R_MAX, labels=False)
    bare = batch.replace(neighbours=None, incoming=None)
    assert torch.equal(exported(bare)["forces"], exported(batch)["forces"])
    short = batch.replace(positions=batch.positions.float())
    assert exported(short)["energy"].dtype == torch.float64


def test_calculator(package, exported, model):
    path_or_model = {"path": package, "text": str(package), "model": exported}
    atoms = water(8, box=TRICLINIC)
    atoms.calc = Calculator(model, device="cpu")
    wanted = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
    for one in path_or_model.values():
        atoms.calc = Calculator(one)
        computed = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
        for a, b in zip(computed, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    atoms.numbers[0] = 6
    with pytest.raises(InputError, match="C, which the model does not know"):
        atoms.get_forces()


def test_says_what_it_is(package, exported, model, lines):
    told = read_metadata(package)
    assert exported.metadata == told
    assert (told.model, told.species, told.r_max, told.cutoffs) == ("EmbeddedAtom", ["H", "O"], R_MAX, None)
    assert (told.precision, told.dtype, told.message_passing, told.exchange_width) == ("float64", "float64", True, 2)
    assert (told.parameters, told.averaged, told.device, told.source) == (2, True, "cpu", "a test")
    assert (told.torch, told.ddpkit, told.weights_sha256) == (
        torch.__version__,
        ddpkit.__version__,
        exporting.checksum(model),
    )
    assert exported.species == ("H", "O")
    assert exported.r_max == R_MAX
    assert lines[0].startswith("tracing")
    assert [line for line in lines if not line.startswith("still")][-1].startswith("comparing")


def test_checksum_tells_weights_apart(model):
    other = EmbeddedAtom(strength=1.0 + 1e-15)
    assert exporting.checksum(other) != exporting.checksum(model)
    assert exporting.checksum(EmbeddedAtom()) == exporting.checksum(model)


def test_copies(exported, model):
    batch = collate([frame_of(water(2))], model.species, R_MAX, labels=False)
    for twin in (copy.deepcopy(exported), pickle.loads(pickle.dumps(exported))):  # noqa: S301  (our own)
        assert torch.equal(twin(batch)["forces"], exported(batch)["forces"])


def test_is_loaded_by_a_process_without_the_model(package, model):
    """Nothing but the file is needed, nothing is compiled, and loading does not import torch's compiler, which takes seconds."""
    program = (
        "import sys, torch, ddpkit\n"
        "from ase.build import molecule\n"
        "atoms = molecule('H2O')\n"
        "atoms.calc = ddpkit.Calculator(sys.argv[1])\n"
        "print(*({'ddpkit.models', 'torch._inductor'} & set(sys.modules)))\n"
        "print(repr(float(atoms.get_potential_energy())), 'ddpkit.models' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, package], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    imported, computed = done.stdout.splitlines()
    assert not imported
    energy, knows_models = computed.split()
    atoms = molecule("H2O")
    atoms.calc = Calculator(model, device="cpu")
    assert float(energy) == pytest.approx(atoms.get_potential_energy(), rel=1e-12)
    assert knows_models == "False"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told to keep memory")
def test_steps_take_no_memory_anew(exported):
    inputs = random_inputs(2000, 0, 60, species=2, r_max=R_MAX, message_passing=True, seed=0, device="cpu").arguments()
    for _ in range(3):
        exported._run(*inputs)
    cleared = []
    for _ in range(3):  # what else the process does may clear pages too, but hardly each time
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            exported._run(*inputs)
        cleared.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(cleared) < inputs[0].nbytes // resource.getpagesize()  # of one array in ten steps


@pytest.mark.parametrize("owned", [2, 5, 30])
def test_ghosts(exported, model, owned):
    """The file itself, called as LAMMPS does: the rows of ghosts go through the exchange."""
    inputs = random_inputs(owned, 7, 12, species=2, r_max=R_MAX, message_passing=True, seed=owned, device="cpu")
    with exchanging(Mirrored(torch.arange(7) % owned)):
        ours, theirs = exported._run(*inputs.arguments()), model.for_inference()(*inputs.arguments())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with pytest.raises(InputError, match="no exchange between ranks"):
        exported._run(*inputs.arguments())


def test_what_an_exchange_raises_is_raised_by_the_code_that_called_it(exported):
    class Lost(Mirrored):
        def to_owners(self, *_):
            raise ConnectionError("rank 3 is lost")

    inputs = random_inputs(5, 7, 12, species=2, r_max=R_MAX, message_passing=True, seed=0, device="cpu").arguments()
    owner = torch.arange(7) % 5
    with pytest.raises(ConnectionError, match="rank 3 is lost"), exchanging(Lost(owner)):
        exported._run(*inputs)
    with exchanging(Mirrored(owner)):
        exported._run(*inputs)


def test_code_that_goes_on_without_the_rows_of_an_exchange_has_failed():
    with pytest.raises(InputError, match="no exchange"), passing_errors_on(), contextlib.suppress(InputError):
        from_owners(torch.zeros(2, 1), 3)


def test_what_pads_small_inputs_is_before_the_ghosts_and_after_the_edges():
    vectors, ends = torch.tensor([[1.0, 0, 0]], dtype=torch.float64), torch.tensor([0])
    padded = inputs_of(vectors, torch.tensor([1, 0]), ends, torch.tensor([1]), 1, message_passing=True, beyond=9.0)
    assert padded.species.tolist() == [1, 0, 0, 0]
    assert padded.centre.tolist() == [0, 1, 2]
    assert padded.neighbour.tolist() == [3, 2, 1]
    assert padded.vectors.norm(dim=1).tolist() == [1.0, 9.0, 9.0]
    assert padded.outgoing.tolist() == [[0, 3], [1, 3], [2, 3]]
    assert padded.incoming.tolist() == [[3, 3], [2, 3], [1, 3], [0, 3]]


def test_eval_takes_it(package, model, tmp_path, capsys):
    images = [water(n, seed=n) for n in (1, 2, 3)]
    for atoms in images:
        atoms.calc = Calculator(model, device="cpu")
        atoms.calc = SinglePointCalculator(atoms, energy=atoms.get_potential_energy(), forces=atoms.get_forces() + 0.5)
    write(tmp_path / "set.xyz", images)
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    words = [package, tmp_path / "set.xyz", "--out", tmp_path / "out", "--device", "cpu"]
    evaluate.main(parser.parse_args([str(word) for word in words]))
    assert re.search(r"O +6 +500 +500", capsys.readouterr().out)  # meV/Å
    with pytest.raises(InputError, match=r"model\.pt2 is an exported model, so its data are not known: give DATA too"):
        evaluate.main(parser.parse_args([str(package), "--device", "cpu"]))


# --- what is refused ------------------------------------------------------------------------------------------------------------


def rewritten(package, path, **changes):
    """A copy of the package that says something else of itself."""
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith("_metadata.json"):
                told = json.loads(content)
                own = json.loads(told["ddpkit"]) | {k: v for k, v in changes.items() if k != "AOTI_CPU_ISA"}
                told |= {k: v for k, v in changes.items() if k == "AOTI_CPU_ISA"}
                told["ddpkit"] = json.dumps({k: v for k, v in own.items() if v is not None or k == "cutoffs"})
                content = json.dumps(told).encode()
            new.writestr(item, content)
    return path


def test_more_atoms_than_code_can_address_are_refused(package, model, tmp_path):
    """As if each edge, or entry of a table, had a thousandth of what 32 bits can tell apart."""
    few, many = (collate([frame_of(water(n))], model.species, R_MAX, labels=False) for n in (4, 27))
    for name in ("edges", "outgoing"):
        exported = ddpkit.load_exported(
            rewritten(package, tmp_path / f"{name}.pt2", elements=[{name: 2**31 // 1000}, {"owned": 1}])
        )
        torch.testing.assert_close(exported(few)["forces"], model(few)["forces"], rtol=1e-10, atol=1e-12)
        with pytest.raises(InputError, match=rf"81 atoms with {many.edge_index.shape[1]} edges are \d+\.\d times what"):
            exported(many)


class _MostElements(torch.fx.Interpreter):
    """Of a tensor that any node of a graph makes."""

    found = 0

    def run_node(self, node):
        made = super().run_node(node)
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.found = max(self.found, tensor.numel())
        return made


@pytest.mark.parametrize("name", ["toy", "allegro_tiny", "nequip_tiny"])
def test_no_tensor_has_more_elements_than_a_package_for_gpus_says(name, model):
    if name != "toy":
        model = build(model_spec(name, []), ("H", "O")).eval()
    module = model.for_inference().eval()
    facts = exporting._describe(model, module, "cpu", source="", averaged=False)
    traced = package_of._traced(module, facts)
    elements = json.loads(json.dumps(addressing.elements_of(traced)))  # as it is written
    made = [node.meta.get("val") for node in traced.graph.nodes]
    widest = max(t.numel() for t in made if isinstance(t, torch.Tensor) and isinstance(t.numel(), int))  # at any sizes
    has_grown = False
    for owned, ghosts, most in ((60, 40, 8), (5, 400, 3), (40, 10, 60)):
        inputs = random_inputs(
            owned,
            ghosts,
            most,
            species=2,
            r_max=model.r_max,
            message_passing=module.message_passing,
            seed=most,
            device="cpu",
        )
        counted = _MostElements(traced.module())
        with torch.no_grad(), exchanging(Mirrored(torch.arange(ghosts) % owned)):
            counted.run(*inputs.arguments())
        sizes = inputs.sizes()
        bound = max(sum(count * sizes[key] for key, count in of_tensor.items()) for of_tensor in elements)
        assert counted.found <= max(bound, widest)
        if counted.found > widest:
            assert bound <= 3 * counted.found
            has_grown = True
    assert has_grown


EDGES, OWNED, ALL, MOST, MOST_IN = sympy.symbols("edges owned all most most_in", positive=True, integer=True)
GROWTHS = [
    addressing._Growth("incoming", (ALL, MOST_IN)),
    addressing._Growth("outgoing", (OWNED, MOST), least=(ALL,)),
    addressing._Growth("edges", (EDGES,)),
    addressing._Growth("all", (ALL,)),
    addressing._Growth("owned", (OWNED,), least=(ALL,)),
]
GROWING = {
    "edges": 576 * EDGES + 576,
    "blocks of a table": 48 * OWNED * FloorDiv(MOST + 7, 8),
    "a table and its rows": 3 * OWNED * MOST + 500 * OWNED,
    "blocks of edges and atoms": 320 * FloorDiv(EDGES + 7 * ALL, 8),
    "those that are owned": 17 * sympy.Min(OWNED, ALL),
    "incoming": 5 * ALL * MOST_IN + ALL,
}


@pytest.mark.parametrize("expression", GROWING.values(), ids=GROWING)
@settings(max_examples=20, deadline=None)
@given(owned=st.integers(2, 10**6), ghosts=st.integers(0, 10**7), edges=st.integers(2, 10**8), most=st.integers(2, 500))
def test_what_is_told_of_a_number_of_elements_is_never_less(expression, owned, ghosts, edges, most):
    every = owned + ghosts
    sizes = {"edges": edges, "owned": owned, "all": every, "outgoing": owned * most, "incoming": 2 * every * most}
    told = addressing._told(expression, GROWTHS)
    symbols = {EDGES: edges, OWNED: owned, ALL: every, MOST: most, MOST_IN: 2 * most}
    assert int(expression.subs(symbols)) <= sum(count * sizes[name] for name, count in told.items()) + 1000


TOO_FAST = EDGES * MOST, ALL * MOST, EDGES * MOST_IN, EDGES**2, OWNED * ALL, OWNED * MOST**2, EDGES * OWNED


@pytest.mark.parametrize("expression", TOO_FAST, ids=map(str, TOO_FAST))
def test_what_grows_faster_than_atoms_edges_and_tables_is_refused(expression):
    assert addressing._told(expression, GROWTHS) is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": 1}, r"is a package of format 1, and this ddpkit reads 2"),
        ({"species": None}, r"is a package of format 2"),
        ({"torch": "2.1.0"}, r"was compiled by torch 2\.1\.0 and cannot run under torch"),
        pytest.param(
            {"device": "cuda"},
            r"was compiled for an NVIDIA GPU, and there is none here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=["format", "lacks something", "torch", "device"],
)
def test_a_package_of_something_else_is_refused(package, tmp_path, changes, sentence):
    path = rewritten(package, tmp_path / "other.pt2", **changes)
    with pytest.raises(InputError, match=sentence):
        ddpkit.load_exported(path)
    with pytest.raises(InputError, match=sentence):
        Calculator(path)


def test_a_package_for_another_processor_is_refused(package, tmp_path, monkeypatch):
    path = rewritten(package, tmp_path / "other.pt2", AOTI_CPU_ISA="AVX512 AVX512_VNNI")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.raises(InputError, match=r"instructions \(AVX512\) that this one lacks"):
        ddpkit.load_exported(path)


def test_what_is_no_package_is_refused(package, tmp_path):
    with pytest.raises(InputError, match=r"There is no file .*nowhere\.pt2"):
        ddpkit.load_exported(tmp_path / "nowhere.pt2")
    (tmp_path / "text.pt2").write_text("hello")
    torch.save({"a": torch.ones(2)}, tmp_path / "saved.pt2")
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(3, 2),)), tmp_path / "program.pt2")
    whole = package.read_bytes()
    (tmp_path / "short.pt2").write_bytes(whole[: len(whole) // 2])
    for name in ("text", "saved", "program", "short"):
        with pytest.raises(InputError, match=rf"{name}\.pt2 is no package that `ddpkit export` wrote"):
            ddpkit.load_exported(tmp_path / f"{name}.pt2")


def test_a_damaged_package_is_refused(package, tmp_path):
    with zipfile.ZipFile(package) as archive:
        largest = max(archive.infolist(), key=lambda item: item.file_size)
    content = bytearray(package.read_bytes())
    content[largest.header_offset + largest.file_size // 2] ^= 1
    (tmp_path / "damaged.pt2").write_bytes(content)
    with pytest.raises(InputError, match=r"is damaged \(the checksum of .* is wrong\)"):
        ddpkit.load_exported(tmp_path / "damaged.pt2")


@pytest.mark.usefixtures("uncompiled")
def test_code_that_computes_something_else_is_not_written(tmp_path):
    (tmp_path / "model.pt2").write_text("what was there")
    with pytest.raises(ParityError, match=r"computes something else than the model: .*, so nothing was written"):
        ddpkit.export(EmbeddedAtom(strength=1.001), tmp_path / "model.pt2")
    assert [item.name for item in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_text() == "what was there"


def test_a_model_that_says_another_thing_for_inference_is_not_written(package, monkeypatch, tmp_path):
    """Module and code agree, but are not the model."""

    class Wrong(EmbeddedAtom):
        def forward(self, batch):
            return {name: 2 * value for name, value in super().forward(batch).items()}

    monkeypatch.setattr(exporting, "compile_package", copying(package))
    with pytest.raises(ParityError, match=r"than the model: (energy|forces|stress) by 0\.5 relative .* for frames of"):
        ddpkit.export(Wrong(), tmp_path / "model.pt2")


def test_export_refuses_a_model_that_looks_at_values(tmp_path):
    class Peeking(EmbeddedAtom):
        def _pairs(self, vectors, species, centre, neighbour):
            assert int(centre.max()) >= 0
            return super()._pairs(vectors, species, centre, neighbour)

    with pytest.raises(
        InputError, match=r"^Peeking cannot be traced for any number of atoms .*take numbers from shapes"
    ):
        ddpkit.export(Peeking(), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_export_refuses_where_there_is_no_compiler(model, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"There is no C\+\+ compiler no-such-compiler here"):
        ddpkit.export(model, tmp_path / "model.pt2")


@pytest.mark.long
def test_a_compiler_that_links_its_own_library_makes_what_can_be_loaded(tmp_path):
    """Locales of two C++ libraries in one process are mixed up, and torch's code for loading asks for one."""
    compiler = tmp_path / "g++"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} -static-libstdc++ -static-libgcc "$@"\n')
    compiler.chmod(0o755)
    program = (
        "import sys\n"
        "from toys import EmbeddedAtom\n"
        "import ddpkit\n"
        "ddpkit.export(EmbeddedAtom().eval(), sys.argv[1])\n"  # which loads it
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "model.pt2"],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "CXX": str(compiler), "PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("uncompiled")
def test_export_refuses_what_it_cannot_do(model, tmp_path):
    def refused(sentence, given=model, to="model.pt2", **options):
        with pytest.raises(InputError, match=sentence):
            ddpkit.export(given, tmp_path / to, **options)

    refused(r"Linear cannot be exported: it needs species, r_max and a method for_inference\(\)", torch.nn.Linear(2, 2))
    refused(r"model\.pt does not end in \.pt2", to="model.pt")
    (tmp_path / "folder.pt2").mkdir()
    refused(r"folder\.pt2 is a folder", to="folder.pt2")
    (tmp_path / "file").write_text("")
    refused(r"cannot be written", to="file/model.pt2")
    if not torch.cuda.is_available():
        refused(r"There is no NVIDIA GPU to compile for", device="cuda")
    assert not (tmp_path / "model.pt2").exists()


# --- the command ----------------------------------------------------------------------------------------------------------------


def ddpkit_export(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.main(parser.parse_args([str(word) for word in words]))


def write_checkpoint(path, weights, averaged=None):
    ema = (
        None if averaged is None else {f"module.{k}": v for k, v in averaged.items()} | {"n_averaged": torch.tensor(3)}
    )
    state = {"optimizer": {}, "scheduler": {}, "progress": {}, "model": weights, "ema": ema}
    checkpoint.save(
        path, state | {"model_spec": {"_target_": "toys.EmbeddedAtom", "species": ["H", "O"], "r_max": R_MAX}}
    )


@pytest.mark.usefixtures("uncompiled")
def test_command_takes_averaged_weights_of_a_run(model, tmp_path, monkeypatch, capsys):
    other, run = EmbeddedAtom(strength=3.0), tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    described = []
    copied = exporting.compile_package

    def compile_package(module, metadata, path, say):
        described.append(metadata)
        return copied(module, metadata, path, say)

    monkeypatch.setattr(exporting, "compile_package", compile_package)
    write_checkpoint(run / "checkpoints" / "last.pt", other.state_dict(), averaged=model.state_dict())
    ddpkit_export(run, "--out", tmp_path / "new" / "model.pt2")
    assert "averaged weights of" in capsys.readouterr().out
    write_checkpoint(run / "checkpoints" / "best.pt", model.state_dict())
    ddpkit_export(run, "--out", tmp_path / "best.pt2")
    ddpkit_export(run / "checkpoints" / "best.pt", "--out", tmp_path / "file.pt2")
    assert "(weights of" in capsys.readouterr().out
    assert [d.averaged for d in described] == [True, False, False]
    assert {d.weights_sha256 for d in described} == {exporting.checksum(model)}
    assert [d.source for d in described] == [
        str(run / "checkpoints" / name) for name in ("last.pt", "best.pt", "best.pt")
    ]
    assert (tmp_path / "new" / "model.pt2").is_file()


def test_command_refuses_what_holds_no_weights(tmp_path):
    with pytest.raises(InputError, match=r"holds no weights to export"):
        ddpkit_export(tmp_path, "--out", tmp_path / "model.pt2")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(InputError, match=r"cannot be read"):
        ddpkit_export(tmp_path / "text.pt", "--out", tmp_path / "model.pt2")
