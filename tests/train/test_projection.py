import contextlib
import csv
import os

import numpy as np
import pytest
import torch
from torch import nn

from ddpkit.compile import backend
from ddpkit.errors import InputError
from ddpkit.experiments import run
from ddpkit.projection import COLUMNS, WIDTH, Projection, is_due


def rows(path):
    with path.open() as file:
        found = list(csv.reader(file))
    assert tuple(found[0]) == COLUMNS
    assert len({row[0] for row in found}) == len(found)  # each step once
    return {int(row[0]): np.array(row[1:], dtype=float) for row in found[1:]}


def test_steps_are_evenly_spaced_in_the_logarithm():
    due = [step for step in range(1001) if is_due(step)]
    assert due[:14] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 16, 20, 25]
    assert due[-4:] == [501, 631, 794, 1000]
    assert len([s for s in range(101, 1001) if is_due(s)]) == 10


def test_a_last_step_that_is_due_is_written_once(tmp_path):
    log = Projection(nn.Linear(3, 2), lambda: 0.5, tmp_path / "projection.csv")
    log.begin()
    for step in (1, 2, 3):
        log.after(step)
    log.after(3, ends=True)
    assert list(rows(tmp_path / "projection.csv")) == [0, 1, 2, 3]


def test_distances_of_projections_are_distances_of_parameters(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 20), nn.Linear(20, 3)).requires_grad_(True)
    before = [p.detach().clone() for p in model.parameters()]
    log = Projection(model, lambda: 0.5, tmp_path / "projection.csv")
    log.begin()
    ratios = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        moved = [1e-6 * torch.randn(p.shape, generator=generator) for p in before]
        with torch.no_grad():
            for p, start, more in zip(model.parameters(), before, moved, strict=True):
                p.copy_(start + more)
        log.after(seed + 1, ends=True)
        true = float(
            torch.cat(
                [(p.detach().double() - b.double()).flatten() for p, b in zip(model.parameters(), before, strict=True)]
            ).norm()
        )
        found = rows(tmp_path / "projection.csv")
        ratios.append(np.linalg.norm(found[seed + 1][:WIDTH] - found[0][:WIDTH]) / true)
    assert np.mean(ratios) == pytest.approx(1, abs=0.05)
    assert np.std(ratios) == pytest.approx(1 / np.sqrt(2 * WIDTH), rel=0.4)


def test_a_resumed_run_has_the_rows_of_an_uninterrupted_one(ddpkit_run, tmp_path):
    more = ("train.projection=true", "train.max_epochs=3", "train.checkpoint_every=4")
    ddpkit_run(*more, f"run_dir={tmp_path / 'whole'}")
    ddpkit_run(*more, "train.max_steps=10", f"run_dir={tmp_path / 'parts'}")
    ddpkit_run(*more, "train.max_steps=null", f"resume={tmp_path / 'parts'}")
    whole, parts = (rows(tmp_path / name / "projection.csv") for name in ("whole", "parts"))
    assert set(whole) == {0, *range(1, 11), 13, 16, 18}
    assert set(whole) == set(parts)
    for step, row in whole.items():
        assert np.array_equal(row, parts[step]), step


@pytest.mark.long
def test_the_trajectory_of_four_ranks_is_emulated_to_the_last_bit(ddpkit_run, tmp_path):
    more = ("train.projection=true", "train.max_steps=6")
    ddpkit_run(*more, f"run_dir={tmp_path / 'real'}", ranks=4)
    ddpkit_run(*more, "strategy=emulated", "strategy.ranks=4", f"run_dir={tmp_path / 'ring'}")
    real, ring = (rows(tmp_path / name / "projection.csv")[6] for name in ("real", "ring"))
    assert np.array_equal(real[:WIDTH], ring[:WIDTH])


class Reached(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("resumes", [False, True])
def test_switches_are_set_before_a_communicator_is_made(monkeypatch, tmp_path, resumes):
    """NCCL reads its environment when the first communicator is made; a resumed run is where and what it was started as."""
    seen = {}

    def init(device, *, timeout):
        seen.update(algo=os.environ.get("NCCL_ALGO"), deterministic=torch.are_deterministic_algorithms_enabled())
        seen.update(device=device, timeout=timeout.total_seconds())
        raise Reached

    monkeypatch.delenv("NCCL_ALGO", raising=False)
    monkeypatch.setattr(run.group, "init_process_group", init)
    words = ["deterministic=true", "device=cpu", "train.timeout=7"]
    if resumes:
        config = run.read([*words, f"run_dir={tmp_path}"])
        (tmp_path / "config.yaml").write_text(run.OmegaConf.to_yaml(config))
        words = [f"resume={tmp_path}"]
    with pytest.raises(Reached):
        run.main(words)
    assert seen == {"algo": "Ring", "deterministic": True, "device": "cpu", "timeout": 7}


def switches():
    """What a run sets for its whole process."""
    return (
        os.environ.get("NCCL_ALGO"),
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        backend.interprets(),
    )


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_set_for_a_run_is_undone_after_it(monkeypatch, fails):
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    words = ["deterministic=true", "tf32=true", "compile=true", "compiler=interpreted"]
    try:
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
        before = switches()
        with contextlib.suppress(Reached), run.setup.numerics(run.read(words)):
            assert switches() == ("Ring", ":16:8", True, False, True, True, True)
            if fails:
                raise Reached
        assert switches() == before
    finally:
        torch.use_deterministic_algorithms(mode=False)


def test_an_algorithm_of_nccl_can_be_forced(monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", "NVLS")
    for words in (["nccl_algo=Tree"], ["nccl_algo=Tree", "deterministic=true"]):
        with run.setup.numerics(run.read(words)):
            assert os.environ["NCCL_ALGO"] == "Tree"
        assert os.environ["NCCL_ALGO"] == "NVLS"
    with pytest.raises(InputError, match="compiler=gcc is unknown: use one of inductor, public, interpreted"):
        run.read(["compiler=gcc"])
