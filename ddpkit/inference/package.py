"""A model compiled into one file: an AOTInductor package, which Python and C++ load without compiling.

A model for inference is a module of positional tensors (`ddpkit.inference.inputs.Inputs`) that returns

    energies of the owned atoms [owned] float64, eV, and
    slopes [edges, 3] float64, eV/Å: the derivative of the sum of these energies by the edge vectors.

Forces follow as `forces[centre] += slope; forces[neighbour] -= slope`. Edges longer than the cutoff must add nothing.
A model that passes messages asks for the features of ghosts by `ddpkit.inference.exchange.from_owners`.
"""

import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ddpkit.errors import InputError
from ddpkit.inference.addressing import elements_of
from ddpkit.inference.exchange import passing_errors_on  # which registers the operators that compiled code may call
from ddpkit.inference.inputs import SMALLEST, random_inputs
from ddpkit.torch_private import compile_ahead, load_ahead, release, sizes_are_many

FORMAT = 2
SUFFIX = ".pt2"
KEY = "ddpkit"  # of the metadata, in Python and in C++


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What a package says of itself, as JSON under the key "ddpkit" of its metadata."""

    model: str  # the class
    species: list[str]
    r_max: float  # Å
    cutoffs: list[list[float]] | None  # [species, species] of centre and neighbour, Å; None for r_max throughout
    precision: str  # "float64", "float32" or "mixed"
    dtype: str  # of the layers, and of rows that are exchanged: "float64" or "float32"
    message_passing: bool  # whether it takes `incoming`
    exchange_width: int  # the widest row that is exchanged between ranks; 0 where none are
    parameters: int
    weights_sha256: str
    averaged: bool  # weights averaged in training
    device: str  # "cpu" or "cuda"
    torch: str
    ddpkit: str
    source: str  # the run or checkpoint
    elements: list[dict[str, int]] = field(default_factory=list)  # by `elements_of`; empty where indices have 64 bits
    format: int = FORMAT


def compile_package(module: nn.Module, metadata: Metadata, path: Path, say: Callable[[str], None] = print) -> Metadata:
    """Traces and compiles a model for inference, for any number of atoms, edges and neighbours, into a file.

    Args:
        module: called with the tensors of `Inputs`, in evaluation mode; it may call `torch.autograd.grad`.
        metadata: written into the file; it says what the module takes and where it computes.
        path: of the file, ending in .pt2.
        say: is told what is going on.

    Returns:
        What is written: the metadata, and for GPUs how many elements its tensors have.

    Raises:
        InputError: the module cannot be traced, or there is no compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise InputError(
            f"There is no C++ compiler {compiler} here, which an export needs: install one, or name it in CXX; what is exported "
            "runs without."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of names within it
        say("tracing the model")
        exported = _traced(module, metadata)
        if metadata.device == "cuda":
            metadata = replace(metadata, elements=elements_of(exported))
        say("compiling, which may take minutes")
        compile_ahead(exported, path, {KEY: json.dumps(asdict(metadata))}, metadata.device)
    return metadata


def _traced(module: nn.Module, metadata: Metadata) -> torch.export.ExportedProgram:
    # All sizes differ, from one another and from 3: sizes that are equal in a trace are one.
    example = random_inputs(
        23,
        14,
        19,
        species=len(metadata.species),
        r_max=metadata.r_max,
        message_passing=metadata.message_passing,
        seed=0,
        device=metadata.device,
    ).arguments()
    trace = make_fx(lambda *x: tuple(module(*x)), tracing_mode="symbolic", _allow_non_fake_inputs=True)
    try:
        with torch.autograd.set_multithreading_enabled(False), sizes_are_many():
            traced = trace(*example)
            # what the trace took for granted of the example's sizes is forgotten here, and found out for all sizes
            return torch.export.export(_Flat(traced), example, dynamic_shapes=(_dims(metadata),))
    except InputError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(
            f"{metadata.model} cannot be traced for any number of atoms ({type(error).__name__}: {why}): what for_inference() "
            "returns must not look at the values of tensors; take numbers from shapes."
        ) from error


class _Flat(nn.Module):
    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__()
        self.traced = traced

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.traced(*tensors))


def _dims(metadata: Metadata) -> tuple[dict[int, Any], ...]:
    edges, owned, every, most, most_in = (
        torch.export.Dim(name, min=SMALLEST) for name in ("edges", "owned", "all", "most", "most_in")
    )
    dims: tuple[dict[int, Any], ...] = ({0: edges}, {0: every}, {0: edges}, {0: edges}, {0: owned, 1: most})
    return (*dims, {0: every, 1: most_in}) if metadata.message_passing else dims


def read_metadata(path: Path) -> Metadata:
    """What a package says of itself, and whether it can be used here; nothing of it is run.

    Raises:
        InputError: the file is no package, is damaged, or was made for another torch or format, or for a device or
            processor that is not here.
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}: give a package that `ddpkit export` wrote.")
    try:
        with zipfile.ZipFile(path) as archive:
            named = [name for name in archive.namelist() if name.endswith("_metadata.json")]
            everything = json.loads(archive.read(named[0]))
            told = json.loads(everything[KEY])
            damaged = archive.testzip()
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} is no package that `ddpkit export` wrote, or it is damaged ({type(error).__name__}): export the model again."
        ) from error
    if damaged is not None:
        raise InputError(f"{path} is damaged (the checksum of {damaged} is wrong): copy or export it again.")
    _refuse_unlike(path, told)
    instructions = str(everything.get("AOTI_CPU_ISA", "")).split()[:1]
    if instructions == ["AVX512"] and torch.backends.cpu.get_cpu_capability() != "AVX512":
        raise InputError(
            f"{path} was compiled for processors with instructions (AVX512) that this one lacks: export the model again here."
        )
    return Metadata(**told)


def _refuse_unlike(path: Path, told: Mapping[str, Any]) -> None:
    if told.get("format") != FORMAT or {f.name for f in fields(Metadata)} != told.keys():
        raise InputError(
            f"{path} is a package of format {told.get('format')}, and this ddpkit reads {FORMAT}: export the model again with it."
        )
    if release(told["torch"]) != release():
        raise InputError(
            f"{path} was compiled by torch {told['torch']} and cannot run under torch {torch.__version__}: export the model "
            "again here, or install that release."
        )
    if told["device"] == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"{path} was compiled for an NVIDIA GPU, and there is none here: export the model with --device cpu."
        )


def load_package(path: Path, device: torch.device) -> Callable[..., list[Tensor]]:
    """The compiled code of a package, called with the tensors of `Inputs` on that device.

    Raises:
        InputError: it cannot be loaded.
    """
    index = (device.index or 0) if device.type == "cuda" else -1
    try:
        code = load_ahead(path, index)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be loaded here ({why}): export the model again on this machine.") from error

    def run(*inputs: Tensor) -> list[Tensor]:
        with passing_errors_on():
            return code(*inputs)

    return run
