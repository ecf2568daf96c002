"""Strategies that keep something: the largest entries of a gradient travel, and the rest is added to the next one."""

import torch

import ddpkit


class Sparse(ddpkit.GradientSync):
    """After the backward pass."""

    def __init__(self, module, *others, fraction=0.2, **options):
        self.fraction = fraction
        super().__init__(module, *others, **options)

    @property
    def agreed_options(self):
        return super().agreed_options | {"fraction": self.fraction}

    def attach(self):
        self.residuals = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    def sent(self, residual, gradient):
        """What there is to send, and what is sent of it."""
        whole = residual if gradient is None else residual + gradient
        flat = whole.flatten()
        largest = flat.abs().topk(max(1, int(self.fraction * flat.numel()))).indices
        return whole, torch.zeros_like(flat).scatter(0, largest, flat[largest]).view(whole.shape)

    def reduce(self):
        for name, parameter in self.parameters.items():
            whole, sent = self.sent(self.residuals[name], parameter.grad)
            self.residuals[name].copy_(whole - sent)
            self.all_reduce(sent)
            parameter.grad = sent

    def state_dict(self):
        return {"residuals": self.residuals}

    def load_state_dict(self, state):
        for name, residual in state["residuals"].items():
            self.residuals[name].copy_(residual)


class Resharded(Sparse):
    """Goes on on any number of ranks: the mean of the residuals stays."""

    def reshard_state(self, states):
        first, *others = (state["residuals"] for state in states)
        return {"residuals": {name: sum((s[name] for s in others), r) / len(states) for name, r in first.items()}}


class SparseInGraph(Sparse):
    """In the compiled step."""

    acts = "in graph"

    def after_gradients(self, trained, **_):
        return SparseAverage(self, trained)


class SparseAverage(ddpkit.AverageInGraph):
    def tensors(self):
        return [*self.places, *(self.sync.residuals[name] for name in self.trained)]

    def trace(self, parameters, gradients, tensors):
        places, residuals = tensors[: len(parameters)], tensors[len(parameters) :]
        started = []
        for residual, gradient in zip(residuals, gradients, strict=True):
            whole, sent = self.sync.sent(residual, gradient)
            started.append(self.start_average(sent))
            residual.copy_(torch.where(torch.isfinite(whole), whole - sent, residual))
        for place, average in zip(places, started, strict=True):
            place.copy_(self.wait(average))

    def expected(self, gradients):
        sent = [self.sync.sent(self.sync.residuals[n], g)[1] for n, g in zip(self.trained, gradients, strict=True)]
        for one in sent:
            self.sync.all_reduce(one)
        return sent


class KeepsASet(Sparse):
    """What checkpoints cannot hold."""

    def state_dict(self):
        return {"seen": {1, 2}}
