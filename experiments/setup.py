"""From a configuration to everything a run is made of."""

import json
import os
import random
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ddpkit import checkpoint
from ddpkit.average import moving_average
from ddpkit.capture.padding import compare_padding, require_padding, taken_for_real
from ddpkit.compile.objective import Criterion
from ddpkit.compile.parity import Difference
from ddpkit.data import Capacities, Capacity, Loader, Sampler, Sweep, choose_capacities, statistics
from ddpkit.data.makers import suggested
from ddpkit.errors import InputError, exhausted
from ddpkit.experiments.run_data import Data, changed, fingerprint, kept
from ddpkit.experiments.turns import wait_for
from ddpkit.kernels import check_kernels, require_kernels
from ddpkit.loss import EnergyForcesLoss
from ddpkit.profiler import StepProfiler
from ddpkit.projection import Projection
from ddpkit.ranks import phase
from ddpkit.ranks.agree import agree, most_on_ranks, share
from ddpkit.ranks.group import Environment
from ddpkit.ranks.switches import deterministic_algorithms, tf32, variables
from ddpkit.record import RunFolder
from ddpkit.schedule import Schedule
from ddpkit.step import make_step
from ddpkit.sync.emulated import EveryRank
from ddpkit.train import Trainer

PROBE = 8
"""Frames of the fixed batch whose loss is recorded beside the projection: the first ones to validate."""


_REPEATABLE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}  # NVLS sums in no fixed order


@contextmanager
def numerics(config: DictConfig) -> Iterator[None]:
    """Sets what holds for the whole process while this is open: determinism, TF32, NCCL, the compiler.

    It is opened before a communicator is made: NCCL reads its environment once.
    """
    chosen: dict[str, str] = {}
    if config.deterministic:
        chosen = {name: os.environ.get(name, value) for name, value in _REPEATABLE.items()}
    if config.nccl_algo is not None:
        chosen["NCCL_ALGO"] = config.nccl_algo
    with ExitStack() as switches:
        switches.enter_context(variables(chosen))
        switches.enter_context(tf32(allowed=config.tf32))
        if config.deterministic:
            switches.enter_context(deterministic_algorithms(wanted=True))
        if config.compile:
            from ddpkit.compile.backend import using

            switches.enter_context(using(config.compiler))
        yield


def model_spec(config: DictConfig, data: Data) -> dict[str, Any]:
    """What a model is built from, in plain values: kept in checkpoints, so that they are enough to build it again.

    Species, the number of neighbours, shifts and scales are those of the data, unless the configuration gives them.

    Raises:
        InputError: the configuration's species lack some of the data.
    """
    spec = OmegaConf.to_container(config.model, resolve=True)
    assert isinstance(spec, dict)
    species = spec.get("species") or list(data.frames.species)
    if lacking := [name for name in data.frames.species if name not in species]:
        raise InputError(
            f"model.species lacks {', '.join(lacking)}, which {data.frames.path} has: add them, or leave model.species out."
        )
    facts = statistics(
        data.frames, data.train, float(config.model.r_max), isolated=config.data.shifts == "isolated", species=species
    )
    measured = {
        "species": list(facts.species),
        "avg_num_neighbors": float(facts.avg_num_neighbors),
        "shifts": [float(x) for x in facts.shifts],
        "scales": [float(x) for x in facts.scales],
    }
    given = {str(key): value for key, value in spec.items()}
    return {
        **given,
        "precision": config.precision,
        **{key: value for key, value in measured.items() if given.get(key) is None},
    }


def build_model(spec: dict[str, Any], seed: int) -> nn.Module:
    """The model with weights drawn from `seed`.

    Raises:
        InputError: it cannot be built so.
    """
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (for models that draw from it)
    try:
        model = instantiate(spec, _convert_="all")
    except (InstantiationException, TypeError) as error:
        if lack := exhausted(error):
            raise lack from error
        cause = error.__cause__ or error
        if isinstance(cause, InputError):
            raise cause from None
        raise InputError(f"The model cannot be built ({_short(cause)}): check the model's configuration.") from error
    assert isinstance(model, nn.Module)
    return model


def build_optimizer(config: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the model's parameters.

    Raises:
        InputError: it cannot be built so.
    """
    try:
        optimizer = instantiate(config.optimizer, _partial_=True)(model.parameters())
    except (InstantiationException, TypeError, ValueError) as error:
        cause = error.__cause__ or error
        raise InputError(f"The optimizer cannot be built ({_short(cause)}): check the keys of optimizer.") from error
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def build_schedule(config: DictConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Schedule | None:
    """What moves the optimizer's learning rates in place of `train.plateau`, where the configuration names it.

    Raises:
        InputError: it cannot be built so.
    """
    if config.scheduler is None or config.scheduler.get("_target_") is None:
        return None
    train, warmup = config.train, config.train.warmup_steps
    settings = OmegaConf.to_container(config.scheduler, resolve=True)
    assert isinstance(settings, dict)
    per = settings.pop("per", "epoch")
    if per not in ("step", "epoch"):
        raise InputError(f"scheduler.per={per} is unknown: use step or epoch.")
    steps = min(train.max_epochs * steps_per_epoch, train.max_steps or sys.maxsize)
    if warmup >= steps:
        raise InputError(
            f"train.warmup_steps={warmup} is not less than the {steps} steps of the run: warm up for fewer."
        )
    left = steps - warmup if per == "step" else -(-(steps - warmup) // steps_per_epoch)
    depends = "all" in settings.values()
    settings = {key: left if value == "all" else value for key, value in settings.items()}
    try:
        scheduler = instantiate(settings, _partial_=True)(optimizer)
    except (InstantiationException, TypeError, ValueError) as error:
        cause = error.__cause__ or error
        raise InputError(f"The scheduler cannot be built ({_short(cause)}): check the keys of scheduler.") from error
    if not isinstance(scheduler, LRScheduler):
        raise InputError(
            f"scheduler._target_={settings['_target_']} is no scheduler of torch.optim.lr_scheduler: use one."
        )
    return Schedule(optimizer, scheduler, per=per, warmup_steps=warmup, length=left if depends else None)


def _short(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())[:200]


def trainable_parameters(model: nn.Module) -> int:
    """Number of trainable parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def model_name(config: DictConfig) -> str:
    """What the model is called in messages."""
    return str(config.model.get("name") or config.model["_target_"].rpartition(".")[2]).lower()


def strategy_name(config: DictConfig) -> str:
    """What the strategy is called in messages and labels."""
    return str(config.strategy.get("name") or config.strategy["_target_"])


def build_trainer(
    config: DictConfig, here: Environment, data: Data, folder: RunFolder | None, state: dict[str, Any] | None
) -> Trainer:
    """Everything that trains, from scratch or from a checkpoint's state.

    Raises:
        InputError: on every rank, where parts do not fit together.
    """
    with ExitStack() as undo:
        trainer = _build_trainer(config, here, data, folder, state, undo)
        undo.pop_all()
    return trainer


def _build_trainer(
    config: DictConfig,
    here: Environment,
    data: Data,
    folder: RunFolder | None,
    state: dict[str, Any] | None,
    undo: ExitStack,
) -> Trainer:
    """The same; `undo` gets what has to be done where something is raised here or later."""
    r_max = float(config.model.r_max)
    seen = fingerprint(config, data)
    spec = state["model_spec"] if state else share(lambda: model_spec(config, data), "the statistics of the data")
    criterion = EnergyForcesLoss(**config.loss)
    with agree("building the model"):
        model = build_model(spec, config.seed).to(here.device)
        if config.init_from is not None and state is None:
            model.load_state_dict(_weights(config.init_from, spec, seen))
        optimizer = build_optimizer(config, model)
    filled = None
    if records(config, here) and leaves_padding_out(config, here, data, model, criterion, spec["species"]):
        filled = capacities(config, data, here)
    with agree("choosing batches"):
        train = train_sampler(config, data, here, None if filled is None else filled.levels)
        sweep = Sweep(
            data.validation, data.frames.atoms[data.validation], data.frames.edges(r_max)[data.validation],
            config.train.batch_size, world_size=here.world_size, rank=here.rank,
            stresses=data.frames.has_stress(data.validation) if config.loss.stress else None,
        )  # fmt: skip
        workers = config.train.workers
        train_loader = Loader(
            data.frames, train, spec["species"], r_max, device=here.device, epochs=config.train.max_epochs,
            workers=suggested(here.device.type, here.local_size) if workers is None else workers,
        )  # fmt: skip
        val_loader = Loader(data.frames, sweep, spec["species"], r_max, device=here.device)
        schedule = build_schedule(config, optimizer, train_loader.steps_per_epoch())
    undo.callback(train_loader.close)
    if train_loader.workers:  # they start while the compiler is at work
        progress = state["progress"] if state else {"epoch": 0, "step_in_epoch": 0}
        train_loader.begin(progress["epoch"], progress["step_in_epoch"])
    ema = moving_average(model, config.train.ema_decay)  # copies the model before a strategy hooks itself to it
    step = make_step(
        model, criterion, optimizer,
        strategy=strategy_name(config), compile=config.compile, comm=config.comm, clip_norm=config.train.clip_norm,
        cuda_graphs=filled is not None,
        **{"timeout": config.train.timeout, **{k: v for k, v in config.strategy.items() if k not in ("name", "_target_")}},
    )  # fmt: skip
    if config.compile or config.check_kernels:
        with phase.during("compile"):
            batches = train_loader.example()
            if folder is not None and config.check_kernels and hasattr(model, "with_reference_kernels"):
                print("comparing kernels with a reference: a minute for large models on a CPU", flush=True)
            compared = compare_kernels(model, batches[0]) if config.check_kernels else []
            if folder is not None:
                kernels_of: Any = getattr(model, "kernels_of", None)
                kernels = None if kernels_of is None else kernels_of(here.device)
                folder.summarize(kernels=kernels)
                if kernels is not None:
                    how = ", compared with a reference in plain PyTorch" if compared else ""
                    print(f"kernels: {kernels}{how}", flush=True)
            if filled is not None and folder is not None:
                print(f"recorded steps: {filled}", flush=True)
                folder.summarize(capacities=asdict(filled))
            if config.compile:
                if folder is not None:
                    print("compiling the step: a minute or more, or seconds if it has been stored", flush=True)
                step.prepare(batches)
    between_epochs = None
    if config.train.turns is not None:
        with agree("waiting for its turn"):
            between_epochs = wait_for(Path(config.train.turns), Path(config.run_dir).name)
    trainer = Trainer(
        model=model,
        step=step,
        optimizer=optimizer,
        criterion=criterion,
        train_loader=train_loader,
        val_loader=val_loader if len(data.validation) else None,
        ema=ema,
        schedule=schedule,
        config=OmegaConf.to_object(config.train),
        folder=folder,
        here=here,
        model_spec=spec,
        data=seen,
        projection=None if folder is None else _projection(config, here, data, spec, model, criterion, folder, state),
        profiler=StepProfiler(folder.path / "profile", config.profile, here.device)
        if folder and config.profile
        else None,
        between_epochs=between_epochs,
    )
    if state is not None:
        with agree("restoring the checkpoint"):
            try:
                trainer.load_state_dict(state)
            except InputError:
                raise
            except (RuntimeError, ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"The checkpoint of {config.run_dir} does not fit its model ({_short(error)}): use the one that this "
                    "run wrote."
                ) from error
    return trainer


def _projection(
    config: DictConfig,
    here: Environment,
    data: Data,
    spec: dict[str, Any],
    model: nn.Module,
    criterion: EnergyForcesLoss,
    folder: RunFolder,
    state: dict[str, Any] | None,
) -> Projection | None:
    """What records the trajectory in `projection.csv`, where the configuration asks for it."""
    if not config.train.projection:
        return None
    frames, r_max = (data.validation if len(data.validation) else data.train)[:PROBE], float(config.model.r_max)
    sweep = Sweep(frames, data.frames.atoms[frames], data.frames.edges(r_max)[frames], PROBE)
    _, [batch] = next(Loader(data.frames, sweep, spec["species"], r_max, device=here.device).epoch(0))

    def probe() -> float:
        was_training = model.training
        model.eval()
        loss = float(criterion(model(batch), batch)["loss"]) / here.world_size  # the criterion gives a rank's share
        model.train(was_training)
        return loss

    resume_from = state["progress"]["step"] if state else 0
    return Projection(model, probe, folder.path / "projection.csv", resume_from=resume_from)


def compare_kernels(model: nn.Module, batch: Any) -> list[Difference]:
    """Compares the model's kernels with its reference on every rank; returns what was compared.

    Raises:
        ParityError: they compute something else.
        InputError: they cannot be run here.
    """
    with agree("comparing kernels with the reference"):
        found = check_kernels(model, batch)
        require_kernels(model, found)
    return found


def train_sampler(
    config: DictConfig, data: Data, here: Environment, capacities: Sequence[Capacity] | None = None
) -> Sampler:
    """What deals out the training frames.

    Args:
        config: the configuration.
        data: the set and its parts.
        here: where this process stands.
        capacities: what batches are filled up to (`choose_capacities` for the plan that this gives without); None: nothing.

    Raises:
        InputError: a batch that is too small for the ranks, or larger than the set.
    """
    make, world_size, rank = Sampler, here.world_size, here.rank
    if strategy_name(config) == "emulated" and here.world_size == 1:
        make, world_size, rank = EveryRank, config.strategy.ranks, 0
    r_max, stresses = float(config.model.r_max), config.loss.stress
    return make(
        data.train, data.frames.atoms[data.train], data.frames.edges(r_max)[data.train],
        config.train.batch_size, world_size=world_size, rank=rank, accumulate=config.train.accumulate,
        seed=config.data.seed, stresses=data.frames.has_stress(data.train) if stresses else None,
        most_neighbours=None if capacities is None else data.frames.most_neighbours(r_max)[data.train],
        capacities=capacities,
    )  # fmt: skip


def records(config: DictConfig, here: Environment) -> bool:
    """Whether steps of a run are recorded and replayed, if what fills batches up is left out.

    Raises:
        InputError: `cuda_graphs=true` where ranks share a GPU.
    """
    can_communicate = here.device.type != "cuda" or here.world_size == 1 or "nccl" in here.backend
    if config.cuda_graphs == "auto":
        return bool(config.compile) and here.device.type == "cuda" and can_communicate
    if config.cuda_graphs and not can_communicate:
        raise InputError(
            f"cuda_graphs=true records the communication of ranks, which NCCL alone allows, and these use {here.backend}: give "
            "each rank a GPU, or use cuda_graphs=auto."
        )
    return bool(config.cuda_graphs)


def leaves_padding_out(
    config: DictConfig, here: Environment, data: Data, model: nn.Module, criterion: Criterion, species: Sequence[str]
) -> bool:
    """Whether model and criterion leave out what fills batches up, on every rank; where `cuda_graphs=auto` asks, they may not.

    Raises:
        InputError: on every rank, where `cuda_graphs=true` wants it and they do not.
    """
    r_max = float(config.model.r_max)
    with phase.during("compile"), agree("comparing batches that are filled up with others"):
        sampler = train_sampler(config, data, here, capacities=None)
        batch, *_ = Loader(data.frames, sampler, species, r_max, device=here.device).example()
        measured = compare_padding(model, criterion, batch, r_max)
        if config.cuda_graphs != "auto":
            require_padding(measured)
    if not most_on_ranks(sum(not d.is_fine for d in measured)):
        return True
    if sentence := taken_for_real(measured):
        warnings.warn(f"Steps are not recorded: that would fill batches up, and {sentence}.", stacklevel=2)
    return False


def capacities(config: DictConfig, data: Data, here: Environment) -> Capacities:
    """What the training batches of a run are filled up to, so that one recorded step serves many; rank 0's choice.

    Raises:
        InputError: on every rank, a batch that is too small for the ranks, or larger than the set.
    """
    what = "choosing what batches are filled up to"
    with agree(what):
        sampler = train_sampler(config, data, here, capacities=())
    found = share(lambda: asdict(choose_capacities(sampler)), what)
    return Capacities(tuple(Capacity(*level) for level in found.pop("levels")), **found)


def refuse_another_model(config: DictConfig, spec: dict[str, Any]) -> None:
    """Looks whether a checkpoint's model is that of the run's configuration.

    Raises:
        InputError: it is another.
    """
    wanted = OmegaConf.to_container(config.model, resolve=True)
    assert isinstance(wanted, dict)
    different = sorted(str(key) for key in wanted if spec.get(key) != wanted[key])
    # What else is in it are numbers of the data; a callable named there would be called.
    different += [key for key in spec if key not in wanted and "_target_" in json.dumps(spec[key])]
    if different:
        raise InputError(
            f"The checkpoint of {config.run_dir} holds another model than its config.yaml says ({', '.join(different)} differ): "
            "use the checkpoint that this run wrote, or the other run's folder."
        )


def _weights(run: str, spec: dict[str, Any], seen: Mapping[str, str]) -> dict[str, Any]:
    """The best averaged weights of another run of the same model on the same data."""
    state = checkpoint.load(Path(run) / "checkpoints" / "best.pt")
    before = state.get("data")
    if before is not None and (what := changed(before, seen, order=False)):
        raise InputError(
            f"init_from={run} was trained on other data than these: {what}, so that frames to validate and test "
            "on may be among those "
            f"that it was trained on; use the data of that run{kept(before)}."
        )
    if state["model_spec"] != spec:
        different = sorted(k for k in spec if state["model_spec"].get(k) != spec[k])
        raise InputError(
            f"init_from={run} holds another model ({', '.join(different)} differ): use the same model and data."
        )
    return checkpoint.inference_weights(state)
