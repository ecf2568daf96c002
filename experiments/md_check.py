"""`ddpkit md-check`: whether a model conserves what molecular dynamics conserves."""

import argparse
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ase import Atoms, io

from ddpkit.calculator import Calculator
from ddpkit.errors import InputError, ParityError
from ddpkit.experiments import lammps_forces
from ddpkit.experiments.conservation import DOUBLE, SINGLE, Bounds, Verdict, check, ranks_verdict
from ddpkit.experiments.structures import fitting
from ddpkit.inference.package import SUFFIX


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", type=Path, help="run folder, checkpoint or exported file")
    parser.add_argument(
        "--structure",
        type=Path,
        metavar="FILE",
        help="last configuration of a file that ASE reads (default: one made of species that the model knows)",
    )
    parser.add_argument("--temperature", type=float, default=300.0, metavar="K", help="in K (default: 300)")
    parser.add_argument("--device", help="where to compute, such as cpu (default: the GPU where there is one)")
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="compare forces in LAMMPS on one rank and on N too; takes an exported file",
    )
    parser.add_argument("--seed", type=int, default=1, help="of velocities and directions (default: 1)")


def main(args: argparse.Namespace) -> None:
    """Prints a verdict for each quantity.

    Raises:
        InputError: the model, the configuration or an option cannot be used.
        ParityError: something is not conserved.
    """
    if not (math.isfinite(args.temperature) and args.temperature > 0):
        raise InputError(f"--temperature {args.temperature:g} is no temperature: give one in K greater than zero.")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed} is negative: give a number from 0 on.")
    if args.ranks is not None and args.ranks < 1:
        raise InputError(f"--ranks {args.ranks} is no number of ranks: give one from 1 on.")
    if args.ranks is not None and args.model.suffix != SUFFIX:
        raise InputError(
            f"--ranks compares runs of LAMMPS, which takes an exported file: `ddpkit export {args.model}` makes it."
        )
    calculator = Calculator(args.model, device=_device(args.device))
    model: Any = calculator.model
    atoms = fitting(model.species) if args.structure is None else read(args.structure)
    described = atoms.info.get("name") or args.structure
    print(
        f"{args.model}: {kind(model)}, {precision(model)}, on {calculator.device}; {len(atoms)} atoms "
        f"({described}{', periodic' if atoms.pbc.any() else ''})",
        flush=True,
    )
    started = time.monotonic()
    verdicts = check(
        atoms, calculator, bounds(model), temperature=args.temperature, seed=args.seed,
        say=lambda text: print(f"  {text}", flush=True),
    )  # fmt: skip
    if args.ranks is not None:
        in_lammps = partial(lammps_forces.forces, args.model)
        verdicts.append(ranks_verdict(atoms, calculator, bounds(model), in_lammps, args.ranks, args.seed))
    print(table(verdicts))
    print(f"{time.monotonic() - started:.0f} s")
    if failed := [v.what for v in verdicts if not v.passes]:
        raise ParityError(f"{args.model} fails md-check: {', '.join(failed)}; the lines above say by how much.")


def table(verdicts: list[Verdict]) -> str:
    """One line for each verdict and one for its bound."""
    return "\n".join(
        f"{v.what:<10}{'passes' if v.passes else 'FAILS':<8}{v.figure}\n{'':<18}{v.bound}" for v in verdicts
    )


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name} is no device: give cpu or cuda.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: there is no NVIDIA GPU here; use --device cpu.")
    return device


def read(path: Path) -> Atoms:
    """The last configuration of a file.

    Raises:
        InputError: it cannot be read, or holds no atoms.
    """
    if not path.is_file():
        raise InputError(f"--structure {path} is no file: give one that ASE reads, such as .xyz or .pdb.")
    try:
        atoms = io.read(path, index=-1)
    except Exception as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"--structure {path} cannot be read ({why}): give a file that ASE reads, such as .xyz."
        ) from error
    if len(atoms) < 2:
        number = "one atom" if len(atoms) else "no atoms"
        raise InputError(f"--structure {path} holds {number}: give a configuration with at least two.")
    # velocities, constraints and results of the file are not wanted
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)


def kind(model: torch.nn.Module) -> str:
    """The name of its class, or of the class that was exported."""
    return str(getattr(getattr(model, "metadata", None), "model", type(model).__name__))


def precision(model: torch.nn.Module) -> str:
    """As a model says, or as its weights are: an exported one has its word in `metadata`."""
    said = getattr(getattr(model, "metadata", model), "precision", None)
    if isinstance(said, str):
        return said
    weights = [*model.parameters(), *model.buffers()]
    single = any(w.is_floating_point() and w.dtype != torch.float64 for w in weights)
    return "float32" if single else "float64"


def bounds(model: torch.nn.Module) -> Bounds:
    """What the rounding of a model explains."""
    return DOUBLE if precision(model) == "float64" else SINGLE
