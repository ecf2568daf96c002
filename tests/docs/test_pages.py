"""Every block of code of every page: Python is run, commands are parsed by the programs that they name, cheap ones are run."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import yaml
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.io import write
from fences import LANGUAGES, ROOT, blocks, pages
from hydra.utils import get_object
from shell import Shell, check

import ddpkit
from ddpkit.compile.backend import using
from ddpkit.experiments.cli import _dispatch
from ddpkit.experiments.config import flat, read
from ddpkit.models import NequIP, save_nequip
from ddpkit.ranks import group
from ddpkit.testing.__main__ import main as ddpkit_testing

RESULTS = ROOT / "docs" / "results" / "2026-11-25-cpu"
# Pages whose single-process commands are run too, shortened; ranks are started by the conformance suite alone.
RUN = {
    "docs/tutorials/first-study.md",
    "docs/tutorials/own-data.md",
    "docs/tutorials/own-model.md",
    "docs/tutorials/own-strategy.md",
    "docs/how-to/convert-nequip.md",
    "docs/how-to/reproducible-runs.md",
}
CHEAP = ("run", "eval", "data", "analyze", "convert-config", "models", "predict")
PAGES = pages()
BASH = shutil.which("bash") or "/bin/bash"


def frames(count=40, name="CH3CH2OH"):
    random = np.random.default_rng(1)
    for _ in range(count):
        atoms = molecule(name)
        atoms.positions += 0.05 * random.standard_normal(atoms.positions.shape)
        atoms.calc = EMT()
        atoms.get_forces()
        yield atoms


def prepared():
    write("some.extxyz", list(frames()))
    _dispatch(["data", "prepare", "ase", "some.extxyz", "--out", "prepared/ethanol"])


def trained(folder):
    _dispatch(["run", *shortened([f"run_dir={folder}"])])


def finished_studies():
    for name in ("baseline", "rerun", "standard", "compiled", "new_seed"):
        shutil.copytree(RESULTS / "numerics" / name, f"demo/numerics/{name}")
    for name in ("standard-eager-32", "custom-eager-32"):
        shutil.copytree(RESULTS / "speed" / name, f"demo/speed/{name}")


def model_to_use(monkeypatch):
    """A run in the place of the exported file, which takes a minute to make and has tests of its own."""
    from ddpkit.checkpoint import load_model
    from ddpkit.inference import exported

    trained("runs/stage2")
    model = load_model(Path("runs/stage2"))
    model.metadata = {}
    monkeypatch.setattr(exported, "load", lambda _: model)
    monkeypatch.setattr(ddpkit, "load_exported", exported.load)
    return {"atoms": molecule("CH3CH2OH")}


def material(page, monkeypatch):
    """Makes what a page takes for granted; names that its code uses."""
    write("some.extxyz", list(frames()))
    if page == "docs/tutorials/first-study.md":
        finished_studies()
    elif page == "docs/tutorials/own-model.md":
        prepared()
    elif page == "docs/how-to/convert-nequip.md":
        write("frames.xyz", list(frames(name="H2O")), format="extxyz")
        save_nequip(
            NequIP(["H", "O"], r_max=4.0, num_layers=1, l_max=1, num_features=4, avg_num_neighbors=2.0), "last.ckpt"
        )
    elif page == "docs/how-to/inference.md":
        return model_to_use(monkeypatch)
    return {}


def shortened(words):
    """The words of a run, so that it takes two steps on made-up data."""
    if any(word.startswith("resume=") for word in words):
        return [*words, "train.max_steps=3"]
    short = ["train.max_steps=2", "train.max_epochs=1", "compile=false", "device=cpu", "check_kernels=false"]
    if not any(word.startswith("experiment=") for word in words):
        short += ["model=allegro_tiny", "data.split=[0.8,0.1,0.1]"]
        if "data=files" not in words:
            short += ["data=files", "data.path=some.extxyz"]
    return [*words, "data.cache=cache", *short]


def run(words):
    """Runs a command where that is cheap, without the launcher."""
    while words and words[0] in ("mpirun", "-n", "2"):
        words = words[1:]
    program, *rest = words
    if program in ("ddpkit-run", "ddpkit-analyze"):
        program, rest = "ddpkit", [program.rpartition("-")[2], *rest]
    if program == "python" and rest[:2] == ["-m", "ddpkit.testing"]:
        assert ddpkit_testing(rest[2:]) == 0
    if program != "ddpkit" or not rest or rest[0] not in CHEAP or {"--cfg", "strategy=emulated"} & {*rest}:
        return
    if rest[0] == "run":
        rest = ["run", *shortened(rest[1:])]
    elif rest[0] == "eval":
        rest += ["--device", "cpu"]
    _dispatch(rest)


def leave_group():
    if dist.is_initialized():
        group.shutdown()


@pytest.fixture(autouse=True)
def sets_of_the_studies(monkeypatch):
    for name in ("DDPKIT_SPICE", "DDPKIT_MPTRJ", "DDPKIT_MOLECULE"):
        monkeypatch.setenv(name, "prepared/set")


@pytest.fixture
def page_folder(tmp_path, monkeypatch):
    """Where the commands of a page are given."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.filterwarnings("error:Converting a tensor with requires_grad")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_blocks_of_a_page(page, page_folder, monkeypatch):
    names = {"__name__": "__main__", "ddpkit": ddpkit} | material(page, monkeypatch)
    shell = Shell()
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block}: {block.language!r} is none of {', '.join(sorted(LANGUAGES))}"
        if block.title:
            (page_folder / block.title).write_text(block.text)
        try:
            if block.language == "python":
                monkeypatch.setattr(sys, "argv", [block.title, "1"])
                with using("interpreted"):
                    exec(compile(block.text, block.title or str(block), "exec"), names)  # noqa: S102  (our own pages)
                leave_group()
            elif block.language == "yaml":
                targets = re.findall(r"_target_: (ddpkit\.[\w.]+)", block.text)
                assert yaml.safe_load(block.text)
                assert all(map(get_object, targets))
            elif block.language == "bash":
                assert subprocess.run([BASH, "-n"], input=block.text, text=True, check=False).returncode == 0
                for words in shell.commands(block.text):
                    check(words, page_folder)
                    if page in RUN:
                        run(words)
        except BaseException as error:
            error.add_note(f"in the block of {block}")
            raise


def test_commands_that_do_not_exist_are_seen(tmp_path):
    for line in (
        "ddpkit fly",
        "ddpkit-run strategy=standrad",
        "ddpkit-run trian.max_epochs=1",
        "ddpkit eval runs/one --splitt test",
        "ddpkit experiment numerics scale=huge",
        "mpirun -n 2 --what ddpkit-run",
        "torchrun --nproc-per-node 2 -m ddpkit.experiments run model=nothing",
        "python nothing.py",
        "python -m ddpkit.testing custom --sizes 2",
        "make nothing",
        "pip install '.[nothing]'",
        "nothing at all",
    ):
        (words,) = Shell().commands(line)
        with pytest.raises((AssertionError, ValueError, SystemExit)):
            check(words, tmp_path)


def test_commands_within_the_text():
    """`ddpkit ...` and the like with more than their names; what is in capitals stands for something."""
    seen = 0
    for page in PAGES:
        if page.startswith(("docs/reference/", "docs/explanation/", "docs/architecture")):
            continue  # they speak of options
        text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
        for code in re.findall(r"`((?:mpirun [^`]*)?ddpkit(?:-run|-analyze)? [^`]*[= ][^`]+)`", text):
            if re.search(r"=|--|[/.]\w", code) and not re.search(r"\b[A-Z]{2,}\b|\||\.\.\.|…", code):
                seen += 1
                for words in Shell().commands(code):
                    check(words, ROOT)
    assert seen > 10


def test_the_readme_is_short_and_fits_a_terminal():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    inside = False
    for number, line in enumerate(lines, 1):
        inside ^= line.startswith("```")
        assert inside or line.startswith("|") or len(line) <= 105, f"README.md, line {number} is {len(line)} wide"


def test_every_key_that_the_text_names_is_one():
    keys = flat(read(["scheduler=cosine"])).keys()
    for page in PAGES:
        text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
        for key in re.findall(r"`((?:train|data|loss)\.[a-z_.]+)(?:=[^`]*)?`", text):
            assert any(one == key or one.startswith(f"{key}.") for one in keys), f"{page}: {key}"


def templates():
    """The sentences of the code, `…` where values are put in."""
    for room in ("ddpkit", "models", "experiments"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value.replace("%s", "…")


def test_messages_that_a_page_explains_are_those_of_the_code():
    sentences = list(templates())
    text = (ROOT / "docs/how-to/when-it-hangs-or-slows.md").read_text()
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    messages = [code for cell in cells for code in re.findall(r"`([^`]*…[^`]*|[^`]{20,})`", cell)]
    assert len(messages) > 25
    for message in messages:
        parts = [part.strip() for part in message.split("…") if part.strip()]
        assert any(all(part in sentence for part in parts) for sentence in sentences), message
