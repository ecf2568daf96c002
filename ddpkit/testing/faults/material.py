"""The data of the campaign's runs."""

from pathlib import Path

import numpy as np


def write_clusters(path: Path, frames: int = 60) -> None:
    """Writes metal clusters of very unequal sizes with effective-medium energies and forces."""
    from ase import Atoms
    from ase.build import bulk
    from ase.calculators.emt import EMT
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.io import write

    random = np.random.default_rng(0)
    block = bulk("Cu", cubic=True, a=3.7) * (2, 2, 2)
    images = []
    for _ in range(frames):
        size = int(random.integers(2, 14))
        chosen = random.permutation(len(block))[:size]
        symbols = ["Cu" if flip else "Al" for flip in random.random(size) < 0.5]
        cluster = Atoms(symbols, block.positions[chosen] + random.normal(0, 0.05, (size, 3)))
        cluster.calc = EMT()
        energy, forces = cluster.get_potential_energy(), cluster.get_forces()
        cluster.calc = SinglePointCalculator(cluster, energy=energy, forces=forces)
        images.append(cluster)
    part = path.with_suffix(".part.extxyz")
    write(part, images, parallel=False)
    part.replace(path)
