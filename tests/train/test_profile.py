"""Where the time of steps went: traces made up with known answers, and one real run."""

import csv
import json
import random

import numpy as np
import pytest
import torch

from ddpkit.breakdown import (
    BETWEEN,
    PARTS,
    break_down,
    intersect,
    length,
    merge,
    part_of_kernel,
    part_of_operator,
    subtract,
)
from ddpkit.errors import InputError
from ddpkit.experiments.config import read
from ddpkit.profiler import StepProfiler, table, write


def event(name, begin, end, category="kernel", thread=1):
    return {"ph": "X", "name": name, "cat": category, "ts": begin, "dur": end - begin, "tid": thread}


def step(number, begin, end):
    return event(f"ProfilerStep#{number}", begin, end, "user_annotation")


def milliseconds(events):
    """Per step: milliseconds, busy milliseconds and launches of each part, without those of which there is nothing."""
    broken_down = break_down(events)
    assert [part.name for part in broken_down.parts] == list(PARTS)
    assert sum(part.seconds for part in broken_down.parts) == pytest.approx(broken_down.seconds)
    return {
        part.name: tuple(round(1e3 * x, 9) for x in (part.seconds, part.busy, part.launches / 1e3))
        for part in broken_down.parts
        if part.seconds or part.busy
    }


ON_A_GPU = [
    step(9, 0, 10_000), step(10, 10_000, 20_000),
    {**step(9, 300, 4_000), "cat": "gpu_user_annotation"},
    event("aten::mm", 0, 10_000, "cpu_op"),  # what the host does counts for nothing
    event("nvjet_hsh_128x64_64x8_2x1_v_bz_TNT", 1_000, 3_000, thread=7),
    event("triton_poi_fused__to_copy_bmm_mul_3", 3_000, 4_000, thread=7),
    event("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 3_500, 6_000, thread=9),
    event("void at::native::multi_tensor_apply_kernel<at::native::FusedOptimizerTensorListMetadata<4>>", 6_500, 7_000),
    event("Memcpy DtoH (Device -> Pinned)", 6_900, 7_400, "gpu_memcpy", 11),
    event("double_backward_B(float*, float*)", 12_000, 15_000),
    event("fixup_forward", 15_000, 15_500),
    event("sm90_xmma_gemm_f32f32", 19_500, 21_000),  # ends after the last step
    event("Memset (Device)", 30_000, 31_000, "gpu_memset"),  # no step's
]  # fmt: skip


def test_kernels_of_a_gpu():
    assert milliseconds(ON_A_GPU) == {
        "products": (1.25, 1.25, 1),
        "convolution": (1.75, 1.75, 1),
        "elementwise and reductions": (0.5, 0.5, 0.5),
        "optimizer": (0.25, 0.25, 0.5),
        "copies": (0.2, 0.25, 0.5),  # 0.1 ms beside the optimizer
        "communication exposed": (1.0, 1.25, 0.5),  # 0.5 ms beside a kernel
        "idle": (5.05, 5.05, 0),
    }


def test_what_belongs_to_no_step_is_left_out():
    validation = [event(BETWEEN, 8_000, 10_000, "user_annotation"), event("void gemv2T_kernel_val<int>", 8_500, 9_500)]
    with_it, without = milliseconds([*ON_A_GPU, *validation]), milliseconds(ON_A_GPU)
    assert with_it.pop("idle")[0] == without.pop("idle")[0] - 1
    assert with_it == without


def test_operators_of_a_cpu():
    assert milliseconds([
        step(3, 0, 10_000),
        event("aten::matmul", 1_000, 4_000, "cpu_op"),
        event("aten::mm", 2_000, 3_500, "cpu_op"),
        event("aten::resolve_conj", 2_500, 2_600, "cpu_op"),
        event("autograd::engine::evaluate_function: MmBackward0", 4_000, 5_000, "cpu_op"),
        event("aten::t", 4_500, 4_600, "cpu_op"),
        event("## Call CompiledFxGraph f3fh5 ##", 5_000, 7_000, "cpu_op"),
        event("aten::bmm", 5_500, 6_000, "cpu_op"),
        event("aten::_to_copy", 6_000, 6_200, "cpu_op"),
        event("Optimizer.step#AdamW.step", 7_000, 8_000, "user_annotation"),
        event("aten::copy_", 7_200, 7_400, "cpu_op"),
        event("gloo:all_reduce", 7_500, 9_000, "user_annotation", 2),
        event("aten::sum", 0, 10_000, "cpu_op", 5),  # of another thread
    ]) == {
        "products": (3.4, 3.4, 2),
        "elementwise and reductions": (1.5, 1.5, 3),
        "optimizer": (1.0, 1.0, 1),
        "copies": (0.2, 0.2, 1),
        "communication exposed": (1.0, 1.5, 1),
        "idle": (2.9, 2.9, 0),
    }  # fmt: skip


def test_a_trace_without_steps_is_refused():
    with pytest.raises(ValueError, match="has no event named ProfilerStep#"):
        break_down([event("gemm", 0, 1)])


@pytest.mark.parametrize(("name", "part"), [
    ("void cutlass::Kernel2<cutlass_80_simt_sgemm_128x64_8x5_nt_align1>(...)", "products"),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "products"), ("triton_tem_fused_bmm_4", "products"),
    ("forward", "convolution"), ("void backward<float>(float*)", "convolution"), ("double_backward_A", "convolution"),
    ("fixup_double_backwardB(void*, float*)", "convolution"),
    ("void at::native::vectorized_layer_norm_kernel_forward", "elementwise and reductions"),
    ("triton_per_fused_copy_mm_sum_0", "elementwise and reductions"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "elementwise and reductions"),
    ("void at::native::reduce_kernel<512, 1>", "elementwise and reductions"),
    ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copies"),
    ("void at::native::multi_tensor_apply_kernel<..., CopyFunctor<float>>", "copies"),
    ("void at::native::multi_tensor_apply_kernel<..., FusedAdamMathFunctor<float, 4, (ADAM_MODE)1>>", "optimizer"),
    ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication exposed"),
])  # fmt: skip
def test_kernels_are_known_by_their_names(name, part):
    assert part_of_kernel(name) == part


@pytest.mark.parametrize(("name", "part"), [
    ("aten::addmm", "products"), ("aten::mul", "elementwise and reductions"), ("aten::_fused_adamw_", "optimizer"),
    ("aten::cat", "copies"), ("c10d::allreduce_", "communication exposed"), ("ProfilerStep#3", None), ("MmBackward0", None),
])  # fmt: skip
def test_operators_are_known_by_their_names(name, part):
    assert part_of_operator(name) == part


@pytest.mark.parametrize("seed", range(5))
def test_sets_of_moments(seed):
    draw = random.Random(seed)
    these, those = ([sorted(draw.sample(range(40), 2)) for _ in range(draw.randrange(6))] for _ in range(2))
    a, b = ({n for begin, end in intervals for n in range(begin, end)} for intervals in (these, those))
    these, those = merge(map(tuple, these)), merge(map(tuple, those))
    for result, expected in ((these, a), (intersect(these, those), a & b), (subtract(these, those), a - b)):
        assert {n for begin, end in result for n in range(begin, end)} == expected
        assert length(result) == len(expected)


def test_the_table_names_the_kernels_of_a_convolution(tmp_path):
    broken_down = break_down(ON_A_GPU)
    said = table(broken_down)
    assert said.startswith("2 steps profiled, 10.000 ms each")
    lines = [line.split() for line in said.splitlines()]
    assert ["convolution", "1.750", "17.5", "%", "1.750", "1"] in lines
    assert ["fixup_forward", "0.250", "0"] in lines  # once in two steps
    write(broken_down, tmp_path)
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["part"] for row in rows] == list(PARTS)
    assert sum(float(row["percent"]) for row in rows) == pytest.approx(100)
    kernels = list(csv.DictReader((tmp_path / "kernels.csv").open()))
    assert float(kernels[0]["ms_per_step"]) == max(float(kernel["ms_per_step"]) for kernel in kernels) == 1.5


@pytest.mark.parametrize("value", [-1, 1001])
def test_nonsense_is_refused(value):
    with pytest.raises(InputError, match=rf"profile={value} is out of range: it must be 0 or more and at most 1000\."):
        read([f"profile={value}"])


def test_a_real_run(run_here, tmp_path, capsys):
    run = tmp_path / "run"
    assert run_here(f"run_dir={run}", "profile=4", "train.checkpoint_every=2") == ""  # steps 9 to 12 of 12
    assert "4 steps profiled, " in (said := capsys.readouterr().out)
    assert str(run / "profile" / "trace.json") in said
    trace = json.loads((run / "profile" / "trace.json").read_text())["traceEvents"]
    assert len({e["name"] for e in trace if e["name"].startswith("ProfilerStep#")}) == 4
    broken_down = break_down(trace)
    seconds = {part.name: part.seconds for part in broken_down.parts}
    assert min(seconds[part] for part in ("products", "elementwise and reductions", "optimizer", "copies", "idle")) > 0
    assert seconds["convolution"] == seconds["communication exposed"] == 0
    assert any(kernel.name == "aten::bmm" and kernel.launches >= 1 for kernel in broken_down.kernels)
    assert run_here(f"resume={run}", "train.max_epochs=3") == ""  # profiles nothing again
    assert "profiled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("left", "made", "says"), [(50, 13, "4 steps profiled"), (2, 2, "2 steps profiled"), (9, 3, "ended before")]
)
def test_few_steps_are_enough(left, made, says, tmp_path, capsys):
    with StepProfiler(tmp_path / "profile", 4, torch.device("cpu")) as profiler:
        profiler.start(left)
        for _ in range(made):
            torch.ones(20, 20) @ torch.ones(20, 20)
            profiler.step()
        torch.ones(2) + 1  # after the last
    said = capsys.readouterr().out
    assert says in said
    if "profiled," in said:
        rows = {row["part"]: row for row in csv.DictReader((tmp_path / "profile" / "table.csv").open())}
        assert float(rows["products"]["launches_per_step"]) == 1
        assert np.isclose(sum(float(row["percent"]) for row in rows.values()), 100)
    else:
        assert not (tmp_path / "profile").exists()


def test_what_fails_writes_no_table(tmp_path):
    profiler = StepProfiler(tmp_path / "profile", 4, torch.device("cpu"))
    profiler.start(4)
    profiler.step()
    with pytest.raises(ZeroDivisionError), profiler:
        raise ZeroDivisionError
    assert not (tmp_path / "profile").exists()
