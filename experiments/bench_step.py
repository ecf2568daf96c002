"""`ddpkit bench step`: time and memory of a training step (forward, forces, backward, AdamW), beside the original package's.

With `--peer nequip` the model is built in `nequip` or `nequip-allegro`, imported from there (`from_nequip`), and both
take steps on the same batch in turn, in one process; `ratio` is the median over turns of peer over ours. Peak memory is
measured in a process of its own for each: on a GPU what PyTorch had allocated at most, on a CPU the growth of the
resident set over what it was with model and batch in place.
"""

import argparse
import csv
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ddpkit
from ddpkit.batch import Batch
from ddpkit.data import Frame, collate
from ddpkit.errors import InputError
from ddpkit.experiments.models_table import CRYSTAL_SPECIES, build, default_species, model_spec
from ddpkit.step import Step

COLUMNS = (
    "model", "device", "precision", "mode", "frames", "atoms", "edges", "seconds", "peak_bytes", "peer_seconds",
    "peer_peak_bytes", "ratio",
)  # fmt: skip

_SIZES = range(28, 43)  # atoms of the frames: about 35 in a molecule, about 30 in a crystal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("overrides", nargs="*", help="such as model.l_max=1")
    parser.add_argument("--model", nargs="+", default=["allegro_small"], help="named models (see `ddpkit models`)")
    parser.add_argument(
        "--kind", choices=["molecules", "crystals"], help="default: crystals for nequip_xl, else molecules"
    )
    parser.add_argument("--frames", type=int, default=4, help="frames in the batch, each of about 35 atoms")
    parser.add_argument("--precision", choices=["mixed", "float32", "float64"], default="mixed")
    parser.add_argument("--mode", choices=["eager", "compile"], default="eager")
    parser.add_argument("--peer", choices=["nequip"], help="compare with the original package")
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU, for both")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU where there is one")
    parser.add_argument("--tf32", action="store_true", help="let float32 matrix products use TF32, for both")
    parser.add_argument(
        "--deterministic", action="store_true", help="another row for ours with bitwise repeatable steps"
    )
    parser.add_argument("--csv", type=Path, help="write the table here")
    parser.add_argument(
        "--memory-of", choices=["ours", "peer", "none"], help="measure only memory, and print it as JSON"
    )


def main(args: argparse.Namespace) -> None:
    """Measures and prints the table."""
    if min(args.frames, args.repeats, args.threads) < 1:
        raise InputError("--frames, --repeats and --threads must be positive.")
    if args.peer and args.precision == "float32":
        raise InputError("the peer embeds geometry in float64: compare with --precision mixed or float64.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; use --device cpu or a CUDA build of torch.")
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.memory_of:
        print(json.dumps(_peak_bytes(args)))
        return
    rows = []
    for number, name in enumerate(args.model):
        for row in _measure(name, args):
            rows.append(row)
            _print_row(row, header=number == 0 and len(rows) == 1)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


@dataclass(frozen=True)
class Case:
    """A model, the peer's where asked for, and a batch."""

    ours: nn.Module
    peer: nn.Module | None
    batch: Batch


class Peer(nn.Module):
    """A model of the original package that speaks the model contract."""

    def __init__(self, module: nn.Module, batch: Batch) -> None:
        super().__init__()
        self.module = module
        sizes = torch.bincount(batch.frame, minlength=batch.num_frames)
        self.data = {
            "pos": batch.positions,
            "edge_index": batch.edge_index,
            "atom_types": batch.species,
            "batch": batch.frame,
            "num_atoms": sizes,
        }
        if batch.cell is not None:
            # an edge's shift in units of the lattice vectors
            of_edge = batch.frame[batch.edge_index[0]]
            shift = torch.linalg.solve(batch.cell.transpose(1, 2)[of_edge], batch.edge_shift.unsqueeze(2))
            self.data |= {"cell": batch.cell, "edge_cell_shift": shift.squeeze(2).round()}

    def forward(self, _: Batch) -> dict[str, Tensor]:
        """The contract's outputs for the batch that it was built for."""
        out = self.module(dict(self.data))
        result = {"energy": out["total_energy"].squeeze(1).double(), "forces": out["forces"].double()}
        if "cell" in self.data:
            result["stress"] = out["stress"].double()
        return result


def peer_model(spec: dict[str, Any], species: Sequence[str], precision: str, *, compile: bool) -> nn.Module:  # noqa: A002
    """The same model in `nequip` or `nequip-allegro`.

    Raises:
        InputError: the package is missing.
    """
    try:
        from allegro.model import AllegroModel
        from nequip.model import NequIPGNNModel
        from nequip.utils.global_state import set_global_state
    except ImportError as error:
        raise InputError(
            "--peer nequip needs the packages nequip and nequip-allegro: pip install 'ddpkit[test]'."
        ) from error
    set_global_state(allow_tf32=bool(torch.backends.cuda.matmul.allow_tf32))
    shared = {
        "seed": 1,
        "model_dtype": "float64" if precision == "float64" else "float32",
        "compile_mode": "compile" if compile else "eager",
        "type_names": list(species),
        "r_max": spec["r_max"],
        "l_max": spec["l_max"],
        "parity": spec["parity"],
        "num_layers": spec["num_layers"],
        "avg_num_neighbors": 30.0,
        "per_type_energy_shifts": 0.0,
        "per_type_energy_scales": 1.0,
    }
    if spec.get("zbl"):
        zbl = {"_target_": "nequip.nn.pair_potential.ZBL", "units": "metal", "chemical_species": list(species)}
        shared["pair_potential"] = zbl
    radial = {"num_bessels": spec["num_bessels"], "polynomial_cutoff_p": spec["polynomial_cutoff_p"]}
    if spec["_target_"].endswith("NequIP"):
        model: nn.Module = NequIPGNNModel(
            **shared,
            **radial,
            num_features=spec["num_features"],
            type_embed_num_features=spec["type_embedding_dim"],
            radial_mlp_depth=spec["radial_depth"],
            radial_mlp_width=spec["radial_width"],
        )
        return model
    model = AllegroModel(
        **shared,
        radial_chemical_embed={"_target_": "allegro.nn.TwoBodyBesselScalarEmbed", **radial},
        radial_chemical_embed_dim=spec["embed_dim"],
        scalar_embed_mlp_hidden_layers_depth=spec["scalar_embed_depth"],
        scalar_embed_mlp_hidden_layers_width=spec["scalar_embed_width"],
        num_scalar_features=spec["num_scalar_features"],
        num_tensor_features=spec["num_tensor_features"],
        allegro_mlp_hidden_layers_depth=spec["mlp_depth"],
        allegro_mlp_hidden_layers_width=spec["mlp_width"],
        readout_mlp_hidden_layers_depth=spec["readout_depth"],
        readout_mlp_hidden_layers_width=spec["readout_width"],
        readout_mlp_nonlinearity=None,
    )
    return model  # noqa: RET504  (which gives it a type)


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
    """Builds models and batch.

    Raises:
        InputError: there is no such model or package.
    """
    spec = model_spec(name, args.overrides)
    kind = args.kind or ("crystals" if name == "nequip_xl" else "molecules")
    species = CRYSTAL_SPECIES if kind == "crystals" else default_species(spec)
    if args.peer and spec.get("scalar_embed_dim") is not None:
        spec["scalar_embed_dim"] = None  # as the peer has it
    batch = collate(frames(kind, args.frames, 1), species, spec["r_max"], labels=False)
    random = torch.Generator().manual_seed(1)
    batch = batch.replace(
        energy=torch.randn(batch.num_frames, generator=random, dtype=torch.float64),
        forces=torch.randn(batch.positions.shape, generator=random, dtype=torch.float64),
    ).to(args.device)
    torch.manual_seed(1)
    if not args.peer:
        return Case(build(spec, species, precision=args.precision).to(args.device), None, batch)
    from ddpkit.models import from_nequip

    peer = peer_model(spec, species, args.precision, compile=args.mode == "compile").to(args.device).train()
    model = from_nequip(peer) if ours else nn.Module()
    return Case(model, Peer(peer, batch), batch)


def _optimizer(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def _step(model: nn.Module, *, compile: bool) -> Step:  # noqa: A002
    return ddpkit.make_step(model, ddpkit.EnergyForcesLoss(), _optimizer(model), strategy="none", compile=compile)


class PlainStep:
    """A step as the original package's trainer takes it: `loss.backward()`, then the optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._criterion = ddpkit.EnergyForcesLoss()
        self._optimizer = _optimizer(model)

    def __call__(self, batch: Batch) -> None:
        """Trains on a batch."""
        self._optimizer.zero_grad()
        self._criterion(self._model(batch), batch)["loss"].backward()
        self._optimizer.step()


def _measure(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of the table: ours, and ours with repeatable steps where asked for."""
    built = case(name, args)
    modes = {args.mode: False}
    if args.deterministic:
        modes[f"{args.mode} deterministic"] = True
    step = _step(built.ours, compile=args.mode == "compile")
    peer_step = None if built.peer is None else PlainStep(built.peer)
    for mode, deterministic in modes.items():
        torch.use_deterministic_algorithms(mode=deterministic)
        times, peer_times = [], []
        for turn in range(args.repeats + 1):  # the first warms up
            if peer_step is not None:
                torch.use_deterministic_algorithms(mode=False)
                peer_times += [_timed(peer_step, built.batch)][: turn and 1]
                torch.use_deterministic_algorithms(mode=deterministic)
            own = [_timed(step, built.batch) for _ in range(3)]
            times += [statistics.median(own)][: turn and 1]
        torch.use_deterministic_algorithms(mode=False)
        ratios = [a / b for a, b in zip(peer_times, times, strict=False)]
        yield {
            "model": name,
            "device": torch.cuda.get_device_name() if args.device == "cuda" else f"cpu ({args.threads} threads)",
            "precision": args.precision,
            "mode": mode,
            "frames": built.batch.num_frames,
            "atoms": built.batch.positions.shape[0],
            "edges": built.batch.edge_index.shape[1],
            "seconds": statistics.median(times),
            "peak_bytes": _memory_elsewhere("ours", name, args),
            "peer_seconds": statistics.median(peer_times) if peer_times else None,
            "peer_peak_bytes": _memory_elsewhere("peer", name, args) if peer_times else None,
            "ratio": statistics.median(ratios) if ratios else None,
        }


def _timed(step: Any, batch: Batch) -> float:
    _wait()
    start = time.perf_counter()
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
        "--device", args.device, "--memory-of", whose,
    ]  # fmt: skip
    for option in ("kind", "peer"):
        if getattr(args, option):
            command += [f"--{option}", getattr(args, option)]
    command += ["--tf32"] * args.tf32
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed: {done.stderr.strip().splitlines()[-1:]}")
    return int(json.loads(done.stdout.strip().splitlines()[-1]))


def _peak_bytes(args: argparse.Namespace) -> int:
    """What three steps need at most beyond model and batch."""
    built = case(args.model[0], args, ours=args.memory_of == "ours")
    step: Step | PlainStep
    if args.memory_of == "ours":
        step = _step(built.ours, compile=args.mode == "compile")
    else:
        assert built.peer is not None
        step = PlainStep(built.peer)
    if args.device == "cuda":
        for _ in range(3):
            step(built.batch)
        return torch.cuda.max_memory_allocated()
    before = _resident("VmRSS")
    for _ in range(3):
        step(built.batch)
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """Bytes of the resident set, from Linux' account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise InputError("peak memory on a CPU is read from /proc/self/status, which this system does not have.")


def _print_row(row: dict[str, Any], *, header: bool) -> None:
    """One line for people, in ms and MiB."""
    if header:
        words = ("device", "precision", "mode", "frames", "atoms", "edges", "ms", "MiB", "peer ms", "peer MiB", "ratio")
        print(_line("model", *words))
    peer = ("", "", "")
    if row["ratio"] is not None:
        peer = (f"{1e3 * row['peer_seconds']:.1f}", f"{row['peer_peak_bytes'] / 2**20:.0f}", f"{row['ratio']:.1f}")
    sizes = (str(row[key]) for key in ("frames", "atoms", "edges"))
    own = (f"{1e3 * row['seconds']:.1f}", f"{row['peak_bytes'] / 2**20:.0f}")
    print(_line(row["model"], row["device"][:16], row["precision"], row["mode"], *sizes, *own, *peer), flush=True)


def _line(*words: str) -> str:
    widths = (-15, -16, -9, -20, 6, 6, 7, 9, 7, 9, 8, 6)
    return " ".join(w.ljust(-n) if n < 0 else w.rjust(n) for w, n in zip(words, widths, strict=True)).rstrip()
