"""Lightning's trainer and nequip's own program, with ddpkit's strategies in place of theirs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ddpkit.testing import run_ranks

CONFIGURATION = Path(__file__).parent / "nequip"


def fit(folder, accumulate):
    """The weights after training, with Lightning's own strategy first."""
    import logging
    import warnings

    import lightning
    from lightning.pytorch.strategies import DDPStrategy
    from lightning.pytorch.utilities import disable_possible_user_warnings

    from ddpkit.lightning import SyncStrategy

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(3, 8, dtype=torch.float64), nn.Tanh(), nn.Linear(8, 1, dtype=torch.float64)
            )

        def training_step(self, batch):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.1)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    disable_possible_user_warnings()
    warnings.simplefilter("ignore")
    points = torch.randn(24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for strategy in (DDPStrategy(), SyncStrategy(), SyncStrategy("overlap", check_every=2), SyncStrategy("standard")):
        module = Module()
        trainer = lightning.Trainer(
            accelerator="cpu", devices=2, strategy=strategy, max_epochs=2, accumulate_grad_batches=accumulate,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder, gradient_clip_val=0.5,
        )  # fmt: skip
        calls = []
        if isinstance(strategy, SyncStrategy):
            module.on_train_end = lambda s=strategy, c=calls: c.append(s.sync.stats.calls)
        trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(points), batch_size=3))
        found.append(([p.detach().numpy() for p in module.parameters()], *calls))
    return found


def fit_both(folder):
    return [fit(folder, accumulate) for accumulate in (1, 2)]


def test_the_trainer_ends_where_its_own_strategy_does(tmp_path):
    environment = {"TORCHELASTIC_RUN_ID": "test"}
    for accumulated in run_ranks(fit_both, 2, str(tmp_path), initialize=False, environment=environment):
        for steps, (own, *ours) in zip((8, 4), accumulated, strict=True):
            for weights, calls in ours:
                assert calls == steps
                for mine, theirs in zip(weights, own[0], strict=True):
                    assert (mine == theirs).all()


def train_nequip(folder, *overrides):
    program = Path(sys.executable).parent / "nequip-train"
    command = [program, "-cp", CONFIGURATION, "-cn", "tiny", f"hydra.run.dir={folder}", *overrides]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    state = torch.load(folder / "last.ckpt", weights_only=False)["state_dict"]
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_nequip_train_ends_where_its_own_strategy_does(tmp_path, compiled):
    extra = ["+training_module.model.compile_mode=compile"] if compiled else []
    theirs = train_nequip(tmp_path / "theirs", "trainer.strategy._target_=nequip.train.SimpleDDPStrategy", *extra)
    ours = train_nequip(tmp_path / "ours", *extra)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-10, atol=1e-12)
