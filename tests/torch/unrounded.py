"""Torch before 2.13 drops a conversion to a narrower dtype where another follows: `ddpkit.compile.inductor` rewrites without."""

import torch
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch.fx.experimental.proxy_tensor import make_fx


def rounded(x):
    return x.to(torch.bfloat16).to(torch.float64)


def shown() -> bool:
    """Whether a number comes out that bfloat16 does not know."""
    x = torch.tensor([1 / 3], dtype=torch.float64)
    graph = make_fx(rounded, decomposition_table=torch._inductor.decomposition.select_decomp_table())(x)
    joint_graph_passes(graph)
    return not torch.equal(graph(x), rounded(x))
