"""Where the time of training steps went: a pure function of the events of a profiler's trace.

Every moment of the steps is counted once, for the first of `PARTS` that is at work then. So communication is what nothing else
hides ("exposed"), and idle is when nothing is at work: on a GPU it waits for the host, on a CPU it is Python, reading of data
and other work without an operator.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STEP = "ProfilerStep#"
"""Begins the name of the annotation around each step: torch.profiler's."""
BETWEEN = "ddpkit: between steps"
"""Annotation around what belongs to no step (validation, a checkpoint)."""

PARTS = (
    "products", "convolution", "elementwise and reductions", "optimizer", "copies", "communication exposed", "idle",
)  # fmt: skip
_PRODUCTS, _CONVOLUTION, _ELEMENTWISE, _OPTIMIZER, _COPIES, _COMMUNICATION, _IDLE = PARTS

# Kernels by their names, the first that fits; all others are elementwise or reductions.
_KERNELS = (
    (_PRODUCTS, re.compile(r"^triton_(?:tem|mm)")),
    (_ELEMENTWISE, re.compile(r"^triton_")),  # named after all operators that were fused, copies and products too
    (_COMMUNICATION, re.compile(r"nccl", re.IGNORECASE)),
    # OpenEquivariance names its kernels so; cuEquivariance by what they compute
    (_CONVOLUTION, re.compile(
        r"^(?:void\s+)?(?:fixup_)?(?:double_)?(?:forward|backward)(?:_?[AB])?(?:\s*[(<]|$)|cuequivariance|segmented_polynomial"
    )),
    (_COPIES, re.compile(r"memcpy|memset|copy|CatArray", re.IGNORECASE)),
    (_OPTIMIZER, re.compile(r"multi_tensor_apply|Adam|sgd", re.IGNORECASE)),
    (_PRODUCTS, re.compile(
        r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitK|dot_kernel", re.IGNORECASE
    )),
)  # fmt: skip
# Operators of a CPU likewise. Others (autograd's frames, annotations) belong to what is around them.
_OPERATORS = (
    (_COMMUNICATION, re.compile(r"^(?:c10d|_c10d_functional|gloo|nccl|mpi)\b")),
    (_OPTIMIZER, re.compile(r"^Optimizer\.step|^aten::(?:_fused_(?:adam|sgd)|_foreach_lerp|lerp)")),
    (_PRODUCTS, re.compile(
        r"^(?:aten|mkldnn|mkl)::_?(?:mm|bmm|addmm|baddbmm|addbmm|matmul|linear|mkl_linear|linear_pointwise|dot|mv|addmv|einsum)(?:_|$)"
    )),
    (_COPIES, re.compile(r"^aten::(?:copy_|_to_copy|to|clone|contiguous|cat|stack|_foreach_copy_|pin_memory|_pin_memory)$")),
    (_ELEMENTWISE, re.compile(r"^aten::|^prims::|^## Call CompiledFxGraph|^graph_\d|^cpp_fused|^ddpkit::")),
)  # fmt: skip
_UNDER_WAY = re.compile(r"^(?:gloo|nccl|mpi):")  # from launch to end, beside what the thread does meanwhile
_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}

Interval = tuple[float, float]


@dataclass(frozen=True)
class Part:
    """One part of the mean step.

    Attributes:
        name: one of `PARTS`.
        seconds: in which it was the first of `PARTS` at work; they add up to the step.
        busy: seconds that all its kernels or operators took, also beside others.
        launches: number of its kernels or operators.
    """

    name: str
    seconds: float
    busy: float
    launches: float


@dataclass(frozen=True)
class Kernel:
    """One kernel, or operator of a CPU, in the mean step."""

    part: str
    name: str
    busy: float
    launches: float


@dataclass(frozen=True)
class Breakdown:
    """The mean of some steps.

    Attributes:
        steps: how many there were.
        seconds: of a step.
        parts: one for each of `PARTS`.
        kernels: those that took longest first.
    """

    steps: int
    seconds: float
    parts: list[Part]
    kernels: list[Kernel]


@dataclass(frozen=True)
class _Work:
    part: str
    name: str
    begin: float
    end: float
    launches: int = 1


@dataclass
class _Sum:
    busy: float = 0.0
    launches: float = 0.0

    def add(self, busy: float, launches: float) -> None:
        self.busy += busy
        self.launches += launches


def break_down(events: Iterable[Mapping[str, Any]], most: int | None = None) -> Breakdown:
    """Breaks steps down into parts.

    Args:
        events: `traceEvents` of a Chrome trace that torch.profiler has written, times in microseconds. Steps are annotated
            with `STEP`. Where there are kernels of a GPU, they are what counts, otherwise operators of the thread that makes
            the steps.
        most: how many steps count, the first ones; None: all.

    Raises:
        ValueError: there is no step.
    """
    whole = [event for event in events if event.get("ph") == "X"]
    # A GPU's trace shows annotations twice, the second time above the kernels that they launched.
    steps = [e for e in whole if str(e["name"]).startswith(STEP) and not str(e.get("cat", "")).startswith("gpu")]
    steps = sorted(steps, key=_interval)[:most]
    if not steps:
        raise ValueError(f"The trace has no event named {STEP}...")
    between = [_interval(e) for e in whole if e["name"] == BETWEEN and not str(e.get("cat", "")).startswith("gpu")]
    inside = subtract(merge(map(_interval, steps)), merge(between))
    on_device = [e for e in whole if e.get("cat") in _ON_DEVICE]
    works = _kernels(on_device) if on_device else _operators(whole, steps[0]["tid"])
    count = len(steps)
    scale = 1e-6 / count

    moments: dict[str, list[Interval]] = defaultdict(list)
    by_name: dict[tuple[str, str], _Sum] = defaultdict(_Sum)
    for work in works:
        pieces = intersect([(work.begin, work.end)], inside)
        moments[work.part] += pieces
        begins_inside = any(begin <= work.begin < end for begin, end in inside)
        by_name[work.part, work.name].add(length(pieces) * scale, work.launches * begins_inside / count)
    kernels = [
        Kernel(*key, total.busy, total.launches) for key, total in by_name.items() if total.busy or total.launches
    ]
    parts, covered = [], list[Interval]()
    for name in PARTS[:-1]:
        before = length(covered)
        covered = merge([*covered, *moments[name]])
        own = [kernel for kernel in kernels if kernel.part == name]
        busy, launches = sum(kernel.busy for kernel in own), sum(kernel.launches for kernel in own)
        parts.append(Part(name, (length(covered) - before) * scale, busy, launches))
    idle = (length(inside) - length(covered)) * scale
    parts.append(Part(_IDLE, idle, idle, 0.0))
    return Breakdown(count, length(inside) * scale, parts, sorted(kernels, key=lambda kernel: -kernel.busy))


def part_of_kernel(name: str) -> str:
    """Which of `PARTS` a kernel of a GPU belongs to."""
    return next((part for part, pattern in _KERNELS if pattern.search(name)), _ELEMENTWISE)


def part_of_operator(name: str) -> str | None:
    """Which of `PARTS` an operator of a CPU belongs to; None where that depends on what is around it."""
    return next((part for part, pattern in _OPERATORS if pattern.search(name)), None)


def _kernels(events: Iterable[Mapping[str, Any]]) -> Iterator[_Work]:
    for event in events:
        name = str(event["name"])
        yield _Work(part_of_kernel(name), name, *_interval(event))


def _operators(events: Iterable[Mapping[str, Any]], thread: Any) -> Iterator[_Work]:
    """What the thread did at each moment: its innermost operator. And collectives, from launch to end."""
    open_: list[tuple[float, str | None, str]] = []  # end, part and name of the operators around, the innermost last
    since = 0.0

    def until(now: float) -> Iterator[_Work]:
        nonlocal since
        if open_ and open_[-1][1] is not None and now > since:
            yield _Work(open_[-1][1], open_[-1][2], since, now, launches=0)
        since = now

    def close(now: float) -> Iterator[_Work]:
        while open_ and open_[-1][0] <= now:
            yield from until(open_[-1][0])
            open_.pop()

    ordered = sorted(events, key=lambda event: (event["ts"], -event.get("dur", 0.0)))
    for event in ordered:
        name, (begin, end) = str(event["name"]), _interval(event)
        if _UNDER_WAY.search(name):
            yield _Work(_COMMUNICATION, name, begin, end)
            continue
        if event.get("tid") != thread or event.get("cat") not in ("cpu_op", "user_annotation"):
            continue
        yield from close(begin)
        yield from until(begin)
        around = open_[-1][1] if open_ else None
        part = around if around == _OPTIMIZER else part_of_operator(name) or around
        if part is not None and part != around:
            yield _Work(part, name, begin, begin)
        open_.append((min(end, open_[-1][0]) if open_ else end, part, name))
    yield from close(float("inf"))


def _interval(event: Mapping[str, Any]) -> Interval:
    return float(event["ts"]), float(event["ts"]) + float(event.get("dur", 0.0))


# --- sets of moments, as intervals that are sorted and apart --------------------------------------------------------------------


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """The moments that lie in any interval."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def intersect(these: Sequence[Interval], those: Sequence[Interval]) -> list[Interval]:
    """The moments that lie in both of two sets."""
    pieces = ((max(a, c), min(b, d)) for a, b in these for c, d in those)
    return [(begin, end) for begin, end in pieces if begin < end]


def subtract(these: Sequence[Interval], those: Sequence[Interval]) -> list[Interval]:
    """The moments that lie in the first set alone."""
    edges = [-float("inf"), *(edge for interval in those for edge in interval), float("inf")]
    return intersect(these, list(zip(edges[::2], edges[1::2], strict=True)))


def length(intervals: Iterable[Interval]) -> float:
    """The sum of the lengths of intervals that are apart."""
    return sum(end - begin for begin, end in intervals)
