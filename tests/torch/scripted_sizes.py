"""TorchScript takes sizes for numbers while it is traced: why `ddpkit.compile.script` calls the Python it was made of."""

import torch
from torch.fx.experimental.proxy_tensor import make_fx


@torch.jit.script
def scripted(x):
    return torch.zeros(x.size(0)) + x


def shown() -> bool:
    """Whether a graph of a scripted function holds for one size only."""
    graph = make_fx(scripted, tracing_mode="symbolic")(torch.ones(7))
    return any(7 in node.args[0] for node in graph.graph.nodes if "zeros" in str(node.target))
