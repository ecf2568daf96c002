"""Functional forms in torch.optim branch in Python on weight decay and momentum: why `ddpkit.sync.graph_update` has its own."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd


def step_of_adamw(p: Tensor, g: Tensor, mean: Tensor, square: Tensor, count: Tensor, decay: Tensor) -> None:
    adamw(
        [p], [g], [mean], [square], [], [count], foreach=False, differentiable=True, amsgrad=False, maximize=False,
        lr=torch.tensor(0.1), beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=decay,
    )  # fmt: skip


def step_of_sgd(p: Tensor, g: Tensor, velocity: Tensor, momentum: Tensor) -> None:
    sgd(
        [p], [g], [velocity], foreach=False, weight_decay=0.0, momentum=momentum, lr=0.1, dampening=0.0, nesterov=False,
        maximize=False,
    )  # fmt: skip


def is_refused(step: Callable[..., None], *tensors: Tensor) -> bool:
    """Whether a step cannot be traced, because it asks for the value of a tensor."""
    try:
        with torch.no_grad():
            make_fx(step, tracing_mode="fake")(*tensors)
    except RuntimeError as error:
        return "data-dependent" in str(error)
    return False


def shown() -> bool:
    """Whether a step cannot be traced that reads weight decay or momentum whenever it is taken."""
    number, vectors = torch.tensor(0.5), torch.ones(4, 3)
    return is_refused(step_of_adamw, *vectors, torch.tensor(0.0), number) and is_refused(
        step_of_sgd, *vectors[:3], number
    )


if __name__ == "__main__":
    print(torch.__version__, shown())
