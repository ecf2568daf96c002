import numpy as np
import torch

from ddpkit.batch import Batch
from ddpkit.data import Frame, collate
from ddpkit.data.frame import NUMBERS
from ddpkit.models import Allegro, NequIP

SPECIES = ("H", "C", "O")
R_MAX = 4.0
PRECISIONS = ("float64", "mixed", "float32")


def make_frame(atoms=10, *, periodic=False, seed=0, box=6.0, symbols=SPECIES):
    random = np.random.default_rng(seed)
    positions = np.zeros((0, 3))
    while len(positions) < atoms:
        candidate = random.random(3) * box
        if all(np.linalg.norm(positions - candidate, axis=1) > 1.0):
            positions = np.vstack((positions, candidate))
    numbers = np.array([NUMBERS[random.choice(symbols)] for _ in range(atoms)])
    cell = np.eye(3) * box + random.normal(size=(3, 3)) * 0.3 if periodic else None
    return Frame(numbers, positions, 0.0, np.zeros((atoms, 3)), cell=cell, pbc=np.array([periodic] * 3), stress=None)


def make_batch(frames, r_max=R_MAX, species=SPECIES) -> Batch:
    return collate(frames, species, r_max, labels=False)


def make_model(name, precision="float64", **settings):
    torch.manual_seed(1)
    settings = {
        "r_max": R_MAX,
        "avg_num_neighbors": 12.0,
        "shifts": [-1.0, 2.0, 3.0],
        "precision": precision,
        **settings,
    }
    if name == "allegro":
        small = {"num_scalar_features": 8, "num_tensor_features": 4, "embed_dim": 8, "scalar_embed_width": 16}
        return Allegro(SPECIES, **{**small, "scalar_embed_dim": 12, "mlp_width": 16, "readout_width": 8, **settings})
    return NequIP(SPECIES, **{"num_features": 6, "l_max": 2, "num_layers": 3, "radial_width": 16, **settings})


def relative(a, b):
    return float(((a - b).abs().max() / b.abs().max().clamp(min=1e-300)).detach())
