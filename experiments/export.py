"""`ddpkit export`: a trained model as one file for inference."""

import argparse
import time
from pathlib import Path

from ddpkit import checkpoint
from ddpkit.errors import InputError
from ddpkit.inference.export import export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ddpkit export`."""
    parser.description = (
        "Compiles the model of a run or checkpoint, with averaged weights where the run kept them, into one file that needs no "
        "compiler where it is used: by ddpkit.load_exported, by ddpkit.Calculator (ASE) and by LAMMPS. The file runs under the "
        "torch release and on processors or GPUs like those that made it."
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run folder (its best checkpoint) or a file"
    )
    parser.add_argument("--out", type=Path, default=Path("model.pt2"), metavar="FILE", help="(default: %(default)s)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the file computes (default: %(default)s)"
    )


def main(args: argparse.Namespace) -> None:
    """Runs `ddpkit export`.

    Raises:
        InputError: there is no such checkpoint, or its model cannot be exported.
        ParityError: the compiled code computes something else than the model.
    """
    start = time.monotonic()
    path = checkpoint.checkpoint_of(args.run)
    if not path.is_file():
        raise InputError(f"{args.run} holds no weights to export: give a run folder with a checkpoint, or its file.")
    model = checkpoint.load_model(path)
    averaged = checkpoint.load(path)["ema"] is not None
    made = export(
        model,
        args.out,
        device=args.device,
        source=str(path),
        averaged=averaged,
        say=lambda line: print(f"{line} ...", flush=True),
    )
    size = args.out.stat().st_size / 1e6
    weights = "averaged weights" if averaged else "weights"
    print(
        f"{args.out}: {made.model}, {made.parameters:,} parameters ({weights} of {path}), species {' '.join(made.species)}, "
        f"cutoff {made.r_max:g} Å, {made.precision}, for {made.device}; {size:.1f} MB in {time.monotonic() - start:.0f} s"
    )
