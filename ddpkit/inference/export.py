"""From a model to a file: what `ddpkit export` does."""

import copy
import hashlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ddpkit import __version__
from ddpkit.batch import Batch
from ddpkit.compile.parity import Difference, differences, tolerance_for
from ddpkit.data.frame import Frame
from ddpkit.data.neighbours import neighbour_list
from ddpkit.errors import InputError, ParityError
from ddpkit.inference.exchange import Mirrored, exchanging
from ddpkit.inference.exported import Exported
from ddpkit.inference.inputs import random_inputs
from ddpkit.inference.package import SUFFIX, Metadata, compile_package, load_package

Say = Callable[[str], None]
_PATIENCE = 10.0  # seconds between lines while there is nothing new


def export(
    model: nn.Module,
    path: Path | str,
    *,
    device: str = "cpu",
    source: str = "",
    averaged: bool = False,
    say: Say | None = None,
) -> Metadata:
    """Compiles a model into one file, compares what it computes with the model, and moves it into place.

    Args:
        model: of the model contract, with `species`, `r_max` and a method `for_inference()`, as `ddpkit.models` have it. That
            returns a module of one rank's atoms (`ddpkit.inference.package` says what it is called with and returns) with the
            attributes `message_passing` (whether it takes `incoming`) and `exchange_width` (of the widest row that it exchanges).
        path: of the file, ending in .pt2. What was there is replaced.
        device: "cpu" or "cuda": where the file computes. A file for GPUs is made on one.
        source: where the weights come from, in words.
        averaged: whether they were averaged in training.
        say: called with a line of text when there is something new, and every ten seconds.

    Returns:
        What the file says of itself.

    Raises:
        InputError: the model cannot be exported, the device is not there, or the file cannot be written.
        ParityError: the compiled code computes something else than the model; nothing is written.
    """
    path = Path(path)
    _require_place(path)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "There is no NVIDIA GPU to compile for: export with --device cpu, or on a machine that has one."
        )
    if not all(hasattr(model, name) for name in ("species", "r_max", "for_inference")):
        raise InputError(
            f"{type(model).__name__} cannot be exported: it needs species, r_max and a method for_inference() that returns a "
            "module of one rank's atoms (see ddpkit.inference.export), as Allegro and NequIP have them."
        )
    model = copy.deepcopy(model).to(device).eval()
    module = cast("Any", model).for_inference().to(device).eval()
    metadata = _describe(model, module, device, source=source, averaged=averaged)
    say = say or (lambda _: None)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        made = Path(folder) / path.name
        with _patient(say):
            metadata = compile_package(module, metadata, made, say)
            say("comparing the compiled code with the model")
            _require_same(model, module, made, metadata)
        made.replace(path)
    return metadata


def _require_place(path: Path) -> None:
    if path.suffix != SUFFIX:
        raise InputError(f"{path} does not end in {SUFFIX}: give such a name, by which the file is recognised.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): choose another place.") from error
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the name of a file.")


def _describe(model: nn.Module, module: nn.Module, device: str, *, source: str, averaged: bool) -> Metadata:
    told = cast("Any", model)
    dtype = getattr(model, "dtype", next((p.dtype for p in model.parameters()), torch.float64))
    name = str(dtype).removeprefix("torch.")
    return Metadata(
        model=type(model).__name__,
        species=[str(symbol) for symbol in told.species],
        r_max=float(told.r_max),
        cutoffs=getattr(model, "cutoffs", None),
        precision=str(getattr(model, "precision", name)),
        dtype=name,
        message_passing=bool(module.message_passing),
        exchange_width=int(cast("int", module.exchange_width)),
        parameters=sum(p.numel() for p in model.parameters()),
        weights_sha256=checksum(model),
        averaged=averaged,
        device=device,
        torch=torch.__version__,
        ddpkit=__version__,
        source=source,
    )


def checksum(model: nn.Module) -> str:
    """SHA-256 of a model's state: names, types, shapes and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _patient(say: Say) -> Iterator[None]:
    """Says now and then that work goes on."""
    done, start = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(_PATIENCE):
            say(f"still at it after {time.monotonic() - start:.0f} s")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


# Owned atoms, ghosts, most neighbours: sizes that were not compiled with, the smallest among them.
_RANKS = ((2, 0, 2), (3, 1, 2), (40, 25, 30))
# Atoms in the frames of batches.
_FRAMES = ((1,), (2, 1), (27, 1, 8))


def _require_same(model: nn.Module, module: nn.Module, path: Path, metadata: Metadata) -> None:
    """Compares compiled code with the module that it was made of, with ghosts, and with the model itself, in batches of frames.

    Raises:
        ParityError: they differ.
    """
    tensors = [*model.parameters(), *model.buffers()]
    tolerance = tolerance_for(tensors)
    compared: list[Difference] = []
    compiled = load_package(path, torch.device(metadata.device))
    for owned, ghosts, most in _RANKS:
        inputs = random_inputs(
            owned,
            ghosts,
            most,
            species=len(metadata.species),
            r_max=metadata.r_max,
            message_passing=metadata.message_passing,
            seed=owned,
            device=metadata.device,
        )
        owner = torch.arange(ghosts, device=metadata.device) % owned
        with exchanging(Mirrored(owner)), torch.autograd.set_multithreading_enabled(False):
            ours, theirs = (
                dict(zip(("energies", "slopes"), run(*inputs.arguments()), strict=True)) for run in (compiled, module)
            )
        compared += differences(ours, theirs, [], tolerance, f"{owned} atoms and {ghosts} ghosts")
    exported = Exported(path)
    for atoms in _FRAMES:
        batch = _batch(atoms, metadata)
        compared += differences(
            exported(batch), model(batch), [], tolerance, f"frames of {', '.join(map(str, atoms))} atoms"
        )
    bad = [d for d in compared if not d.is_fine]
    if bad:
        worst = max(bad, key=lambda d: d.error)
        raise ParityError(
            f"The compiled code computes something else than the model: {worst.name} by {worst.error:.2g} relative (allowed "
            f"{worst.tolerance:.0e}) for {worst.shape}, so nothing was written: look for what in the model depends on sizes, "
            "random numbers or Python state."
        )


def _batch(atoms: tuple[int, ...], metadata: Metadata) -> Batch:
    """Periodic frames of so many atoms near the points of a lattice."""
    random = np.random.default_rng(len(atoms))
    positions: list[np.ndarray] = []
    cells, ends, shifts = [], [], []
    spacing = metadata.r_max / 2.2
    for count in atoms:
        side = round(np.ceil(count ** (1 / 3)))
        points = np.stack(np.meshgrid(*[np.arange(side)] * 3), -1).reshape(-1, 3)[:count]
        place = spacing * (points + random.uniform(-0.1, 0.1, (count, 3)))
        cell = spacing * side * (np.eye(3) + random.uniform(-0.05, 0.05, (3, 3)))
        frame = Frame(np.ones(count, np.int64), place, 0.0, np.zeros((count, 3)), cell=cell, pbc=np.array([True] * 3))
        centre, neighbour, shift = neighbour_list(frame, metadata.r_max)
        ends.append(np.stack([centre, neighbour]) + sum(len(earlier) for earlier in positions))
        positions.append(place)
        cells.append(cell)
        shifts.append(shift)
    total = sum(atoms)
    return Batch(
        positions=torch.from_numpy(np.concatenate(positions)),
        species=torch.from_numpy(random.integers(0, len(metadata.species), total)),
        frame=torch.repeat_interleave(torch.arange(len(atoms)), torch.tensor(atoms)),
        edge_index=torch.from_numpy(np.concatenate(ends, 1)),
        edge_shift=torch.from_numpy(np.concatenate(shifts)),
        num_frames=len(atoms),
        cell=torch.from_numpy(np.stack(cells)),
    ).to(metadata.device)
