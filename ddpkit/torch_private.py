"""What ddpkit uses of torch's private names, but for its compiler (`ddpkit.compile.inductor`). No other module names any.

Each has a reason and a public way that serves where a release of torch lacks it. A name that is missing is told once, when
this is loaded.
"""

import contextlib
import getpass
import importlib
import itertools
import operator
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

# The same since 2.0. The library for trees that torch's public functions take (torch.export, torch.func) has no public name.
from torch.utils import _pytree as pytree

from ddpkit.errors import InputError

__all__ = ["DispatchMode", "pytree"]

TESTED = (2, 11), (2, 14)
"""The first and the last release whose private names have been tried: see docs/explanation/torch.md."""

T = TypeVar("T")


def release(version: str = torch.__version__) -> tuple[int, int]:
    """The first two numbers of a version."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    assert numbers is not None, version
    return int(numbers[1]), int(numbers[2])


def is_tested(version: str = torch.__version__) -> bool:
    """Whether a release of torch lies in the tested range."""
    return TESTED[0] <= release(version) <= TESTED[1]


def _private(home: Any, path: str, public: T, loses: str) -> Any:
    """What a path of names leads to; `public` and a warning of what that loses where there is no such thing."""
    try:
        for name in path.split("."):
            home = getattr(home, name)
    except AttributeError:
        warnings.warn(
            f"torch {torch.__version__} has no {path} ({loses}): see docs/explanation/torch.md.", stacklevel=3
        )
        return public
    return home


# --- operations on lists of tensors: torch's own optimizers and clipping use them; a loop takes one kernel a tensor ------------


def _copy_one_by_one(to: Sequence[Tensor], what: Sequence[Tensor]) -> None:
    for x, y in zip(to, what, strict=True):
        x.copy_(y)


def _add_one_by_one(to: Sequence[Tensor], what: Sequence[Tensor]) -> None:
    for x, y in zip(to, what, strict=True):
        x.add_(y)


def _lerp_one_by_one(to: Sequence[Tensor], what: Sequence[Tensor], weight: float) -> None:
    for x, y in zip(to, what, strict=True):
        x.lerp_(y, weight)


def _norm_one_by_one(tensors: Sequence[Tensor], order: float) -> list[Tensor]:
    return [torch.linalg.vector_norm(x, order) for x in tensors]


copy_all: Callable[[Sequence[Tensor], Sequence[Tensor]], Any] = _private(
    torch, "_foreach_copy_", _copy_one_by_one, "slower copies of gradients"
)
add_all: Callable[[Sequence[Tensor], Sequence[Tensor]], Any] = _private(
    torch, "_foreach_add_", _add_one_by_one, "slower sums of gradients"
)
lerp_all: Callable[[Sequence[Tensor], Sequence[Tensor], float], Any] = _private(
    torch, "_foreach_lerp_", _lerp_one_by_one, "slower moving averages of weights"
)
norms_of: Callable[[Sequence[Tensor], float], Sequence[Tensor]] = _private(
    torch, "_foreach_norm", _norm_one_by_one, "slower norms of gradients"
)

# --- tensors, modules, optimizers ---------------------------------------------------------------------------------------------

# How often a tensor has been changed in place: autograd's own count, which it shows nowhere else.
_COUNTS = _private(torch.zeros(0), "_version", None, "changes of tensors in place are not noticed") is not None
version_of: Callable[[Tensor], int] = operator.attrgetter("_version") if _COUNTS else lambda _: 0


def members(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """A module's parameters and modules, without those of its modules: public ways take 50 times as long, at every step."""
    return module._parameters, module._modules


def homes_of_buffers(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where a module and its modules keep their buffers, each once, in the order of `module.buffers()`: a dict and a name.

    To look there takes a tenth of the time of `getattr`, at every step.
    """
    homes: dict[int, tuple[dict[str, Any], str]] = {}
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                homes.setdefault(id(buffer), (part._buffers, name))
    return list(homes.values())


def note_step(optimizer: Optimizer) -> None:
    """Marks a step as taken that was not made by `step()`: torch's schedulers look for this and warn where it is missing."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def skips_by_flag(optimizer: Optimizer) -> bool:
    """Whether an optimizer leaves out a step where its `found_inf` on the device says so: the contract of `torch.amp.GradScaler`,
    kept by those made with `fused=True`, unless a state that they have loaded took that from them.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and all(
        group.get("fused", True) for group in optimizer.param_groups
    )


_OPTIMIZERS = importlib.import_module("torch.optim.optimizer")


def hooks_of(optimizer: Optimizer) -> list[Callable[..., Any]]:
    """What is called before and after each `step()` of an optimizer, of all optimizers included: torch tells nowhere else."""
    places = [
        (optimizer, "_optimizer_step_pre_hooks"),
        (optimizer, "_optimizer_step_post_hooks"),
        (_OPTIMIZERS, "_global_optimizer_pre_hooks"),
        (_OPTIMIZERS, "_global_optimizer_post_hooks"),
    ]
    return [hook for home, name in places for hook in getattr(home, name, {}).values()]


_HOOKS = operator.attrgetter("_backward_hooks", "_post_accumulate_grad_hooks")


def count_gradient_hooks(parameters: Iterable[Tensor]) -> int:
    """How many hooks on parameters a backward pass calls: torch tells nowhere else."""
    return sum(map(len, filter(None, itertools.chain.from_iterable(map(_HOOKS, parameters)))))


def undo_capture(graph: torch.cuda.CUDAGraph, pool: Any, *, has_begun: bool) -> None:
    """After a capture that failed. Torch before 2.14 would keep all memory of the pool, that of other graphs too, as long as the
    process lives (pytorch pull request 190348); before 2.12 it would also take the capture to be under way (180395).

    Args:
        graph: what was captured.
        pool: of its memory.
        has_begun: whether anything was captured.
    """
    if release() >= (2, 14):
        return
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
        has_begun = True
    except RuntimeError:  # it has been ended, or had not begun
        pass
    try:
        graph.pool()  # of a capture that ended well, which is let go of with the graph
    except RuntimeError:
        if has_begun:
            torch._C._cuda_releasePool(device, pool)


# Tracing, with proxies or fake tensors, goes through dispatch modes; eager code has none. `torch.compiler.is_compiling()` tells
# of `torch.compile` and `torch.export` alone.
dispatch_modes: Callable[[], int] = _private(
    torch, "_C._len_torch_dispatch_stack", lambda: 0, "models are traced as they run eagerly"
)

# What sees every operation as it runs; torch documents it, in a module with a private name.
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode  # noqa: E402

_LOOKS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")


def looks_at_number(operation: Any) -> bool:
    """Whether an operation that a `DispatchMode` sees makes the host wait for what the device computes."""
    return str(operation.name()).partition(".")[0] in _LOOKS


def starts_collective(operation: Any) -> bool:
    """Whether an operation that a `DispatchMode` sees starts one of the `functional_collectives`, whose result is waited for."""
    return str(operation.name()).startswith("_c10d_functional::") and "wait_tensor" not in operation.name()


def writes_in_place(operation: Any) -> bool:
    """Whether an operation that a `DispatchMode` sees changes one of its arguments."""
    return bool(operation._schema.is_mutable)


_will_execute: Callable[[Any], bool] = _private(
    torch, "_C._will_engine_execute_node", lambda _: True, "gradients that nobody asks for are computed"
)


def is_asked_for(node: Any, number: int) -> bool:
    """Inside of a backward pass, whether anybody asks for the gradient by a tensor that a function took.

    Args:
        node: the `ctx` of a `torch.autograd.Function` in its `backward`.
        number: of the tensor among those that it took.
    """
    target = node.next_functions[number][0]
    if target is None:
        return False
    try:
        return bool(_will_execute(target))
    except RuntimeError:  # of leaves it cannot be told
        return True


# --- torch.distributed --------------------------------------------------------------------------------------------------------


def default_store() -> dist.Store:
    """The store that the default group was made with; a connection of its own where torch does not hand it over."""
    get = getattr(dist.distributed_c10d, "_get_default_store", None)
    if get is not None:
        return get()
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # type: ignore[attr-defined]


def backends() -> dict[str, str]:
    """The backend of the default group for each type of device."""
    return dict(part.split(":") for part in dist.get_backend_config().split(","))


def count_buckets(wrapper: nn.parallel.DistributedDataParallel) -> int:
    """How many buckets DistributedDataParallel has: it tells nowhere else; 0 where it does not."""
    logged: dict[str, Any] = getattr(wrapper, "_get_ddp_logging_data", dict)()
    sizes = logged.get("rebuilt_bucket_sizes") or logged.get("bucket_sizes") or ""
    return len([size for size in str(sizes).split(",") if size.strip()])


def functional_collectives() -> Any:
    """Collectives that can be nodes of a graph, `all_reduce` and `wait_tensor`: torch.compile's own, with no public name.

    Raises:
        InputError: this torch has none.
    """
    ops = torch.ops._c10d_functional
    if not (hasattr(ops, "all_reduce") and hasattr(ops, "wait_tensor")):
        raise InputError(
            f"strategy=ingraph needs collectives inside graphs, which torch {torch.__version__} lacks: choose strategy=custom."
        )
    return ops


# --- the compiler's cache ---------------------------------------------------------------------------------------------------


def folder_of_cache() -> str:
    """Where compiled code lies on disk, made if there is none; the place is torch's own choice unless the environment names one.

    Raises:
        OSError: it cannot be made.
    """
    try:
        from torch._inductor.runtime.cache_dir_utils import cache_dir
    except ImportError:
        user = getpass.getuser()
        folder = os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{user}")
        Path(folder).mkdir(parents=True, exist_ok=True)
        return folder
    return cache_dir()


def custom_operator(name: str) -> Any:
    """What `torch.library.custom_op` has made of a function; None for operators that were made otherwise.

    Args:
        name: as "space::name".
    """
    try:
        from torch._library.custom_ops import OPDEFS
    except ImportError:
        return None
    return OPDEFS.get(name)


def schemas_of(packet: Any) -> list[str]:
    """What the overloads of an operator take and return, in words."""
    return [str(getattr(packet, name)._schema) for name in packet.overloads()]


_dump: Callable[[str], str] = _private(
    torch, "_C._dispatch_dump", lambda _: "", "operators are told apart by their schema"
)


def registrations(name: str) -> list[str]:
    """Where an operator and its kernels were registered, each as `FILE:LINE`.

    Args:
        name: as "space::name".
    """
    return sorted(set(re.findall(r"registered at (\S+:\d+)", _dump(name))))


LOADED = ".load_ok"
"""From torch 2.14 on, an empty file with this ending beside a library in the compiler's cache says that it could be loaded."""


def clear_caches() -> None:
    """Has the compiler forget what this process has loaded from its cache; publicly, all that it has compiled."""
    try:
        from torch._inductor.utils import clear_caches as clear
    except ImportError:
        clear = torch.compiler.reset
    clear()


# --- compiling ahead of time: documented functions in a module that is private by name ------------------------------------------

_AHEAD: dict[str, Any] = {
    # code for as many threads as there are where it runs, not where it was compiled: ranks of one thread would fight for cores
    "cpp.dynamic_threads": True,
    # they serve many compilations, take longer than one, and are named by a program (openssl) that need not be there
    "aot_inductor.precompile_headers": False,
    # from the library that torch loads: where a toolchain links its own into the file, locales of the two are mixed up and
    # loading it ends the process
    "aot_inductor.custom_op_libs": [":libstdc++.so.6"],
}
# As in `ddpkit.compile.inductor`, for the same reasons: NequIP's code for CPUs is a tenth faster, and Triton splits what it can.
_AHEAD_ON: dict[str, dict[str, Any]] = {
    "cpu": {"realize_opcount_threshold": 1, "realize_reads_threshold": 1},
    "cuda": {"loop_ordering_after_fusion": False},
}


def link_to_loaded_cpp_library() -> None:
    """Has files that other programs of this process compile ahead of time be linked as this package's own are."""
    from torch._inductor import config

    config.aot_inductor.custom_op_libs = _AHEAD["aot_inductor.custom_op_libs"]


@contextlib.contextmanager
def sizes_are_many() -> Iterator[None]:
    """While tracing, no size that varies, nor a part of one, is asked whether it is 1: torch.export has no public way."""
    config = importlib.import_module("torch.fx.experimental._config")
    with config.patch(backed_size_oblivious=True):
        yield


def compile_ahead(exported: Any, path: Path, metadata: dict[str, str], device: str) -> None:
    """Compiles an exported program into a file that Python and C++ load.

    Args:
        exported: by `torch.export.export`.
        path: of the file, ending in .pt2.
        metadata: readable in Python and C++.
        device: "cpu" or "cuda".
    """
    inductor = importlib.import_module("torch._inductor")
    settings = {"aot_inductor.metadata": metadata, **_AHEAD, **_AHEAD_ON[device]}
    inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=settings)


_PackageLoader: Any = _private(torch, "_C._aoti.AOTIModelPackageLoader", None, "exported models take longer to load")


def load_ahead(path: Path, index: int) -> Callable[..., list[Tensor]]:
    """The code of such a file, called with tensors.

    torch's public way imports its compiler, and compiles programs that tell which instructions the processor has, for a warning
    alone: seconds, and most of a minute on one GPU's host. It also reads how arguments are nested anew at each call.

    Args:
        path: of the file.
        index: of the GPU; -1 for the CPU.
    """
    if _PackageLoader is None:
        inductor = importlib.import_module("torch._inductor")
        loaded: Callable[..., list[Tensor]] = inductor.aoti_load_package(str(path), device_index=index)
        return loaded
    single_threaded, copies = False, 1
    loader = _PackageLoader(str(path), "model", single_threaded, copies, index)

    def run(*inputs: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = loader.run(list(inputs))
        return outputs

    return run


# --- TorchScript --------------------------------------------------------------------------------------------------------------

# torch.jit.script leaves the function here for torch.compile.
SCRIPTED = "_torchdynamo_inline"

# The class of methods of scripted modules; that of scripted functions is public.
ScriptMethod: Any = _private(torch, "_C.ScriptMethod", None, "TorchScript in models is not named")


def type_of_script(owner: Any) -> str:
    """The name of the class that a scripted module was made of."""
    named = getattr(owner, "_type", None)
    return "a scripted module" if named is None else str(named().name())
