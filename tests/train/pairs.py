"""A potential of pairs, which is traced in a fraction of the time that Allegro takes: for runs whose model is not the subject."""

from dataclasses import fields

import torch

from ddpkit.models.config import PotentialConfig
from ddpkit.models.graph import sum_to_centre
from ddpkit.models.potential import Potential

SHARED = {field.name for field in fields(PotentialConfig)}


class Pairs(Potential):
    """Each edge has an energy that depends on its length. Of Allegro's settings it takes what all potentials have."""

    def __init__(self, **settings):
        super().__init__(PotentialConfig(**{name: value for name, value in settings.items() if name in SHARED}))
        self.first = torch.nn.Parameter(torch.randn(settings["num_bessels"], 8, dtype=self.dtype))
        self.second = torch.nn.Parameter(torch.randn(8, 1, dtype=self.dtype))

    def atomic_energies(self, edges):
        return sum_to_centre(torch.tanh(edges.radial @ self.first) @ self.second, edges.graph).squeeze(1)
