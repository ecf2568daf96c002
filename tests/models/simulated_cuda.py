"""Kernels of CUDA C++ run on a CPU: one thread of theirs after another, compiled by the C++ compiler of the machine.

Right for kernels whose threads hand each other nothing but by `LAY` and `total` (`ddpkit.models.cuda_source`).
"""

import ctypes
import hashlib
import itertools
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
extern "C" void stand_at(int x, int y, int thread) { blockIdx = {x, y}; threadIdx = {thread, 0}; }
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
    kernel = getattr(library, function)
    for y, x, thread in itertools.product(range(grid[1]), range(grid[0]), range(threads)):
        library.stand_at(x, y, thread)
        kernel(*values)


@cache
def _compiled(text):
    name = hashlib.sha256(text.encode()).hexdigest()
    with tempfile.TemporaryDirectory(prefix="ddpkit-simulated-") as folder:
        path = Path(folder) / f"{name}.cpp"
        path.write_text(HEAD + text)
        library = path.with_suffix(".so")
        compiler = shutil.which("g++")
        assert compiler, "needs a C++ compiler"
        subprocess.run([compiler, "-O0", "-w", "-shared", "-fPIC", "-o", library, path], check=True)
        return ctypes.CDLL(str(library))
