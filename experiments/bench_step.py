"""`ddpkit bench step`: time and memory of a training step (forward, forces, backward, AdamW), beside the original package's.

Steps go through several batches of different sizes in turn. `ms` is the time of a step that is waited for, `train` that of a step
in a row of steps that nobody waits for. With `--peer nequip` the model is built in `nequip` or `nequip-allegro`, imported from
there (`from_nequip`), and both take turns in one process; `ratio` is the median over turns of peer over ours. With
`--cuda-graphs` ours replays recorded steps of batches that are filled up to a few sizes. Peak memory is measured in a process of
its own for each, once all batches have been met: on a GPU what PyTorch has allocated at most, model and batches apart, on a CPU
the growth of the resident set.

`--sweep model.l_max=1,2,3` makes a row for each value, and tells the least time that the counted operations of matrix products
and the bytes that uncompiled operations move would take at this machine's measured ceilings; `--plot` draws that.
"""

import argparse
import csv
import ctypes
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import ddpkit
from ddpkit.batch import Batch
from ddpkit.capture.steps import STEADY
from ddpkit.data import Capacities, Frame, Sampler, choose_capacities, collate
from ddpkit.data.capacities import holding
from ddpkit.errors import InputError
from ddpkit.experiments.counting import Ceilings, count, measure_ceilings
from ddpkit.experiments.models_table import CRYSTAL_SPECIES, build, default_species, model_spec
from ddpkit.experiments.peers import Peer, PlainStep, optimizer, peer_model, with_kernels
from ddpkit.padding import own_sizes, pad
from ddpkit.ranks.switches import deterministic_algorithms, tf32, threads
from ddpkit.step import Step

COLUMNS = (
    "model", "device", "precision", "mode", "batches", "frames", "atoms", "edges", "seconds", "seconds_train", "seconds_first",
    "peak_bytes", "captured", "capacities", "waste", "peer_seconds", "peer_seconds_train", "peer_seconds_first",
    "peer_peak_bytes", "ratio", "ratio_train", "sweep", "operations", "bytes", "seconds_operations", "seconds_bytes",
)  # fmt: skip

_OF_PEER = (
    "peer_seconds", "peer_seconds_train", "peer_seconds_first", "peer_peak_bytes", "ratio", "ratio_train",
)  # fmt: skip

_SIZES = range(28, 43)  # atoms of the frames: about 35 in a molecule, about 30 in a crystal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("overrides", nargs="*", help="such as model.l_max=1")
    parser.add_argument("--model", nargs="+", default=["allegro_small"], help="named models (see `ddpkit models`)")
    parser.add_argument(
        "--kind", choices=["molecules", "crystals"], help="default: crystals for nequip_xl, else molecules"
    )
    parser.add_argument("--frames", type=int, default=4, help="frames in a batch, each of about 35 atoms")
    parser.add_argument("--batches", type=int, default=6, help="batches of different sizes that are taken in turn")
    parser.add_argument("--precision", choices=["mixed", "float32", "float64"], default="mixed")
    parser.add_argument("--mode", choices=["eager", "compile"], default="eager")
    parser.add_argument("--cuda-graphs", action="store_true", help="with --mode compile, replay recorded steps")
    parser.add_argument("--peer", choices=["nequip"], help="compare with the original package")
    parser.add_argument("--peer-kernels", choices=["openequivariance", "cuequivariance"], help="kernels of the peer")
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU, for both")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU where there is one")
    parser.add_argument("--tf32", action="store_true", help="let float32 matrix products use TF32, for both")
    parser.add_argument(
        "--deterministic", action="store_true", help="another row for ours with bitwise repeatable steps"
    )
    parser.add_argument(
        "--sweep", metavar="KEY=V1,V2,...", help="a row for each value: of frames, or of a key such as model.l_max"
    )
    parser.add_argument("--csv", type=Path, help="write the table here")
    parser.add_argument("--plot", type=Path, help="draw the sweep here")
    parser.add_argument(
        "--memory-of", choices=["ours", "peer", "none"], help="measure only memory, and print it as JSON"
    )


def main(args: argparse.Namespace) -> None:
    """Measures and prints the table."""
    if min(args.frames, args.repeats, args.threads, args.batches) < 1:
        raise InputError("--frames, --batches, --repeats and --threads must be positive.")
    if args.cuda_graphs and args.mode != "compile":
        raise InputError("--cuda-graphs replays compiled steps: add --mode compile.")
    if args.peer_kernels and not args.peer:
        raise InputError("--peer-kernels are those of a peer: add --peer nequip.")
    if args.peer and args.precision == "float32":
        raise InputError("the peer embeds geometry in float64: compare with --precision mixed or float64.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; use --device cpu or a CUDA build of torch.")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with threads(args.threads), tf32(allowed=args.tf32):
        if args.memory_of:
            print(json.dumps(_peak_bytes(args)))
        else:
            _print_table(args)


def _print_table(args: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    ceilings: Ceilings | None = None
    for name, (value, one) in itertools.product(args.model, _sweep(args)):
        for row in _measure(name, one):
            if value is not None:
                ceilings = ceilings or measure_ceilings(torch.device(one.device), _dtype(one))
                row |= {"sweep": value, **_counted(name, one, ceilings)}
            rows.append(row)
            _print_row(row, header=len(rows) == 1)
    if args.plot:
        _plot(args.plot, args.sweep.partition("=")[0], rows)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


def _sweep(args: argparse.Namespace) -> list[tuple[str | None, argparse.Namespace]]:
    """The values of a sweep, each with the options that it makes; one None without a sweep.

    Raises:
        InputError: the sweep cannot be read.
    """
    if args.sweep is None:
        if args.plot:
            raise InputError("--plot draws a sweep: add --sweep, such as --sweep frames=1,2,4.")
        return [(None, args)]
    key, _, values = args.sweep.partition("=")
    parts = values.split(",")
    if not all(parts) or not (key == "frames" or key.startswith("model.")):
        raise InputError(f"--sweep {args.sweep} cannot be read: write such as frames=1,2,4 or model.l_max=1,2,3.")
    if key == "frames":
        if not all(part.isdigit() and int(part) > 0 for part in parts):
            raise InputError(f"--sweep {args.sweep}: frames are positive whole numbers.")
        return [(part, argparse.Namespace(**vars(args) | {"frames": int(part)})) for part in parts]
    return [
        (part, argparse.Namespace(**vars(args) | {"overrides": [*args.overrides, f"{key}={part}"]})) for part in parts
    ]


def _dtype(args: argparse.Namespace) -> torch.dtype:
    return torch.float64 if args.precision == "float64" else torch.float32


def _counted(name: str, args: argparse.Namespace, ceilings: Ceilings) -> dict[str, Any]:
    """Operations and bytes of a step, averaged over the batches, and what they would take at the ceilings."""
    built = case(name, argparse.Namespace(**vars(args) | {"cuda_graphs": False, "peer": None}))
    step = PlainStep(built.ours)
    counts = [count(partial(step, batch)) for batch in built.batches]
    operations, moved = (statistics.mean(column) for column in zip(*counts, strict=True))
    return {
        "operations": round(operations),
        "bytes": round(moved),
        "seconds_operations": operations / ceilings.operations,
        "seconds_bytes": moved / ceilings.bytes,
    }


def _plot(path: Path, key: str, rows: list[dict[str, Any]]) -> None:
    """Draws times and memory of a sweep, with what counted operations and bytes would take at the ceilings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    times, memory = figure.subplots(1, 2)
    for number, name in enumerate(dict.fromkeys(row["model"] for row in rows)):
        own = [row for row in rows if row["model"] == name]
        values = [float(row["sweep"]) for row in own]
        lines = (
            ("seconds_train", "-", name),
            ("seconds_operations", "--", f"{name}: counted operations of products at the ceiling"),
            ("seconds_bytes", ":", f"{name}: bytes of uncompiled operations at the ceiling"),
            *((("peer_seconds_train", "-.", f"{name}: original package"),) if own[0]["peer_seconds"] else ()),
        )
        for column, style, label in lines:
            times.plot(values, [1e3 * row[column] for row in own], style, marker="o", color=f"C{number}", label=label)
        memory.plot(values, [row["peak_bytes"] / 2**20 for row in own], marker="o", color=f"C{number}", label=name)
    for axes, what in ((times, "ms a step, in a row"), (memory, "peak memory, MiB")):
        axes.set(xlabel=key, ylabel=what, yscale="log")
    figure.legend(*times.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['precision']}, {rows[0]['mode']}")
    figure.savefig(path, dpi=150)


@dataclass(frozen=True)
class Case:
    """A model, the peer's where asked for, and batches.

    Attributes:
        ours: the model.
        peer: the same model in the original package.
        batches: as they are.
        filled: what ours is given: the same, filled up to few sizes where steps are to be recorded.
        capacities: those sizes; None where batches are left as they are.
    """

    ours: nn.Module
    peer: Peer | None
    batches: list[Batch]
    filled: list[Batch]
    capacities: Capacities | None


def frames(kind: str, number: int, seed: int) -> list[Frame]:
    """Molecules or crystals of about 35 atoms, without labels."""
    random = np.random.default_rng(seed)
    found = list(itertools.islice(_crystals(seed) if kind == "crystals" else _molecules(random), min(number, 16)))
    shaken = []
    for n in range(number):
        frame = found[n % len(found)]
        positions = frame.positions + random.normal(0, 0.03, frame.positions.shape)
        unknown = np.full_like(positions, np.nan)
        shaken.append(Frame(frame.numbers, positions, np.nan, unknown, frame.cell, frame.pbc))
    return shaken


def _molecules(random: np.random.Generator) -> Iterator[Frame]:
    try:
        from ddpkit.data.molecules import build as conformer
        from ddpkit.data.molecules import systems

        for system in itertools.cycle([s for s in systems() if s.kind == "smiles"]):
            numbers, positions = conformer(system, random)
            if len(numbers) in _SIZES:
                yield Frame(numbers, positions, np.nan, np.full_like(positions, np.nan))
    except ImportError as error:
        raise InputError(
            "molecules need the package rdkit: pip install 'ddpkit[generate]', or take --kind crystals."
        ) from error


def _crystals(seed: int) -> Iterator[Frame]:
    from ddpkit.data.crystals import generate_crystals

    for attempt in itertools.count():
        yield from (f for f in generate_crystals(64, seed + attempt) if len(f) in _SIZES)


def case(name: str, args: argparse.Namespace, *, ours: bool = True) -> Case:
    """Builds models and batches.

    Raises:
        InputError: there is no such model or package.
    """
    spec = model_spec(name, args.overrides)
    kind = args.kind or ("crystals" if name == "nequip_xl" else "molecules")
    species = CRYSTAL_SPECIES if kind == "crystals" else default_species(spec)
    if args.peer and spec.get("scalar_embed_dim") is not None:
        spec["scalar_embed_dim"] = None  # as the peer has it
    batches, filled, capacities = _batches(kind, species, spec["r_max"], args)
    torch.manual_seed(1)
    if not args.peer:
        return Case(build(spec, species, precision=args.precision).to(args.device), None, batches, filled, capacities)
    from ddpkit.models import from_nequip

    module = peer_model(spec, species, args.precision, compile=args.mode == "compile").to(args.device).train()
    model = from_nequip(module) if ours else nn.Module()
    if args.peer_kernels:
        module = with_kernels(module, args.peer_kernels, spec["_target_"].rpartition(".")[2])
    if ours and spec.get("kernels", "auto") != "auto":
        weights = model.state_dict()
        model = build(spec, species, precision=args.precision).to(args.device)
        model.load_state_dict(weights)
    peer = Peer(module)
    for batch in batches:
        peer.prepare(batch)
    return Case(model, peer, batches, filled, capacities)


def _batches(
    kind: str, species: Sequence[str], r_max: float, args: argparse.Namespace
) -> tuple[list[Batch], list[Batch], Capacities | None]:
    """Batches as a run would draw them, and the same filled up to capacities that its plan would have."""
    pool = frames(kind, max(64, args.frames * args.batches), 1)
    single = [collate([frame], species, r_max, labels=False) for frame in pool]
    atoms, edges = (
        [x.shape[0] for x in column] for column in zip(*((b.positions, b.edge_shift) for b in single), strict=True)
    )
    most = [b.neighbours.shape[1] for b in single if b.neighbours is not None]
    plan = Sampler(
        np.arange(len(pool)),
        np.array(atoms),
        np.array(edges),
        args.frames,
        most_neighbours=np.array(most),
        capacities=(),
    )
    capacities = choose_capacities(plan) if args.cuda_graphs else None
    random = torch.Generator().manual_seed(1)
    batches, filled = [], []
    steps = itertools.chain.from_iterable(plan.epoch(epoch) for epoch in itertools.count())
    for step in itertools.islice(steps, args.batches):
        batch = collate([pool[n] for n in step.indices], species, r_max, labels=False)
        batch = batch.replace(
            energy=torch.randn(batch.num_frames, generator=random, dtype=torch.float64),
            forces=torch.randn(batch.positions.shape, generator=random, dtype=torch.float64),
        )
        batches.append(batch.to(args.device))
        if capacities is not None:
            sizes = own_sizes(batch)
            level = holding(capacities.levels, np.array([[*sizes[:2], batch.num_frames, sizes.most]]))
            filled.append(pad(batch, level or sizes, r_max).to(args.device))
    return batches, filled or batches, capacities


def _step(model: nn.Module, args: argparse.Namespace) -> Step:
    return ddpkit.make_step(
        model,
        ddpkit.EnergyForcesLoss(),
        optimizer(model),
        strategy="none",
        compile=args.mode == "compile",
        cuda_graphs=args.cuda_graphs,
    )


@dataclass
class Timed:
    """A step and what it took.

    Attributes:
        step: called with a batch.
        batches: taken in turn.
        first: seconds until each batch has been met twice.
        waited: of each turn, the median seconds of a step that was waited for.
        train: of each turn, seconds a step in a row that was not.
    """

    step: Callable[[Batch], Any]
    batches: list[Batch]
    first: float = 0.0
    waited: list[float] = field(default_factory=list)
    train: list[float] = field(default_factory=list)

    def warm_up(self) -> None:
        """Meets each batch: compiles, and records."""
        began = time.perf_counter()
        self.step(self.batches[0])
        _wait()
        self.first = time.perf_counter() - began
        for batch in (STEADY // len(self.batches) + 3) * self.batches:
            self.step(batch)
        _wait()

    def turn(self) -> None:
        """Takes all batches, waiting for each step, and then again in a row."""
        self.waited.append(statistics.median(_timed(self.step, [batch]) for batch in self.batches))
        row = max(1, 24 // len(self.batches)) * self.batches
        self.train.append(_timed(self.step, row) / len(row))


def _measure(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of the table: ours, and ours with repeatable steps where asked for."""
    built = case(name, args)
    modes = {args.mode: False}
    if args.deterministic:
        modes[f"{args.mode} deterministic"] = True
    step = _step(built.ours, args)
    peer = None if built.peer is None else Timed(PlainStep(built.peer), built.batches)
    if peer is not None:
        peer.warm_up()
    for mode, deterministic in modes.items():
        with deterministic_algorithms(wanted=deterministic):
            own = Timed(step, built.filled)
            own.warm_up()
        for _ in range(args.repeats):
            if peer is not None:
                peer.turn()
            with deterministic_algorithms(wanted=deterministic):
                own.turn()
        yield {
            "model": name,
            "device": torch.cuda.get_device_name() if args.device == "cuda" else f"cpu ({args.threads} threads)",
            "precision": args.precision,
            "mode": mode,
            "batches": len(built.batches),
            "frames": args.frames,
            "atoms": round(statistics.mean(batch.positions.shape[0] for batch in built.batches)),
            "edges": round(statistics.mean(batch.edge_index.shape[1] for batch in built.batches)),
            "seconds": statistics.median(own.waited),
            "seconds_train": statistics.median(own.train),
            "seconds_first": own.first,
            "peak_bytes": _memory_elsewhere("ours", name, args),
            "captured": step.captured_steps,
            "capacities": None if built.capacities is None else len(built.capacities.levels),
            "waste": None if built.capacities is None else built.capacities.edges,
            **_of_peer(name, args, peer, own),
        }
        if peer is not None:
            peer.waited, peer.train = [], []


def _of_peer(name: str, args: argparse.Namespace, peer: Timed | None, own: Timed) -> dict[str, Any]:
    if peer is None:
        return dict.fromkeys(_OF_PEER)
    return {
        "peer_seconds": statistics.median(peer.waited),
        "peer_seconds_train": statistics.median(peer.train),
        "peer_seconds_first": peer.first,
        "peer_peak_bytes": _memory_elsewhere("peer", name, args),
        "ratio": statistics.median(a / b for a, b in zip(peer.waited, own.waited, strict=True)),
        "ratio_train": statistics.median(a / b for a, b in zip(peer.train, own.train, strict=True)),
    }


def _timed(step: Callable[[Batch], Any], batches: Sequence[Batch]) -> float:
    _wait()
    start = time.perf_counter()
    for batch in batches:
        step(batch)
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _memory_elsewhere(whose: str, name: str, args: argparse.Namespace) -> int:
    """Peak memory of one of the two in a fresh process."""
    command = [
        sys.executable, "-m", "ddpkit.experiments", "bench", "step", *args.overrides, "--model", name,
        "--frames", str(args.frames), "--precision", args.precision, "--mode", args.mode, "--threads", str(args.threads),
        "--device", args.device, "--batches", str(args.batches), "--memory-of", whose,
    ]  # fmt: skip
    for option in ("kind", "peer", "peer_kernels"):
        if getattr(args, option):
            command += [f"--{option.replace('_', '-')}", getattr(args, option)]
    command += ["--tf32"] * args.tf32 + ["--cuda-graphs"] * args.cuda_graphs
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed: {done.stderr.strip().splitlines()[-1:]}")
    return int(json.loads(done.stdout.strip().splitlines()[-1]))


def _peak_bytes(args: argparse.Namespace) -> int:
    """What steps need at most beyond model and batches, once each batch has been met."""
    built = case(args.model[0], args, ours=args.memory_of == "ours")
    if args.device == "cpu":
        _forget_peak()
    before = _allocated(args)
    if args.memory_of == "ours":
        timed = Timed(_step(built.ours, args), built.filled)
    else:
        assert built.peer is not None
        timed = Timed(PlainStep(built.peer), built.batches)
    if args.device == "cpu":
        for batch in timed.batches:
            timed.step(batch)
        return _resident("VmHWM") - before
    timed.warm_up()
    torch.cuda.reset_peak_memory_stats()
    for batch in timed.batches:
        timed.step(batch)
    _wait()
    return torch.cuda.max_memory_allocated() - before


def _forget_peak() -> None:
    """Gives free memory back to the system, and has its account of the largest resident set begin anew."""
    ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):  # some containers forbid it
        Path("/proc/self/clear_refs").write_text("5")


def _allocated(args: argparse.Namespace) -> int:
    return torch.cuda.memory_allocated() if args.device == "cuda" else _resident("VmRSS")


def _resident(field: str) -> int:
    """Bytes of the resident set, from Linux' account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise InputError("peak memory on a CPU is read from /proc/self/status, which this system does not have.")


def _print_row(row: dict[str, Any], *, header: bool) -> None:
    """One line for people, in ms and MiB."""
    if header:
        words = ("device", "precision", "mode", "frames", "atoms", "edges", "ms", "train", "MiB")
        print(_line("model", *words, "peer ms", "train", "peer MiB", "ratio", "train"))
    peer: tuple[str, ...] = ("", "", "", "", "")
    if row["ratio"] is not None:
        peer = (
            *(f"{1e3 * row[key]:.1f}" for key in ("peer_seconds", "peer_seconds_train")),
            f"{row['peer_peak_bytes'] / 2**20:.0f}",
            *(f"{row[key]:.1f}" for key in ("ratio", "ratio_train")),
        )
    sizes = (str(row[key]) for key in ("frames", "atoms", "edges"))
    own = (
        *(f"{1e3 * row[key]:.2f}" for key in ("seconds", "seconds_train")),
        f"{row['peak_bytes'] / 2**20:.0f}",
    )
    print(_line(row["model"], row["device"][:16], row["precision"], row["mode"], *sizes, *own, *peer), flush=True)


def _line(*words: str) -> str:
    widths = (-15, -16, -9, -20, 6, 6, 7, 9, 9, 7, 9, 9, 8, 6, 6)
    return " ".join(w.ljust(-n) if n < 0 else w.rjust(n) for w, n in zip(words, widths, strict=True)).rstrip()
