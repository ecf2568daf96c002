"""`ddpkit eval`: accuracy tables of a run or checkpoint, parity plots, the worst frames, torsion barriers."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from ddpkit import checkpoint
from ddpkit.analysis import accuracy, figures, published, tables
from ddpkit.checkpoint import checkpoint_of
from ddpkit.data import PreparedSet, collate
from ddpkit.data.ase_files import atoms_of
from ddpkit.data.labels import by_preparing
from ddpkit.errors import InputError
from ddpkit.evaluate import Evaluation, evaluate
from ddpkit.experiments import run_data, torsion
from ddpkit.experiments.config import read, read_saved
from ddpkit.experiments.data import told
from ddpkit.inference.exported import load
from ddpkit.inference.package import SUFFIX
from ddpkit.ranks import group, phase
from ddpkit.ranks.agree import agree
from ddpkit.ranks.group import Environment
from ddpkit.ranks.lifeline import alive

PARTS = ("train", "validation", "test", "all")
_PAPERS = ("allegro_small", "allegro_medium", "allegro_large")  # models whose errors the paper has
_ENERGY_POINTS = 100_000  # that a figure is made of


@dataclass(frozen=True)
class Chosen:
    """What is evaluated.

    Attributes:
        frames: the set.
        indices: its frames that are evaluated.
        part: of the set, by the run's division.
        known: sentences on frames that the run has seen.
    """

    frames: PreparedSet
    indices: NDArray[np.int64]
    part: str
    known: tuple[str, ...] = ()


@dataclass(frozen=True)
class Beside:
    """Another model's errors, to stand in brackets.

    Attributes:
        errors: as `accuracy.subset_table` takes them.
        told: what they are.
    """

    errors: pd.DataFrame
    told: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ddpkit eval`."""
    parser.description = (
        "Errors of a trained model by subset and by element, parity plots, the worst frames, and torsion barriers; alone or "
        "under mpirun. Predicts with the averaged weights where the run kept them."
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN_OR_CHECKPOINT",
        help="a run folder (its best checkpoint), a checkpoint's file, or a file of ddpkit export",
    )  # fmt: skip
    parser.add_argument(
        "data", type=Path, nargs="?", metavar="DATA",
        help="a prepared set or a file that ASE reads (default: what the run was trained on)",
    )  # fmt: skip
    parser.add_argument(
        "--split", choices=PARTS,
        help="part of the data, divided as the run's configuration says (default: all of DATA, or the run's own test part)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: a folder in the run's)")
    parser.add_argument("--torsion", type=Path, metavar="FILE", help="TorsionNet500, or a file in its layout (JSON)")
    parser.add_argument(
        "--torsion-reference", type=Path, metavar="FILE", help="reference energies for it (default: those of its own)"
    )
    parser.add_argument(
        "--beside", type=Path, metavar="FILE",
        help="values to stand in brackets: another model's accuracy.csv, or published values in its columns (default: the "
        "paper's, for subsets of SPICE 2)",
    )  # fmt: skip
    parser.add_argument("--worst", type=int, default=10, metavar="N", help="frames to write out (default: %(default)s)")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="frames in a batch, over all ranks (default: %(default)s)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")


def main(args: argparse.Namespace) -> None:
    """Runs `ddpkit eval`.

    Raises:
        InputError: on every rank, where the checkpoint, the data or the benchmark cannot be used.
    """
    phase.enter("rendezvous")
    here = group.init_process_group(None if args.device == "auto" else args.device)
    with alive(here, doing="ddpkit eval"):
        _evaluate(args, here)
    group.shutdown()


def _evaluate(args: argparse.Namespace, here: Environment) -> None:
    phase.enter("data")
    with agree("reading the run"):
        if args.batch_size < 1 or args.worst < 0:
            raise InputError(
                f"--batch-size {args.batch_size} and --worst {args.worst}: give at least 1, and at least 0."
            )
        if args.torsion_reference and not args.torsion:
            raise InputError("--torsion-reference needs --torsion: give the file with the coordinates too.")
        if not args.run.exists():
            raise InputError(
                f"{args.run} does not exist: it lies in no run folder and is no checkpoint; give the folder of a run, or the "
                "file of a checkpoint."
            )
        config = _configuration(args.run)
        _refuse_without_weights(args.run)
        if config is None and args.data is None and args.torsion is None:
            raise InputError(f"{args.run} {_outside(args.run)}, so its data are not known: give DATA too.")
        beside = Beside(accuracy.read_beside(args.beside), f"In brackets: {args.beside}.") if args.beside else None
        fragments = torsion.read_fragments(args.torsion, args.torsion_reference) if args.torsion else []
        model = load(args.run, here.device).requires_grad_(requires_grad=False)
    chosen = _open(args, config, model) if args.data is not None or config is not None else None
    out = _out(args, config, chosen)
    with agree("making the folder"):
        if here.is_first:
            _make(out)
    phase.enter("validation")
    if chosen is not None:
        evaluation = evaluate(model, chosen.frames, chosen.indices, here, batch_size=args.batch_size, progress=True)
        with agree("writing the tables"):
            if here.is_first:
                _tell_accuracy(chosen, evaluation, out, _notes(args, chosen), beside, config)
                _write_worst(chosen, evaluation, model, here, out, args.worst)
    if fragments:
        _barriers(model, fragments, here, out, args)
    with agree("leaving"):
        if here.is_first:
            print(f"written to {out}")


def _configuration(run: Path) -> DictConfig | None:
    """The configuration of the run that a path means or lies in; none for an exported model, which may lie anywhere."""
    if run.suffix == SUFFIX:
        return None
    folder = run if run.is_dir() else run.parent.parent
    return read_saved(folder) if (folder / "config.yaml").is_file() else None


def _outside(run: Path) -> str:
    return "is an exported model" if run.suffix == SUFFIX else "lies in no run folder"


def _refuse_without_weights(run: Path) -> None:
    """Says why a run folder holds no checkpoint."""
    if not (run / "config.yaml").is_file() or checkpoint_of(run).is_file():
        return
    every = read_saved(run).train.checkpoint_every
    if every in (0, "never"):
        why = f"it was run with train.checkpoint_every={every}, which writes none: train again without that"
    else:
        why = "it ended before its first checkpoint: train again, longer or with train.checkpoint_every=N for one every N steps"
    raise InputError(f"The run in {run} left no weights to evaluate: {why}.")


def _fingerprint_of(run: Path) -> Mapping[str, str] | None:
    """That of the data that a run was trained on; None where its version kept none."""
    folder = run if run.is_dir() else run.parent.parent
    try:
        found = json.loads((folder / "summary.json").read_text()).get("data_fingerprint")
    except (OSError, ValueError):
        found = None
    return found or checkpoint.load(checkpoint_of(run)).get("data")


def _refuse_changed_data(args: argparse.Namespace, config: DictConfig, data: run_data.Data, part: str) -> None:
    """Looks whether the data are what the run was trained on, so that its parts are what they were."""
    before = _fingerprint_of(args.run)
    if before is None:
        if group.environment().is_first:
            print(
                "The run was made by a version that kept no fingerprint of its data: whether they have changed is not known."
            )
        return
    what = run_data.changed(before, run_data.fingerprint(config, data), order=False)
    if what is None:
        return
    raise InputError(
        f"{args.data or config.data.path} is not what {args.run} was trained on ({what}), so its {part} part may "
        "hold frames that were "
        f"trained on: give the data that it was trained on{run_data.kept(before)} as DATA with --split {part}, or "
        "give these as DATA "
        "without --split."
    )


def _open(args: argparse.Namespace, saved: DictConfig | None, model: Any) -> Chosen:
    part = args.split or ("test" if args.data is None else "all")
    if args.data is None:
        assert saved is not None
        config = saved
    else:
        with agree("reading the run"):
            if saved is None and part != "all":
                raise InputError(
                    f"{args.run} {_outside(args.run)}, so how it divided its data is not known: leave --split {part} out."
                )
            config = read(["data=files", "data.path=-"])
            if saved is not None and part != "all":
                config.data = OmegaConf.merge(config.data, saved.data, {"cache": config.data.cache})
            else:
                config.data.split = [1.0, 0.0, 0.0]
            # A file is read as the run's was, but for a stress, which is not evaluated. A prepared set was read once and for all.
            if saved is not None and part == "all":
                config.data.energy_key, config.data.forces_key = saved.data.energy_key, saved.data.forces_key
                config.data.allow_missing = True
            if args.data.is_dir():
                config.data.energy_key = config.data.forces_key = config.data.stress_key = None
            config.data.source, config.data.path = "files", str(args.data)
            config.model.r_max = float(model.r_max)
    data = run_data.open_data(config, by_preparing)
    with agree("comparing the data"):
        if saved is not None and (args.data is None or part != "all"):
            _refuse_changed_data(args, config, data, part)
    parts = {name: getattr(data, name) for name in PARTS[:3]}
    indices = np.sort(np.concatenate(list(parts.values()))) if part == "all" else parts[part]
    known: tuple[str, ...] = ()
    if saved is not None and args.data is not None and part == "all":
        indices, known = _unseen(saved, data.frames, indices)
    with agree("choosing the frames"):
        if not len(indices):
            if known:
                raise InputError(
                    f"All frames of {args.data} are among those that the run trained or validated on: give others."
                )
            raise InputError(f"The {part} part of the run's data is empty: choose another with --split, or give DATA.")
    return Chosen(data.frames, indices, part, known)


def _unseen(
    saved: DictConfig, frames: PreparedSet, indices: NDArray[np.int64]
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """The frames of another set than the run's that the run has neither trained nor validated on, and what to say of that."""
    try:
        own = run_data.open_data(saved)
    except InputError:
        return indices, ("Whether the run has seen some of these frames is not known: its own data cannot be opened.",)
    if own.frames.fingerprint == frames.fingerprint or own.frames.digests is None or frames.digests is None:
        return indices, ()
    seen = np.isin(frames.digests[indices], own.frames.digests[np.concatenate([own.train, own.validation])])
    told = f"{seen.sum():,} frames left out that the run trained or validated on."
    return indices[~seen], (told,) if seen.any() else ()


def _out(args: argparse.Namespace, config: DictConfig | None, chosen: Chosen | None) -> Path:
    if args.out is not None:
        return Path(args.out)
    run = args.run if args.run.is_dir() else args.run.parent if config is None else args.run.parent.parent
    if chosen is None:
        return Path(run) / "evaluation" / "torsion"
    words = [chosen.part] if args.data is None else [args.data.stem, args.split] if args.split else [args.data.stem]
    return Path(run) / "evaluation" / "-".join(words)


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made ({error.strerror}): choose another folder with --out.") from error


def _notes(args: argparse.Namespace, chosen: Chosen) -> list[str]:
    dropped = chosen.frames.manifest["dropped"]
    left_out = "; ".join(f"{count:,} frames left out when it was prepared: {name}" for name, count in dropped.items())
    what = "all frames" if chosen.part == "all" else f"the {chosen.part} part"
    return [
        f"Weights: {checkpoint_of(args.run)}. Data: {what} of {args.data or chosen.frames.path}"
        + (f" ({left_out})" if left_out else "")
        + f". Labels: {told(chosen.frames.labels)}.",
        *chosen.known,
    ]


def _published(config: DictConfig | None) -> "Beside":
    """The paper's errors on SPICE 2: of the run's own model where it is one of the paper's, otherwise of the largest."""
    same = [name for name in _PAPERS if config is not None and config.model == read([f"model={name}"]).model]
    values = published.published_accuracy(same[0] if same else _PAPERS[-1])
    return Beside(values, f"In brackets: {values['model'].iloc[0]} as published ({values['source'].iloc[0]}).")


def _errors(chosen: Chosen, evaluation: Evaluation) -> accuracy.Frames:
    frames, indices = chosen.frames, evaluation.indices
    return accuracy.Frames(
        frames.subset_index[indices], frames.subsets, frames.atoms[indices], evaluation.energy - frames.array("energy")[indices],
        evaluation.forces_abs, evaluation.forces_square,
    )  # fmt: skip


def _tell_accuracy(
    chosen: Chosen,
    evaluation: Evaluation,
    out: Path,
    notes: list[str],
    beside: Beside | None,
    config: DictConfig | None,
) -> None:
    errors = _errors(chosen, evaluation)
    values, elements = accuracy.by_subset(errors), accuracy.by_element(evaluation.species, evaluation.by_species)
    if beside is None and accuracy.stands_beside(published.published_accuracy(_PAPERS[-1]), values):
        beside = _published(config)
    if beside is not None:
        notes = [*notes, beside.told]
    others = None if beside is None else beside.errors
    shown = [accuracy.subset_table(values, notes, others), accuracy.element_table(elements)]
    tables.write(out, "accuracy", values, shown)
    tables.write_csv(out / "elements.csv", elements)
    reference = np.asarray(chosen.frames.array("energy")[evaluation.indices])
    tables.write_csv(out / "frames.csv", accuracy.by_frame(errors, evaluation.indices, reference))
    figures.save(_parity(chosen.frames, evaluation), out / "parity.png")
    print("\n\n".join(table.text() for table in shown))


def _parity(frames: PreparedSet, evaluation: Evaluation) -> Any:
    atoms, energy = frames.atoms[evaluation.indices], frames.array("energy")[evaluation.indices]
    some = np.unique(np.linspace(0, len(atoms) - 1, _ENERGY_POINTS).astype(np.int64))
    labels = np.concatenate([frames.array("forces")[slice(*frames.atom_range(int(i)))] for i in evaluation.kept])
    return accuracy.parity(
        np.stack([energy / atoms, evaluation.energy / atoms], axis=1)[some],
        np.stack([labels.reshape(-1), evaluation.forces.reshape(-1)], axis=1),
        len(atoms),
        int(atoms.sum()),
    )


def _write_worst(chosen: Chosen, evaluation: Evaluation, model: Any, here: Environment, out: Path, count: int) -> None:
    """Extended XYZ of the frames with the largest errors, worst first; labels as `energy` and `forces`, predictions beside."""
    from ase.io import write

    errors = _errors(chosen, evaluation)
    for name, size in (("forces", errors.forces_rmse), ("energy", np.abs(errors.energy_per_atom_error))):
        images = []
        for place in np.argsort(-size, kind="stable")[:count].tolist():
            frame = chosen.frames.frame(int(evaluation.indices[place]))
            batch = collate([frame], model.species, model.r_max).to(here.device)
            atoms = atoms_of(frame)
            atoms.arrays["predicted_forces"] = model(batch)["forces"].detach().to(torch.float64).cpu().numpy()
            atoms.info |= {
                "frame": int(evaluation.indices[place]),
                "predicted_energy": float(evaluation.energy[place]),
                "energy_error_per_atom": float(errors.energy_per_atom_error[place]),
                "forces_rmse": float(errors.forces_rmse[place]),
                **{key: text for key, text in (("subset", frame.subset), ("group", frame.group)) if text},
            }
            images.append(atoms)
        if images:
            write(out / f"worst_{name}.xyz", images, format="extxyz", parallel=False)


def _barriers(
    model: Any, fragments: list[torsion.Fragment], here: Environment, out: Path, args: argparse.Namespace
) -> None:
    """Tells the errors of barrier heights, of the fragments whose elements the model knows."""
    known = [fragment for fragment in fragments if set(fragment.symbols) <= set(model.species)]
    with agree("choosing the fragments"):
        if not known:
            raise InputError(
                f"{args.torsion} holds no fragment of the model's elements alone ({', '.join(model.species)}): give another "
                "benchmark or another model."
            )
    predicted = torsion.profiles(model, known, here)
    with agree("writing the barriers"):
        if here.is_first:
            values = accuracy.barriers([f.name for f in known], [f.energies for f in known], predicted)
            notes = _barrier_notes(known, len(fragments) - len(known), args)
            others = published.published_barriers() if len(known) == torsion.FRAGMENTS else None
            if others is not None:
                notes.append(f"Other models as published: {others['source'].iloc[0]}.")
            table = accuracy.barrier_table(values, notes, others)
            tables.write(out, "torsion", values, [table])
            print(f"\n{table.text()}")


def _barrier_notes(known: list[torsion.Fragment], left_out: int, args: argparse.Namespace) -> list[str]:
    reference = args.torsion_reference or args.torsion
    notes = [f"Single points of {args.torsion}, the barrier being the highest less the lowest; reference: {reference}."]
    if left_out:
        notes.append(f"Left out, for elements that the model does not know: {left_out}.")
    if few := sum(len(fragment.energies) < torsion.CONFORMERS for fragment in known):
        notes.append(f"Of fewer than {torsion.CONFORMERS} conformers, so that the barrier may be too low: {few}.")
    return notes
