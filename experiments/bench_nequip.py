"""Time the trainer of nequip, `nequip-train`, on the data, the model and the batches of a run.

usage: ddpkit bench nequip ddp|simple [OVERRIDES...] run_dir=DIR     (on several ranks: mpirun -n N ddpkit bench nequip ...)

`ddp` is Lightning's DistributedDataParallel, `simple` nequip's SimpleDDPStrategy, each with its default settings. OVERRIDES are
those of `ddpkit-run`. Frames, size of the batches, loss, optimizer, average of the weights and TF32 are those of such a run, and
the weights at first; layers are nequip's own. compile=true is its compile_mode, model.kernels=openequivariance (or
cuequivariance) its modifier of that name. Not alike are: which frames a rank gets, which nequip takes as they come and a run
balances; positions, which nequip has in float64; with `ddp`, what is sent: also buffers in each step, in which nequip keeps the
averaged weights. Batches are made by up to 8 processes of a rank on GPUs unless train.workers says otherwise, more than a run
needs, because nequip computes neighbours anew for each. Nothing is validated or saved.

DIR becomes a run folder, as far as `ddpkit-analyze speed` reads one; DIR/nequip/config.yaml is what nequip-train was started
with. An epoch lasts from its first batch, once that is there, to the end of its last step on the slowest rank.
`ddpkit experiment speed arms=custom-eager,nequip-simple` sets such runs beside ours.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ddpkit.errors import InputError
from ddpkit.experiments import nequip_trainer, run_data
from ddpkit.experiments.config import read
from ddpkit.experiments.turns import wait_for
from ddpkit.ranks import group
from ddpkit.ranks.agree import agree
from ddpkit.ranks.group import Environment
from ddpkit.record import RunFolder, describe_environment, record_failure, versions
from ddpkit.train import ROWS_LATE

_PACKAGES = ("nequip", "lightning")


def main(arguments: Sequence[str]) -> None:
    """Trains by `nequip-train`.

    Raises:
        InputError: on every rank, where it cannot be done so.
    """
    if not arguments or "=" in arguments[0]:
        raise InputError("The scheme is missing: use `ddpkit bench nequip ddp` or `ddpkit bench nequip simple`.")
    scheme, *overrides = arguments
    nequip_trainer.require_installed("ddpkit bench nequip")
    if given := [word for word in overrides if word.partition("=")[0].lstrip("+~").partition(".")[0] == "strategy"]:
        raise InputError(f"{given[0]} is not for nequip's trainer, whose scheme is {scheme}: leave it out.")
    config = read(overrides)
    nequip_trainer.require_plain(config, scheme)
    nequip_trainer.require_kernels(config)
    if config.run_dir is None:
        raise InputError("run_dir is missing: name the folder for what is measured.")
    device = None if config.device == "auto" else config.device
    here = group.init_process_group(device, timeout=timedelta(seconds=config.train.timeout))
    # Where Lightning looks for a rank that somebody else has started, as soon as it is imported.
    os.environ |= {"LOCAL_RANK": str(here.local_rank), "NODE_RANK": str(here.rank // here.local_size)}
    if config.train.rows_late is None:
        config.train.rows_late = ROWS_LATE[here.device.type]
    folder = _opened(config, scheme, here)
    try:
        _train(config, scheme, here, folder)
    except BaseException as failure:
        why = getattr(failure, "told", None) or str(failure) or type(failure).__name__
        record_failure(Path(config.run_dir), why, error_kind=type(failure).__name__)
        raise
    finally:
        if folder is not None:
            with suppress(InputError):
                folder.close()
    group.shutdown()


def _opened(config: DictConfig, scheme: str, here: Environment) -> RunFolder | None:
    with agree("opening the run folder"):
        nequip_trainer.batch_of_rank(config, here.world_size)
        if not here.is_first:
            return None
        folder = RunFolder(Path(config.run_dir))
        environment = describe_environment(here, comm="torch", seeds={"seed": config.seed, "data": config.data.seed})
        environment["versions"] |= versions(_PACKAGES)
        folder.describe(nequip_trainer.as_run(config, scheme), environment)
        folder.summarize(status="running", error=None, error_kind=None)
        return folder


def _train(config: DictConfig, scheme: str, here: Environment, folder: RunFolder | None) -> None:
    data = run_data.open_data(config)
    with agree("writing the files of nequip"):
        run_data.refuse_missing_labels(config, data)
        steps = nequip_trainer.steps_per_epoch(config, data)
        files = nequip_trainer.write_files(config, data)
    place = Path(config.run_dir).resolve() / "nequip"
    with agree("writing the training file of nequip"):
        if folder is not None:
            place.mkdir(exist_ok=True)
            made = nequip_trainer.training_file(config, scheme, files, here, steps)
            OmegaConf.save(OmegaConf.create(made), place / nequip_trainer.NAME)
            folder.summarize(parameters=files.parameters)
    from ddpkit.experiments.nequip_clock import Clock

    turns = config.train.turns
    clock = Clock(
        here,
        folder,
        steps=steps,
        weight=sum((config.loss.energy, config.loss.forces, config.loss.stress)),
        timeout=config.train.timeout,
        pause=wait_for(Path(turns), Path(config.run_dir).name) if turns else None,
    )
    _nequip_train(place)
    if folder is not None:
        p = clock.progress
        share: dict[str, Any] = {"data_share": p.seconds_data / p.seconds_steps if p.seconds_steps else None}
        folder.summarize(status="finished", steps=p.step, epochs=p.epoch, skipped=0, **share)


def _nequip_train(place: Path) -> None:
    """The program `nequip-train`, in this process, which is a rank of a group that is there already."""
    from nequip.scripts.train import main as train

    before = sys.argv
    sys.argv = [
        "nequip-train", "-cp", str(place), "-cn", nequip_trainer.NAME, f"hydra.run.dir={place}", "hydra.output_subdir=null",
        "hydra/job_logging=stdout",
    ]  # fmt: skip
    try:
        train()
    finally:
        sys.argv = before
