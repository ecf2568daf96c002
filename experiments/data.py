"""`ddpkit data`: make the built-in sets, prepare published files, describe a set."""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np

from ddpkit.data.ase_files import AseFiles
from ddpkit.data.builtin import RECIPES, generate, generated
from ddpkit.data.labels import Choice, as_options
from ddpkit.data.mptrj import ENERGIES, MPtrj
from ddpkit.data.parts import SPLIT, split
from ddpkit.data.prepared import TESTED, Filters, PreparedSet
from ddpkit.data.preparing import Source, prepare
from ddpkit.data.sampler import Sampler
from ddpkit.data.spice import Spice
from ddpkit.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ddpkit data`."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="generate|prepare|info")
    _add_generate(verbs.add_parser("generate", help="make a built-in set"))
    _add_prepare(verbs.add_parser("prepare", help="turn SPICE, MPtrj or any files that ASE reads into a prepared set"))
    info = verbs.add_parser("info", help="describe a prepared set")
    info.add_argument("path", type=Path)
    info.add_argument("--r-max", type=float, help="cutoff in Å that edges are counted with (default: the set's)")
    info.add_argument("--ranks", type=int, default=2, help="ranks for the imbalance (default: %(default)s)")
    info.add_argument("--batch-size", type=int, help="global batch for the imbalance (default: 16, or all frames)")
    info.add_argument("--verify", action="store_true", help="compare all arrays with their checksums")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Makes a built-in set: `generated` (molecules drawn by Langevin dynamics and labelled with GFN2-xTB) or "
        "`generated_crystals` (periodic crystals over 89 elements labelled with an analytic pair potential: for measuring "
        "speed, not accuracy)."
    )
    parser.add_argument("source", nargs="?", choices=sorted(RECIPES), default="generated")
    parser.add_argument("--frames", type=int, default=300, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="sets of one seed are identical (default: %(default)s)")
    parser.add_argument("--processes", type=int, help="how many work at a time (default: all cores)")
    parser.add_argument("--out", type=Path, help="folder to be (default: in the cache, where `ddpkit-run` looks)")
    parser.add_argument("--cache", type=Path, default=_cache(), help="(default: %(default)s)")


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    formats = parser.add_subparsers(dest="format", required=True, metavar="spice|mptrj|ase")
    for name, what, cleans in (
        ("spice", "a SPICE file (SPICE-2.0.1.hdf5)", True),
        ("mptrj", "an MPtrj file (MPtrj_2022.9_full.json)", True),
        ("ase", "files that ASE reads (extxyz, db, traj ...)", False),
    ):
        one = formats.add_parser(name, help=what)
        one.add_argument("files", nargs="+" if name == "ase" else 1, type=Path, metavar="FILE")
        one.add_argument("--out", type=Path, required=True, help="folder to be")
        one.add_argument("--r-max", type=float, default=6.0, help="cutoff in Å (default: %(default)s)")
        one.add_argument("--processes", type=int, help="how many work at a time (default: all cores, at most 12)")
        if name != "mptrj":
            _add_filter(one, "charged", "frames of a total charge other than zero", default=cleans)
        _add_filter(one, "isolated", "frames with an atom that has no neighbour within the cutoff", default=cleans)
        _add_filter(
            one, "unlabelled", "frames whose energy, forces or positions are missing, NaN or infinite", default=cleans
        )
        if name == "mptrj":
            one.add_argument("--energy", choices=sorted(ENERGIES), default="uncorrected", help="(default: %(default)s)")
        if name == "ase":
            for label in ("energy", "forces"):
                one.add_argument(
                    f"--{label}-key", metavar="KEY", help=f"name of the {label}, where it is unusual or one of several"
                )
            one.add_argument(
                "--stress-key", metavar="KEY",
                help="likewise of the stress in eV/Å^3 (ASE's sign), or of a virial in eV (-stress times volume), which has "
                "virial in its name; six numbers are xx yy zz yz xz xy",
            )  # fmt: skip
            one.add_argument(
                "--allow-missing", action="store_true",
                help="keep periodic frames without a stress among others that have one (default: refuse)",
            )  # fmt: skip


def _add_filter(parser: argparse.ArgumentParser, name: str, what: str, *, default: bool) -> None:
    parser.add_argument(
        f"--drop-{name}", action=argparse.BooleanOptionalAction, default=default,
        help=f"leave out {what} (default: {'yes' if default else 'no'})",
    )  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Runs `ddpkit data`."""
    {"generate": _generate, "prepare": _prepare, "info": _info}[args.verb](args)


def _generate(args: argparse.Namespace) -> None:
    if args.frames < 1:
        raise InputError(f"--frames {args.frames}: ask for at least one")
    if args.out is None:
        path = generated(args.source, args.cache, frames=args.frames, seed=args.seed, processes=args.processes)
        print(_described(PreparedSet(path)))
    else:
        made = generate(args.source, args.out, frames=args.frames, seed=args.seed, processes=args.processes)
        print(_described(made))


def _prepare(args: argparse.Namespace) -> None:
    source: Source
    filters = Filters(
        charged=getattr(args, "drop_charged", False), isolated=args.drop_isolated, unlabelled=args.drop_unlabelled
    )
    if args.format == "spice":
        source = Spice(args.files[0])
    elif args.format == "mptrj":
        source = MPtrj(args.files[0], args.energy)
    else:
        choice = Choice(args.energy_key, args.forces_key, args.stress_key, args.allow_missing)
        source = AseFiles(args.files, choice, labels=not filters.unlabelled, advice=as_options)
    print(_described(prepare(source, args.out, r_max=args.r_max, filters=filters, processes=args.processes)))


def _info(args: argparse.Namespace) -> None:
    frames = PreparedSet(args.path)
    if args.verify:
        frames.verify()
        print("checksums: all arrays match")
    print(_described(frames))
    r_max = frames.manifest["r_max"] if args.r_max is None else args.r_max
    edges = frames.edges(r_max)
    everything = np.arange(len(frames))
    batch_size = min(16, len(frames)) if args.batch_size is None else args.batch_size
    sampler = Sampler(everything, frames.atoms, edges, batch_size, world_size=args.ranks)
    before, after = sampler.imbalance()
    print(f"\nwithin {r_max:g} Å: {edges.sum():,} edges, {edges.sum() / frames.atoms.sum():.1f} neighbours an atom")
    print(
        f"work of the slowest of {args.ranks} ranks over the mean, global batch {batch_size}: "
        f"{before:.3f} in equal numbers of frames, {after:.3f} balanced by edges"
    )
    if len(frames) >= len(SPLIT):
        sizes = " / ".join(f"{len(part):,}" for part in split(len(frames), SPLIT))
        print(f"split at random {':'.join(f'{100 * share:g}' for share in SPLIT)}: {sizes} to train, validate and test")


def _described(frames: PreparedSet) -> str:
    """What a set holds and what was left out of it."""
    facts = frames.manifest
    sizes = f"{np.median(frames.atoms):g} in the median frame ({frames.atoms.min()} to {frames.atoms.max()})"
    periodic = "periodic" if frames.periodic else "not periodic"
    references = ", ".join(f"{symbol} {energy:.6g} eV" for symbol, energy in sorted(frames.atom_energies.items()))
    lines = [
        f"{frames.path}",
        f"labels: {told(frames.labels)}",
        *facts.get("notes", ()),
        _selection(facts),
        *([f"isolated atoms: {references}"] if references else []),
        f"{facts['atoms']:,} atoms, {sizes}; {facts['groups']:,} molecules or materials; {periodic}",
        f"{len(frames.species)} species: {' '.join(frames.species)}",
        f"{'subset':<50} {'frames':>10} {'atoms':>12}",
    ]
    counts = np.bincount(frames.subset_index, minlength=len(frames.subsets))
    atoms = np.bincount(frames.subset_index, weights=frames.atoms, minlength=len(frames.subsets))
    rows: list[tuple[Any, ...]] = sorted(zip(frames.subsets, counts, atoms, strict=True))
    lines += [f"{name or '(none)':<50} {count:>10,} {int(size):>12,}" for name, count, size in rows]
    return "\n".join(lines)


def told(labels: dict[str, Any]) -> str:
    """Where the labels of a set come from, in words."""
    keys = {what: facts for what, facts in labels.items() if what != "theory"}
    parts = [labels["theory"]] if "theory" in labels else []
    if any(facts["key"] for facts in keys.values()):
        parts.append(
            ", ".join(
                f"{what} from {facts['key']} [{facts['unit']}]" + (f" ({facts['from']})" if "from" in facts else "")
                for what, facts in keys.items()
            )
        )
    return "; ".join(parts) or "as in the files"


def _selection(facts: dict[str, Any]) -> str:
    """How many frames each filter left, in the order in which frames are tested."""
    left = facts["read"]
    parts = [f"{left:,} frames read"]
    for name, count in sorted(facts["dropped"].items(), key=lambda item: TESTED.index(item[0])):
        left -= count
        parts.append(f"{count:,} dropped: {name}, {left:,} left")
    unlabelled = facts.get("unlabelled", {})
    if facts["periodic"] and 0 < unlabelled.get("stress", 0) < facts["frames"]:
        parts.append(f"{unlabelled['stress']:,} of the {facts['frames']:,} frames have no stress")
    parts += [
        f"{unlabelled[what]:,} frames have no {what}, or one that is NaN or infinite"
        for what in ("energy", "forces")
        if unlabelled.get(what)
    ]
    return "; ".join(parts)


def _cache() -> Path:
    return Path(os.environ.get("DDPKIT_CACHE", Path.home() / ".cache" / "ddpkit"))
