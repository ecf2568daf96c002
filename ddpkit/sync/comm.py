"""All-reduce of one flat tensor, through torch.distributed or through MPI."""

from datetime import timedelta
from functools import cache
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ddpkit.errors import InputError
from ddpkit.torch_private import backends


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> Any:
        """Returns when the result may be used (on a GPU: by later work of the current stream)."""


class Comm:
    """How gradients travel.

    Attributes:
        bytes: handed to collectives by this rank since `reset()`.
        collectives: number of collectives since `reset()`.
        wants_calls: whether collectives move on inside `progress()` alone.
    """

    wants_calls: ClassVar[bool] = False

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.bytes = self.collectives = 0

    def reset(self) -> None:
        """Starts counting anew."""
        self.bytes = self.collectives = 0

    def averages(self, device: torch.device) -> bool:
        """Whether `all_reduce` on this device averages by itself; where not, it sums, and the caller scales before."""
        del device
        return False

    def all_reduce(self, tensor: Tensor, *, overlapped: bool = False) -> Work | None:
        """Starts the all-reduce of a contiguous tensor, in place; None where there is nothing to do."""
        if self.world_size == 1:
            return None
        self.bytes += tensor.nbytes
        self.collectives += 1
        return self._start(tensor, overlapped)

    def progress(self) -> None:
        """Lets collectives under way move on, where they need the caller's help."""

    def _start(self, tensor: Tensor, overlapped: bool) -> Work:
        raise NotImplementedError


class TorchComm(Comm):
    """torch.distributed's default group: NCCL on GPUs, gloo on CPUs."""

    def __init__(self, timeout: timedelta) -> None:
        initialised = dist.is_available() and dist.is_initialized()
        super().__init__(*((dist.get_rank(), dist.get_world_size()) if initialised else (0, 1)))
        self._timeout = timeout
        self._averages: dict[torch.device, bool] = {}

    def averages(self, device: torch.device) -> bool:
        """NCCL multiplies by 1 / ranks on its way; it does so before adding, as torch's DistributedDataParallel does."""
        if device not in self._averages:
            self._averages[device] = self.world_size > 1 and backends().get(device.type) == "nccl"
        return self._averages[device]

    def _start(self, tensor: Tensor, overlapped: bool) -> Work:
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.AVG if self.averages(tensor.device) else dist.ReduceOp.SUM  # type: ignore[assignment]
        options.timeout = self._timeout
        options.asyncOp = overlapped
        return dist.group.WORLD.allreduce([tensor], options)  # type: ignore[union-attr, no-any-return]


class MpiComm(Comm):
    """mpi4py's COMM_WORLD; tensors on a GPU go through page-locked host memory."""

    wants_calls: ClassVar[bool] = True

    def __init__(self) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise InputError(f"comm=mpi needs an MPI library ({error}): install one or use comm=torch.") from error
        self._mpi = MPI
        self._world = _own_world()
        super().__init__(self._world.rank, self._world.size)
        theirs = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if theirs != (self.rank, self.world_size):
            raise InputError(
                f"comm=mpi: torch.distributed calls this rank {theirs[0]} of {theirs[1]}, MPI rank {self.rank} of "
                f"{self.world_size}: start with the mpirun of the MPI that mpi4py was built with, or use comm=torch."
            )
        self._host = WeakTensorKeyDictionary()  # by the tensor on the GPU
        self._under_way: list[MpiWork] = []

    def progress(self) -> None:
        """Open MPI moves nonblocking collectives only inside its own calls."""
        self._under_way = [work for work in self._under_way if not work.test()]

    def _host_of(self, tensor: Tensor) -> Tensor:
        """Memory of the host for a tensor, made once: to lock pages takes longer than to copy them."""
        if tensor not in self._host:
            self._host[tensor] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return self._host[tensor]  # type: ignore[no-any-return]

    def _start(self, tensor: Tensor, overlapped: bool) -> Work:
        host = tensor
        if tensor.is_cuda:
            host = self._host_of(tensor)
            host.copy_(tensor)  # on its stream, and so after what the last call still copies back from there
        kind, add = _sum_of(tensor.dtype)
        message = [self._mpi.memory.fromaddress(host.data_ptr(), host.nbytes), host.numel(), kind]
        if overlapped:
            work = MpiWork(self._world.Iallreduce(self._mpi.IN_PLACE, message, add), tensor, host)
            self._under_way.append(work)
            return work
        self._world.Allreduce(self._mpi.IN_PLACE, message, add)
        return MpiWork(None, tensor, host)


class MpiWork:
    """An MPI all-reduce whose result may have to go back to the GPU."""

    def __init__(self, request: Any, tensor: Tensor, host: Tensor) -> None:
        self._request, self._tensor, self._host = request, tensor, host

    def test(self) -> bool:
        """Whether it has ended."""
        return bool(self._request.Test())

    def wait(self) -> None:
        """Waits for the result."""
        if self._request is not None:
            self._request.Wait()
        if self._host is not self._tensor:
            self._tensor.copy_(self._host, non_blocking=True)


@cache
def _own_world() -> Any:
    """All ranks, apart from the communicators of the user's own calls."""
    from mpi4py import MPI

    return MPI.COMM_WORLD.Dup()


@cache
def _sum_of(dtype: torch.dtype) -> tuple[Any, Any]:
    """MPI's datatype and the operation that adds; MPI has no 16-bit floats, so torch adds those."""
    from mpi4py import MPI

    if dtype in (torch.float32, torch.float64):
        return (MPI.FLOAT if dtype == torch.float32 else MPI.DOUBLE), MPI.SUM

    def add(source: Any, target: Any, datatype: Any) -> None:
        del datatype
        total = torch.frombuffer(target, dtype=dtype)
        total += torch.frombuffer(source, dtype=dtype)

    return MPI.UINT16_T, MPI.Op.Create(add, commute=True)


def make_comm(name: str, timeout: timedelta) -> Comm:
    """`"torch"` or `"mpi"`."""
    if name == "torch":
        return TorchComm(timeout)
    if name == "mpi":
        return MpiComm()
    raise InputError(f"comm={name} is unknown: use torch or mpi.")
