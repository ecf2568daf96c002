"""Strategies of a user's own that live inside the compiled step."""

import torch
import torch.distributed as dist

import ddpkit


class SumAndScale(ddpkit.GradientSync):
    """One sum over all gradients, scaled afterwards."""

    acts = "in graph"

    def after_gradients(self, trained, **_):
        return Summed(self, trained)

    def traffic(self):
        return sum(p.nbytes for p in self.parameters.values()), 1


class Summed(ddpkit.AverageInGraph):
    def trace(self, parameters, gradients, tensors):
        pairs = zip(parameters, gradients, strict=True)
        flat = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])
        if dist.is_initialized():
            started = torch.ops._c10d_functional.all_reduce(flat, "sum", dist.group.WORLD.group_name)
            flat = torch.ops._c10d_functional.wait_tensor(started) / dist.get_world_size()
        for place, part in zip(tensors, flat.split([p.numel() for p in parameters]), strict=True):
            place.copy_(part.view(place.shape))


class OneByOne(ddpkit.GradientSync):
    """The default of `AverageInGraph`."""

    acts = "in graph"

    def after_gradients(self, trained, **_):
        return ddpkit.AverageInGraph(self, trained)


class Compressing(ddpkit.GradientSync):
    """Sends bfloat16 and adds what rounding has left over to the next gradient."""

    acts = "in graph"

    def after_gradients(self, trained, **_):
        return Rounded(self, trained)


class Rounded(ddpkit.AverageInGraph):
    def __init__(self, sync, trained):
        super().__init__(sync, trained)
        self.left = [torch.zeros_like(p) for p in trained.values()]

    def tensors(self):
        return [*self.places, *self.left]

    def trace(self, parameters, gradients, tensors):
        count = len(parameters)
        for p, g, place, left in zip(parameters, gradients, tensors[:count], tensors[count:], strict=True):
            whole = left + (torch.zeros_like(p) if g is None else g)
            sent = whole.to(torch.bfloat16)
            left.copy_(whole - sent.to(p.dtype))
            place.copy_(self.wait(self.start_average(sent)).to(p.dtype))

    def expected(self, gradients):
        self.run(gradients)
        return [place.clone() for place in self.places]


class Asking(ddpkit.GradientSync):
    """Its graph asks for a value, or fails."""

    acts = "in graph"

    def __init__(self, module, *others, asks, **options):
        self.asks = asks
        super().__init__(module, *others, **options)

    def after_gradients(self, trained, **_):
        return AskingForNorms(self, trained)


class AskingForNorms(ddpkit.AverageInGraph):
    def trace(self, parameters, gradients, tensors):
        factor = 0.5 if self.sync.asks and gradients[0].norm() > 1 else "one"
        for place, gradient, _ in zip(tensors, gradients, parameters, strict=True):
            place.copy_(self.wait(self.start_average(gradient * factor)))


class Wrong(ddpkit.GradientSync):
    """Forgets to average."""

    acts = "in graph"

    def after_gradients(self, trained, **_):
        return Forgetting(self, trained)


class Forgetting(ddpkit.AverageInGraph):
    def trace(self, parameters, gradients, tensors):
        for p, gradient, place in zip(parameters, gradients, tensors, strict=True):
            place.copy_(torch.zeros_like(p) if gradient is None else gradient)
