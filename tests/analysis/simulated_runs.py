"""Run folders with known content."""

import copy
import json

import numpy as np
import pandas as pd
import yaml

from ddpkit.analysis.runs import Run

CONFIG = {
    "strategy": {"name": "custom"},
    "compile": False,
    "seed": 1,
    "deterministic": False,
    "comm": "torch",
    "precision": "mixed",
    "device": "cpu",
    "data": {"name": "generated", "seed": 7, "path": None},
    "model": {"_target_": "ddpkit.models.Allegro", "r_max": 5.0, "type_embedding_dim": 32},
    "optimizer": {"name": "adamw", "lr": 0.002},
    "train": {"batch_size": 8, "max_epochs": 2, "max_steps": None, "log_every": 1, "checkpoint_every": 1},
}
STEP_COLUMNS = (
    "step,epoch,loss,loss_energy,loss_forces,loss_stress,lr,grad_norm,atoms,edges,"
    "seconds,seconds_data,seconds_compute,seconds_sync,seconds_optimizer"
)
EPOCH_COLUMNS = (
    "epoch,seconds,steps,train_loss,val_loss,val_energy_rmse,val_energy_mae,val_forces_rmse,val_forces_mae,lr"
)


def merged(base, changes):
    """A nested mapping with some values replaced; dotted keys reach inside."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        *path, last = key.split(".")
        place = result
        for part in path:
            place = place[part]
        place[last] = value
    return result


def write_run(
    folder,
    label,
    losses,
    *,
    epochs=(),
    epoch_steps=10,
    parameters=1000,
    status="finished",
    world_size=2,
    first_step=1,
    log_every=1,
    splits=(0.001, 0.08, None, 0.002),
    atoms=None,
    summary=None,
    val_forces=None,
    projection=None,
    starts=None,
    **config,
):
    """Writes one run folder; `losses` are logged every `log_every` steps, `epochs` are seconds.

    `val_forces` is the final validation force error, `projection` maps steps to 64 numbers.
    """
    run = folder / label
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(merged(CONFIG, config)))
    shown = ["" if value is None else repr(value) for value in splits]
    lines = [STEP_COLUMNS]
    for i, loss in enumerate(losses):
        step = first_step + i * log_every
        count = 100 + step if atoms is None else atoms[i]
        lines.append(f"{step},1,{float(loss)!r},,,,0.002,1.0,{count},{20 * count},0.1,{','.join(shown)}")
    (run / "steps.csv").write_text("\n".join(lines) + "\n")
    error = "" if val_forces is None else repr(float(val_forces))
    seconds = [1.0] if val_forces is not None and not len(epochs) else epochs
    rows = [
        EPOCH_COLUMNS,
        *(f"{i},{float(s)!r},{epoch_steps},0.1,0.1,,,{error},,0.002" for i, s in enumerate(seconds, start=1)),
    ]
    if projection is not None:
        lines = [",".join(["step", *(f"p{n}" for n in range(64)), "probe_loss"])]
        lines += [",".join([str(step), *(repr(float(x)) for x in row), "0.5"]) for step, row in projection.items()]
        (run / "projection.csv").write_text("\n".join(lines) + "\n")
    if starts is not None:
        (run / "study.json").write_text(json.dumps({"starts": starts}))
    (run / "epochs.csv").write_text("\n".join(rows) + "\n")
    facts = {
        "status": status,
        "parameters": parameters,
        "seconds_compile": 0.0,
        "steps": len(losses),
        **(summary or {}),
    }
    (run / "summary.json").write_text(json.dumps(facts))
    environment = {
        "versions": {"python": "3.11", "torch": "2.13.0"}, "host": "node1", "device": "cpu", "world_size": world_size,
        "backend": "gloo", "comm": "torch", "command": ["ddpkit-run"],
    }  # fmt: skip
    (run / "environment.json").write_text(json.dumps(environment))
    return run


def falling(steps, scale=0.4):
    """A loss that falls as trainings do."""
    t = np.arange(1, steps + 1)
    rng = np.random.default_rng(11)
    return 0.02 + scale / np.sqrt(t) * np.exp(0.25 * rng.normal(size=steps))


def wander(rng, steps, size):
    """A diverging trajectory: relative noise that grows like a random walk."""
    return size * np.cumsum(rng.normal(size=steps)) / np.sqrt(steps) + size * rng.normal(size=steps)


def run_of(
    label, losses, *, val_forces=None, seed=1, status="finished", ranks=8, summary=None, epochs=(), turns=None, **config
):
    """A run as it would be read from a folder, for studies that are simulated by the hundred."""
    steps = np.arange(1, len(losses) + 1)
    seconds = list(epochs) if len(epochs) else [1.0]
    error = np.nan if val_forces is None else val_forces
    changes = {"seed": seed, "data.seed": seed, "train.turns": turns, **config}
    return Run(
        label=label,
        config=merged(CONFIG, changes),
        steps=pd.DataFrame({"step": steps, "epoch": 1, "loss": losses, "atoms": 100.0 + steps}),
        epochs=pd.DataFrame(
            {"epoch": np.arange(1, len(seconds) + 1), "seconds": seconds, "steps": 10, "val_forces_rmse": error}
        ),
        summary={"status": status, "parameters": 1000, "steps": len(losses), **(summary or {})},
        environment={"world_size": ranks, "device": "cpu"},
    )
