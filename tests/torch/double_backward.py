"""`torch.compile` cannot differentiate twice: why ddpkit traces below autograd, and compiles graphs with nothing to derive."""

import torch


def shown() -> bool:
    """Whether a loss on forces cannot be derived through a compiled model."""
    weight = torch.ones(3, requires_grad=True)
    positions = torch.linspace(0, 1, 12).reshape(4, 3).requires_grad_()
    energy = torch.compile(lambda x: torch.sin(x @ weight).sum(), backend="aot_eager")
    try:
        (slope,) = torch.autograd.grad(energy(positions), positions, create_graph=True)
        slope.square().sum().backward()
    except RuntimeError as error:
        return "double backward" in str(error)
    return False
