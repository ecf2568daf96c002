"""Train a model.

usage: [mpirun -n N] ddpkit-run [OVERRIDES...]

Overrides set configuration keys, for example:

  model=allegro_small|allegro_medium|nequip_small|...      data=generated|generated_crystals|files   data.path=FILE
  strategy=standard|custom|none|overlap|ingraph|emulated   compile=true|false   comm=torch|mpi
  compiler=inductor|public|interpreted cuda_graphs=auto|true|false
  nccl_algo=Ring|Tree      strategy.ranks=64 strategy.order=ring (emulated)
  seed=1  data.seed=1  precision=mixed|float32|float64     deterministic=true|false   device=auto|cpu|cuda
  train.max_epochs=10  train.max_steps=1000  train.batch_size=16  train.log_every=1
  profile=20  run_dir=DIR  resume=DIR  experiment=small_molecule|spice_stage1|spice_stage2|mptrj|FILE.yaml

`ddpkit-run --cfg` prints the whole configuration. Everything a run leaves behind is in its folder: config.yaml,
environment.json, steps.csv, epochs.csv, summary.json and checkpoints/. One run at a time writes into it, and nothing that was
logged is overwritten: a folder with a checkpoint or a finished run is gone on with by resume=DIR or left alone, and what a run
without a checkpoint has left is moved into DIR/previous-1 when a new one starts there.

A loss or gradient that is NaN or infinite ends the run with exit code 1, whatever the strategy and train.log_every: at the next
row, and before a checkpoint is written. summary.json counts the updates that were not applied (skipped), and the steps of a
compiled run in which some rank ran eager code (eager_steps).
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ddpkit import checkpoint
from ddpkit.compile.digest import digest
from ddpkit.errors import InputError, RankLostError, writing
from ddpkit.experiments import run_data, setup
from ddpkit.experiments.config import flat, keys_of, read, read_saved
from ddpkit.lock import FolderLock
from ddpkit.ranks import group, phase, watchdog
from ddpkit.ranks.agree import agree, share
from ddpkit.ranks.group import Environment
from ddpkit.ranks.lifeline import Lifeline, alive
from ddpkit.record import RunFolder, describe_environment, record_failure
from ddpkit.summary import failure as recorded_failure
from ddpkit.train import ROWS_LATE, Trainer

# Keys that a resumed run may change: where and how long, not what.
_MAY_CHANGE = (
    "train.max_epochs",
    "train.max_steps",
    "train.max_seconds",
    "train.checkpoint_every",
    "train.timeout",
    "train.rows_late",
    "train.workers",
    "train.turns",
    "device",
    "profile",
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
    started = _as_started(config, overrides)
    with setup.numerics(started):
        _run(config, started, overrides)


def _run(config: DictConfig, started: DictConfig, overrides: Sequence[str]) -> None:
    """Meets the other ranks and trains; `started` is the configuration that a resumed run was started with."""
    phase.enter("rendezvous")
    here = group.init_process_group(
        None if started.device == "auto" else started.device, timeout=timedelta(seconds=started.train.timeout)
    )
    job = Job(config, here)
    try:
        with alive(here, job.record_failure) as lifeline:
            phase.enter("data")
            job.open(overrides)
            if job.run_dir is not None:
                lifeline.keeps_in(job.run_dir)
            _train(job, lifeline)
    except BaseException as failure:
        job.close_failed(failure)
        raise
    job.close()
    group.shutdown()


class Job:
    """What belongs to the run that this process is a rank of, as far as it has come.

    Attributes:
        config: the configuration; of a resumed run, the one it was started with.
        here: where this process stands.
        state: of the checkpoint to go on from; None for a new run.
        run_dir: the folder, once it is this run's: from `open()` on for a new run, from `begin()` on for one that goes on.
        folder: writes there, on rank 0.
        trainer: once there is one.
    """

    def __init__(self, config: DictConfig, here: Environment) -> None:
        self.config, self.here = config, here
        self.state: dict[str, Any] | None = None
        self.run_dir: Path | None = None
        self.folder: RunFolder | None = None
        self.trainer: Trainer | None = None
        self._lock: FolderLock | None = None

    def open(self, overrides: Sequence[str]) -> None:
        """Takes the folder, and reads the checkpoint of a resumed run; a new run begins to write.

        Raises:
            InputError: on every rank; the folder is as it was.
        """
        config, here = self.config, self.here
        with agree("choosing the run folder"):
            _refuse_to_mix(config)
        path = _chosen(config)
        with agree("opening the run folder"):
            if here.is_first:  # before anything is read that another run might be writing
                self._lock = FolderLock(path)
        if config.resume is not None:
            with agree("reading the checkpoint"):
                config = self.config = resumed(config, overrides)
                self.state = checkpoint.load_to_resume(path)
                setup.refuse_another_model(config, self.state["model_spec"])
        config.run_dir = str(path)
        if config.train.rows_late is None:
            config.train.rows_late = ROWS_LATE[here.device.type]
        with agree("setting up the run"):
            if here.is_first:
                progress = self.state["progress"] if self.state else {"step": 0, "epoch": 0}
                self.folder = RunFolder(
                    path,
                    resume_from=progress["step"],
                    resume_epoch=progress["epoch"],
                    tensorboard=config.train.tensorboard,
                    lock=self._lock,
                    log_every=config.train.log_every,
                )
                self.folder.describe(
                    OmegaConf.to_yaml(config),
                    describe_environment(here, comm=config.comm, seeds={"seed": config.seed, "data": config.data.seed}),
                )
                if self.state is None:
                    self.run_dir = path  # it says "running" from here on, and the others may never come
                self.folder.summarize(status="running", error=None, error_kind=None)
        if self.state is None:
            self.run_dir = path

    def begin(self) -> None:
        """Begins to write where a run goes on, once nothing can be refused any more."""
        path = Path(self.config.run_dir)
        with agree("opening the run folder"):
            if self.folder is not None:
                self.run_dir = path
                self.folder.begin()
        self.run_dir = path

    def record_failure(self, sentence: str) -> None:
        """Has the run's summary tell why it cannot go on, and what is known by then; from any rank and thread."""
        if self.run_dir is not None:
            watchdog.leave_word(sentence)
            record_failure(self.run_dir, sentence, **self._facts())

    def _facts(self) -> dict[str, int]:
        """Alike on all ranks, since mpirun may end rank 0 before it has written them."""
        return self.trainer.facts() if self.trainer else {}

    def close_failed(self, failure: BaseException) -> None:
        """Records the failure, with how far training has come, and lets go of the folder."""
        why = getattr(failure, "told", None) or str(failure) or type(failure).__name__
        kind = type(failure).__name__
        # A launcher ends all ranks once one has failed: what that one or a thread has recorded is the cause of the signal.
        if isinstance(failure, KeyboardInterrupt) and self.run_dir and (told := recorded_failure(self.run_dir)):
            why, kind = told, RankLostError.__name__
        with suppress(InputError):  # a full disk, say
            if self.folder is not None:
                self.folder.summarize(status="failed", error=why, error_kind=kind, **self._facts())
        if self.run_dir is not None:
            watchdog.leave_word(why)
            record_failure(self.run_dir, why, error_kind=kind, **self._facts())
        with suppress(InputError):
            self.close()

    def close(self) -> None:
        """Lets go of the folder."""
        if self.folder is not None:
            self.folder.close()
        elif self._lock is not None:
            self._lock.release()


def _train(job: Job, lifeline: Lifeline) -> None:
    config, here, folder = job.config, job.here, job.folder
    data = run_data.open_data(config)
    with agree("looking at the data"):
        run_data.refuse_changed_data(config, data, job.state)
        run_data.refuse_missing_labels(config, data)
        if folder is not None:
            run_data.tell_data(config, data, folder, job.state)
    started = time.perf_counter()
    phase.enter("model")
    trainer = job.trainer = setup.build_trainer(config, here, data, folder, job.state)
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
    job.begin()
    lifeline.keeps_in(Path(config.run_dir))
    trainer.fit()
    phase.enter("end")
    if folder is None:
        return
    done = trainer.progress
    facts = trainer.facts() | {
        "bytes_per_step": trainer.step.sync.stats.bytes,
        "code": digest() if config.compile else None,
        "seconds_logging_per_row": trainer.seconds_logging,
        "data_share": done.seconds_data / done.seconds_steps if done.seconds_steps else None,
    }
    if done.seconds_steps:
        print(f"waiting for data: {done.seconds_data / done.seconds_steps:.2%} of the step time", flush=True)
    if done.captured_steps:
        facts |= {"recordings": trainer.step.recordings, "seconds_recording": trainer.step.seconds_recording}
        print(f"{done.captured_steps} of {done.step} steps replayed {trainer.step.recordings} recordings", flush=True)
    if done.eager_steps:
        print(
            f"{done.eager_steps} of {done.step} steps ran eager code on some rank, in full or in part: the compiled code does "
            "not hold for the batches that the warnings above name",
            flush=True,
        )
    if trainer.stopped_by is None:
        folder.summarize(status="finished", **facts)
    else:
        remedy = f"continue with resume={folder.path}"
        if not trainer.config.leaves_checkpoints:
            remedy = "train.checkpoint_every=never has left no checkpoint to go on from, so start a new run"
        why = f"stopped by {trainer.stopped_by.name} after step {done.step}: {remedy}"
        folder.summarize(status="stopped", error=why, **facts)
        print(f"ddpkit: {why}", flush=True)


def _refuse_to_mix(config: DictConfig) -> None:
    """Looks at what can be known of the folders before anything is written.

    Raises:
        InputError: the folder of a run that there is not, or one that would have to be two things.
    """
    if config.resume is not None:
        read_saved(Path(config.resume))
        if config.run_dir is not None and not _is_same(config.run_dir, config.resume):
            raise InputError(f"resume={config.resume} goes on in that folder: leave run_dir={config.run_dir} out.")
    elif config.init_from is not None:
        if config.run_dir is not None and _is_same(config.run_dir, config.init_from):
            raise InputError(
                f"init_from={config.init_from} is the folder of the new run itself: choose another run_dir, or go on with "
                f"resume={config.init_from}."
            )
        if Path(config.init_from).is_file():
            raise InputError(
                f"init_from={config.init_from} is a file: give the run folder whose best weights to start from."
            )
        checkpoint.load(Path(config.init_from) / "checkpoints" / "best.pt")


def _is_same(one: str, two: str) -> bool:
    return Path(one).resolve() == Path(two).resolve()


def _chosen(config: DictConfig) -> Path:
    """The run folder: the one that was named, or one that rank 0 makes and names after the time."""
    named = config.run_dir if config.resume is None else config.resume
    return Path(named or share(lambda: str(_dated(config)), "naming the run folder"))


def _dated(config: DictConfig) -> Path:
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{setup.model_name(config)}-{setup.strategy_name(config)}"
    for number in count(1):
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            with writing(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()  # another run may have started in the same second
            break
    return path


def _as_started(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """As `resumed`, for a resumed run; the given configuration otherwise, or where it cannot go on so."""
    if config.resume is not None:
        with suppress(InputError):  # told later, on every rank
            return resumed(config, overrides)
    return config


def resumed(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The configuration that the folder was run with, with the overrides that a resumed run may have.

    Raises:
        InputError: there is no such run, or an override changes what the run is; it is named.
    """
    folder = Path(config.resume)
    saved = read_saved(folder)
    before, now = flat(saved), flat(config)
    decides = {key: word for word in overrides for key in keys_of(word, config)}  # the last of several words for a key
    for key, word in decides.items():
        if key in _MAY_CHANGE:
            OmegaConf.update(saved, key, now.get(key))
        elif before.get(key) != now.get(key):
            own = key == word.partition("=")[0].lstrip("+~")
            which = "" if own else f" ({key} would be {now.get(key)})"
            raise InputError(
                f"{word} is not what the run in {folder} was started with{which}: it has {key}={before.get(key)}; leave "
                f"{word} out, or start a new run."
            )
    saved.resume, saved.run_dir, saved.profile = None, str(folder), config.profile
    return saved
