"""What `nequip-train` is started with, so that it trains as a run of ours would: frames, weights, and its training file."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from ddpkit.data import PreparedSet
from ddpkit.data.ase_files import atoms_of
from ddpkit.data.once import made_once
from ddpkit.errors import InputError
from ddpkit.experiments import setup
from ddpkit.experiments.config import flat
from ddpkit.experiments.peers import KERNELS
from ddpkit.experiments.run_data import Data, fingerprint
from ddpkit.models import save_nequip
from ddpkit.ranks.cores import of_job
from ddpkit.ranks.group import Environment

SCHEMES: Mapping[str, Any] = {"ddp": "ddp", "simple": {"_target_": "nequip.train.SimpleDDPStrategy"}}
"""What averages gradients: Lightning's `DDPStrategy`, or the strategy that nequip brings, each with its default settings."""
NAME = "config.yaml"
_CLOCK = "ddpkit.experiments.nequip_clock.current"
# What nequip's trainer would do otherwise than a run, or not at all.
_PLAIN: Mapping[str, Any] = {
    "comm": "torch",
    "deterministic": False,
    "nccl_algo": None,
    "resume": None,
    "init_from": None,
    "profile": 0,
    "data.allow_missing": False,
    "scheduler._target_": None,
    "loss.huber_delta": None,
    "train.accumulate": 1,
    "train.max_steps": None,
    "train.max_seconds": None,
    "train.projection": False,
    "train.tensorboard": False,
    "train.warmup_steps": 0,
}
_MOST_WORKERS = 8
_PIECE = 1000  # frames that are written at a time


@dataclass(frozen=True)
class Files:
    """What was written for nequip.

    Attributes:
        train: the frames to train on, extxyz.
        validation: frames for its validation, which is turned off.
        weights: the model, as `save_nequip` writes it.
        species: its chemical symbols.
        parameters: how many of its numbers are trained.
    """

    train: Path
    validation: Path
    weights: Path
    species: tuple[str, ...]
    parameters: int


def require_installed(what: str) -> None:
    """Looks for the packages of nequip.

    Raises:
        InputError: one is missing.
    """
    if lacking := [name for name in ("nequip", "lightning") if find_spec(name) is None]:
        raise InputError(
            f"{what} starts nequip's own trainer, and the package {lacking[0]} is missing: pip install 'ddpkit[nequip]'."
        )


def require_plain(config: DictConfig, scheme: str) -> None:
    """Looks whether nequip's trainer can do what the configuration says.

    Raises:
        InputError: it cannot; the key is named.
    """
    if scheme not in SCHEMES:
        raise InputError(f"{scheme!r} is no scheme of nequip's trainer: use {' or '.join(SCHEMES)}.")
    known = flat(config)
    for key, value in _PLAIN.items():
        if (given := known.get(key)) != value:
            raise InputError(
                f"{key}={str(given).lower()} is not for nequip's trainer, which is timed at plain training: leave it out."
            )
    if config.compile and scheme == "ddp":
        raise InputError(
            "compile=true is not for nequip's trainer with ddp, which nequip refuses to compile: use simple."
        )
    kernels, kind = _kernels(config), _kind(config)
    if kernels != "ddpkit" and (kernels, kind) not in KERNELS:
        raise InputError(f"model.kernels={kernels} is not for nequip's {kind}: use model.kernels=auto for its fastest.")


def require_kernels(config: DictConfig) -> None:
    """Looks for what the kernels that nequip is to use need.

    Raises:
        InputError: their package, or a GPU.
    """
    kernels = _kernels(config)
    if kernels == "ddpkit":
        return
    if config.device == "cpu" or not torch.cuda.is_available():
        raise InputError(
            f"model.kernels={kernels} needs an NVIDIA GPU: use model.kernels=ddpkit for nequip's own on CPUs."
        )
    if find_spec(kernels) is None:
        raise InputError(f"model.kernels={kernels} needs that package: pip install {kernels}.")


def _kernels(config: DictConfig) -> str:
    """The kernels that nequip is to use: "ddpkit" for its own, which "auto" means where OpenEquivariance cannot be used."""
    kernels: str = config.model.get("kernels", "ddpkit")
    if kernels != "auto":
        return kernels
    best, on_gpu = "openequivariance", config.device != "cpu" and torch.cuda.is_available()
    return best if on_gpu and (best, _kind(config)) in KERNELS and find_spec(best) else "ddpkit"


def _kind(config: DictConfig) -> str:
    kind: str = config.model["_target_"].rpartition(".")[2]
    return kind


def write_files(config: DictConfig, data: Data) -> Files:
    """Writes frames and weights, once for all runs that have the same.

    Raises:
        InputError: nequip has no such model.
    """
    cache, seen = Path(config.data.cache), fingerprint(config, data)
    spec = setup.model_spec(config, data) | ({"kernels": "ddpkit"} if "kernels" in config.model else {})

    def frames(folder: Path) -> None:
        folder.mkdir()
        _write(data.frames, data.train, folder / "train.xyz")
        _write(data.frames, data.train[:2], folder / "validation.xyz")

    def weights(folder: Path) -> None:
        folder.mkdir()
        model = setup.build_model(spec, config.seed)
        save_nequip(model, folder / "weights.ckpt")
        facts = {"species": list(spec["species"]), "parameters": setup.trainable_parameters(model)}
        (folder / "facts.json").write_text(json.dumps(facts))

    made = made_once(cache / f"nequip-frames-{_digest(seen['frames'], seen['split'])}", frames)
    model = made_once(cache / f"nequip-model-{_digest(spec, config.seed, torch.__version__)}", weights)
    facts = json.loads((model / "facts.json").read_text())
    return Files(
        (made / "train.xyz").resolve(),
        (made / "validation.xyz").resolve(),
        (model / "weights.ckpt").resolve(),
        tuple(facts["species"]),
        int(facts["parameters"]),
    )


def _digest(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _write(frames: PreparedSet, numbers: np.ndarray, path: Path) -> None:
    from ase.io import write

    for first in range(0, len(numbers), _PIECE):
        images = [atoms_of(frames.frame(int(number))) for number in numbers[first : first + _PIECE]]
        write(path, images, format="extxyz", append=first > 0, parallel=False)


def steps_per_epoch(config: DictConfig, data: Data) -> int:
    """Steps of an epoch, as a run has them: a last batch that is not full is left out.

    Raises:
        InputError: there are too few frames for one batch.
    """
    steps = len(data.train) // config.train.batch_size
    if not steps:
        raise InputError(
            f"train.batch_size={config.train.batch_size} is more than the {len(data.train)} frames to train on: make it smaller."
        )
    return steps


def batch_of_rank(config: DictConfig, ranks: int) -> int:
    """Frames that each rank has in a step.

    Raises:
        InputError: the batch cannot be divided.
    """
    size, rest = divmod(config.train.batch_size, ranks)
    if rest or not size:
        raise InputError(
            f"train.batch_size={config.train.batch_size} cannot be divided among {ranks} ranks, of which nequip gives each as "
            f"many frames: use a multiple of {ranks}."
        )
    return int(size)


def workers(config: DictConfig, here: Environment) -> int:
    """Processes of each rank that make its batches: as `train.workers` says, else on GPUs as many as there are cores, up to 8."""
    if config.train.workers is not None:
        return int(config.train.workers)
    if here.device.type == "cpu":
        return 0
    return max(0, min(_MOST_WORKERS, len(of_job()) // here.local_size - 1))


def training_file(config: DictConfig, scheme: str, files: Files, here: Environment, steps: int) -> dict[str, Any]:
    """The file that `nequip-train` is started with.

    Args:
        config: of a run.
        scheme: one of `SCHEMES`.
        files: frames and weights.
        here: where this process stands.
        steps: of an epoch.
    """
    makers = workers(config, here)
    loader = {"_target_": "torch.utils.data.DataLoader", "batch_size": batch_of_rank(config, here.world_size)}
    more = {"num_workers": makers, "persistent_workers": makers > 0, "shuffle": True, "drop_last": True}
    transforms = [
        {
            "_target_": "nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper",
            "model_type_names": list(files.species),
        },
        {"_target_": "nequip.data.transforms.NeighborListTransform", "r_max": float(config.model.r_max)},
    ]
    return {
        "run": ["train"],
        "data": {
            "_target_": "nequip.data.datamodule.ASEDataModule",
            "seed": config.data.seed,
            "train_file_path": str(files.train),
            "val_file_path": str(files.validation),
            "transforms": transforms,
            "train_dataloader": {**loader, **more},
            "val_dataloader": loader,
        },
        "trainer": _trainer(config, scheme, here, steps),
        "training_module": _module(config, files),
    }


def _trainer(config: DictConfig, scheme: str, here: Environment, steps: int) -> dict[str, Any]:
    tf32 = {"_target_": "nequip.train.callbacks.TF32Scheduler", "schedule": {0: bool(config.tf32)}}
    return {
        "_target_": "lightning.Trainer",
        "accelerator": "cpu" if here.device.type == "cpu" else "gpu",
        "devices": here.local_size,
        "num_nodes": here.world_size // here.local_size,
        "strategy": SCHEMES[scheme],
        "plugins": [{"_target_": "lightning.pytorch.plugins.environments.LightningEnvironment"}],
        "max_epochs": config.train.max_epochs,
        "limit_train_batches": steps,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "gradient_clip_val": config.train.clip_norm,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [tf32, {"_target_": _CLOCK}],
    }


def _module(config: DictConfig, files: Files) -> dict[str, Any]:
    weights = {"total_energy": config.loss.energy, "forces": config.loss.forces}
    if config.loss.stress:
        weights["stress"] = config.loss.stress
    model: dict[str, Any] = {
        "_target_": "nequip.model.ModelFromCheckpoint",
        "checkpoint_path": str(files.weights),
        "compile_mode": "compile" if config.compile else "eager",
    }
    if modifier := KERNELS.get((_kernels(config), _kind(config))):
        model = {"_target_": "nequip.model.modify", "modifiers": [{"modifier": modifier}], "model": model}
    decay = config.train.ema_decay
    average = {"_target_": "nequip.train.EMALightningModule", "ema_decay": decay}
    return {
        **(average if decay else {"_target_": "nequip.train.NequIPLightningModule"}),
        "loss": {
            "_target_": f"nequip.train.EnergyForce{'Stress' if config.loss.stress else ''}Loss",
            "per_atom_energy": config.loss.per_atom,
            "coeffs": weights,
        },
        "val_metrics": {
            "_target_": "nequip.train.EnergyForceMetrics",
            "coeffs": {"total_energy_mae": 1.0, "forces_mae": 1.0},
        },
        "optimizer": OmegaConf.to_container(config.optimizer, resolve=True),
        "model": model,
    }


def strategy_name(scheme: str) -> str:
    """What the analysis calls it."""
    return f"nequip {scheme}"


def as_run(config: DictConfig, scheme: str) -> str:
    """The `config.yaml` of the run folder: the run's, with nequip's scheme for its strategy."""
    facts = OmegaConf.to_container(config)
    assert isinstance(facts, dict)
    return OmegaConf.to_yaml(OmegaConf.create({**facts, "strategy": {"name": strategy_name(scheme)}}))
