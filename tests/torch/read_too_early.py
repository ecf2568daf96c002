"""A sum of scattered values is read before anything has been added to it (pytorch issues 185509, 177631): see `_order_kept`."""

import contextlib
from unittest import mock

import torch
from torch import nn

import ddpkit
from ddpkit.compile import inductor
from ddpkit.errors import ParityError


class Messages(nn.Module):
    """Between embedded species: the embedding's gradient sums what the messages' sums have put together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.update = nn.Embedding(3, 4), nn.Linear(4, 4)

    def forward(self, batch):
        """One sum of messages."""
        (i, j), species, filters = batch
        x = self.embedding(species)
        return torch.tanh(self.update(x + torch.zeros_like(x).index_add(0, i, x[j] * filters)))


def shown() -> bool:
    """Whether compiled code that was made without the mend fails, or the parity check refuses it."""
    i = torch.arange(12).repeat_interleave(3)
    batch = ((i, torch.randint(0, 12, (36,))), torch.randint(0, 3, (12,)), torch.rand(36, 4))
    model = Messages()
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    with mock.patch.object(inductor, "_order_kept", contextlib.nullcontext):
        step = ddpkit.make_step(model, lambda out, _: out.square().mean(), still, strategy="none", compile=True)
        try:
            step(batch)
        except (ParityError, UnboundLocalError):  # wrong values, or a buffer that is read before it is made
            return True
    return False


if __name__ == "__main__":
    print(torch.__version__, shown())
