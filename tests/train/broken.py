"""A model that misbehaves where it is told to: `BROKEN` holds at which steps or phase, and on which ranks, as JSON."""

import json
import os

import torch

from ddpkit.models import Allegro
from ddpkit.ranks.launchers import place
from ddpkit.step import Step

steps = 0  # begun by this process, since the last model was built
_call = Step.__call__


def _counted(step, batch, **plan):
    global steps  # noqa: PLW0603
    steps += 1
    return _call(step, batch, **plan)


Step.__call__ = _counted


class Broken(Allegro):
    def __init__(self, **keywords):
        global steps  # noqa: PLW0603
        super().__init__(**keywords)
        steps = 0
        self.plan = json.loads(os.environ.get("BROKEN", "{}"))
        self.is_chosen = place().rank in self.plan.get("ranks", [0, 1])
        next(self.parameters()).register_hook(self.spoil)

    def spoil(self, gradient):
        return gradient * float("nan") if self.is_chosen and steps in self.plan.get("gradients", []) else gradient

    def forward(self, batch):
        output = super().forward(batch)
        if steps and not self.training and self.is_chosen and "validation" in self.plan:
            if self.plan["validation"] == "raises":
                raise MemoryError("no room")
            output["forces"] = output["forces"] + torch.tensor(float("nan"))
        return output
