"""Made-up frames."""

import numpy as np

from ddpkit.data import Frame


def molecule(rng: np.random.Generator, atoms: int = 6, **changes) -> Frame:
    facts = {
        "numbers": rng.choice([1, 6, 8], size=atoms),
        "positions": rng.uniform(0, 1.5 * atoms ** (1 / 3), size=(atoms, 3)),
        "energy": float(rng.normal()),
        "forces": rng.normal(size=(atoms, 3)),
    }
    return Frame(**(facts | changes))


def crystal(rng: np.random.Generator, atoms: int = 6, edge: float = 4.0, pbc=(True, True, True), **changes) -> Frame:
    facts = {
        "positions": rng.uniform(-edge, 2 * edge, size=(atoms, 3)),
        "cell": edge * (np.eye(3) + 0.15 * rng.normal(size=(3, 3))),
        "pbc": np.array(pbc),
        "stress": rng.normal(size=(3, 3)),
    }
    return molecule(rng, atoms, **(facts | changes))
