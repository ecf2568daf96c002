"""A strategy of your own: a subclass with two methods, or four if it keeps something from step to step.

It is used by class or by import path:

    mpirun -n 2 python docs/examples/04_own_strategy.py
    PYTHONPATH=docs/examples python -m ddpkit.testing 04_own_strategy.TopK --world-size 2 --cases different_seeds stats

In a configuration it is `strategy._target_=mypackage.TopK`.
"""

import torch

import ddpkit


class TopK(ddpkit.GradientSync):
    """Sends the largest tenth of each rank's gradient and keeps the rest for later steps (error feedback)."""

    def attach(self):
        """Called once, when the module is in place on every rank."""
        self.rest = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    def reduce(self):
        """Called by `synchronize()`; on return the gradients must be equal on all ranks."""
        for name, parameter in self.parameters.items():
            whole = self.rest[name] + parameter.grad
            least = whole.abs().flatten().kthvalue(1 + int(0.9 * (whole.numel() - 1))).values
            sent = torch.where(whole.abs() >= least, whole, 0)
            self.rest[name].copy_(whole - sent)
            self.all_reduce(sent)  # the mean over ranks, in place, counted in `stats`
            parameter.grad = sent

    def state_dict(self):
        """What checkpoints hold of it, for each rank."""
        return {"rest": self.rest}

    def load_state_dict(self, state):
        """Goes on from that."""
        for name, rest in state["rest"].items():
            self.rest[name].copy_(rest)


if __name__ == "__main__":
    here = ddpkit.init_process_group()
    model = torch.nn.Linear(20, 1).to(here.device)
    sync = ddpkit.make_sync(TopK, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(300):
        x = torch.randn(64, 20, device=here.device)
        loss = ((sync.module(x) - x.mean(-1, keepdim=True)) ** 2).mean()
        loss.backward()
        sync.synchronize()
        optimizer.step()
        optimizer.zero_grad()
    print(f"rank {here.rank} of {here.world_size}: loss {float(loss.detach()):.2e}, {sync.stats}")
