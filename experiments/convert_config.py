"""Writes the configuration of a run for a training file of `nequip`, and names each key that has no counterpart."""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from ddpkit.errors import InputError
from ddpkit.experiments.nequip_file import NONE, Section, read
from ddpkit.experiments.nequip_model import run_settings
from ddpkit.experiments.nequip_training import data_settings, symbols_of_types, trainer_settings, training_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument(
        "file", type=Path, metavar="NEQUIP.YAML", help="a file that nequip-train of nequip 0.19 is started with"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DDPKIT.YAML",
        help="where to write it, for ddpkit-run experiment=DDPKIT.YAML; default: print it",
    )


def main(args: argparse.Namespace) -> None:
    """Converts a file.

    Raises:
        InputError: it is no training file of nequip 0.19, or its model has no counterpart; or the new one cannot be written.
    """
    settings, remarks = convert(args.file)
    text = as_text(args.file, settings, remarks)
    for remark in remarks:
        print(f"ddpkit: {remark}", file=sys.stderr)
    if args.out is None:
        print(text, end="")
        return
    if args.out.exists() and args.out.samefile(args.file):
        raise InputError(f"--out {args.out} is the file that is converted: give another path.")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
    except OSError as error:
        raise InputError(f"--out {args.out} cannot be written ({error.strerror}): give another path.") from error
    print(f"{args.out}: start it by ddpkit-run experiment={args.out}")


def convert(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The settings of a run, nested as in its configuration, and what has no counterpart, a sentence each.

    Args:
        path: of a training file of nequip 0.19.

    Raises:
        InputError: it is none, or its model has no counterpart.
    """
    remarks: list[str] = []
    file = Section(read(path, remarks), "", remarks)
    _runs(file)
    data, module, trainer = (file.section(name) for name in ("data", "training_module", "trainer"))
    symbols = symbols_of_types(data.value("transforms"))
    settings = run_settings(module.section("model"), symbols)
    parts = [
        {"data": data_settings(data, settings["model"]["r_max"])},
        training_settings(module),
        trainer_settings(trainer, data.section("train_dataloader")),
    ]
    for name in ("val", "test", "predict"):
        if f"{name}_dataloader" in data:
            data.tell(f"{name}_dataloader", f"{NONE}: batches that are evaluated are as large as those of training")
    data.close()
    for part in parts:
        for key, value in part.items():
            settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
    options = file.section("global_options")
    if (allowed := options.take("allow_tf32")) is not None:
        settings["tf32"] = bool(allowed)
    options.close()
    return settings, remarks


def _runs(file: Section) -> None:
    """What nequip-train does in turn; ddpkit-run trains."""
    runs = file.take("run")
    others = [run for run in (runs if isinstance(runs, list) else [runs]) if run != "train"]
    if others:
        file.tell(
            "run",
            "is not done by ddpkit-run, which trains: evaluate by `ddpkit eval RUN_FOLDER`, on the frames to test on",
            value=others,
        )


def as_text(path: Path, settings: dict[str, Any], remarks: list[str]) -> str:
    """A file for `ddpkit-run experiment=FILE`, with the remarks at its head."""
    settings = dict(settings)
    kind = settings["model"]["_target_"].rpartition(".")[2].lower()
    groups = {"model": f"{kind}_tiny", "data": "files", "strategy": settings.pop("strategy")}
    groups |= {name: None for name in ("optimizer", "scheduler") if name in settings}
    defaults = {"defaults": [{f"override /{group}": choice} for group, choice in groups.items()]}
    head = [
        "# @package _global_",
        f"# Converted from {path.name} by ddpkit convert-config; start it by ddpkit-run experiment=FILE.",
        "# Weights of the loss are divided by their sum, as nequip does.",
        *(["# Not converted, or not alike:"] if remarks else []),
        *(f"#   {remark}" for remark in remarks),
    ]
    body = yaml.safe_dump({**defaults, **settings}, sort_keys=False, default_flow_style=None, width=120)
    return "\n".join(head) + "\n" + body
