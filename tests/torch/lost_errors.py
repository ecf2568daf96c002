"""What an operator raises in code that was compiled ahead comes out as a RuntimeError: see `ddpkit.inference.exchange`."""

import tempfile

import torch
from torch import nn


@torch.library.custom_op("ddpkit_tests::refuses", mutates_args=())
def refuses(x: torch.Tensor) -> torch.Tensor:
    raise LookupError(f"why: {len(x)} rows")


refuses.register_fake(torch.empty_like)


class Refusing(nn.Module):
    def forward(self, x):
        return refuses(x)


def outcome() -> str:
    """The name of what is raised, and whether it says why."""
    exported = torch.export.export(Refusing(), (torch.ones(3),))
    with tempfile.TemporaryDirectory() as folder:
        settings = {"aot_inductor.precompile_headers": False}
        path = torch._inductor.aoti_compile_and_package(
            exported, package_path=f"{folder}/refusing.pt2", inductor_configs=settings
        )
        code = torch._inductor.aoti_load_package(path)
        try:
            code(torch.ones(3))
        except (RuntimeError, LookupError) as error:
            return f"{type(error).__name__}, {'' if 'why' in str(error) else 'not '}saying why"
    return "nothing"


def shown() -> bool:
    """Whether it is anything but the operator's own error."""
    return not outcome().startswith("LookupError")


if __name__ == "__main__":
    print(torch.__version__, outcome())
