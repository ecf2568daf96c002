"""What a training run is told: how long, how large, how often."""

from dataclasses import dataclass, field


@dataclass
class PlateauConfig:
    """torch's ReduceLROnPlateau on the weighted sum of validation losses.

    Attributes:
        factor: the learning rate is multiplied by it; 1 keeps the rate.
        patience: validated epochs without improvement, before the rate falls.
        threshold: improvement of the validation loss that counts, absolute.
        min_lr: the rate goes no lower.
    """

    factor: float = 0.8
    patience: int = 10
    threshold: float = 1e-6
    min_lr: float = 1e-7


@dataclass
class EarlyStopConfig:
    """Stops when the mean of validation force RMSE (eV/Å) and per-atom energy RMSE (eV) no longer improves.

    Attributes:
        patience: validated epochs without improvement, before training stops.
        threshold: improvement of that mean that counts, absolute.
    """

    patience: int = 200
    threshold: float = 1e-9


@dataclass
class TrainConfig:
    """How long, how large, how often.

    Attributes:
        max_epochs: passes over the frames to train on.
        max_steps: number of optimizer steps after which training stops, where that is before `max_epochs`.
        max_seconds: walltime limit of training and validation, over all resumed parts.
        batch_size: frames in the global batch, over all ranks.
        accumulate: micro-batches that one optimizer step is made of.
        timeout: seconds that a rank waits for the others before it ends the run.
        log_every: steps between rows of `steps.csv`.
        rows_late: steps after which ranks look at a row, write it, and act on what it tells (NaN, a signal, the time limit):
            a killed run lacks the rows of so many steps. By then a GPU has ended the row's step, and the host need not wait for
            it. None: 8 on GPUs, 1 on CPUs.
        checkpoint_every: steps between checkpoints; None: once an epoch, or once in `validate_every` of them; a run that ends
            leaves one too. "never" (or 0): none.
        clip_norm: upper bound of the norm of the global gradient; None: no clipping.
        ema_decay: share of the moving average of the weights that a step keeps; validation uses the average. 0 turns it off.
        validate: validate after each epoch.
        validate_every: validate after each so many epochs, and after the last.
        warmup_steps: over so many steps the learning rate rises from 0; what moves it after them begins then.
        plateau: when the learning rate falls, where the run has no `scheduler`.
        early_stop: when training stops by itself.
        tensorboard: log to `tensorboard/` in the run folder too.
        projection: record a projection of the parameters and the loss on a fixed batch in `projection.csv`.
        workers: processes of each rank that make its batches; 0: a thread of the rank does. None: 2 on GPUs where the rank has at
            least 3 cores, 1 where it has 2, and 0 on CPUs. The batches are the same.
        turns: folder in which the runs of a study take turns, an epoch at a time.
    """

    max_epochs: int = 10
    max_steps: int | None = None
    max_seconds: float | None = None
    batch_size: int = 16
    accumulate: int = 1
    timeout: float = 600.0
    log_every: int = 1
    rows_late: int | None = None
    checkpoint_every: int | str | None = None
    clip_norm: float | None = None
    ema_decay: float = 0.999
    validate: bool = True
    validate_every: int = 1
    warmup_steps: int = 0
    plateau: PlateauConfig = field(default_factory=PlateauConfig)
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)
    tensorboard: bool = False
    projection: bool = False
    workers: int | None = None
    turns: str | None = None

    @property
    def leaves_checkpoints(self) -> bool:
        """Whether a run writes checkpoints."""
        return self.checkpoint_every not in (0, "never")

    def is_checkpoint_due(self, step: int) -> bool:
        """Whether one is written after this step, within an epoch."""
        return self.leaves_checkpoints and self.checkpoint_every is not None and step % int(self.checkpoint_every) == 0
