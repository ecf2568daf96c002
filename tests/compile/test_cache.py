"""A start with damaged files in the compiler's cache."""

import os
import re
import tempfile
import textwrap
import time
import warnings
from pathlib import Path

import pytest
from starts import fork_program

from ddpkit.compile import cache
from ddpkit.errors import InputError

PROGRAM = textwrap.dedent("""
    import threading
    import torch
    from ddpkit.compile.graph import lower, trace
    from ddpkit.compile.layout import Layout, sizes_of

    x = torch.linspace(0, 1, 24, dtype=torch.float64).reshape(12, 2)
    layout = Layout.of([x])
    graph = trace(lambda x, fixed: [(x.sin() * fixed[0]).cumsum(0).tanh()], layout, sizes_of(layout, x), [torch.ones(2)])
    kernel = lower(graph.graph, graph.symbols, graph.inputs, ())
    (y,) = kernel([12, x, torch.ones(2)])
    torch.testing.assert_close(y, x.sin().cumsum(0).tanh())
    print("right")
    for thread in threading.enumerate():
        if thread.name == "look at the processor":  # what it compiles would be met half done by the next start
            thread.join()
""")


def start(folder):
    """What a start of the program says, and on the error stream."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    environment.pop("TORCHINDUCTOR_COMPILE_THREADS", None)
    with tempfile.TemporaryDirectory() as name:
        program, said = Path(name) / "program.py", Path(name) / "said"
        program.write_text(PROGRAM)
        code = fork_program(program, [], environment, said).wait(300.0)
        return code, (said / "output").read_text(), (said / "errors").read_text()


def compiled_files(folder):
    """Without torch 2.14's empty notes that a library could be loaded."""
    files = (p for p in folder.rglob("*") if p.is_file() and "locks" not in p.parts and p.suffix != ".load_ok")
    return sorted(p for p in files if not p.name.startswith("."))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_at_a_line(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) * 2 // 3]))


def spoil(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = os.urandom(len(content[middle : middle + 64]))
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    code, out, complaints = start(folder)
    assert (code, out) == (0, "right\n"), complaints
    assert "cache" not in complaints
    kinds = {path.suffix or path.parts[-4] for path in compiled_files(folder)}
    assert kinds == {".so", ".cpp", ".py", "fxgraph"}
    return folder


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        pytest.param(spoil, marks=pytest.mark.long),
        pytest.param(cut_at_a_line, marks=pytest.mark.long),
        pytest.param(empty, marks=pytest.mark.long),
    ],
)
def test_damaged_files_are_compiled_anew_with_one_line(folder, damage):
    files = compiled_files(folder)
    for path in files:
        damage(path)
    code, out, complaints = start(folder)
    assert (code, out) == (0, "right\n"), complaints
    assert complaints.count("damaged files were removed from the compiler's cache") == 1
    assert "Traceback" not in complaints
    assert [path for path in compiled_files(folder) if cache._is_damaged(path)] == []


def test_afterwards_nothing_is_compiled(folder):
    start(folder)  # the first start from a cache makes libraries of its own
    before = {path: path.stat().st_mtime_ns for path in compiled_files(folder)}
    code, out, complaints = start(folder)
    assert (code, out) == (0, "right\n"), complaints
    assert "cache" not in complaints
    assert {path: path.stat().st_mtime_ns for path in compiled_files(folder)} == before


@pytest.mark.long
def test_what_no_seal_tells_is_compiled_without_the_cache(folder):
    for seal in folder.rglob(".*.seal"):
        seal.unlink()
    for path in compiled_files(folder):
        if path.suffix == ".py":
            path.write_text("raise SystemError('damaged')")
    code, out, complaints = start(folder)
    assert (code, out) == (0, "right\n"), complaints
    assert f"The compiler's cache in {folder} could not be used" in complaints
    assert "remove that folder" in complaints


def test_the_note_that_a_library_could_be_loaded_is_no_damage_and_goes_with_the_library(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    library = tmp_path / "ab" / "cab.main.so"
    note = library.with_name(f"{library.name}.load_ok")
    library.parent.mkdir()
    note.touch()
    assert not cache.mend()
    assert note.exists()
    library.write_bytes(b"cut short")
    with pytest.warns(UserWarning, match="^1 damaged files were removed from the compiler's cache"):
        assert cache.mend()
    assert list(library.parent.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache.tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match=re.escape(f"in {tmp_path} cannot be written (Permission denied): set ")):
        cache.make_ready()


def test_what_was_looked_through_since_the_machine_started_is_not_read_again(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    read = []
    original = cache._checksum
    monkeypatch.setattr(cache, "_checksum", lambda path: read.append(path.name) or original(path))
    monkeypatch.setattr(cache, "_COARSE", 0)
    (tmp_path / "ab").mkdir()
    one, two = tmp_path / "ab" / "one.py", tmp_path / "ab" / "two.py"
    with cache.sealing():
        for path in (one, two):
            path.write_text("1")
    time.sleep(0.05)  # a tick of the file system's clock

    def looks():
        read.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            is_mended = cache.mend()
        return is_mended, sorted(read)

    assert looks() == (False, ["one.py", "two.py"])
    assert looks() == (False, [])
    before = two.stat()
    two.write_text("2")
    os.utime(two, ns=(before.st_atime_ns, before.st_mtime_ns))  # another content, of the same size and time
    assert looks() == (True, ["two.py"])
    assert not two.exists()
    monkeypatch.setattr(cache, "_boot", lambda: "another start")
    assert looks() == (False, ["one.py"])
    monkeypatch.setattr(cache, "_boot", lambda: "")  # a system that does not tell
    assert looks() == looks() == (False, ["one.py"])
