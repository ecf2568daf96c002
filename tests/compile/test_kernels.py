"""C++ kernels that share a file do what they do each alone."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._inductor.async_compile import AsyncCompile, get_compile_threads

from ddpkit.compile import inductor
from ddpkit.compile.inductor import compiled_together
from ddpkit.compile.kernels import shared_out
from ddpkit.ranks.group import Environment

_SCALE = """
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C"  void  kernel(const double* in, double* out, const int64_t n, const float factor)
{
    if (n < 0) throw std::runtime_error("a negative count");
    for (int64_t i = 0; i < n; i++) out[i] = in[i] * factor%s;
}
"""


@given(st.dictionaries(st.text(min_size=1), st.text(max_size=50), min_size=1), st.integers(1, 5))
def test_every_kernel_is_in_one_file_and_files_are_about_equally_long(sources: dict[str, str], count: int) -> None:
    shares = shared_out(sources, count)
    assert sorted(name for share in shares for name in share) == sorted(sources)
    assert len(shares) == min(count, len(sources))
    lengths = [sum(len(sources[name]) for name in share) for share in shares]
    assert max(lengths) - min(lengths) <= max(map(len, sources.values()))


def test_kernels_of_one_name_and_one_with_a_macro_are_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "2")
    types = ["const double*", "double*", "const int64_t", "const float"]
    sources = {f"plus_{n}": _SCALE % f" + {n}" for n in range(5)}
    macro = (_SCALE % "").replace("const float factor", "const float").replace("extern", "#define factor 7\nextern")
    sources["macro"] = macro
    with compiled_together():
        compiler = AsyncCompile()
        scope = {name: compiler.cpp_pybinding(types, source) for name, source in sources.items()}
        compiler.wait(scope)
    files = [path for path in tmp_path.rglob("*.main.cpp") if "plus_" in path.read_text()]
    assert len(files) == 2
    values, out = torch.arange(4, dtype=torch.float64), torch.empty(4, dtype=torch.float64)
    for n in range(5):
        scope[f"plus_{n}"](values, out, 4, 2.5)
        torch.testing.assert_close(out, values * 2.5 + n, rtol=0, atol=0)
    scope["macro"](values, out, 4, 2.5)
    torch.testing.assert_close(out, values * 7.0, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="a negative count"):
        scope["plus_0"](values, out, -1, 2.5)
    with pytest.raises(TypeError, match="takes 4 arguments, not 3"):
        scope["plus_0"](values, out, 4)
    with pytest.raises(TypeError):
        scope["plus_0"](values, out, "four", 2.5)


@pytest.mark.parametrize("fails", ["no such names", "a file"])
def test_without_shared_files_each_kernel_is_compiled_on_its_own(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if fails == "a file":
        monkeypatch.setattr(inductor, "file_of", lambda _: "#error")
    else:
        monkeypatch.setattr(inductor, "SHARES_FILES", False)
    types = ["const double*", "double*", "const int64_t", "const float"]
    with compiled_together():
        compiler = AsyncCompile()
        scope = {"scale": compiler.cpp_pybinding(types, _SCALE % "")}
        compiler.wait(scope)
    values, out = torch.arange(4, dtype=torch.float64), torch.empty(4, dtype=torch.float64)
    scope["scale"](values, out, 4, 2.5)
    torch.testing.assert_close(out, values * 2.5, rtol=0, atol=0)
    assert not recwarn.list


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no such call on this system")
@pytest.mark.parametrize("fails", [False, True])
def test_a_rank_bound_to_one_core_compiles_on_all_of_them(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    here = os.sched_getaffinity(0)
    monkeypatch.setattr("ddpkit.ranks.cores._of_launcher", lambda: here)
    one = {min(here)}
    os.sched_setaffinity(0, one)
    try:
        with contextlib.suppress(ZeroDivisionError), compiled_together():
            assert os.sched_getaffinity(0) == here
            assert get_compile_threads() == min(32, len(here))
            _ = 1 // (not fails)
        assert os.sched_getaffinity(0) == one
    finally:
        os.sched_setaffinity(0, here)


@pytest.mark.parametrize(
    ("device", "ranks", "threads"), [("cuda", 1, 6), ("cuda", 4, 1), ("cuda", 9, 1), ("cpu", 4, 6)]
)
def test_ranks_with_a_gpu_each_share_the_cores(
    device: str, ranks: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "6")
    monkeypatch.setattr(inductor, "environment", lambda: Environment(local_size=ranks, device=torch.device(device)))
    with compiled_together():
        assert get_compile_threads() == threads


_STARTS = """
from torch._inductor.async_compile import AsyncCompile
from ddpkit.compile.inductor import _threads, inductor_config, start_workers
start_workers()
assert AsyncCompile._ready_future is not None
with inductor_config.patch(compile_threads=_threads()):
    AsyncCompile.wait_pool_ready(120)
    assert AsyncCompile.use_process_pool()
"""


@pytest.mark.long
def test_workers_are_started_ahead() -> None:
    variables = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
    subprocess.run([sys.executable, "-c", _STARTS], env=variables, check=True, timeout=200)
