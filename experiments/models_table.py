"""`ddpkit models`: the named models with their species and trainable parameters."""

import argparse
import csv
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from ddpkit.data.crystals import ELEMENTS
from ddpkit.data.frame import SYMBOLS
from ddpkit.errors import InputError

COLUMNS = ("model", "parameters")
SPICE_SPECIES = ("H", "Li", "B", "C", "N", "O", "F", "Na", "Mg", "Si", "P", "S", "Cl", "K", "Ca", "Br", "I")
CRYSTAL_SPECIES = tuple(SYMBOLS[number] for number in ELEMENTS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", nargs="?", help="only this one")
    parser.add_argument("overrides", nargs="*", help="such as model.type_embedding_dim=128")
    parser.add_argument(
        "--species",
        nargs="+",
        help="chemical symbols; default: the 17 of SPICE for Allegro, the 89 of MPtrj for NequIP",
    )
    parser.add_argument("--csv", type=Path, help="write the table here")


def main(args: argparse.Namespace) -> None:
    """Prints the table."""
    names, overrides = model_names(), list(args.overrides)
    if args.model is not None and "=" in args.model:
        overrides.insert(0, args.model)
    elif args.model is not None:
        names = [args.model]
    wrong = [text for text in overrides if not text.startswith("model.")]
    if wrong:
        raise InputError(f"{wrong[0]} is no setting of a model: write model.<key>=<value>.")
    if unknown := [symbol for symbol in args.species or () if symbol not in SYMBOLS[1:]]:
        raise InputError(f"--species {unknown[0]} is no chemical symbol: give such as H C O.")
    rows = []
    print(f"{'model':<16} {'species':>7} {'parameters':>12}")
    for name in names:
        spec = model_spec(name, overrides)
        species = args.species or default_species(spec)
        parameters = count(spec, species)
        rows.append({"model": name, "parameters": parameters})
        print(f"{name:<16} {len(species):>7} {parameters:>12,}")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


def model_names() -> list[str]:
    """All models that there is a configuration for."""
    folder = files("ddpkit.experiments.conf") / "model"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def model_spec(name: str, overrides: list[str]) -> dict[str, Any]:
    """The settings of a named model.

    Raises:
        InputError: there is no such model, or an override does not fit.
    """
    from omegaconf import OmegaConf

    from ddpkit.experiments.config import read

    spec = OmegaConf.to_container(read([f"model={name}", *overrides]).model, resolve=True)
    assert isinstance(spec, dict)
    return {str(key): value for key, value in spec.items()}


def default_species(spec: dict[str, Any]) -> tuple[str, ...]:
    """What a model is trained on in the paper."""
    return CRYSTAL_SPECIES if spec["_target_"].endswith("NequIP") else SPICE_SPECIES


def build(spec: dict[str, Any], species: tuple[str, ...] | list[str], **settings: Any) -> torch.nn.Module:
    """A model with its settings, and stand-ins for what is computed from data.

    Raises:
        InputError: it cannot be built so.
    """
    settings = {"avg_num_neighbors": 30.0, **settings}
    try:
        model: torch.nn.Module = instantiate(spec, species=list(species), **settings)
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, InputError):
            raise cause from None
        raise InputError(
            f"The model cannot be built ({' '.join(str(cause).split())[:200]}): check its settings."
        ) from error
    return model


def count(spec: dict[str, Any], species: tuple[str, ...] | list[str]) -> int:
    """Trainable parameters; no weights are built."""
    with torch.device("meta"):
        model = build(spec, species)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
