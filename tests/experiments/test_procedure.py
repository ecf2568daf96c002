"""The paper's procedure is what `experiment=...` configures."""

import pytest

from ddpkit.experiments.config import read

DATA = ("data=files", "data.path=prepared")


@pytest.mark.parametrize(("stage", "energy", "rate"), [("spice_stage1", 1.0, 0.002), ("spice_stage2", 25.0, 0.001)])
@pytest.mark.parametrize(("model", "patience"), [("allegro_medium", 200), ("allegro_large", 20)])
def test_stages_on_spice(stage, energy, rate, model, patience):
    config = read([f"experiment={stage}", f"model={model}", *DATA])
    assert (config.loss.energy, config.loss.forces, config.loss.stress) == (energy, 1.0, 0.0)
    assert (config.train.batch_size, config.train.max_epochs, config.train.ema_decay) == (256, 1000, 0.999)
    assert dict(config.train.plateau) == {"factor": 0.8, "patience": 10, "threshold": 1e-6, "min_lr": 1e-7}
    assert dict(config.train.early_stop) == {"patience": patience, "threshold": 1e-9}
    assert (config.optimizer._target_, config.optimizer.weight_decay, config.optimizer.lr) == (
        "torch.optim.AdamW",
        1e-6,
        rate,
    )


def test_mptrj():
    config = read(["experiment=mptrj", *DATA])
    assert config.model.num_features == read(["model=nequip_xl", *DATA]).model.num_features
    assert (config.train.batch_size, config.loss.stress, config.tf32) == (640, 1.0, True)
    assert config.data.split_by == "group"


@pytest.mark.parametrize(("model", "kind"), [("allegro_molecule", "Allegro"), ("nequip_molecule", "NequIP")])
def test_one_molecule(model, kind):
    config = read(["experiment=small_molecule", f"model={model}", "data.path=prepared"])
    assert not config.model.zbl
    assert config.model._target_ == f"ddpkit.models.{kind}"
    assert (config.data.source, list(config.data.split), config.data.shifts) == ("files", [0.8, 0.1, 0.1], "fitted")
    assert (config.compile, config.cuda_graphs, config.train.batch_size) == (True, "auto", 5)
    assert config.scheduler._target_ == "torch.optim.lr_scheduler.CosineAnnealingLR"
    # The run ends by its steps, at which the rate has fallen.
    assert config.train.max_epochs >= config.train.max_steps
    assert config.train.early_stop.patience >= config.train.max_epochs
    assert read(["experiment=small_molecule", "data.path=x"]).model == read(["model=allegro_molecule"]).model


def test_what_is_said_wins_over_an_experiment():
    config = read(["experiment=spice_stage2", "model=allegro_large", "train.batch_size=8", "loss.energy=3", *DATA])
    assert (config.train.batch_size, config.loss.energy, config.loss.forces) == (8, 3.0, 1.0)
