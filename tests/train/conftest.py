import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from starts import run_ddpkit
from tiny import TINY

from ddpkit.experiments.cli import _dispatch


@pytest.fixture(scope="session")
def clusters(tmp_path_factory):
    """Metal clusters of very unequal sizes with effective-medium energies and forces: 60 frames."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(60):
        size = int(rng.integers(2, 14))
        block = bulk("Cu", cubic=True, a=3.7) * (2, 2, 2)
        chosen = rng.permutation(len(block))[:size]
        cluster = Atoms(
            ["Cu" if flip else "Al" for flip in rng.random(size) < 0.5],
            block.positions[chosen] + rng.normal(0, 0.05, (size, 3)),
        )
        cluster.calc = EMT()
        labels = {"energy": cluster.get_potential_energy(), "forces": cluster.get_forces()}
        cluster.calc = SinglePointCalculator(cluster, **labels)
        images.append(cluster)
    path = tmp_path_factory.mktemp("clusters") / "clusters.extxyz"
    write(path, images)
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def ddpkit_run(clusters, cache):
    """Runs `ddpkit run` on ranks of its own and returns the finished process."""

    def start(*overrides, check=True, **how):
        done = run_ddpkit("run", *TINY, f"data.path={clusters}", f"data.cache={cache}", *overrides, **how)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return start


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """Overrides of a run whose model misbehaves as planned."""

    def plan(**what):
        monkeypatch.setenv("BROKEN", json.dumps(what))
        return "model._target_=broken.Broken", f"run_dir={tmp_path / 'run'}"

    here = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(here)
    monkeypatch.setenv("PYTHONPATH", here)
    return plan


@pytest.fixture
def summary(tmp_path):
    return lambda: json.loads((tmp_path / "run" / "summary.json").read_text())


@pytest.fixture
def run_here(clusters, cache):
    """Runs in this process, on one rank; returns the sentence that ended it."""

    def start(*overrides):
        try:
            _dispatch(["run", *TINY, f"data.path={clusters}", f"data.cache={cache}", *overrides])
        except FloatingPointError as error:
            return str(error)
        return ""

    return start
