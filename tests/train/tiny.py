"""The overrides of a run that takes a second."""

TINY = (
    "model=allegro_tiny",
    "model.r_max=4.0",
    "data=files",
    "device=cpu",
    "train.batch_size=8",
    "train.max_epochs=2",
    "train.ema_decay=0.9",
    "data.split=[0.8,0.1,0.1]",
)
