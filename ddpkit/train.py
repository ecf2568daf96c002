"""The training loop: steps, validation, records, checkpoints, and a clean way out.

Everything that ranks must agree on while training (losses, a signal to stop, NaN on some rank) rides on one small asynchronous
gather a step, which is read a fixed number of steps later, so that the host need not wait for it.
"""

import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.profiler import record_function
from tqdm import tqdm

from ddpkit import checkpoint
from ddpkit.average import MovingAverage
from ddpkit.batch import Batch
from ddpkit.breakdown import BETWEEN
from ddpkit.data import GlobalStep
from ddpkit.errors import NonFiniteGradientError, NonFiniteLossError
from ddpkit.evaluate import Errors
from ddpkit.ledger import LOSS_COLUMNS, Ledger, Report, Reports, describe_lost, name_bad
from ddpkit.profiler import StepProfiler
from ddpkit.progress import Progress, Stretch
from ddpkit.projection import Projection
from ddpkit.ranks import phase
from ddpkit.ranks.gather import Gather
from ddpkit.ranks.group import Environment
from ddpkit.record import RunFolder
from ddpkit.schedule import Schedule
from ddpkit.step import Step
from ddpkit.sync import state as sync_state
from ddpkit.train_config import PlateauConfig, TrainConfig

ROWS_LATE = {"cpu": 1, "cuda": 8}
"""After how many steps rows are read, where nothing else is said."""


Drawn = tuple[GlobalStep, list[Batch]]


class Loader(Protocol):
    """Gives this rank's batches, the same global batches whatever the world size."""

    def epoch(self, epoch: int, start: int = 0) -> Generator[Drawn]:
        """This rank's micro-batches of each step of an epoch, from step `start` on."""

    def steps_per_epoch(self) -> int:
        """Number of optimizer steps in an epoch."""

    def close(self) -> None:
        """Gives up what was made ahead of an epoch."""


class Trainer:
    """Trains one model on the ranks of the process group.

    Args:
        model: the module whose parameters `step` updates.
        step: a step made by `ddpkit.make_step`.
        optimizer: the step's optimizer.
        criterion: the step's criterion, for validation.
        train_loader: batches to train on.
        val_loader: batches to validate on, each frame once over all ranks; None for no validation.
        ema: moving average of the model's weights, made before `step`; validation uses it.
        schedule: moves the optimizer's learning rates in place of `config.plateau`.
        config: how long, how large, how often.
        folder: where to record; None on every rank but rank 0.
        here: where this process stands.
        model_spec: plain values that the model can be built from again; kept in checkpoints.
        data: likewise what tells the data apart from others.
        projection: records the trajectory of the parameters; None on every rank but rank 0.
        profiler: traces some steps; None on every rank but rank 0.
        between_epochs: called on every rank before the first epoch and after each whole one; returns a signal to stop by, or 0.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        step: Step,
        optimizer: torch.optim.Optimizer,
        criterion: Callable[[Any, Batch], Any],
        train_loader: Loader,
        val_loader: Loader | None,
        ema: MovingAverage | None,
        schedule: Schedule | None = None,
        config: TrainConfig,
        folder: RunFolder | None,
        here: Environment,
        model_spec: dict[str, Any],
        data: dict[str, str] | None = None,
        projection: Projection | None = None,
        profiler: StepProfiler | None = None,
        between_epochs: "Callable[[Trainer], int] | None" = None,
    ) -> None:
        self.model, self.step, self.optimizer, self.criterion = model, step, optimizer, criterion
        self.train_loader, self.val_loader = train_loader, val_loader
        self.config, self.folder, self.here, self.model_spec = config, folder, here, model_spec
        self.data = data
        self.progress = Progress()
        self.ema = ema
        self.schedule = schedule or Schedule(
            optimizer, _plateau(optimizer, config.plateau), warmup_steps=config.warmup_steps
        )
        self._gather = Gather(here, config.timeout)
        self._ledger = Ledger(step)
        self._reports = Reports(self._ledger, self._gather)
        self._late = config.rows_late or ROWS_LATE[here.device.type]
        self._row_before: torch.cuda.Event | None = None
        self._writer = checkpoint.Writer(config.timeout)
        self._has_checkpoint = False
        self._seconds_logging, self._rows = 0.0, 0
        self.stop_signal: int | None = None
        self.stopped_by: signal.Signals | None = None
        self._projection, self._profiler = projection, profiler
        self.between_epochs = between_epochs
        self._out_of_time = False
        self._started = time.monotonic()

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that training goes on from and that is the same on all ranks."""
        return {
            "model_spec": self.model_spec,
            "data": self.data,
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **self.schedule.state_dict(),
            "progress": vars(self.progress).copy(),
        }

    def _states_of_ranks(self) -> dict[str, Any]:
        """What differs by rank, of all ranks: random numbers, and on rank 0 what the strategy keeps. All ranks must call it."""
        return {
            "random_states": self._gather.objects(checkpoint.random_state(self.here.device)),
            "sync": sync_state.collect(self.step.sync, self._gather.objects_on_first),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a checkpoint.

        Raises:
            InputError: the strategy keeps a state for each rank, and another number of ranks saved.
        """
        self.model.load_state_dict(state["model"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state)
        self.progress = Progress(**state["progress"])
        self._has_checkpoint = True
        sync_state.restore(self.step.sync, state.get("sync", []))
        states = state.get("random_states", [])
        if self.here.rank < len(states):  # further ranks go on from their seed
            checkpoint.set_random_state(states[self.here.rank], self.here.device)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Trains until done, stopped by a signal, or failed.

        Raises:
            NonFiniteLossError, NonFiniteGradientError: on every rank, where any rank met NaN or infinity.
        """
        if self._projection is not None:
            self._projection.begin()
        self._started = time.monotonic() - self.progress.seconds
        with self._signals(), self._profiler or nullcontext(), closing(self.train_loader):
            if self._profiler is not None:
                self._profiler.start(self._steps_left())
            self._pause()
            while not self._is_done():
                self._train_epoch()
                with record_function(BETWEEN):
                    self._end_epoch()
                if self.progress.step_in_epoch:  # the run stopped within an epoch
                    break
                self._pause()
        if self._projection is not None and self.stopped_by is None:
            self._projection.after(self.progress.step, ends=True)
        self._writer.wait()

    def _pause(self) -> None:
        if self.between_epochs is not None and (number := self.between_epochs(self)):
            self.stopped_by = signal.Signals(number)

    def facts(self) -> dict[str, int]:
        """What `summary.json` tells of how far training has come and of what went otherwise than asked."""
        p = self.progress
        names = ("skipped", "eager_steps", "captured_steps")
        return {"steps": p.step, "epochs": p.epoch, **{name: getattr(p, name) for name in names}}

    def _is_done(self) -> bool:
        p, c = self.progress, self.config
        return (
            p.epoch >= c.max_epochs
            or (c.max_steps is not None and p.step >= c.max_steps)
            or p.epochs_since_best >= c.early_stop.patience
            or self.stopped_by is not None
            or self._out_of_time
        )

    def _is_validation_due(self) -> bool:
        """Whether the epoch that ends now is one to validate after."""
        p, c = self.progress, self.config
        last = p.epoch + 1 >= c.max_epochs or (c.max_steps is not None and p.step >= c.max_steps)
        return last or (p.epoch + 1) % c.validate_every == 0 or self.stopped_by is not None or self._out_of_time

    def _steps_left(self) -> int:
        """How many steps are to come, unless something stops training before."""
        p, c = self.progress, self.config
        left = (c.max_epochs - p.epoch) * self.train_loader.steps_per_epoch() - p.step_in_epoch
        return left if c.max_steps is None else min(left, c.max_steps - p.step)

    def _train_epoch(self) -> None:
        """Runs the steps that are left of this epoch, up to where the run stops."""
        p, c = self.progress, self.config
        phase.enter("step")
        self.model.train()
        total = self.train_loader.steps_per_epoch()
        bar = tqdm(
            total=total, initial=p.step_in_epoch, desc=f"epoch {p.epoch + 1}", unit="step", leave=False,
            disable=self.folder is None, mininterval=1.0,
        )  # fmt: skip
        batches = self.train_loader.epoch(p.epoch, p.step_in_epoch)
        stretch = Stretch(time.perf_counter())
        self._row_before = self._gather.now()
        try:
            while (drawn := stretch.draw(batches)) is not None:
                counts, micro_batches = drawn
                due = (p.step + 1) % c.log_every == 0
                result = self._take_step(counts, micro_batches, keep_norm=not due)
                stretch.steps += 1
                stop = self._read_until(bar, p.step - self._late)
                if due:
                    ended, stretch = stretch, stretch.end()
                    self._send_row(counts, result, ended)
                    p.count(ended)
                self.schedule.after_step()
                bar.update()
                if self._profiler is not None:
                    self._profiler.step()
                if stop or (c.max_steps is not None and p.step >= c.max_steps):
                    break
                if c.is_checkpoint_due(p.step) and p.step_in_epoch < total:
                    if self._read_all(bar):
                        break
                    with record_function(BETWEEN):
                        self._save("last")
            self._read_all(bar)
            stretch.end()
            p.count(stretch)
        except NonFiniteGradientError:  # told by the strategy on every rank, before the step had ended
            p.skipped += 1
            with suppress(RuntimeError):  # of a rank that has left already
                self._read_until(bar, p.step)
            raise
        finally:
            bar.close()
            batches.close()

    def _take_step(self, counts: GlobalStep, micro_batches: list[Batch], *, keep_norm: bool) -> Any:
        """Updates the weights and what follows them; returns what the criterion returned.

        Args:
            counts: of the global batch.
            micro_batches: of this rank.
            keep_norm: whether another step comes before the gradient's norm is sent.
        """
        p, captured = self.progress, self.step.captured_steps
        result = self.step(
            micro_batches if len(micro_batches) > 1 else micro_batches[0], planned=counts.capacity is not None
        )
        p.captured_steps += self.step.captured_steps - captured
        self._ledger.note(keep=keep_norm)
        if self.ema is not None:
            self.ema.update()
        p.step += 1
        p.step_in_epoch += 1
        if self._projection is not None:
            self._projection.after(p.step)
        return result

    def _send_row(self, counts: GlobalStep, result: Any, stretch: Stretch) -> None:
        """Starts gathering this step's losses and times."""
        began = time.perf_counter()
        terms = result if isinstance(result, dict) else {"loss": result}
        losses = [terms[n].detach() if n in terms else self._absent for n in LOSS_COLUMNS]
        row = {
            "step": self.progress.step,
            "epoch": self.progress.epoch + 1,
            "atoms": counts.atoms,
            "edges": counts.edges,
            "seconds_data": stretch.waited / stretch.steps,
        }
        self._send(losses, stretch.seconds / stretch.steps, row, stretch.steps, self.step.timing())
        self._rows += 1
        self._seconds_logging += time.perf_counter() - began

    @cached_property
    def _absent(self) -> Tensor:
        return torch.full((), float("nan"), dtype=torch.float64, device=self.step.grad_norm.device)

    def _send(
        self,
        losses: list[Tensor],
        seconds: float,
        row: dict[str, Any] | None = None,
        row_steps: int = 0,
        timing: Callable[[], dict[str, float | None]] | None = None,
    ) -> None:
        """Starts gathering losses, times, wishes to stop, and how the steps since the last time went."""
        lr = self.optimizer.param_groups[0]["lr"]
        on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"  # where reading it would wait
        if row is not None and not on_device:
            row["lr"] = float(lr)
        limit = self.config.max_seconds
        left = None if limit is None else limit - (time.monotonic() - self._started)
        self._reports.send(
            self.progress.step,
            losses,
            [lr] if on_device else [],
            seconds=seconds,
            signal=self.stop_signal or 0,
            out_of_time=left is not None and self._late * seconds > left,
            row=row,
            row_steps=row_steps,
            timing=timing,
        )

    def _read_all(self, bar: tqdm) -> bool:  # type: ignore[type-arg]
        """Has ranks look together at all steps so far, so that no checkpoint hides a lost one; whether they agreed to stop."""
        stop = self._read_until(bar, self.progress.step)
        if len(self._ledger):
            self._send([], seconds=0.0)
            stop = self._read_until(bar, self.progress.step) or stop
        return stop

    def _read_until(self, bar: tqdm, last: int) -> bool:  # type: ignore[type-arg]
        """Judges what ranks have sent up to step `last` and writes its rows; whether they agreed to stop.

        All ranks read the same at the same step, whatever has arrived before, so that they act alike.
        """
        stop = False
        while len(self._reports) and self._reports.oldest <= last:
            stop = self._act_on_report(bar) or stop
        return stop

    def _act_on_report(self, bar: tqdm) -> bool:  # type: ignore[type-arg]
        """Judges what was sent longest ago and writes its row; whether ranks agreed to stop."""
        report = self._receive()
        splits = {} if report.timing is None else report.timing()
        began = time.perf_counter()
        self._refuse_non_finite(report)
        self.progress.seconds = time.monotonic() - self._started
        if report.row is not None:
            row = report.whole_row(self.here.rank, self._seconds_of_row(report), splits)
            self.progress.loss_sum_in_epoch += row["loss"]
            self.progress.rows_in_epoch += 1
            if self.folder is not None:
                self._writer.check()
                self.folder.write_step(row)
                bar.set_postfix_str(f"loss={row['loss']:.4g}", refresh=False)
        if report.signals.any():
            self.stopped_by = signal.Signals(int(report.signals.max()))
        self._out_of_time |= bool(report.out_of_time.any())
        self._seconds_logging += time.perf_counter() - began
        return self.stopped_by is not None or self._out_of_time

    def _receive(self) -> Report:
        """The report that was sent longest ago, with its lost updates and eager steps counted."""
        report = self._reports.receive()
        self.progress.skipped += report.skipped
        self.progress.eager_steps += int(report.eager.any(axis=0).sum())
        return report

    def _seconds_of_row(self, report: Report) -> float:
        """Mean walltime of the row's steps on the slowest rank.

        A host that runs ahead of its GPU sees neither when a step begins nor when it ends. The device does, and it ends a gather
        when the slowest rank has come.
        """
        before, self._row_before = self._row_before, self._gather.ended
        if before is None or self._row_before is None:
            return float(report.seconds.max())
        return before.elapsed_time(self._row_before) / 1e3 / report.row_steps

    @property
    def seconds_logging(self) -> float:
        """What a row of a step costs this rank's host, seconds, without waiting for ranks or devices."""
        return self._seconds_logging / max(1, self._rows)

    def _refuse_non_finite(self, report: Report) -> None:
        """Ends the run where an update was lost or a loss is not finite, whatever the strategy."""
        if not report.skipped and np.isfinite(report.losses[:, :1]).all():
            return
        later = []
        with suppress(RuntimeError):  # of a rank that has left already
            while len(self._reports):  # steps that were made since count too
                later.append(self._receive())
        raise NonFiniteLossError(
            f"{describe_lost(report, later)}: look at the labels of that batch, lower optimizer.lr, or set "
            f"train.clip_norm{self._good()}."
        )

    def _good(self) -> str:
        return "; the last checkpoint is good" if self._has_checkpoint else ""

    def _end_epoch(self) -> None:
        """Validates, adjusts the rate, records the epoch and saves.

        A run that stops within an epoch saves where it stands, so that it can be resumed, and validates unless it was told to
        leave.
        """
        p, c = self.progress, self.config
        ended = p.step_in_epoch >= self.train_loader.steps_per_epoch()
        if not ended:
            self._save("last")
            if self.stopped_by is not None:
                return
        errors = None
        validates = self.val_loader is not None and c.validate
        if validates and (not ended or self._is_validation_due()):
            with phase.during("validation"):
                errors = self.validate()
        steps = p.step_in_epoch
        row: dict[str, float | int | None] = {
            "epoch": p.epoch + 1,
            "seconds": float(self._gather.numbers([p.seconds_in_epoch]).max()),
            "steps": steps,
            "train_loss": p.loss_sum_in_epoch / p.rows_in_epoch if p.rows_in_epoch else None,
            "lr": float(self.optimizer.param_groups[0]["lr"]),
        }
        improved = False
        if errors is not None:
            row |= errors
            score = (errors["val_forces_rmse"] + errors["val_energy_rmse"]) / 2
            improved = score < p.best - c.early_stop.threshold
            p.best, p.epochs_since_best = (score, 0) if improved else (p.best, p.epochs_since_best + 1)
        if self.folder is not None:
            self.folder.write_epoch(row)
            self.folder.summarize(**self.facts() | {"epochs": p.epoch + int(ended)})
            _tell(row)
        if not ended:
            if improved:  # apart from the last, which goes on as if it had not been stopped
                self._save("best")
            return
        self.schedule.after_epoch(None if errors is None else errors["val_loss"])
        p.epoch += 1
        p.step_in_epoch, p.rows_in_epoch, p.seconds_in_epoch, p.loss_sum_in_epoch = 0, 0, 0.0, 0.0
        if errors is not None or not validates or self.between_epochs is not None or c.is_checkpoint_due(p.step):
            self._save("last", *(["best"] if improved or not validates else []))

    # -- validation ----------------------------------------------------------------------------------------------------

    def validate(self) -> dict[str, float]:
        """Errors over the validation set, of the averaged weights where they are kept, each frame counted once.

        Raises:
            NonFiniteLossError: on every rank, where any rank met NaN or infinity.
        """
        assert self.val_loader is not None
        model = self.model if self.ema is None else self.ema.module
        errors = Errors()
        loss = 0.0
        model.eval()
        for _, batches in self.val_loader.epoch(0):
            for batch in batches:
                output = model(batch)
                errors.add(output, batch)
                result = self.criterion(output, batch)
                loss += float((result["loss"] if isinstance(result, dict) else result).detach())
        self.model.train()
        everyone = self._gather.numbers([loss, *errors.sums])
        if sentence := name_bad("error of validation", everyone.sum(axis=1, keepdims=True), self.progress.step):
            raise NonFiniteLossError(
                f"{sentence}: lower optimizer.lr, or look at the labels of validation{self._good()}."
            )
        total, *sums = everyone.sum(axis=0)
        metrics = Errors(np.asarray(sums)).metrics()
        return {"val_loss": float(total) / self.here.world_size} | {f"val_{k}": v for k, v in metrics.items()}

    # -- leaving -------------------------------------------------------------------------------------------------------

    def _save(self, *names: str) -> None:
        """Writes checkpoints `last`, or `best`, or both."""
        if not self.config.leaves_checkpoints:
            return
        with phase.during("checkpoint"):
            self._write_checkpoints(names)

    def _write_checkpoints(self, names: Sequence[str]) -> None:
        of_ranks = self._states_of_ranks()
        self._has_checkpoint = True
        if self.folder is None:
            return
        self.folder.to_disk()
        self._writer.write([self.folder.checkpoints / f"{name}.pt" for name in names], self.state_dict() | of_ranks)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGUSR1 ask for a checkpoint and a clean end."""

        def remember(number: int, _: Any) -> None:
            self.stop_signal = number

        before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _plateau(optimizer: torch.optim.Optimizer, config: PlateauConfig) -> ReduceLROnPlateau | None:
    if config.factor >= 1:
        return None
    return ReduceLROnPlateau(
        optimizer, factor=config.factor, patience=config.patience, threshold=config.threshold, threshold_mode="abs",
        min_lr=config.min_lr,
    )  # fmt: skip


def _tell(row: dict[str, float | int | None]) -> None:
    """One line on an epoch."""
    loss = [] if row["train_loss"] is None else [f"loss {row['train_loss']:.5g}"]
    shown = [f"epoch {row['epoch']:>4}", *loss, f"{row['seconds']:.1f} s"]
    if row.get("val_loss") is not None:
        shown += [
            f"validation: loss {row['val_loss']:.5g}",
            f"energy {1e3 * (row['val_energy_rmse'] or 0):.2f} meV/atom",
            f"forces {1e3 * (row['val_forces_rmse'] or 0):.1f} meV/Å",
        ]
    tqdm.write("  ".join(shown))
