"""Train a model.

usage: [mpirun -n N] ddpkit-run [OVERRIDES...]

Overrides set configuration keys, for example:

  model=allegro_small|allegro_medium|nequip_small|...      data=generated|generated_crystals|files   data.path=FILE
  strategy=standard|custom|none|overlap|ingraph            compile=true|false   comm=torch|mpi
  seed=1  data.seed=1  precision=mixed|float32|float64     deterministic=true|false   device=auto|cpu|cuda
  train.max_epochs=10  train.max_steps=1000  train.batch_size=16  train.log_every=1
  run_dir=DIR  resume=DIR  experiment=spice_stage1|spice_stage2|mptrj

`ddpkit-run --cfg` prints the whole configuration. Everything a run leaves behind is in its folder: config.yaml,
environment.json, steps.csv, epochs.csv, summary.json and checkpoints/.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ddpkit import checkpoint, launch, phase
from ddpkit.errors import InputError
from ddpkit.experiments import setup
from ddpkit.experiments.config import read, read_saved
from ddpkit.launch import Environment, agree
from ddpkit.lifeline import Lifeline
from ddpkit.record import RunFolder, describe_environment, record_failure

# Keys that a resumed run may change: where and how long, not what.
_MAY_CHANGE = (
    "train.max_epochs",
    "train.max_steps",
    "train.max_seconds",
    "train.checkpoint_every",
    "train.timeout",
    "device",
    "run_dir",
    "resume",
)


def main(overrides: Sequence[str]) -> None:
    """Trains as the overrides say.

    Raises:
        InputError: on every rank, where the configuration or the data cannot be used.
    """
    prints = "--cfg" in overrides
    config = read([word for word in overrides if word != "--cfg"])
    if prints:
        print(OmegaConf.to_yaml(config), end="")
        return
    phase.enter("rendezvous")
    here = launch.init_process_group(
        None if config.device == "auto" else config.device, timeout=timedelta(seconds=config.train.timeout)
    )
    run_dir: Path | None = None  # once it is this run's
    folder: RunFolder | None = None
    lifeline = Lifeline(here, lambda sentence: None if run_dir is None else record_failure(run_dir, sentence))
    try:
        with lifeline.listening():
            phase.enter("data")
            setup.set_numerics(config)
            state = None
            if config.resume is not None:
                with agree("reading the checkpoint"):
                    config = _resumed(config, overrides)
                    state = checkpoint.load(Path(config.run_dir) / "checkpoints" / "last.pt")
                    setup.refuse_another_model(config, state["model_spec"])
            folder = _open_folder(config, here, state)
            run_dir = Path(config.run_dir)
            _train(config, here, folder, state, lifeline)
    except BaseException as error:
        failure = lifeline.explain(error)
        why = str(failure) or type(failure).__name__
        if folder is not None:
            with suppress(InputError):  # a full disk, say
                folder.summarize(status="failed", error=why)
        if run_dir is not None:
            record_failure(run_dir, why)
        if failure is error:
            raise
        raise failure from error
    launch.shutdown()


def _open_folder(config: DictConfig, here: Environment, state: dict[str, Any] | None) -> RunFolder | None:
    """The run folder, on rank 0; all ranks agree on its path."""
    config.run_dir = str(_agreed_folder(config, here))
    folder = None
    with agree("setting up the run"):
        if here.is_first:
            progress = state["progress"] if state else {"step": 0, "epoch": 0}
            folder = RunFolder(
                Path(config.run_dir),
                resume_from=progress["step"],
                resume_epoch=progress["epoch"],
                tensorboard=config.train.tensorboard,
            )
            folder.describe(
                OmegaConf.to_yaml(config),
                describe_environment(here, comm=config.comm, seeds={"seed": config.seed, "data": config.data.seed}),
            )
            folder.summarize(status="running", error=None)
    return folder


def _train(
    config: DictConfig, here: Environment, folder: RunFolder | None, state: dict[str, Any] | None, lifeline: Lifeline
) -> None:
    data = setup.open_data(config)
    started = time.perf_counter()
    phase.enter("model")
    trainer = setup.build_trainer(config, here, data, folder, state)
    lifeline.step = lambda: trainer.progress.step + 1
    parameters = setup.trainable_parameters(trainer.model)
    if folder is not None:
        folder.summarize(parameters=parameters, seconds_compile=trainer.step.seconds_compile)
        print(
            f"{setup.model_name(config)}: {parameters:,} parameters; "
            f"{len(data.train)} frames to train on, {len(data.validation)} to validate, {len(data.test)} to test; "
            f"{here.world_size} rank{'s' * (here.world_size > 1)} on {here.device.type}, "
            f"strategy {setup.strategy_name(config)}{', compiled' * config.compile}; "
            f"ready after {time.perf_counter() - started:.1f} s; {folder.path}",
            flush=True,
        )
        if here.world_size > 1:
            before, after = setup.train_sampler(config, data, here).imbalance()
            print(
                f"edges of the fullest rank over the mean: {before:.3f} in equal numbers of frames, {after:.3f} as balanced here",
                flush=True,
            )
            folder.summarize(imbalance_before=before, imbalance=after)
    trainer.fit()
    phase.enter("end")
    if folder is None:
        return
    done = trainer.progress
    facts = {
        "steps": done.step,
        "epochs": done.epoch,
        "bytes_per_step": trainer.step.sync.stats.bytes,
        "seconds_logging_per_row": trainer.seconds_logging,
        "data_share": done.seconds_data / done.seconds_steps if done.seconds_steps else None,
    }
    if done.seconds_steps:
        print(f"waiting for data: {done.seconds_data / done.seconds_steps:.2%} of the step time", flush=True)
    if trainer.stopped_by is None:
        folder.summarize(status="finished", **facts)
    else:
        why = f"stopped by {trainer.stopped_by.name} after step {done.step}: continue with resume={folder.path}"
        folder.summarize(status="failed", error=why, **facts)
        print(f"ddpkit: {why}", flush=True)
    folder.close()


def _agreed_folder(config: DictConfig, here: Environment) -> Path:
    """The run folder that rank 0 names."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    if here.world_size > 1:
        shared = launch.store()
        if here.is_first:
            shared.set("run_dir", _dated(config))
        return Path(shared.get("run_dir").decode())
    return Path(_dated(config))


def _dated(config: DictConfig) -> str:
    return f"runs/{datetime.now():%Y%m%d-%H%M%S}-{setup.model_name(config)}-{setup.strategy_name(config)}"


def _resumed(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The configuration that the folder was run with, with the overrides that a resumed run may have.

    Raises:
        InputError: there is no such run, or an override changes what the run is.
    """
    folder = Path(config.resume)
    saved = read_saved(folder)
    if any(_key(word) not in _MAY_CHANGE for word in overrides):
        before, now = _flat(saved), _flat(config)
        for key in sorted(before.keys() | now.keys()):
            if key not in _MAY_CHANGE and before.get(key) != now.get(key):
                raise InputError(
                    f"{key}={now.get(key)} is not what the run in {folder} was started with ({before.get(key)}): resume it with "
                    "the same overrides or none, or start a new run."
                )
    for word in overrides:
        if _key(word) in _MAY_CHANGE:
            OmegaConf.update(saved, _key(word), OmegaConf.select(config, _key(word)))
    saved.resume, saved.run_dir = None, str(folder)
    return saved


def _key(override: str) -> str:
    return override.split("=", maxsplit=1)[0].lstrip("+~")


def _flat(config: DictConfig) -> dict[str, Any]:
    """Every leaf of a configuration by its dotted key."""

    def leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if isinstance(node, dict):
            for name, value in node.items():
                yield from leaves(value, f"{prefix}.{name}" if prefix else str(name))
        else:
            yield prefix, node

    return dict(leaves(OmegaConf.to_container(config), ""))
