"""What holds for all tests: one thread, and a cache of the compiler that is theirs alone."""

import gc
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Before torch is loaded: threads that wait for one another would take the cores from other processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.distributed as dist

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # of deterministic products; read once

# What starts programs or compiles code: the other files take seconds, and come first. The longest of these come first, so that
# workers end together.
SLOW = (
    "train/test_startup.py",
    "inference/test_lammps.py",
    "inference/test_exported.py",
    "inference/test_lammps_models.py",
    "inference/test_lammps_gpu.py",
    "models/test_exported_models.py",
    "models/test_divided.py",
    "models/test_as_nequip.py",
    "experiments/test_md_check.py",
    "sync/test_conformance.py",
    "compile/test_compiled_ranks.py",
    "compile/test_step.py",
    "train/test_training.py",
    "train/test_faults.py",
    "train/test_recorded_runs.py",
    "train/test_strategy_state.py",
    "compile/test_models.py",
    "sync/test_lightning.py",
    "experiments/test_nequip_trainer.py",
    "compile/test_sequences.py",
    "compile/test_recorded_steps.py",
    "compile/test_recorded_ranks.py",
    "train/test_hosts.py",
    "torch/test_public.py",
    "sync/test_in_graph.py",
    "experiments/test_dynamics_study.py",
    "models/test_construction.py",
    "compile/test_state.py",
    "compile/test_update.py",
    "train/test_late.py",
    "train/test_leaving.py",
    "sync/test_emulated.py",
    "experiments/test_bad_input.py",
    "docs/test_pages.py",
    "data/test_builtin.py",
    "compile/test_embedding.py",
    "models/test_reference.py",
    "compile/test_padded_step.py",
    "sync/test_examples.py",
    "compile/test_recorded_training.py",
    "train/test_launch.py",
    "train/test_schedule.py",
    "sync/test_in_graph_conforms.py",
    "train/test_fault_campaign.py",
    "train/test_run_folder_page.py",
    "compile/test_forces.py",
    "models/test_peer.py",
    "analysis/test_numerics_claims.py",
    "train/test_folders.py",
    "experiments/test_run_data.py",
    "experiments/test_evaluate.py",
    "compile/test_stored.py",
    "compile/test_cache.py",
    "compile/test_kernels.py",
    "sync/test_ranks.py",
    "compile/test_interpreted.py",
    "data/test_published_formats.py",
    "train/test_skipped.py",
    "sync/test_flat.py",
    "sync/test_missing.py",
    "experiments/test_studies.py",
    "compile/test_script.py",
    "sync/test_own_strategy.py",
    "torch/test_private_names.py",
    "compile/test_parity.py",
    "analysis/test_report.py",
    "train/test_projection.py",
    "experiments/test_doctor.py",
    "experiments/test_run_capacities.py",
    "train/test_profile.py",
    "sync/test_disagreements.py",
    "experiments/test_check_command.py",
    "compile/test_lines.py",
    "train/test_watchdog.py",
    "torch/test_torchs_faults.py",
    "models/test_padded.py",
    "train/test_committed_runs.py",
    "experiments/test_commands.py",
    "docs/test_site.py",
)
HERE = Path(__file__).parent
TRY_INSTRUCTIONS = """
from torch._inductor import config
from torch._inductor.cpu_vec_isa import valid_vec_isa_list

tried = [str(isa) for isa in valid_vec_isa_list()]
valid_vec_isa_list.cache_clear()
with config.patch("cpp.vec_isa_ok", True):
    print(tried == [str(isa) for isa in valid_vec_isa_list()])
"""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    for mark in item.iter_markers("gpu"):
        number = mark.args[0] if mark.args else 1
        if torch.cuda.device_count() < number:
            pytest.skip(f"needs {number} GPU{'s' * (number > 1)}")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], scope="module")
def device(request):
    """Where tests that ask for it run: on the CPU, and once more on a GPU where there is one."""
    return request.param


@pytest.fixture
def deterministic():
    """Kernels whose sums have an order, as `deterministic=true` has them."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def compile_quickly(folder):
    """Has all processes of the tests use `quick_compiler.py` as their C++ compiler."""
    if compiler := shutil.which("g++"):
        words = [sys.executable, "-IS", str(HERE / "quick_compiler.py"), str(folder), compiler]
        (folder / "g++").write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        (folder / "g++").chmod(0o755)
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
        os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"  # each process would do so anew


def pytest_configure(config):
    """A start looks through the whole cache of the compiler: that of the user may hold gigabytes of other programs."""
    config.compiled = tempfile.mkdtemp(prefix="ddpkit-tests-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = config.compiled
    if hasattr(config, "workerinput"):
        # The other workers have the other cores: a second file of a graph would be its headers once more.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    elif config.getoption("numprocesses", None) and "not slow" not in config.getoption("markexpr"):
        compile_quickly(Path(config.compiled))
        # Each process that compiles would try each kind of vector instructions anew, for seconds; here it is done for all.
        done = subprocess.run([sys.executable, "-c", TRY_INSTRUCTIONS], capture_output=True, text=True, check=False)
        if done.stdout.strip() == "True":
            os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"


def pytest_unconfigure(config):
    shutil.rmtree(config.compiled, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    place = {HERE / name: number for number, name in enumerate(SLOW)}
    for item in items:
        if item.path in place:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.timeout(0))
    items.sort(key=lambda item: place.get(item.path, -1))


def pytest_collection_finish():
    """What is loaded by now stays: collections of garbage need not look through it again and again."""
    gc.freeze()


@pytest.fixture(autouse=True)
def no_process_group_is_left_behind():
    yield
    if dist.is_initialized():
        from ddpkit.ranks import group

        group.shutdown()


@pytest.fixture(autouse=True)
def the_default_dtype_is_put_back():
    """nequip makes float64 the default of the whole process."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float32)
