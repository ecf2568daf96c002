"""Run molecular dynamics in LAMMPS by every model, on every system and number of ranks, into one folder.

usage: ddpkit experiment inference [scale=demo|workstation|paper] [out=DIR] [OPTIONS] [OVERRIDES of model.* and precision]

    pdb=FILE        protein in water for strong scaling, such as DHFR of the Amber20 benchmark; without it a box of water
    models=A,B      named models (`ddpkit models`); their weights are drawn from a seed, which is enough to time them
    parts=A,B       of molecules, water, scaling, calls
    ranks=1,2,4     numbers of ranks for scaling
    repeats=N       runs of each molecule with other velocities
    seconds=N       longest time of each stretch of scaling (minimisation, warming up, timed steps); default 180
    device=cpu|cuda default: the GPU where there is one

The parts follow section III of C. W. Tan et al. (arXiv 2504.16068): small molecules without boundaries, water of 24 to 5,184
atoms on one rank, strong scaling of a large system over ranks. `calls` times the model alone in Python: the exported file, the
model as it trains, and the same model compiled by `nequip-compile`, where that is installed.

Untrained models hold no molecule together: a spring ties every atom to its place (`fix spring/self`), and neighbour lists are
built anew every 20 steps, as for atoms that wander. Each cell has a folder with its input, log.lammps, output.txt and cell.json;
cells that are complete are kept when the same command is given again. `ddpkit-analyze inference DIR` makes tables and figures.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.io.lammpsdata import write_lammps_data

from ddpkit import __version__, checkpoint
from ddpkit.data.molecules import DRUGS
from ddpkit.errors import InputError
from ddpkit.experiments.models_table import SPICE_SPECIES, build, model_names, model_spec
from ddpkit.experiments.structures import PENTAPEPTIDE, from_smiles, read_pdb, water

PARTS = ("molecules", "water", "scaling", "calls")
ENGINES = ("package", "eager", "nequip")
MOLECULES = {
    "pentapeptide": PENTAPEPTIDE,
    "salbutamol": DRUGS["salbutamol"],
    "sulfamethoxazole": DRUGS["sulfamethoxazole"],
}
_SEED = 1  # of weights
_SPRING = 5.0  # eV/Å^2
_ROOM = 5.0  # Å around a molecule
_REFUSED = 2  # exit code of our commands for what cannot be used
_COMMAND = (sys.executable, "-m", "ddpkit.experiments")


@dataclass(frozen=True)
class Scale:
    """How much is run.

    Attributes:
        models: named models.
        molecules: names in `MOLECULES`.
        molecule_steps: of NVT, and of NVE, which are timed.
        repeats: runs of each molecule.
        edges: molecules of water along the edge of each box.
        water_steps: before, and timed.
        ranks: of the scaling part.
        scaling_edge: of the box of water that stands in where no protein is given.
        scaling_steps: before, and timed.
        minimiser: iterations and evaluations of the energy at most, before molecules and scaling.
        seconds: that each of the scaling part's stretches may take at most.
        replicas: of the protein, and the models that these are run with.
        calls: of each model in Python.
        call_edges: boxes of water for these.
    """

    models: tuple[str, ...] = ("allegro_small", "allegro_medium", "allegro_large")
    molecules: tuple[str, ...] = tuple(MOLECULES)
    molecule_steps: tuple[int, int] = (2000, 5000)
    repeats: int = 1
    edges: tuple[int, ...] = (2, 3, 4, 6, 8, 10, 12)
    water_steps: tuple[int, int] = (100, 400)
    ranks: tuple[int, ...] = (1, 2, 4)
    scaling_edge: int = 12
    scaling_steps: tuple[int, int] = (100, 200)
    minimiser: tuple[int, int] = (100, 1000)
    seconds: int = 180
    replicas: tuple[int, int, int] | None = (3, 3, 2)
    replica_models: tuple[str, ...] = ("allegro_small", "allegro_medium")
    calls: int = 50
    call_edges: tuple[int, ...] = (2, 6, 12)


SCALES = {
    "demo": Scale(
        models=("allegro_tiny",),
        molecules=("pentapeptide",),
        molecule_steps=(20, 60),
        edges=(2, 3, 5),
        water_steps=(10, 40),
        ranks=(1, 2),
        scaling_edge=6,
        scaling_steps=(5, 20),
        minimiser=(3, 10),
        replicas=None,
        calls=10,
        call_edges=(2, 5),
    ),
    "workstation": Scale(),
    "paper": Scale(
        molecule_steps=(20_000, 20_000),
        repeats=3,
        water_steps=(1000, 1000),
        ranks=(1, 2, 4, 8),
        scaling_steps=(1000, 1000),
        calls=200,
        call_edges=(2, 3, 4, 6, 8, 10, 12),
    ),
}


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        part: of `PARTS`.
        engine: `lammps`, or one of `ENGINES`.
        model: its name.
        system: name of the configuration.
        atoms: in the whole of it.
        ranks: of LAMMPS.
        repeat: counts from 1; the seed of the velocities.
        steps: timed; in Python, calls.
        femtoseconds: of a time step.
        device: cpu or cuda.
        settings: overrides of the model.
    """

    part: str
    engine: str
    model: str
    system: str
    atoms: int
    ranks: int
    repeat: int
    steps: int
    femtoseconds: float
    device: str
    settings: tuple[str, ...]

    @property
    def label(self) -> str:
        """Its folder's name."""
        label = f"{self.part}-{self.model}-{self.system}-{self.engine if self.part == 'calls' else self.ranks}"
        return label if self.repeat == 1 else f"{label}_{self.repeat}"


@dataclass(frozen=True)
class Task:
    """A cell with what it is made of.

    Attributes:
        cell: what it is.
        atoms: the configuration, before replication.
        replicas: of it along each axis.
        before: steps that are not timed.
        minimiser: iterations and evaluations of the energy at most.
        seconds: that each stretch may take; 0 for no limit.
    """

    cell: Cell
    atoms: Atoms
    replicas: tuple[int, int, int] = (1, 1, 1)
    before: int = 0
    minimiser: tuple[int, int] = (0, 0)
    seconds: int = 0


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    scale: Scale
    out: Path
    parts: tuple[str, ...]
    device: str
    pdb: Path | None
    settings: tuple[str, ...]


def main(arguments: Sequence[str]) -> None:
    """Runs all cells that are not complete.

    Raises:
        InputError: an argument cannot be used, a model cannot be made, or cells failed.
    """
    options = parse(arguments)
    todo = tasks(options)
    complete = [task for task in todo if _is_complete(options.out / task.cell.label, task.cell)]
    models = {task.cell.model: _files(options, task.cell.model) for task in todo if task not in complete}
    failed, seconds = [], 0.0
    for number, task in enumerate(todo, 1):
        label = task.cell.label
        if task in complete:
            print(f"[{number}/{len(todo)}] {label}: complete, kept", flush=True)
            continue
        mean = seconds / max(1, number - 1 - len(complete))
        left = f" (about {mean * (len(todo) - number + 1) / 60:.0f} min left)" if mean * len(todo) > 90 else ""
        print(f"[{number}/{len(todo)}] {label}: {task.cell.atoms:,} atoms{left}", flush=True)
        if task.cell.engine == "nequip" and not models[task.cell.model]["nequip"].is_file():
            failed.append(label)
            print("    failed: nequip-compile made no file of this model", flush=True)
            continue
        result = _measure(task, models[task.cell.model], options.out / label)
        seconds += result["seconds"]
        if result["code"] == _REFUSED:  # the others would be refused as well
            raise InputError(f"{label} cannot be run: {result['error'].removeprefix('ddpkit: ')}")
        if result["status"] != "finished":
            failed.append(label)
            print(f"    failed: {result['error']}", flush=True)
    if failed:
        raise InputError(
            f"{len(failed)} of {len(todo)} cells failed ({', '.join(failed)}): see output.txt in their folders in {options.out}, "
            "or nequip-compile.txt beside the model's files, then give the same command, which runs these alone."
        )
    print(f"inference: {len(todo)} cells in {options.out} ({len(complete)} were complete before).")


def parse(arguments: Sequence[str]) -> Options:
    """The command line.

    Raises:
        InputError: something on it cannot be used.
    """
    named, settings = {"scale": "workstation"}, []
    for word in arguments:
        key, equals, value = word.partition("=")
        if key in ("scale", "out", "pdb", "models", "parts", "ranks", "repeats", "seconds", "device") and equals:
            named[key] = value
        elif (key.startswith("model.") or key == "precision") and equals:
            settings.append(word)
        else:
            raise InputError(
                f"{word} is nothing that the study of inference takes: see `ddpkit experiment inference --help`."
            )
    if named["scale"] not in SCALES:
        raise InputError(f"scale={named['scale']} is unknown: use one of {', '.join(SCALES)}.")
    scale = SCALES[named["scale"]]
    if "models" in named:
        scale = replace(scale, models=_listed(named["models"], "models", model_names()))
        scale = replace(scale, replica_models=tuple(m for m in scale.models if m != "allegro_large"))
    if "ranks" in named:
        scale = replace(scale, ranks=tuple(_whole("ranks", word) for word in named["ranks"].split(",")))
    if "repeats" in named:
        scale = replace(scale, repeats=_whole("repeats", named["repeats"]))
    if "seconds" in named:
        scale = replace(scale, seconds=_whole("seconds", named["seconds"]))
    device = named.get("device") or ("cuda" if torch.cuda.is_available() and named["scale"] != "demo" else "cpu")
    if device not in ("cpu", "cuda"):
        raise InputError(f"device={device} is unknown: use cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda: there is no NVIDIA GPU here; use device=cpu.")
    for name in scale.models:
        model_spec(name, settings)  # a wrong override is told here
    return Options(
        scale,
        Path(named.get("out") or f"studies/inference-{named['scale']}"),
        _listed(named["parts"], "parts", PARTS) if "parts" in named else PARTS,
        device,
        Path(named["pdb"]) if "pdb" in named else None,
        tuple(settings),
    )


def _listed(text: str, key: str, known: Sequence[str]) -> tuple[str, ...]:
    words = tuple(text.split(","))
    if unknown := [word for word in words if word not in known]:
        raise InputError(f"{key}={text}: {unknown[0]!r} is unknown; use some of {', '.join(known)}.")
    return words


def _whole(key: str, text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise InputError(f"{key}: {text!r} is no whole number from 1.")
    return int(text)


def tasks(options: Options) -> list[Task]:
    """Everything that is to be measured, part by part.

    Raises:
        InputError: the protein cannot be read.
    """
    makers = {"molecules": _molecules, "water": _waters, "scaling": _scaling, "calls": _calls}
    return [task for part in options.parts for task in makers[part](options)]


def _cell(options: Options, part: str, model: str, system: str, atoms: int, **more: Any) -> Cell:
    facts = {"engine": "lammps", "ranks": 1, "repeat": 1, "femtoseconds": 0.5, **more}
    return Cell(
        part, model=model, system=system, atoms=atoms, device=options.device, settings=options.settings, **facts
    )


def _molecules(options: Options) -> Iterator[Task]:
    scale = options.scale
    before, steps = scale.molecule_steps
    for name in scale.molecules:
        atoms = from_smiles(name, MOLECULES[name])
        atoms.center(vacuum=_ROOM)
        for model in scale.models:
            for repeat in range(1, scale.repeats + 1):
                cell = _cell(options, "molecules", model, name, len(atoms), repeat=repeat, steps=steps)
                yield Task(cell, atoms, before=before, minimiser=scale.minimiser)


def _waters(options: Options) -> Iterator[Task]:
    scale = options.scale
    before, steps = scale.water_steps
    for edge in scale.edges:
        atoms = water(edge)
        for model in scale.models:
            cell = _cell(options, "water", model, f"water{len(atoms)}", len(atoms), steps=steps, femtoseconds=1.0)
            yield Task(cell, atoms, before=before)


def _scaling(options: Options) -> Iterator[Task]:
    scale = options.scale
    before, steps = scale.scaling_steps
    atoms = water(scale.scaling_edge) if options.pdb is None else read_pdb(options.pdb)
    if unknown := set(atoms.get_chemical_symbols()) - set(SPICE_SPECIES):
        raise InputError(f"pdb={options.pdb} holds {min(unknown)}, which the models do not know: leave such atoms out.")
    name = f"water{len(atoms)}" if options.pdb is None else re.sub(r"[^A-Za-z0-9]+", "_", options.pdb.stem)
    sizes: list[tuple[str, tuple[int, int, int], tuple[str, ...]]] = [(name, (1, 1, 1), scale.models)]
    if options.pdb is not None and scale.replicas is not None:
        sizes.append((f"{name}_{'x'.join(map(str, scale.replicas))}", scale.replicas, scale.replica_models))
    for system, replicas, models in sizes:
        number = len(atoms) * replicas[0] * replicas[1] * replicas[2]
        for model in models:
            for ranks in scale.ranks:
                cell = _cell(options, "scaling", model, system, number, ranks=ranks, steps=steps)
                yield Task(cell, atoms, replicas, before, scale.minimiser, scale.seconds)


def _calls(options: Options) -> Iterator[Task]:
    scale = options.scale
    systems = [(f"water{3 * edge**3}", water(edge)) for edge in scale.call_edges]
    for name in scale.molecules[:1]:
        systems.insert(0, (name, from_smiles(name, MOLECULES[name])))
    for system, atoms in systems:
        for model in scale.models:
            for engine in ENGINES:
                if engine == "nequip" and not _has_nequip():
                    continue
                cell = _cell(options, "calls", model, system, len(atoms), engine=engine, steps=scale.calls)
                yield Task(cell, atoms)


def _has_nequip() -> bool:
    return find_spec("nequip") is not None and find_spec("allegro") is not None


def script(task: Task, model: Path, species: Sequence[str]) -> str:
    """The input of LAMMPS.

    Args:
        task: what is to be run.
        model: exported file.
        species: of the atom types, in order.
    """
    cell = task.cell
    periodic = bool(task.atoms.pbc.all())
    lines = [
        "units metal",
        "atom_style atomic",
        "atom_modify map yes",
        "newton on",
        f"boundary {'p p p' if periodic else 'f f f'}",
        "read_data system.data",
        *([f"replicate {' '.join(map(str, task.replicas))}"] if task.replicas != (1, 1, 1) else []),
        "pair_style ddpkit",
        f"pair_coeff * * {model} {' '.join(species)}",
        "neighbor 1.0 bin",
        "neigh_modify every 20 delay 0 check no",
        f"timestep {cell.femtoseconds / 1000:g}",
        "thermo 100",
        f"fix tether all spring/self {_SPRING:g}",
        "fix_modify tether energy yes",
    ]
    limit = [f"timer timeout {task.seconds // 3600}:{task.seconds // 60 % 60:02d}:{task.seconds % 60:02d} every 10"]
    limit *= bool(task.seconds)
    bath = "fix bath all nvt temp 300 300 0.05"
    velocities = f"velocity all create 300 {4928 + cell.repeat} mom yes rot {'no' if periodic else 'yes'} dist gaussian"
    if cell.part == "water":
        run = [
            velocities,
            "fix move all nve",
            f"fix bath all langevin 300 300 0.1 {1000 + cell.repeat}",
            f"run {task.before}",
        ]
    else:
        run = [
            "min_style cg",
            *limit,
            f"minimize 1e-7 1e-7 {task.minimiser[0]} {task.minimiser[1]}",
            "reset_timestep 0",
            velocities,
            bath,
            *(["fix still all momentum 10 linear 1 1 1 angular"] if cell.part == "molecules" else []),
            *limit,
            f"run {task.before}",
            *(["unfix still", "unfix bath", "fix move all nve"] if cell.part == "molecules" else []),
        ]
    return "\n".join([*lines, *run, *limit, f"run {cell.steps}"]) + "\n"


def _files(options: Options, name: str) -> dict[str, Path]:
    """The model's files, made where they are missing: weights from a seed, the exported file, and the peer's if it can be made.

    Raises:
        InputError: one of ours cannot be made.
    """
    folder = (options.out / "models" / name).resolve()  # programs run in folders of their own
    files = {
        "weights": folder / "model.pt",
        "package": folder / f"model-{options.device}.pt2",
        "nequip": folder / f"model-{options.device}.nequip.pt2",
    }
    made_as = folder / "model.json"
    identity = {"model": name, "settings": list(options.settings), "seed": _SEED, "species": list(SPICE_SPECIES)}
    if made_as.is_file() and json.loads(made_as.read_text()) != identity:
        raise InputError(f"{folder} holds a model of other settings: give another out=, or remove that folder.")
    if not files["weights"].is_file():
        folder.mkdir(parents=True, exist_ok=True)
        spec = {**model_spec(name, list(options.settings)), "species": list(SPICE_SPECIES), "avg_num_neighbors": 60.0}
        torch.manual_seed(_SEED)
        model = build(spec, SPICE_SPECIES, **_precision(options.settings))
        state = {"model": model.state_dict(), "ema": None, "optimizer": {}, "scheduler": None}
        kept = {"model_spec": {**spec, **_precision(options.settings)}, "progress": {"step": 0, "epoch": 0}}
        checkpoint.save(files["weights"], state | kept)
        made_as.write_text(json.dumps(identity))
    if not files["package"].is_file():
        print(f"{name}: exporting weights of seed {_SEED} ...", flush=True)
        export = ["export", str(files["weights"]), "--out", str(files["package"]), "--device", options.device]
        _make([*_COMMAND, *export], folder / "export.txt", f"{name} could not be exported")
    wants_peer = "calls" in options.parts and _has_nequip()
    if wants_peer and not files["nequip"].is_file():
        from ddpkit.models import save_nequip

        print(f"{name}: compiling the same weights with nequip-compile ...", flush=True)
        weights = folder / "model.ckpt"
        save_nequip(checkpoint.load_model(files["weights"]), weights)
        words = ["--mode", "aotinductor", "--device", options.device, "--target", "ase"]
        words += _fast_kernels(name, options.device)
        compiler = [
            sys.executable,
            "-m",
            "ddpkit.experiments.nequip_compile",
            str(weights),
            str(files["nequip"]),
            *words,
        ]
        try:
            _make(compiler, folder / "nequip-compile.txt", f"nequip-compile could not compile {name}")
        except InputError as error:  # what is ours can be measured without it
            print(f"    failed: {error}", flush=True)
    return files


def _fast_kernels(name: str, device: str) -> list[str]:
    """Options of `nequip-compile` for the fastest kernels that its packages bring for a model on a device."""
    if device != "cuda":
        return []
    if model_spec(name, [])["_target_"].endswith("Allegro"):
        return ["--modifiers", "enable_TritonContracter"]
    return ["--modifiers", "enable_OpenEquivariance"] if find_spec("openequivariance") else []


def _precision(settings: Sequence[str]) -> dict[str, str]:
    given = [word.partition("=")[2] for word in settings if word.startswith("precision=")]
    return {"precision": given[-1] if given else "mixed"}


def _make(command: Sequence[str], log: Path, otherwise: str) -> None:
    with log.open("w") as output:
        result = _run(command, log.parent, output, sample_gpu=False)
    if result["code"] != 0:
        raise InputError(f"{otherwise} ({cause(result['code'], log.read_text(errors='replace'))}): see {log}.")


def _is_complete(folder: Path, cell: Cell) -> bool:
    """Whether this very cell has been measured.

    Raises:
        InputError: the folder holds another one.
    """
    path = folder / "cell.json"
    if not path.is_file():
        return False
    held = json.loads(path.read_text())
    if held["cell"] != json.loads(json.dumps(asdict(cell))):
        raise InputError(f"{folder} holds a cell of another configuration: give another out=, or remove that folder.")
    return bool(held["status"] == "finished")


def _measure(task: Task, files: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    """Runs a cell and writes what it is and what came of it to `cell.json`."""
    cell = task.cell
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("log.lammps", "calls.json"):
        (folder / name).unlink(missing_ok=True)
    if cell.part == "calls":
        from ase.io import write

        write(folder / "system.xyz", task.atoms)
        model = files[{"eager": "weights"}.get(cell.engine, cell.engine)]
        words = [cell.engine, str(model), "system.xyz", "--calls", str(cell.steps), "--device", cell.device]
        command = [sys.executable, "-m", "ddpkit.experiments.model_calls", *words]
    else:
        species = list(dict.fromkeys(task.atoms.get_chemical_symbols()))
        write_lammps_data(str(folder / "system.data"), task.atoms, specorder=species, masses=True, atom_style="atomic")
        (folder / "in.lammps").write_text(script(task, files["package"], species))
        command = [*lammps(cell.ranks), "-in", "in.lammps", "-log", "log.lammps"]
    with (folder / "output.txt").open("w") as output:
        output.write(shlex.join(command) + "\n")
        output.flush()
        result = _run(command, folder, output, sample_gpu=cell.device == "cuda")
    measured = {
        "seconds": result["seconds"],
        "memory_mb": result["memory_mb"],
        "gpu_memory_mb": result["gpu_memory_mb"],
    }
    status = "finished" if result["code"] == 0 else "failed"
    error = "" if status == "finished" else cause(result["code"], (folder / "output.txt").read_text(errors="replace"))
    versions = {"ddpkit": __version__, "torch": torch.__version__}
    kept = {"cell": asdict(cell), "status": status, "error": error, **measured, "machine": _machine(cell.device)}
    partial = folder / "cell.json.part"
    partial.write_text(json.dumps(kept | {"versions": versions}, indent=1) + "\n")
    partial.replace(folder / "cell.json")
    return kept | {"code": result["code"]}


def lammps(ranks: int) -> list[str]:
    """The command that starts LAMMPS with the pair style on so many ranks."""
    return [*_COMMAND, "lammps", *(["-n", str(ranks)] if ranks > 1 else [])]


def _run(command: Sequence[str], folder: Path, output: Any, *, sample_gpu: bool) -> dict[str, Any]:
    """Runs a command; says how long it took, and how much memory its largest process and a GPU had in use."""
    started = time.monotonic()
    # In a session of its own, so that Ctrl-C reaches us alone and we can end all of it.
    process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    with _ended_with_us(process), _memory(process.pid, gpu=sample_gpu) as (by_process, on_gpus):
        code = process.wait()
    return {
        "code": code,
        "seconds": time.monotonic() - started,
        "memory_mb": max(by_process.values(), default=None),
        "gpu_memory_mb": max(on_gpus, default=None),
    }


@contextmanager
def _ended_with_us(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(ChildProcessError):
            process.wait()
        raise


@contextmanager
def _memory(root: int, *, gpu: bool) -> Iterator[tuple[dict[int, float], list[float]]]:
    """Collects, several times a second, the high-water marks of a process and its descendants, and what GPUs have in use, in MiB.

    A process may become another program, whose mark begins anew: the last one counts.
    """
    by_process: dict[int, float] = {}
    on_gpus: list[float] = []
    over = threading.Event()
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):  # of which nvidia-smi knows nothing
        query += ["--id", visible]

    def watch() -> None:
        while not over.wait(0.2):
            by_process.update(_high_water_marks(root))
            if gpu:
                told = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
                on_gpus.extend(float(word) for word in told if word.isdigit())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield by_process, on_gpus
    finally:
        over.set()
        watcher.join()


def _high_water_marks(root: int) -> dict[int, float]:
    """Of a process and its descendants, MiB."""
    parents, marks = {}, {}
    for path in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):
            facts = dict(re.findall(r"^(PPid|VmHWM):\s*(\d+)", path.read_text(), re.MULTILINE))
            pid = int(path.parent.name)
            parents[pid] = int(facts["PPid"])
            if "VmHWM" in facts:  # not while a process ends
                marks[pid] = int(facts["VmHWM"]) / 1024
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return {pid: marks[pid] for pid in family if pid in marks}


def cause(code: int, output: str) -> str:
    """Why a program failed: the line of its output that says so, and the signal that ended it.

    Args:
        code: its exit code; minus the number of the signal.
        output: all that it wrote.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("ERROR", "ddpkit:")) or "Error: " in line]
    last = (told or lines or ["it said nothing"])[-1][:300]
    return last if code >= 0 else f"ended by {signal.Signals(-code).name}, after: {last}"


def _machine(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()} ({torch.cuda.device_count()})"
    models = re.findall(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    threads = os.environ.get("OMP_NUM_THREADS")
    told = f", {threads} thread{'s' * (threads != '1')} a rank" if threads else ""
    return f"{models[0] if models else 'CPU'} ({os.cpu_count()} cores{told})"
