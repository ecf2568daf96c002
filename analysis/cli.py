"""`ddpkit analyze`: run folders in, tables, figures and a page out."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ddpkit.analysis import (
    attribution,
    blocks,
    choices,
    claims,
    endpoints,
    figures,
    inference,
    inference_figures,
    numerics,
    plan,
    present,
    ranks,
    recount,
    report,
    speed,
    tables,
)
from ddpkit.analysis.runs import Run, holds_runs, read_runs
from ddpkit.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `ddpkit analyze`."""
    parser.add_argument(
        "study",
        choices=("numerics", "speed", "accuracy", "inference", "report", "ranks", "claims"),
        help="numerics: loss differences (Table 3, Figure 1); speed: epoch times (Table 4); accuracy: errors on test frames, arm "
        "by arm or by number of frames trained on; inference: molecular dynamics (section III); report: the first two as one "
        "HTML page; "
        "ranks: studies of numerics in sub-folders, each with another number of ranks, as one table and figure; claims: "
        "recomputes the numbers of a README from the runs beside it, as its claims.yaml names them",
    )
    parser.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        help="holds run folders; for report also sub-folders of them called numerics... and speed...; for ranks such "
        "sub-folders; for claims a folder of results, or a folder of such folders",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: the folder itself)")
    parser.add_argument(
        "--baseline",
        default="baseline",
        metavar="LABEL",
        help="runs to compare with, one for each seed: LABEL, LABEL_2 ... (default: baseline)",
    )
    parser.add_argument(
        "--warmup",
        type=int,
        metavar="EPOCHS",
        help="epochs to leave out at the start of each timed run (default: 1 for runs that took turns, else 0)",
    )
    parser.add_argument(
        "--format",
        choices=("ddpkit", "lightning"),
        default="ddpkit",
        help="lightning: metrics.csv of Lightning's CSVLogger, as nequip writes it (numerics only)",
    )


def main(args: argparse.Namespace) -> None:
    """Runs `ddpkit analyze`.

    Raises:
        InputError: the folder or its runs cannot be used.
    """
    out = args.out or args.folder
    if args.warmup is not None and args.warmup < 0:
        raise InputError(f"--warmup {args.warmup} is negative; give the number of epochs to leave out")
    if args.study == "numerics":
        _print_section(_numerics(args.folder, out, args)[0])
    elif args.study == "speed":
        _print_section(_speed(args.folder, out, args)[0])
    elif args.study == "accuracy":
        _accuracy(args.folder, out, args)
    elif args.study == "ranks":
        _ranks(args.folder, out, args)
    elif args.study == "inference":
        _inference(args.folder, out)
    elif args.study == "claims":
        _claims(args.folder)
    else:
        _report(args.folder, out, args)


def _study(folder: Path, args: argparse.Namespace) -> blocks.Study:
    """The study of numerics in a folder."""
    runs, skipped = read_runs(folder, args.format)
    try:
        data = blocks.study(runs, plan.read(folder, plan.NUMERICS), args.baseline)
    except InputError as error:
        raise InputError("; ".join([str(error), *skipped])) from None
    return replace(data, left_out=[*(f"{note}." for note in skipped), *data.left_out])


def _ranks(folder: Path, out: Path, args: argparse.Namespace) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder whose sub-folders are studies of numerics")
    found = sorted(path for path in folder.iterdir() if path.is_dir() and holds_runs(path))
    if not found:
        raise InputError(
            f"{folder} holds no studies: give the folder whose sub-folders hold run folders, one for each number of ranks"
        )
    values = ranks.distances([_study(path, args) for path in found])
    shown = ranks.table(values)
    tables.write(out, "ranks", values, [shown])
    tables.write_csv(out / "ranks_intervals.csv", ranks.intervals(values))
    figures.save(ranks.figure(values), out / "ranks.png")
    print(f"{shown.text()}\n\nfigure: {(out / 'ranks.png').resolve()}")


def _claims(folder: Path) -> None:
    known = {path: recount.recount(path) for path in recount.folders(folder)}
    print("\n".join(recount.told(path, numbers) for path, numbers in known.items()))
    wrong = sum(not one.holds for numbers in known.values() for one in numbers)
    if wrong:
        raise InputError(f"{wrong} numbers are not what the runs give: correct the text, or the runs beside it.")


def _numerics(
    folder: Path, out: Path, args: argparse.Namespace, name: str = "numerics", *, attributes: bool = True
) -> tuple[report.Section, list[Run]]:
    data = _study(folder, args)
    values = numerics.table(data)
    shown = [*present.numerics(values, data), present.endpoints(data), present.divergences(data)]
    if attributes:
        shown += _attribution(data, out)
    facts = present.numerics_facts(data)
    tables.write(out, name, values, [facts, *shown])
    tables.write_csv(out / endpoints.file_name(name), endpoints.table(data))
    pictures = [
        report.Picture(
            figures.save(figures.trajectories(data), out / f"{name}.png"),
            f"Losses and loss differences, one column for each arm ({data.scope})",
            "Top: losses, with the baselines' in each. Bottom: histogram of the differences cut at ±0.020, the number of "
            "points outside in the panel; where the cut leaves a few bars or few points, an inset shows the central 99 % of "
            "all differences on their own scale. Runs of an arm are pooled.",
            "loss curves and histograms of loss differences, one column for each arm",
        ),
        report.Picture(
            figures.save(figures.divergences(data), out / f"{name.replace('numerics', 'divergence', 1)}.png"),
            f"Divergence from the baseline ({data.scope})",
            "Distance of the projected parameters relative to their size, geometric mean over the runs of an arm."
            if data.by_projection
            else "Mean absolute loss difference over equal stretches of steps and over the runs of an arm.",
            "distance from the baseline against training step, one line for each arm",
        ),
    ]
    kernels = " Under deterministic kernels" if all(run.deterministic for run in data.runs) else ""
    heading = f"Numerics: does the scheme change the trajectory?{kernels}"
    return report.Section(heading, [facts], claims.numerics_claims(data), [*shown, *pictures]), data.runs


def _attribution(data: blocks.Study, out: Path) -> list[tables.Table]:
    sources = attribution.table(data)
    tables.write_csv(out / "attribution.csv", sources)
    return [present.attribution(sources, data.scope)] if len(sources) else []


def _attribution_over(folders: Sequence[Path], out: Path, args: argparse.Namespace) -> report.Section | None:
    """The attribution over the runs of several folders, with and without deterministic kernels, where they may be compared."""
    runs = [
        replace(run, label=f"{folder.name}/{run.label}")
        for folder in folders
        for run in read_runs(folder, args.format)[0]
    ]
    first = next((run.stem for run in runs if run.label.endswith(f"/{args.baseline}")), args.baseline)
    try:
        data = blocks.study(runs, plan.Plan(plan.NUMERICS, declared=False), first)
    except InputError:
        return None
    return report.Section("Attribution: where do differences come from?", parts=_attribution(data, out))


def _speed(folder: Path, out: Path, args: argparse.Namespace, name: str = "speed") -> tuple[report.Section, list[Run]]:
    if args.format == "lightning":
        raise InputError("Lightning's logs carry no step times; the speed study needs the run folders of ddpkit-run")
    runs, skipped = read_runs(folder)
    data = speed.study(runs, plan.read(folder, plan.SPEED), args.warmup)
    data = replace(data, notes=(*(f"{note}." for note in skipped), *data.notes))
    values = speed.table(data)
    shown, facts = present.epochs(values, data), present.speed_facts(data)
    tables.write(out, name, values, [facts, *shown])
    if len(ratios := speed.beside_table(data)):
        tables.write_csv(out / f"{name}_beside.csv", ratios)
    picture = report.Picture(
        figures.save(figures.epochs(data), out / f"{name}.png"),
        f"Epoch time relative to standard eager of the same size ({data.scope})",
        "Mean seconds of an epoch at the right; bars: 95 % intervals over launches, see the table; crosses: published.",
        "relative epoch time of each strategy with intervals, one panel for each model size",
    )
    return report.Section(
        "Speed: what does the scheme cost?", [facts], claims.speed_claims(data), [*shown, picture]
    ), runs


def _accuracy(folder: Path, out: Path, args: argparse.Namespace) -> None:
    if args.format == "lightning":
        raise InputError("Lightning's logs carry no errors on test frames: give the run folders of ddpkit-run.")
    data = choices.read(folder, args.baseline)
    if data.is_curve:
        shown, drawn = choices.curve_table(choices.curve(data), data.notes), choices.curve_figure(data)
    else:
        shown, drawn = choices.table(data), choices.figure(data)
    tables.write(out, "accuracy", data.rows, [shown])
    path = figures.save(drawn, out / "accuracy.png")
    print(f"{shown.text()}\n\nfigure: {path.resolve()}")


def _inference(folder: Path, out: Path) -> None:
    data = inference.read(folder)
    values = inference.table(data)
    shown = inference.tables(values, data)
    tables.write(out, "inference", values, shown)
    path = figures.save(inference_figures.panels(values, data.machine), out / "inference.png")
    print("\n\n".join([*(table.text() for table in shown), f"figure: {path.resolve()}"]))


def _report(folder: Path, out: Path, args: argparse.Namespace) -> None:
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder; give the folder that holds the runs, or numerics/ and speed/ with them"
        )
    found = sorted(path for path in folder.iterdir() if _holds_study(path, args.format))
    numeric = [path for path in found if path.name.startswith("numerics")]
    together = _attribution_over(numeric, out, args) if len(numeric) > 1 else None
    parts = [_numerics(path, out, args, path.name, attributes=together is None) for path in numeric]
    if together:
        parts.append((together, []))
    parts += [_speed(path, out, args, path.name) for path in found if path not in numeric]
    if not parts:
        runs, _ = read_runs(folder, args.format)
        is_numerics = any(args.baseline in (run.label, run.stem) for run in runs)
        parts.append((_numerics if is_numerics else _speed)(folder, out, args))
    sections = []
    for section, runs in parts:
        _print_section(section)
        machine = [present.environment(runs)] if any(run.environment for run in runs) else []
        sections.append(replace(section, parts=[*section.parts, *machine]))
    page = out / "report.html"
    count = sum(len(runs) for _, runs in parts)
    report.write(
        page,
        "Gradient synchronisation: numerics and speed",
        f"{count} runs in {folder.resolve().name}. Each part begins with what was run and what it can tell apart; "
        "verdicts on what was declared beforehand follow, then the tables and figures that they rest on.",
        sections,
    )
    print(f"report: {page.resolve()}")


def _holds_study(path: Path, layout: str) -> bool:
    """Whether a folder is named as a study's and holds runs."""
    if not path.name.startswith(("numerics", "speed")) or not path.is_dir():
        return False
    return holds_runs(path) or (layout == "lightning" and path.name.startswith("numerics"))


def _print_section(section: report.Section) -> None:
    for part in (*section.facts, *section.parts):
        print(f"{part.text()}\n" if isinstance(part, tables.Table) else f"figure: {part.path.resolve()}")
    if section.claims:
        print(f"\n{claims.summary(section.claims)}\n")
