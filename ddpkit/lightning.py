"""ddpkit's strategies in Lightning, in place of its `DDPStrategy` (extra `lightning`)."""

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from ddpkit.errors import InputError, RankDisagreementError
from ddpkit.ranks.group import init_process_group, is_of_communication
from ddpkit.ranks.launchers import Place, place
from ddpkit.sync import GradientSync, Strategy, make_sync, takes_option
from ddpkit.sync.state import collect, keeps_state, restore

OF_LIGHTNING = {
    "accelerator",
    "parallel_devices",
    "cluster_environment",
    "checkpoint_io",
    "precision_plugin",
    "process_group_backend",
    "timeout",
    "start_method",
}
_STATES = "ddpkit_sync"  # their place in a checkpoint
REFUSED = ("ddp_comm_hook", "ddp_comm_state", "ddp_comm_wrapper", "model_averaging_period")


class SyncStrategy(DDPStrategy):  # type: ignore[misc]
    """Lightning's `DDPStrategy` with the gradient synchronisation of ddpkit; likewise in place of nequip's `SimpleDDPStrategy`.

    ```yaml
    trainer:
      _target_: lightning.Trainer
      strategy:
        _target_: ddpkit.lightning.SyncStrategy   # the one line to change
        sync: custom
    ```

    Gradients are averaged once per optimizer step, also with `accumulate_grad_batches`. With `sync="custom"` and `"overlap"` the
    module is not wrapped, so that it may be compiled as on one device.

    Args:
        sync: a strategy's name, import path or class; `ingraph` needs `ddpkit.make_step` and is refused.
        sync_timeout: seconds to wait for other ranks inside `synchronize()`.
        options: those of Lightning's `DDPStrategy` (`process_group_backend`, `timeout` ...); all others go to the strategy
            (`bucket_mb`, `reduce_dtype`, `check_every`; for `sync="standard"` those of torch's wrapper).

    Attributes:
        sync: the `GradientSync` while fitting; its `stats` tell what was sent.
    """

    def __init__(self, sync: Strategy = "custom", *, sync_timeout: float = 600.0, **options: Any) -> None:
        known = OF_LIGHTNING & set(inspect.signature(DDPStrategy.__init__).parameters)
        refused = [name for name in REFUSED if name in options]
        if refused:
            raise InputError(f"SyncStrategy does not take {refused[0]}: use Lightning's own DDPStrategy for that.")
        super().__init__(**{name: value for name, value in options.items() if name in known})
        if self.cluster_environment is None:  # type: ignore[has-type]  # Lightning's
            self.cluster_environment = _environment()
        self._named = sync
        self._sync_options = {"timeout": sync_timeout} | {n: v for n, v in options.items() if n not in known}
        self.sync: GradientSync | None = None
        self._ended: GradientSync | None = None  # of the last fit, where checkpoints hold what it keeps

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """The model goes to its device before a checkpoint is restored: some kernels of equivariant models need that."""
        return True

    def load_checkpoint(self, checkpoint_path: Any, *arguments: Any, **keywords: Any) -> Any:
        """Reads a checkpoint to resume from; it is the run's own, and its optimizer state may be pickled objects."""
        if (
            keywords.get("weights_only") is None
            and "weights_only" in inspect.signature(super().load_checkpoint).parameters
        ):
            keywords["weights_only"] = False
        return super().load_checkpoint(checkpoint_path, *arguments, **keywords)

    def save_checkpoint(self, checkpoint: dict[str, Any], *arguments: Any, **keywords: Any) -> None:
        """Adds what the strategy keeps on each rank (`GradientSync.state_dict`), where training is to go on from it."""
        sync = self.sync or self._ended
        if sync is not None and "optimizer_states" in checkpoint:
            with self._among_ranks("saving what the strategy keeps"):
                checkpoint[_STATES] = collect(sync, _on_first)
        super().save_checkpoint(checkpoint, *arguments, **keywords)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Has optimizers and the strategy go on from a checkpoint.

        Raises:
            InputError: the strategy keeps a state for each rank, and another number of ranks saved.
        """
        super().load_optimizer_state_dict(checkpoint)
        if self.sync is not None:
            restore(self.sync, checkpoint.get(_STATES, []))

    def setup_environment(self) -> None:
        """Looks whether the trainer and the launcher mean the same ranks.

        Raises:
            InputError: they do not.
        """
        if isinstance(self.cluster_environment, _Launched):
            here, chosen = self.cluster_environment.place, self.num_nodes * self.num_processes
            if chosen != here.world_size:
                raise InputError(
                    f"{here.launcher} started {here.world_size} ranks, but the trainer was given {self.num_processes} devices on "
                    f"{self.num_nodes} hosts: let devices times num_nodes be {here.world_size}."
                )
        super().setup_environment()

    def setup_distributed(self) -> None:
        """Joins the ranks that the launcher has started, if it is not for Lightning to do so."""
        if isinstance(self.cluster_environment, _Launched):
            timeout = {} if self._timeout is None else {"timeout": self._timeout}
            init_process_group(self.root_device.type, self._get_process_group_backend(), **timeout)
        super().setup_distributed()

    def setup(self, trainer: Any) -> None:
        """Prepares the model, and has ranks meet where loops begin and end."""
        trainer.callbacks[:] = [c for c in trainer.callbacks if not isinstance(c, _Meetings)] + [_Meetings()]
        super().setup(trainer)

    def configure_ddp(self) -> None:
        """Attaches the strategy, once the model is on its device."""
        options = dict(self._sync_options)
        scaled = isinstance(self.precision_plugin, MixedPrecision) and self.precision_plugin.scaler is not None
        if scaled and takes_option(self._named, "check_finite"):
            options.setdefault("check_finite", False)  # a scaler looks for infinities itself, and expects them
        self.sync = make_sync(self._named, self.model, **options)  # type: ignore[has-type]  # Lightning's
        self.model = self.sync.module

    def backward(self, closure_loss: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """The backward pass, in which `standard` communicates."""
        if self.sync is None:
            return super().backward(closure_loss, *arguments, **keywords)
        with self.sync.around_backward():
            return super().backward(closure_loss, *arguments, **keywords)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Averages the gradients."""
        super().post_backward(closure_loss)
        if self.sync is not None:
            self.sync.synchronize()

    def barrier(self, *arguments: Any, **keywords: Any) -> None:
        """Waits for all ranks."""
        with self._among_ranks("a barrier"):
            super().barrier(*arguments, **keywords)

    def reduce(self, *arguments: Any, **keywords: Any) -> Tensor:
        """Of what is logged."""
        with self._among_ranks("the reduction of what is logged"):
            return super().reduce(*arguments, **keywords)

    @contextmanager
    def _among_ranks(self, what: str) -> Iterator[None]:
        """Names what a collective of Lightning's own was about when the others were gone, and tells them of a long wait."""
        try:
            with nullcontext() if self.sync is None else self.sync.elsewhere(what):
                yield
        except RuntimeError as error:
            if not is_of_communication(error):
                raise
            raise RankDisagreementError(
                f"Rank {self.global_rank} has lost the other ranks in {what}: see which of them has failed, and why; ranks "
                "must come to the same logging calls equally often."
            ) from error

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Inside, gradients add up on each rank."""
        if self.sync is None:
            yield
            return
        with self.sync.no_sync():
            yield

    def teardown(self) -> None:
        """Lets go of the model."""
        if self.sync is not None:
            self.sync.close()
            self._ended = self.sync if keeps_state(self.sync) else None
            self.sync = None
        super().teardown()


def _on_first(value: Any) -> list[Any]:
    """Every rank's value on rank 0, nothing on the others."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, values or None)
    return values


class _Meetings(Callback):  # type: ignore[misc]
    """Names ranks whose batches end before those of the others: Lightning would go on there while the others wait."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        del pl_module
        _begin_batch(trainer)

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        del arguments
        if not trainer.is_last_batch:  # the next one begins with a collective of Lightning's own, before any hook
            _begin_batch(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        del pl_module
        _meet(trainer, f"the end of training epoch {trainer.current_epoch}")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        del pl_module
        _meet(trainer, f"the start of validation in epoch {trainer.current_epoch}")

    def on_validation_batch_end(self, trainer: Any, *arguments: Any) -> None:
        del arguments
        # before what is logged is reduced over ranks
        if trainer.fit_loop.epoch_loop.val_loop.batch_progress.is_last_batch:
            _meet(trainer, f"the end of validation in epoch {trainer.current_epoch}")


def _begin_batch(trainer: Any) -> None:
    if trainer.strategy.sync is not None:
        trainer.strategy.sync.begin_batch()


def _meet(trainer: Any, what: str) -> None:
    if trainer.strategy.sync is not None:
        trainer.strategy.sync.meet(what)


def _environment() -> ClusterEnvironment | None:
    """Where Lightning would not find by itself what the launcher has started: it takes the variables of a SLURM allocation
    for those of a step, also under mpirun and in a batch script, and asks MPI where it finds mpi4py, which may have no library.
    """  # fmt: skip
    # what Lightning tells the processes that it starts itself
    is_lightnings = {"NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys() and "RANK" not in os.environ
    here = None if is_lightnings else place()
    if here is None or here.launcher == "alone":
        return LightningEnvironment()
    return None if here.launcher in ("torchrun", "srun") else _Launched(here)


class _Launched(ClusterEnvironment):  # type: ignore[misc]
    """Ranks that another launcher has started, as `ddpkit.init_process_group` reads them.

    Args:
        place: this rank's.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    @property
    def creates_processes_externally(self) -> bool:
        """They are there already."""
        return True

    @property
    def main_address(self) -> str:
        """Found by `ddpkit.init_process_group`."""
        return os.environ.get("MASTER_ADDR", "")

    @property
    def main_port(self) -> int:
        """Likewise."""
        return int(os.environ.get("MASTER_PORT", "0"))

    @staticmethod
    def detect() -> bool:
        """Never by Lightning."""
        return False

    def world_size(self) -> int:
        """Number of ranks."""
        return self.place.world_size

    def set_world_size(self, size: int) -> None:
        """The launcher has set it."""

    def global_rank(self) -> int:
        """This rank."""
        return self.place.rank

    def set_global_rank(self, rank: int) -> None:
        """The launcher has set it."""

    def local_rank(self) -> int:
        """This rank among those of its host."""
        return self.place.local_rank

    def node_rank(self) -> int:
        """Number of the host, where all hosts have equally many ranks."""
        return self.place.rank // self.place.local_size
