"""How the learning rate moves: one of torch's schedulers, and a warm-up before it."""

from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler, ReduceLROnPlateau

from ddpkit.errors import InputError


class Schedule:
    """Moves the learning rates of an optimizer after steps and epochs.

    Args:
        optimizer: whose rates move.
        scheduler: one of torch's, made for this optimizer; None: the rates stay. `ReduceLROnPlateau` is told the validation loss
            of each epoch that has one.
        per: whether the scheduler counts steps or epochs.
        warmup_steps: in step n of so many the rates are n / `warmup_steps` of what they are after them. The scheduler counts the
            steps after these, or the epochs that end after these.
        length: how many steps or epochs the scheduler was made for, where it was made for a number.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scheduler: LRScheduler | None = None,
        *,
        per: Literal["step", "epoch"] = "epoch",
        warmup_steps: int = 0,
        length: int | None = None,
    ) -> None:
        self._scheduler, self._per, self._warming, self._length = scheduler, per, warmup_steps, length
        self._warmup = LinearLR(optimizer, 1 / warmup_steps, total_iters=warmup_steps - 1) if warmup_steps > 1 else None

    def after_step(self) -> None:
        """Called after each optimizer step."""
        if self._warming:
            self._warming -= 1
            if self._warmup is not None and self._warming:
                self._warmup.step()
        elif self._scheduler is not None and self._per == "step":
            self._scheduler.step()

    def after_epoch(self, loss: float | None) -> None:
        """Called after each epoch.

        Args:
            loss: of validation; None without one.
        """
        if self._scheduler is None or self._per == "step" or self._warming:
            return
        if not isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step()
        elif loss is not None:
            self._scheduler.step(loss)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the schedule goes on from."""
        return {
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "warmup": None if self._warmup is None else {"left": self._warming, **self._warmup.state_dict()},
            "schedule_length": self._length,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict()`; a checkpoint of 0.1 has no warm-up.

        Raises:
            InputError: that schedule was made for another length.
        """
        length = state.get("schedule_length")
        if length != self._length:
            raise InputError(
                f"The learning rate of this run was scheduled for {length} {self._per}s and now would be for {self._length}: "
                "leave train.max_epochs, train.max_steps and the frames as they were, or give scheduler its lengths in numbers."
            )
        if self._scheduler is not None and state["scheduler"] is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        warmup = state.get("warmup")
        self._warming = 0 if warmup is None else warmup["left"]
        if self._warmup is not None and warmup is not None:
            self._warmup.load_state_dict({key: value for key, value in warmup.items() if key != "left"})
