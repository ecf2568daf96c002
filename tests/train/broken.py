"""A model that misbehaves where it is told to: `BROKEN` holds what, on which ranks, and at which calls, as JSON."""

import json
import os

import torch

from ddpkit.models import Allegro


class Broken(Allegro):
    def __init__(self, **keywords):
        super().__init__(**keywords)
        self.plan = json.loads(os.environ.get("BROKEN", "{}"))
        rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
        self.is_chosen = rank in self.plan.get("ranks", [0, 1])
        self.calls = {True: 0, False: 0}
        next(self.parameters()).register_hook(self.spoil)

    def spoil(self, gradient):
        is_due = self.is_chosen and self.calls[True] in self.plan.get("gradients", [])
        return gradient * float("nan") if is_due else gradient

    def forward(self, batch):
        self.calls[self.training] += 1
        output = super().forward(batch)
        if not self.training and self.is_chosen and "validation" in self.plan:
            if self.plan["validation"] == "raises":
                raise MemoryError("no room")
            output["forces"] = output["forces"] + torch.tensor(float("nan"))
        return output
