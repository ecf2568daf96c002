"""What times `nequip-train` as a run of ours is timed, and writes down what the analysis reads."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from ddpkit.errors import NonFiniteLossError
from ddpkit.progress import Progress
from ddpkit.ranks.gather import Gather
from ddpkit.ranks.group import Environment
from ddpkit.record import RunFolder

_current: "Clock | None" = None


def current() -> "Clock":
    """The clock of this process, which the training file of `nequip-train` names by this function."""
    assert _current is not None, "ddpkit bench nequip starts nequip-train"
    return _current


class Clock(Callback):  # type: ignore[misc]
    """Times the steps of each epoch on every rank, and writes `steps.csv` and `epochs.csv` after it.

    An epoch lasts from its first batch, once that is there, to the end of its last step on the device, on the slowest rank.
    While it lasts no number is read from the device and nothing is sent.

    Args:
        here: where this process stands.
        folder: writes the tables, on rank 0.
        steps: of an epoch.
        weight: by which nequip's loss is multiplied, since nequip divides the weights of its terms by their sum.
        timeout: seconds to wait for the other ranks.
        pause: called before the first epoch and after each, as `Trainer` does.

    Attributes:
        progress: how far training has come.
        stop_signal: none; a signal ends the process.
    """

    def __init__(
        self,
        here: Environment,
        folder: RunFolder | None,
        *,
        steps: int,
        weight: float,
        timeout: float,
        pause: "Callable[[Clock], int] | None",
    ) -> None:
        global _current  # noqa: PLW0603  (a process trains one model)
        _current = self
        self.progress = Progress()
        self.stop_signal: int | None = None
        self._here, self._folder, self._steps, self._weight, self._pause = here, folder, steps, weight, pause
        self._gather = Gather(here, timeout)
        self._losses: list[Tensor] = []
        self._rows: list[list[float]] = []
        self._began = self._ended = self._waited = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Waits for its turn."""
        del trainer, pl_module
        self._give_way()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A batch is there."""
        del trainer, pl_module, batch
        now = time.perf_counter()
        if batch_idx == 0:
            self._began = self._ended = now
        self._waited = now - self._ended

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step has been made, or at least launched."""
        del trainer, pl_module
        if batch_idx + 1 == self._steps and self._here.device.type == "cuda":
            torch.cuda.synchronize(self._here.device)
        now = time.perf_counter()
        self._losses.append(outputs["loss"].detach())
        self._rows.append([now - self._ended, self._waited, batch["pos"].shape[0], batch["edge_index"].shape[1]])
        self._ended = now

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Writes the epoch down and waits for the next turn.

        Raises:
            NonFiniteLossError: on every rank, where a loss was NaN or infinite.
        """
        del pl_module
        seconds = float(self._gather.numbers([self._ended - self._began]).max())
        everyone = self._gather.numbers(np.array(self._rows).ravel()).reshape(self._here.world_size, -1, 4)
        lr = float(trainer.optimizers[0].param_groups[0]["lr"])
        losses = torch.stack(self._losses).double().cpu().numpy() * self._weight / self._here.world_size
        p = self.progress
        if not np.isfinite(losses).all():
            step = p.step + 1 + int(np.argmin(np.isfinite(losses)))
            raise NonFiniteLossError(f"The loss of nequip's trainer was not finite at step {step}: lower optimizer.lr.")
        for loss, (slowest, waited, atoms, edges) in zip(losses, _over_ranks(everyone), strict=True):
            p.step += 1
            self._write_step(
                step=p.step, epoch=p.epoch + 1, loss=float(loss), lr=lr, atoms=int(atoms), edges=int(edges),
                seconds=slowest, seconds_data=waited,
            )  # fmt: skip
        p.epoch += 1
        p.seconds_steps += seconds
        p.seconds_data += float(everyone[0, :, 1].sum())
        if self._folder is not None:
            mean = float(losses.mean())
            self._folder.write_epoch(
                {"epoch": p.epoch, "seconds": seconds, "steps": len(losses), "train_loss": mean, "lr": lr}
            )
            self._folder.summarize(steps=p.step, epochs=p.epoch)
            print(f"epoch {p.epoch:>4}  loss {mean:.5g}  {seconds:.1f} s", flush=True)
        self._losses, self._rows = [], []
        self._give_way()

    def _write_step(self, **row: float) -> None:
        if self._folder is not None:
            self._folder.write_step(row)

    def _give_way(self) -> None:
        if self._pause is not None:
            self._pause(self)


def _over_ranks(everyone: np.ndarray) -> list[tuple[float, float, float, float]]:
    """Of each step: its time on the slowest rank, what rank 0 waited for its batch, and the atoms and edges of all ranks."""
    slowest, waited = everyone[:, :, 0].max(axis=0), everyone[0, :, 1]
    atoms, edges = everyone[:, :, 2].sum(axis=0), everyone[:, :, 3].sum(axis=0)
    return [tuple(row) for row in np.stack([slowest, waited, atoms, edges], axis=1).tolist()]
