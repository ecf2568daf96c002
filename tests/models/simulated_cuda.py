"""Kernels of CUDA C++ run on a CPU: one thread of theirs after another, compiled by the C++ compiler of the machine.

Right for kernels whose threads hand each other nothing but by `LAY`, by `total` and by the sums of a block
(`ddpkit.models.cuda_source`).
"""

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

HEAD = """
#define SIMULATED
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)
struct Place { int x, y; };
static Place blockIdx, threadIdx;
#define LANE (threadIdx.x % 32)
#define WARP (threadIdx.x / 32)
#define ROW(name) const real* name
#define FETCH(name, row, n) name = (row);
#define LAY(to, name, n) for (int j = 0; j < (n); ++j) (to)[j] = name[j];
#define SUMS(n) (n)
#define PLACE(o) (o)
#define BARRIER
#define ADDS (warp == WARPS - 1)
template <typename T> static void total(T (&v)[32], int lane, T* to, int n) {
  for (int j = 0; j < n; ++j) to[j] = lane ? to[j] + v[j] : v[j];
}
"""


def launch(text, function, grid, threads, arguments, others=list):  # noqa: ARG001
    """As `ddpkit.nvrtc.launch`, for tensors on the CPU."""
    library = _compiled(text)
    values = [a if isinstance(a, int) else ctypes.c_void_p(a.data_ptr()) for a in arguments]
    assert all(isinstance(a, int) or a.is_contiguous() for a in arguments)
    getattr(library, f"all_of_{function}")(*grid, threads, *values)


def _one_after_another(text):
    """A function for each kernel that runs all its threads."""
    for name, parameters in re.findall(r"__launch_bounds__\([^)]+\) (\w+)\(\s*([^)]+)\)", text):
        given = ", ".join(re.findall(r"(\w+)(?:,|$)", parameters))
        yield f"""
extern "C" void all_of_{name}(int blocks_x, int blocks_y, int threads, {parameters}) {{
  for (blockIdx.y = 0; blockIdx.y < blocks_y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < blocks_x; ++blockIdx.x)
      for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) {name}({given});
}}"""


@cache
def _compiled(text):
    name = hashlib.sha256(text.encode()).hexdigest()
    with tempfile.TemporaryDirectory(prefix="ddpkit-simulated-") as folder:
        path = Path(folder) / f"{name}.cpp"
        path.write_text("\n".join([HEAD, text, *_one_after_another(text)]))
        library = path.with_suffix(".so")
        compiler = shutil.which("g++")
        assert compiler, "needs a C++ compiler"
        subprocess.run([compiler, "-O0", "-w", "-shared", "-fPIC", "-o", library, path], check=True)
        return ctypes.CDLL(str(library))
