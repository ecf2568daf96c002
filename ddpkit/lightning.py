"""ddpkit's strategies in Lightning, in place of its `DDPStrategy` (extra `lightning`)."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from ddpkit.errors import InputError
from ddpkit.sync import GradientSync, Strategy, make_sync

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
        self._named = sync
        self._sync_options = {"timeout": sync_timeout} | {n: v for n, v in options.items() if n not in known}
        self.sync: GradientSync | None = None

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

    def configure_ddp(self) -> None:
        """Attaches the strategy, once the model is on its device."""
        options = dict(self._sync_options)
        scaled = isinstance(self.precision_plugin, MixedPrecision) and self.precision_plugin.scaler is not None
        if scaled and self._named in ("custom", "overlap"):
            options.setdefault("check_finite", False)  # a scaler looks for infinities itself, and expects them
        self.sync = make_sync(self._named, self.model, **options)  # type: ignore[has-type]  # Lightning's
        self.model = self.sync.module

    def post_backward(self, closure_loss: Tensor) -> None:
        """Averages the gradients."""
        super().post_backward(closure_loss)
        if self.sync is not None:
            self.sync.synchronize()

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
            self.sync = None
        super().teardown()
