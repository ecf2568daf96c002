"""The typed configuration of a run, composed by Hydra from `conf/`."""

import difflib
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ddpkit.errors import InputError
from ddpkit.train_config import TrainConfig

PRECISIONS = ("mixed", "float32", "float64")
SOURCES = ("generated", "generated_crystals", "files")
MOST_PROFILED = 1000  # steps: a trace takes about a megabyte for each

ALLOWED: dict[str, tuple[str | bool, ...]] = {
    "precision": PRECISIONS,
    "device": ("auto", "cpu", "cuda"),
    "comm": ("torch", "mpi"),
    "compiler": ("inductor", "public", "interpreted"),
    "cuda_graphs": ("auto", True, False),
    "data.source": SOURCES,
    "data.split_by": ("frame", "group"),
    "data.shifts": ("isolated", "fitted"),
}
"""The values of keys that have few."""

# keys, what their values must fulfil, and how that is said
BOUNDS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        (
            "train.max_epochs",
            "train.max_steps",
            "train.batch_size",
            "train.accumulate",
            "train.log_every",
            "train.validate_every",
            "train.rows_late",
            "data.frames",
            "data.train_frames",
            "train.early_stop.patience",
        ),
        lambda value: value >= 1,
        "at least 1",
    ),
    (
        ("train.warmup_steps", "train.workers", "train.plateau.patience", "loss.energy", "loss.forces", "loss.stress"),
        lambda value: value >= 0,
        "0 or more",
    ),
    (
        ("train.checkpoint_every",),
        lambda value: value == "never" or (isinstance(value, int) and value >= 0),
        "a number of steps, or never",
    ),
    (("seed", "data.seed"), lambda value: 0 <= value < 2**63, "0 or more and less than 2^63"),
    (("train.timeout",), lambda value: 0 < value <= 1e8, "greater than 0 and at most 1e8 (three years)"),
    (
        ("train.max_seconds", "train.clip_norm", "train.plateau.factor", "loss.huber_delta"),
        lambda value: value > 0,
        "greater than 0",
    ),
    (("profile",), lambda value: 0 <= value <= MOST_PROFILED, f"0 or more and at most {MOST_PROFILED}"),
    (("train.ema_decay",), lambda value: 0 <= value < 1, "0 or more and less than 1"),
)

# What a step takes beside the options of its strategy, and the keys that set it.
_OF_A_STEP = {"comm": "comm", "compile": "compile", "cuda_graphs": "cuda_graphs", "clip_norm": "train.clip_norm"}


@dataclass
class DataConfig:
    """Where frames come from, and how they are split and ordered.

    Attributes:
        source: where frames come from: `generated` (molecules, GFN2-xTB), `generated_crystals` (89 elements, a pair potential) or
            `files`; `data=NAME` sets it.
        path: a prepared set (`ddpkit data prepare`), or any file that ASE reads.
        frames: how many frames are made; of a file, at most this many are taken, the first ones.
        seed: decides the split and the order of frames.
        split: shares to train on, to validate and to test.
        train_frames: train on so many of the part to train on, drawn at random; fewer are some of more.
        split_by: what is split: `frame` by `frame`, or by `group`, so that the frames of a molecule or material stay together.
        neutral: drop charged frames.
        shifts: energy shift of each species: `isolated` atoms as the set knows them, or `fitted` by least squares.
        energy_key: name of the energy [eV] in a file that ASE reads, where it is unusual or one of several.
        forces_key: name of the forces [eV/Å], likewise.
        stress_key: name of the stress [eV/Å^3], likewise, or of a virial [eV], which has `virial` in its name.
        allow_missing: train on a stress that some periodic frames lack: those add nothing to its term.
        cache: folder of what is made once and read by all runs.
    """

    source: str = MISSING
    path: str | None = None
    frames: int | None = None
    seed: int = 1
    split: list[float] = field(default_factory=lambda: [0.9, 0.05, 0.05])
    train_frames: int | None = None
    split_by: str = "frame"
    neutral: bool = False
    shifts: str = "isolated"
    energy_key: str | None = None
    forces_key: str | None = None
    stress_key: str | None = None
    allow_missing: bool = False
    cache: str = MISSING


@dataclass
class LossConfig:
    """Weights of the mean squared errors, and from which error on they grow linearly.

    Attributes:
        energy: weight of the energy, eV^-2: per atom, or of a frame where `per_atom` is off.
        forces: weight of the force components, Å^2/eV^2.
        stress: weight of the stress components, Å^6/eV^2.
        huber_delta: errors above it (eV, eV/Å, eV/Å^3) count linearly; None: all count quadratically.
        per_atom: divide the error of a frame's energy by its number of atoms.
    """

    energy: float = 1.0
    forces: float = 1.0
    stress: float = 0.0
    huber_delta: float | None = None
    per_atom: bool = True


@dataclass
class RunConfig:
    """One run.

    Attributes:
        model: `allegro_` or `nequip_` with `tiny`, `molecule`, `small`, `medium` or `large` behind it, or `nequip_xl`; a model of
            your own is named by `model._target_` with its import path.
        data: a group: `generated`, `generated_crystals` or `files`.
        strategy: how gradients are averaged over ranks: `custom`, `standard`, `overlap`, `ingraph`, `emulated`, `none`, or
            `strategy._target_` with an import path.
        optimizer: `adamw`, or `optimizer._target_` with an import path.
        scheduler: what moves the learning rate: `plateau` (`train.plateau` alone), `cosine`, or `scheduler._target_` with the
            import path of one of torch's schedulers, in place of `train.plateau`. `per` says whether it counts steps or epochs;
            the word `all` stands for as many of them as the run has, less its warm-up.
        seed: initialises the weights.
        compile: compile the step, with its double backward, before training.
        compiler: `inductor`; `public`: by torch.compile (docs/explanation/torch.md); or `interpreted`: run the traced graph
            uncompiled, to separate the effect of tracing from that of compiling.
        cuda_graphs: replay recorded steps, for which batches are filled up to a few sizes: `true`, `false`, or `auto`: with a GPU
            for each rank, where the step is compiled, the strategy is `custom`, `ingraph` or `none`, and the model leaves out
            what fills batches up (`standard` and `overlap` are recorded with `true` alone). On a CPU, recordings are kept
            operation by operation, which shows that a step can be recorded and wins nothing.
        check_kernels: compare the model's kernels with its reference in plain PyTorch before training.
        precision: what the model computes in; `mixed` has geometry and sums of energies in float64, and the layers in float32.
        tf32: let float32 matrix products use TF32 on NVIDIA GPUs.
        device: where to compute; `auto` takes the GPU where there is one.
        comm: what carries the all-reduce: `torch` (NCCL or gloo), or `mpi` (mpi4py; strategies custom and overlap).
        deterministic: steps that are repeatable bit for bit.
        nccl_algo: `Ring`, `Tree` ...: forces NCCL's algorithm, and with it the order of its sums.
        run_dir: the run folder; by default `runs/<date>-<time>-<model>-<strategy>`.
        resume: a run folder to continue in.
        init_from: a run folder whose best weights to start from.
        profile: trace so many steps of rank 0, and tabulate where their time went, in `profile/` of the run folder; 0: none.
        loss: weights of the terms.
        train: how long, how large, how often.
    """

    model: Any = MISSING
    data: DataConfig = MISSING
    strategy: Any = MISSING
    optimizer: Any = MISSING
    scheduler: Any = None
    seed: int = 1
    compile: bool = False
    compiler: str = "inductor"
    cuda_graphs: Any = "auto"
    check_kernels: bool = True
    precision: str = "mixed"
    tf32: bool = False
    device: str = "auto"
    comm: str = "torch"
    deterministic: bool = False
    nccl_algo: str | None = None
    run_dir: str | None = None
    resume: str | None = None
    init_from: str | None = None
    profile: int = 0
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


ConfigStore.instance().store(name="schema", node=RunConfig)


def read(overrides: Sequence[str]) -> DictConfig:
    """Composes the configuration of a run.

    Args:
        overrides: Hydra overrides such as `strategy=standard` or `train.max_epochs=5`.

    Raises:
        InputError: an override names or sets something that does not exist or does not fit.
    """
    config = _compose(overrides)
    _check(config)
    return config


def _compose(overrides: Sequence[str]) -> DictConfig:
    for word in overrides:
        _check_form(word)
    GlobalHydra.instance().clear()
    try:
        with (
            _own_experiment(overrides) as words,
            initialize_config_module("ddpkit.experiments.conf", version_base="1.3"),
        ):
            config = compose("config", overrides=words)
            OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(_sentence(error, overrides)) from error
    except AssertionError as error:  # Hydra's own, where a choice that others are named after is null
        raise InputError(
            "The configuration cannot be composed: model is null, and other settings follow it; choose one of the models, or "
            "give model._target_ an import path."
        ) from error
    _name_strategy(config)
    return config


@contextmanager
def _own_experiment(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The overrides, while Hydra knows a file that `experiment=FILE.yaml` names as one more experiment."""
    if not any(map(_names_file, overrides)):
        yield list(overrides)
        return
    with TemporaryDirectory(prefix="ddpkit-") as folder:
        yield [_placed(word, Path(folder)) for word in overrides] + [f"hydra.searchpath=[file://{folder}]"]


def _names_file(word: str) -> bool:
    key, _, value = word.partition("=")
    return key.lstrip("+") == "experiment" and value.endswith((".yaml", ".yml"))


def _placed(word: str, folder: Path) -> str:
    if not _names_file(word):
        return word
    key, _, value = word.partition("=")
    try:
        text = Path(value).read_text()
        is_mapping = isinstance(yaml.safe_load(text), dict)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise InputError(f"experiment={value} cannot be read ({why}): give a file of settings, or a name.") from error
    except YAMLError as error:
        raise InputError(f"experiment={value} is no YAML ({str(error).splitlines()[0]}): repair it.") from error
    if not is_mapping:
        raise InputError(f"experiment={value} holds no settings: give a file such as `ddpkit convert-config` writes.")
    if "@package" not in text:
        text = f"# @package _global_\n{text}"
    (folder / "experiment").mkdir(exist_ok=True)
    (folder / "experiment" / "of_the_user.yaml").write_text(text)
    return f"{key}=of_the_user"


def _check_form(word: str) -> None:
    """Refuses what Hydra would not understand, or would take for its own."""
    key, equals, _ = word.partition("=")
    if word.startswith("-") or not key.lstrip("+"):
        raise InputError(f"{word} is no option here: write settings as key=value, and see --help.")
    if not equals and not word.startswith("~"):
        raise InputError(f"{word} has no value: write {word}=VALUE.")
    if key.lstrip("+~").split(".")[0] == "hydra":
        raise InputError(
            f"{word} would have no effect: Hydra only puts the configuration together; see run_dir for folders."
        )


def _name_strategy(config: DictConfig) -> None:
    """Has a strategy that was named by its import path bear no other name."""
    strategy = config.strategy
    if not OmegaConf.is_dict(strategy) or strategy.get("name") is None or strategy.get("_target_") is None:
        return
    own = files("ddpkit.experiments.conf") / "strategy" / f"{strategy.name}.yaml"
    if not own.is_file() or yaml.safe_load(own.read_text())["_target_"] != strategy["_target_"]:
        strategy.name = strategy["_target_"]


def read_saved(folder: Path) -> DictConfig:
    """The configuration that the run in a folder had.

    Raises:
        InputError: the folder has none, or one that cannot be read.
    """
    path = folder / "config.yaml"
    try:
        saved = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{folder} is no run folder (it has no config.yaml): give the folder of a run.") from error
    except (YAMLError, OmegaConfBaseException, OSError) as error:
        raise InputError(f"{path} cannot be read ({str(error).splitlines()[0]}): repair it.") from error
    assert isinstance(saved, DictConfig)
    return saved


def flat(config: DictConfig) -> dict[str, Any]:
    """Every leaf of a configuration by its dotted key."""

    def leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if isinstance(node, dict):
            for name, value in node.items():
                yield from leaves(value, f"{prefix}.{name}" if prefix else str(name))
        else:
            yield prefix, node

    return dict(leaves(OmegaConf.to_container(config), ""))


@functools.cache
def _leaves(variables: frozenset[tuple[str, str]], *overrides: str) -> dict[str, Any]:
    """Every leaf with these overrides alone; kept, since Hydra takes a tenth of a second to compose.

    Args:
        variables: of the environment, which defaults are taken from.
        overrides: of the command line.
    """
    del variables
    return flat(_compose(overrides))


def keys_of(override: str, config: DictConfig) -> list[str]:
    """The leaves that one override of `config` sets: what it names, and what it changes of the defaults (a group, say)."""
    name = override.partition("=")[0].lstrip("+~").partition("@")[0]
    leaves = flat(config)
    keys = {key for key in leaves if key == name or key.startswith(f"{name}.")}
    with suppress(InputError):
        variables = frozenset(os.environ.items())
        defaults, alone = _leaves(variables), _leaves(variables, override)
        keys |= {key for key in defaults.keys() | alone.keys() if defaults.get(key) != alone.get(key)}
    return sorted(keys)


def _check(config: DictConfig) -> None:
    """Values that the types alone do not rule out."""
    for key, allowed in ALLOWED.items():
        value = OmegaConf.select(config, key)
        if value not in allowed:
            raise InputError(
                f"{key}={value} is unknown: use one of {', '.join(str(word).lower() for word in allowed)}."
            )
    for keys, fits, must in BOUNDS:
        for key in keys:
            value = OmegaConf.select(config, key)
            if value is not None and not fits(value):
                raise InputError(f"{key}={value} is out of range: it must be {must}.")
    for option, key in _OF_A_STEP.items():
        if option in config.strategy:
            value = str(config.strategy[option])
            value = value.lower() if value in ("True", "False") else value
            raise InputError(f"strategy.{option} is no option of a strategy in a run: write {key}={value}.")
    if not (config.loss.energy or config.loss.forces or config.loss.stress):
        raise InputError("All weights of the loss are 0: set loss.energy or loss.forces.")
    if config.cuda_graphs is True and not config.compile:
        raise InputError("cuda_graphs=true replays compiled steps: add compile=true, or use cuda_graphs=auto.")
    if config.data.source == "files" and config.data.path is None:
        raise InputError("data.path must be set with data=files: give a prepared set or a file that ASE reads.")
    split = list(config.data.split)
    if len(split) != 3 or not (min(split) >= 0 and sum(split) <= 1 + 1e-9 and split[0] > 0):
        raise InputError(
            f"data.split={split} is no split: give three shares of train, validation and test that add up to 1."
        )
    r_max = OmegaConf.select(config, "model.r_max")
    if r_max is not None and not (isinstance(r_max, int | float) and 0 < r_max < float("inf")):
        raise InputError(f"model.r_max={r_max} is no cutoff: it must be a positive distance in Å.")


def _sentence(error: Exception, overrides: Sequence[str]) -> str:
    """One sentence on what Hydra disliked."""
    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(error, OmegaConfBaseException):
        cause = cause.__cause__
    text = " ".join(str(error).split())
    if match := re.search(r"Could not (?:override|find) '([^']+)'", text):
        name = match[1]
        if "/" in name:
            group, option = name.split("/", 1)
            available = sorted(
                re.findall(
                    r"(?<=[\s])[a-z]\w+(?=\s|$)",
                    text.partition("Available options")[2].partition(":")[2].partition("Config search")[0],
                )
            )
            choices = f"use one of {', '.join(available)}" if available else f"see the configs of {group}"
            return f"{group}={option} is unknown: {choices}."
        return f"{name} is no configuration key: {_nearest(name)}"
    if match := re.search(r"Key '([^']+)' (?:is )?not in", text):
        full = next((o.split("=")[0].lstrip("+~") for o in overrides if o.split("=")[0].endswith(match[1])), match[1])
        return f"{full} is no configuration key: {_nearest(full)}"
    if match := re.search(r"Could not append to config. An item is already at '([^']+)'", text):
        return f"{match[1]} is a key already: write {match[1]}=... without the +."
    why = (str(cause) or str(error)).splitlines()[0].rstrip(".")
    if match := re.search(r"Error (?:merging|parsing) override '?([^']+)", text):
        return f"The override {match[1]} cannot be used: {why}."
    return f"The configuration cannot be composed: {why}; correct the overrides."


def _nearest(name: str) -> str:
    """A remedy for a misspelt key."""
    with initialize_config_module("ddpkit.experiments.conf", version_base="1.3"):
        known = _keys(OmegaConf.to_container(compose("config"), resolve=False))
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else "see `ddpkit run --cfg` for the keys."


def _keys(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    return [key for k, v in node.items() for key in (f"{prefix}{k}", *_keys(v, f"{prefix}{k}."))]
