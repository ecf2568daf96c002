"""The data, loss, optimizer, schedule and trainer of a training file of `nequip`, as keys of ours."""

from typing import Any

import torch

from ddpkit.errors import InputError
from ddpkit.experiments.nequip_file import NONE, Section

FOREVER = 1_000_000  # epochs
_LABELS = {"total_energy": "energy_key", "forces": "forces_key", "stress": "stress_key", "virial": "stress_key"}
_PARTS = ("train", "val", "test")
_MODULES = {  # whether it averages the weights
    "nequip.train.NequIPLightningModule": False,
    "nequip.train.EMALightningModule": True,
    "nequip.train.ConFIGLightningModule": False,
    "nequip.train.EMAConFIGLightningModule": True,
    "nequip.train.ScheduleFreeLightningModule": False,
}
_LOSSES = {  # weights of the energy, the forces and the stress where none are given
    "nequip.train.EnergyOnlyLoss": (1.0, None, None),
    "nequip.train.EnergyForceLoss": (1.0, 1.0, None),
    "nequip.train.EnergyForceStressLoss": (1.0, 1.0, 1.0),
}
_STRATEGIES = {
    "auto": "custom",
    "ddp": "standard",
    "nequip.train.SimpleDDPStrategy": "custom",
    "ddpkit.lightning.SyncStrategy": "custom",
    "lightning.pytorch.strategies.DDPStrategy": "standard",
}


def symbols_of_types(transforms: Any) -> dict[str, str]:
    """The element of each type of atom, as the data's mapping from elements to types has it."""
    found: dict[str, str] = {}
    for transform in transforms if isinstance(transforms, list) else []:
        if isinstance(transform, dict) and str(transform.get("_target_")).endswith("ChemicalSpeciesToAtomTypeMapper"):
            named = transform.get("chemical_species_to_atom_type_map") or {}
            found |= {str(kind): str(symbol) for symbol, kind in named.items()}
    return found


def data_settings(data: Section, r_max: float) -> dict[str, Any]:
    """Keys of `data`.

    Args:
        data: the section.
        r_max: the model's cutoff, which is that of the neighbour lists too.

    Raises:
        InputError: a part of it is none of nequip's.
    """
    target = str(data.take("_target_"))
    if not target.startswith("nequip.data.datamodule."):
        raise InputError(
            f"data._target_={target} is none of nequip's data modules: convert a file with "
            "nequip.data.datamodule.ASEDataModule."
        )
    settings: dict[str, Any] = {"seed": data.take("seed", 1), "shifts": "fitted", "path": None}
    if target.endswith(".ASEDataModule"):
        settings |= {**_files(data), **_keys(data)}
    else:
        data.tell("_target_", f"{NONE}: name a file of its frames by data.path=FILE", value=target)
    _transforms(data, r_max)
    statistics = data.section("stats_manager")
    if str(name := statistics.take("_target_", "CommonDataStatisticsManager")).endswith("CommonDataStatisticsManager"):
        statistics.take("type_names")
    else:
        statistics.tell("_target_", value=name)
    statistics.close("is not needed: ddpkit-run computes the statistics by itself")
    return settings


def _files(data: Section) -> dict[str, Any]:
    """The file of frames, and how it is split."""
    settings: dict[str, Any] = {}
    for split in data.sections("split_dataset"):
        if settings:
            for key in split:
                split.tell(key, f"{NONE}, which splits one set: put the files into one by `ddpkit data prepare ase`")
            continue
        settings["path"] = split.take("file_path")
        shares = {name: split.number(name, 0) or 0 for name in _PARTS}
        split.close()
        if not shares["train"]:
            raise InputError(f"{split.name} has no share to train on: give train, val and test.")
        total = sum(shares.values())
        settings["split"] = [share / total for share in shares.values()]
    files = data.take("train_file_path") or []
    for n, file in enumerate(files if isinstance(files, list) else [files]):
        if "path" not in settings:
            settings["path"] = file
        else:
            data.tell(
                f"train_file_path[{n}]",
                f"{NONE}, which reads one set: put the files into one by `ddpkit data prepare ase`",
                value=file,
            )
    if files := data.take("val_file_path"):
        why = f"{NONE}, which splits the frames of one set (data.split) into those to train on, to validate and to test"
        data.tell("val_file_path", why, value=files)
    if files := data.take("test_file_path"):
        why = "is not read by ddpkit-run, which trains: evaluate by `ddpkit eval RUN_FOLDER FILE`"
        data.tell("test_file_path", why, value=files)
    if settings.get("path") is None:
        raise InputError("data has neither split_dataset nor train_file_path: name the file of frames to train on.")
    return settings


def _keys(data: Section) -> dict[str, Any]:
    """The names of labels in the file."""
    settings: dict[str, Any] = {}
    mapping = data.section("key_mapping")
    for key in mapping:
        field = str(mapping.take(key))
        if (name := _LABELS.get(field)) is None:
            mapping.tell(key, value=field)
        elif key != field:
            settings[name] = key
    if included := [key for key in data.take("include_keys") or [] if key not in {*settings.values(), *_LABELS}]:
        data.tell("include_keys", value=included)
    return settings


def _transforms(data: Section, r_max: float) -> None:
    for transform in data.sections("transforms"):
        target = str(transform.take("_target_"))
        name = target.rpartition(".")[2]
        if not target.startswith("nequip.data.transforms."):
            raise InputError(f"{transform.key('_target_')}={target} is none of nequip's transforms: take it out.")
        if name == "ChemicalSpeciesToAtomTypeMapper":
            for key in ("model_type_names", "chemical_species_to_atom_type_map", "chemical_symbols"):
                transform.take(key)
        elif name.endswith("NeighborListTransform"):
            if (cutoff := transform.number("r_max")) != r_max:
                transform.tell("r_max", f"{NONE}, whose neighbours are those within model.r_max", value=cutoff)
            for key in ("per_edge_type_cutoff", "type_names"):
                transform.take(key)  # only fewer edges that the model's cutoffs take out as well
        elif name != "VirialToStressTransform":  # a key that has virial in its name is read as one
            transform.tell("_target_", value=target)
        transform.close()


def loss_settings(loss: Section) -> tuple[dict[str, Any], bool]:
    """Keys of `loss`, and whether frames may lack a stress. Weights are divided by their sum, as nequip does.

    Raises:
        InputError: it is none of nequip's losses.
    """
    target = loss.take("_target_")
    settings: dict[str, Any] = {"per_atom": bool(loss.take("per_atom_energy", True))}
    weights: dict[str, float] = dict.fromkeys(("energy", "forces", "stress"), 0.0)
    if target in _LOSSES:
        coefficients = loss.section("coeffs")
        is_given = bool(list(coefficients))
        for name, key, default in zip(weights, ("total_energy", "forces", "stress"), _LOSSES[target], strict=True):
            if default is not None:
                weights[name] = float(coefficients.number(key, None if is_given else default) or 0.0)
        coefficients.close()
    elif target == "nequip.train.MetricsManager":
        for metric in loss.sections("metrics"):
            _term(metric, weights, settings)
    else:
        raise InputError(
            f"{loss.key('_target_')}={target} is none of nequip's losses: use nequip.train.EnergyForceLoss."
        )
    total = sum(weights.values())
    if total <= 0:
        raise InputError(f"{loss.name} has no term that ddpkit has: use nequip.train.EnergyForceLoss.")
    lacks = loss.section("ignore_nan")
    may_lack = bool(lacks.take("stress", False))
    lacks.close()
    loss.take("type_names")
    loss.close()
    return {**{name: weight / total for name, weight in weights.items()}, **settings}, may_lack


def _term(metric: Section, weights: dict[str, float], settings: dict[str, Any]) -> None:
    """Adds a term of a `MetricsManager`, where ours has it: a mean squared error."""
    field, coefficient, kind = metric.take("field"), metric.number("coeff"), metric.take("metric") or {}
    per_atom = isinstance(field, dict) and str(field.get("_target_")).endswith(".PerAtomModifier")
    if isinstance(field, dict):
        field = field.get("field")
    name = {"total_energy": "energy", "forces": "forces", "stress": "stress"}.get(str(field))
    metric.take("name")
    if coefficient is None:
        return  # it is computed, and not trained on
    if name is None or weights[name] or kind != {"_target_": "nequip.train.MeanSquaredError"}:
        metric.tell("field", f"{NONE} as a term of the loss with this metric", value=field)
    else:
        weights[name] = float(coefficient)
        if name == "energy":
            settings["per_atom"] = per_atom
    metric.close()


def training_settings(module: Section) -> dict[str, Any]:
    """Keys `loss`, `optimizer`, `scheduler`, `train` and `data` of what stands in `training_module`, but for its model.

    Raises:
        InputError: a part of it is none of nequip's.
    """
    target = module.take("_target_")
    if target not in _MODULES:
        raise InputError(
            f"training_module._target_={target} is none of nequip's training modules: use nequip.train.EMALightningModule."
        )
    averages = _MODULES[target]
    if target.endswith(("ConFIGLightningModule", "ScheduleFreeLightningModule")):
        module.tell("_target_", f"{NONE} but for what it has in common with NequIPLightningModule", value=target)
    decay = module.number("ema_decay", 0.999) if averages else 0.0
    settings: dict[str, Any] = {"train": {"ema_decay": decay}}
    settings["loss"], may_lack = loss_settings(module.section("loss"))
    if may_lack:
        settings["data"] = {"allow_missing": True}
    for part in _PARTS:
        if f"{part}_metrics" in module:
            why = f"{NONE}, which records MAE and RMSE of energies per atom and of forces"
            module.tell(f"{part}_metrics", why)
    if optimizer := _optimizer(module.section("optimizer")):
        settings["optimizer"] = optimizer
    if scheduler := _scheduler(module.section("lr_scheduler")):
        settings["scheduler"] = scheduler
    else:
        settings["train"]["plateau"] = {"factor": 1.0}
    module.close()
    return settings


def _optimizer(optimizer: Section) -> dict[str, Any]:
    """One of torch's with its settings; empty where it is another's."""
    target = str(optimizer.take("_target_", "missing"))
    if not _is_torchs(target, "torch.optim.", torch.optim.Optimizer):
        optimizer.tell(
            "_target_", f"{NONE}, which trains with optimizers of torch.optim: its default, AdamW, stands", value=target
        )
        optimizer.close()
        return {}
    for key in optimizer:
        if isinstance(optimizer.value(key), dict) or key == "param_groups":
            optimizer.tell(key)
    settings = {key: optimizer.take(key) for key in optimizer}
    if target.rpartition(".")[2] in ("Adam", "AdamW") and not settings.keys() & {"fused", "foreach", "capturable"}:
        settings["fused"] = True  # the same update in one kernel
    return {"_target_": target, **settings}


def _scheduler(config: Section) -> dict[str, Any]:
    """One of torch's with its settings; empty where there is none, or one that is made of others."""
    if not list(config):
        return {}
    per, scheduler = config.take("interval", "epoch"), config.section("scheduler")
    target = str(scheduler.take("_target_"))
    if (frequency := config.take("frequency", 1)) != 1:
        config.tell("frequency", value=frequency)
    if "monitor" in config:
        config.tell("monitor", f"{NONE}, whose schedulers watch the loss of validation")
    config.close()
    is_torchs = _is_torchs(target, "torch.optim.lr_scheduler.", torch.optim.lr_scheduler.LRScheduler)
    if not is_torchs or any(isinstance(scheduler.value(key), dict | list) for key in ("schedulers", "lr_lambda")):
        scheduler.tell("_target_", f"{NONE}: the learning rate stays as it is", value=target)
        scheduler.close()
        return {}
    return {"_target_": target, "per": per, **{key: scheduler.take(key) for key in scheduler}}


def _is_torchs(target: str, begins: str, kind: type) -> bool:
    found = getattr(torch.optim, target.rpartition(".")[2], None) or getattr(
        torch.optim.lr_scheduler, target.rpartition(".")[2], None
    )
    return target.startswith(begins) and isinstance(found, type) and issubclass(found, kind)


def trainer_settings(trainer: Section, loader: Section) -> dict[str, Any]:
    """Keys of a run, and of its `train`, that stand in `trainer` and in the loader of training batches.

    Raises:
        InputError: a value cannot be read.
    """
    target = trainer.take("_target_", "missing")
    if target not in ("lightning.Trainer", "lightning.pytorch.Trainer"):
        raise InputError(f"trainer._target_={target} is not Lightning's trainer: use lightning.Trainer.")
    train: dict[str, Any] = {}
    settings: dict[str, Any] = {"train": train}
    train["max_epochs"] = _epochs(trainer)
    steps = trainer.number("max_steps", -1)
    train["max_steps"] = None if steps in (None, -1) else steps
    train["max_seconds"] = _seconds(trainer)
    _batches(trainer, loader, train)
    train["clip_norm"] = _clip(trainer)
    if (every := trainer.number("log_every_n_steps")) is not None:
        train["log_every"] = every
    if not trainer.take("enable_checkpointing", True):
        train["checkpoint_every"] = "never"
    if (every := trainer.number("check_val_every_n_epoch", 1)) != 1:
        trainer.tell("check_val_every_n_epoch", f"{NONE}, which validates after each epoch", value=every)
    if trainer.take("deterministic", False):
        settings["deterministic"] = True
    accelerator = trainer.take("accelerator", "auto")
    settings["device"] = {"gpu": "cuda", "cuda": "cuda", "cpu": "cpu"}.get(accelerator, "auto")
    if accelerator not in ("gpu", "cuda", "cpu", "auto"):
        trainer.tell("accelerator", value=accelerator)
    if (precision := trainer.take("precision", "32-true")) not in (None, 32, "32", "32-true"):
        trainer.tell("precision", f"{NONE}, whose precision is that of model_dtype", value=precision)
    settings["strategy"] = _strategy(trainer)
    _loggers(trainer, train)
    train["early_stop"] = {"patience": FOREVER}  # none
    for callback in trainer.sections("callbacks"):
        settings |= _callback(callback, train)
    trainer.close()
    return settings


def _epochs(trainer: Section) -> int:
    epochs = trainer.number("max_epochs")
    if epochs is None:  # Lightning's default
        is_bounded = any(trainer.value(key) not in (None, -1) for key in ("max_steps", "max_time"))
        epochs = -1 if is_bounded else 1000
    return FOREVER if epochs == -1 else int(epochs)


def _seconds(trainer: Section) -> float | None:
    """Lightning's `DD:HH:MM:SS`, or a mapping of units to numbers."""
    time = trainer.take("max_time")
    if time is None:
        return None
    seconds = {"days": 86400.0, "hours": 3600.0, "minutes": 60.0, "seconds": 1.0, "weeks": 604800.0}
    try:
        if isinstance(time, dict):
            return float(sum(seconds[unit] * value for unit, value in time.items()))
        days, hours, minutes, rest = (int(part) for part in time.split(":"))
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f'trainer.max_time={time} is no time: write "DD:HH:MM:SS", in quotes.') from error
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)


def _batches(trainer: Section, loader: Section, train: dict[str, Any]) -> None:
    """The size of the global batch: nequip's is that of one rank and one micro-batch."""
    target = loader.take("_target_", "torch.utils.data.DataLoader")
    if target != "torch.utils.data.DataLoader":
        loader.tell("_target_", value=target)
    size, accumulate = loader.number("batch_size", 1), trainer.number("accumulate_grad_batches", 1) or 1
    devices, nodes = trainer.take("devices", "auto"), trainer.number("num_nodes", 1) or 1
    if isinstance(devices, list):
        devices = len(devices)
    is_known = str(devices).isdigit()
    loader.take("shuffle")
    ranks = int(devices) * int(nodes) if is_known else 1
    if is_known and ranks > 1:
        trainer.tell(
            "devices",
            f"is for the launcher to say: start ddpkit-run on {ranks} ranks (mpirun -n {ranks})",
            value=devices,
        )
    elif not is_known:
        why = "is for each rank in nequip, and train.batch_size is for all: multiply it by the number of ranks"
        loader.tell("batch_size", why, value=size)
    train["batch_size"] = int(size or 1) * int(accumulate) * ranks
    train["accumulate"] = int(accumulate)
    loader.close()


def _clip(trainer: Section) -> float | None:
    norm, algorithm = trainer.number("gradient_clip_val"), trainer.take("gradient_clip_algorithm", "norm")
    if algorithm not in (None, "norm"):
        trainer.tell("gradient_clip_algorithm", f"{NONE}, which clips the norm: nothing is clipped", value=algorithm)
        return None
    return norm or None


def _strategy(trainer: Section) -> str:
    strategy = trainer.take("strategy", "auto")
    if isinstance(strategy, dict):
        section = Section(strategy, trainer.key("strategy"), trainer.remarks)
        strategy = section.take("_target_")
        if strategy == "ddpkit.lightning.SyncStrategy" and "sync" in section:
            return str(section.take("sync"))
        section.close()
    if strategy not in _STRATEGIES:
        trainer.tell("strategy", f"{NONE}: the converted strategy is custom", value=strategy)
    return _STRATEGIES.get(str(strategy), "custom")


def _loggers(trainer: Section, train: dict[str, Any]) -> None:
    if not isinstance(trainer.value("logger"), dict | list):
        if trainer.take("logger", False):
            train["tensorboard"] = True  # Lightning's default
        return
    for logger in trainer.sections("logger"):
        target = str(logger.take("_target_"))
        if target.endswith(".TensorBoardLogger"):
            train["tensorboard"] = True
        else:
            logger.tell(
                "_target_", f"{NONE}, which writes CSV files, and TensorBoard's by train.tensorboard=true", value=target
            )
        logger.close()


def _callback(callback: Section, train: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run that a callback stands for; those of `train` are put there."""
    target = str(callback.take("_target_"))
    settings: dict[str, Any] = {}
    if target.endswith(".EarlyStopping"):
        train["early_stop"] = {"patience": callback.take("patience", 3)}
        if delta := callback.number("min_delta", 0.0):
            why = f"{NONE}, whose train.early_stop.threshold is an improvement of another quantity"
            callback.tell("min_delta", why, value=delta)
        else:
            train["early_stop"]["threshold"] = 0.0
        why = f"{NONE}, whose early stop watches the mean of the RMSE of forces and of energies per atom"
        callback.tell("monitor", why)
        callback.close()
    elif target.endswith(".ModelCheckpoint"):
        callback.take("save_last")
        callback.close(f"{NONE}, which keeps checkpoints/last.pt and checkpoints/best.pt in the run folder")
    elif target.endswith(".LearningRateMonitor"):
        callback.close("is not needed: steps.csv and epochs.csv have the learning rate")
    elif target == "nequip.train.callbacks.TF32Scheduler":
        schedule = callback.take("schedule") or {}
        settings["tf32"] = bool(next(iter(schedule.values()), False))
        if len(schedule) > 1:
            callback.tell("schedule", f"{NONE}, whose tf32 stays what it is at first", value=schedule)
        callback.close()
    else:
        callback.tell("_target_", value=target)
        callback.close()
    return settings
