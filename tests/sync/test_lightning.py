"""Lightning's trainer and nequip's own program, with ddpkit's strategies in place of theirs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ddpkit
from ddpkit.testing import run_ranks

LIGHTNING = ("lightning", "ddpkit.lightning")  # take seconds to import
CONFIGURATION = Path(__file__).parent / "nequip"


class LikeFlat(ddpkit.FlatSync):
    def __init__(self, module, *others, **options):
        super().__init__(module, *others, **options)


class Plain(ddpkit.GradientSync):
    def reduce(self):
        pass


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
    for accumulated in run_ranks(
        fit_both, 2, str(tmp_path), initialize=False, environment=environment, preload=LIGHTNING
    ):
        for steps, (own, *ours) in zip((8, 4), accumulated, strict=True):
            for weights, calls in ours:
                assert calls == steps
                for mine, theirs in zip(weights, own[0], strict=True):
                    assert (mine == theirs).all()


def trainer_of(strategy, **options):
    import logging
    import warnings

    import lightning
    from lightning.pytorch.utilities import disable_possible_user_warnings

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    disable_possible_user_warnings()
    warnings.simplefilter("ignore")
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return lightning.Trainer(
        accelerator="cpu", strategy=strategy, **{"max_epochs": 2} | dict.fromkeys(quiet, False) | options
    )


def module_of(net, *, factor=lambda _: 1.0, told=False):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, number):
            return self.net(batch).square().mean() * factor(number)

        def validation_step(self, batch):
            self.log("val", self.net(batch).mean(), sync_dist=told, on_step=told, on_epoch=True)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Module()


def fit_with_a_stop(folder):
    """Weights and residuals of this rank after two epochs, without a stop and with one after the first epoch."""
    from keeping import Sparse

    from ddpkit.lightning import SyncStrategy

    points = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
    ends = []
    for stops in ((2,), (1, 2)):
        kept = None
        for epochs in stops:
            torch.manual_seed(0)
            module = module_of(nn.Linear(3, 4))
            trainer = trainer_of(SyncStrategy(Sparse), devices=2, max_epochs=epochs)
            module.on_train_end = lambda t=trainer: ends.append(
                {f"residual of {name}": r.clone() for name, r in t.strategy.sync.residuals.items()}
            )
            trainer.fit(module, torch.utils.data.DataLoader(points, batch_size=3), ckpt_path=kept)
            kept = str(Path(folder) / f"{len(stops)}.ckpt")
            trainer.save_checkpoint(kept)
        ends[-1] |= {name: p.detach().clone() for name, p in module.named_parameters()}
    return ends[0], ends[-1]


def test_what_a_strategy_keeps_is_in_checkpoints_of_lightning(tmp_path):
    ranks = run_ranks(fit_with_a_stop, 2, str(tmp_path), initialize=False, environment=ELASTIC)
    for whole, parts in ranks:
        assert whole.keys() == parts.keys()
        assert len(whole) == 4
        assert all(torch.equal(parts[name], whole[name]) for name in whole)
    one, other = (rank[0]["residual of net.weight"] for rank in ranks)
    assert not torch.equal(one, other)


class Stream(torch.utils.data.IterableDataset):
    """So many batches, of unknown number beforehand."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        yield from torch.randn(self.count, 3)


def fit_unequal(strategy, training, validation, told):
    """What each rank is told when its loader is longer or shorter than that of the other; empty if it ends well."""
    from ddpkit.lightning import SyncStrategy

    rank = int(os.environ["RANK"])
    trainer = trainer_of(SyncStrategy(strategy, sync_timeout=15.0), devices=2, num_sanity_val_steps=0)
    loaders = [torch.utils.data.DataLoader(Stream(counts[rank])) for counts in (training, validation)]
    try:
        trainer.fit(module_of(nn.Linear(3, 1), told=told), *loaders)
    except RuntimeError as error:
        return str(error)
    return ""


ELASTIC = {"TORCHELASTIC_RUN_ID": "test"}


def fit_on_two(*arguments):
    return run_ranks(fit_unequal, 2, *arguments, initialize=False, environment=ELASTIC, timeout=300, preload=LIGHTNING)


@pytest.mark.parametrize("strategy", ["custom", pytest.param("standard", marks=pytest.mark.long)])
def test_ranks_with_unequal_numbers_of_batches_are_named(strategy):
    longer, shorter = fit_on_two(strategy, (5, 3), (2, 2), False)
    assert "Rank 0 goes on to batch number 4, but rank 1 has come to the start of validation in epoch 0" in shorter
    assert "give every rank equally many batches" in shorter
    assert "number 4 for rank 1" in longer


def test_validation_on_unequal_numbers_of_batches_does_not_hang():
    assert fit_on_two("custom", (3, 3), (2, 4), False) == ["", ""]


@pytest.mark.long
def test_validation_that_logs_unequally_often_is_named():
    shorter, longer = fit_on_two("custom", (3, 3), (2, 4), True)
    assert "Rank 1 waits in the reduction of what is logged, but rank 0 has come to the end of validation" in shorter
    assert "Rank 1 has lost the other ranks in the reduction of what is logged" in longer


def overflow(kinds):
    """The scale after four steps, the second of which overflows."""
    from functools import partial

    from lightning.pytorch.plugins.precision import MixedPrecision

    import ddpkit
    from ddpkit.lightning import SyncStrategy

    strategies = {
        "name": "custom",
        "class": ddpkit.FlatSync,
        "path": "ddpkit.FlatSync",
        "partial": partial(ddpkit.FlatSync, reduce_dtype="float32"),
        "overlap": "ddpkit.sync.overlap.OverlapSync",
        "subclass": LikeFlat,
        "standard": "standard",
        "plain": Plain,
    }
    scales = []
    for kind in kinds:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        plugin = MixedPrecision("16-mixed", "cuda", scaler=scaler)
        plugin.device = "cpu"
        strategy = SyncStrategy(strategies[kind], process_group_backend="gloo")
        trainer = trainer_of(strategy, devices=1, plugins=[plugin], max_steps=4)
        torch.manual_seed(0)
        module = module_of(nn.Linear(6, 1), factor=lambda number: 1e30 if number == 1 else 1)
        trainer.fit(module, torch.utils.data.DataLoader(torch.randn(4, 6)))
        scales.append(scaler.get_scale())
    return scales


KINDS = ("name", "class", "path", "partial", "overlap", "subclass", "standard", "plain")


def test_a_scaler_finds_every_kind_of_strategy_alike():
    ((first, *others),) = run_ranks(overflow, 1, KINDS, initialize=False, preload=LIGHTNING)
    assert first < 2.0**16
    assert others == [first] * (len(KINDS) - 1)


ALLOCATION = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "SLURM_NNODES": "1",
}  # fmt: skip


def fit_in_allocation(devices, *, alone=False):
    os.environ.update(ALLOCATION)
    if alone:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            del os.environ[name]
    from ddpkit.errors import InputError
    from ddpkit.lightning import SyncStrategy

    module = module_of(nn.Linear(3, 1))
    try:
        trainer = trainer_of(SyncStrategy(), devices=devices)
        trainer.fit(module, torch.utils.data.DataLoader(Stream(3)))
    except InputError as error:
        return str(error)
    return trainer.world_size, trainer.global_rank, module.net.weight.tolist()


def fit_with_too_few_devices_and_again():
    return fit_in_allocation(1), fit_in_allocation(2)


def test_the_variables_of_an_allocation_are_not_taken_for_those_of_a_step():
    (refused, first), (refused_too, second) = run_ranks(
        fit_with_too_few_devices_and_again, 2, launcher="mpirun", initialize=False
    )
    assert (first[:2], second[:2]) == ((2, 0), (2, 1))
    assert first[2] == second[2]
    for said in (refused, refused_too):
        assert "mpirun started 2 ranks, but the trainer was given 1 devices" in said


def test_a_batch_script_alone_is_one_rank():
    assert run_ranks(fit_in_allocation, 1, 1, alone=True, initialize=False, preload=LIGHTNING)[0][:2] == (1, 0)


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


def test_no_mpi_library_is_needed(monkeypatch):
    """Lightning asks mpi4py, which comes with ddpkit and raises where there is no library."""
    import lightning
    from lightning.fabric.plugins.environments import MPIEnvironment

    from ddpkit.lightning import SyncStrategy

    def without_library():
        raise RuntimeError("cannot load MPI library")

    monkeypatch.setattr(MPIEnvironment, "detect", staticmethod(without_library))
    lightning.Trainer(accelerator="cpu", devices=1, strategy=SyncStrategy(), logger=False, enable_checkpointing=False)
