"""Checkpoints that are whole or absent, and that load without running code."""

import os
import random
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ddpkit.errors import InputError

FORMAT = 1
_KEYS = {"model_spec", "model", "ema", "optimizer", "scheduler", "progress"}


def snapshot(state: Any) -> Any:
    """A copy of nested state with every tensor on the CPU, independent of what training does next."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(snapshot(value) for value in state)
    return state


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint to a temporary name, then renames it.

    Raises:
        InputError: the disk is full or cannot be written; what was there before is untouched.
    """
    temporary = path.with_name(f"{path.name}.part")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        temporary.unlink(missing_ok=True)
        why = " ".join(str(error).split())[:200]
        raise InputError(
            f"The checkpoint {path} could not be written ({why}): free some space; the one before it is untouched."
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU; tensors and plain values only.

    Raises:
        InputError: the file is missing, torn, or no checkpoint of this package.
    """
    if not path.is_file():
        raise InputError(f"There is no checkpoint {path}: give a run folder that has one, or a checkpoint's file.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"The checkpoint {path} cannot be read ({type(error).__name__}): it is truncated or no checkpoint; use another one."
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or not state.keys() >= _KEYS:
        raise InputError(f"{path} is not a ddpkit checkpoint of format {FORMAT}: use one that this version wrote.")
    return state


def load_to_resume(run: Path) -> dict[str, Any]:
    """What a run goes on from: its last checkpoint.

    Raises:
        InputError: there is none that can be read. Another one is named, not taken: what it lacks would be trained again.
    """
    last, best = run / "checkpoints" / "last.pt", run / "checkpoints" / "best.pt"
    if not last.exists() and not best.exists():
        raise InputError(
            f"{run} has no checkpoint to go on from (the run ended before its first one, or had train.checkpoint_every=never): "
            f"start a new run instead, in another run_dir or with run_dir={run}, which moves aside what a failed run has left."
        )
    try:
        return load(last)
    except InputError as error:
        try:
            step = load(best)["progress"]["step"]
        except InputError:
            remedy = "start a new run with another run_dir."
        else:
            remedy = f"`cp {best} {last}` lets it go on from the best one, after step {step}."
        why = str(error).partition(": ")[0]
        raise InputError(f"{why}: {remedy}") from error


def inference_weights(state: dict[str, Any]) -> dict[str, Any]:
    """The weights to predict with: averaged ones where the run kept them."""
    if state["ema"] is None:
        return dict(state["model"])
    return {name.removeprefix("module."): value for name, value in state["ema"].items() if name.startswith("module.")}


def checkpoint_of(path: Path) -> Path:
    """The checkpoint to predict with: a run folder's best, else its last; a file is one itself."""
    if not path.is_dir():
        return path
    best = path / "checkpoints" / "best.pt"
    return best if best.is_file() else path / "checkpoints" / "last.pt"


def load_model(path: Path) -> nn.Module:
    """The model of a run folder (its best checkpoint, else its last) or of a checkpoint file, ready to predict.

    The model's class is named in the checkpoint; it must be a torch module.

    Raises:
        InputError: there is no such checkpoint, or its model cannot be built here.
    """
    path = checkpoint_of(path)
    state = load(path)
    target = str(state.get("model_spec", {}).get("_target_"))
    home, _, name = target.rpartition(".")
    try:
        kind = getattr(import_module(home), name, None)
    except (ImportError, ValueError):
        kind = None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise InputError(
            f"The model {target} of {path} is not a torch module here: install the package that it belongs to."
        )
    try:
        settings = {key: value for key, value in state["model_spec"].items() if key != "_target_"}
        if not torch.cuda.is_available():  # a model trained on a GPU predicts anywhere
            settings |= getattr(kind, "portable", {})
        model = kind(**settings)
        model.load_state_dict(inference_weights(state))
    except (RuntimeError, TypeError, KeyError) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(
            f"The weights of {path} do not fit {target} here ({why}): use the version that wrote it."
        ) from error
    return model.eval()


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of this process's random number generators, in tensors and plain values: torch's, Python's and numpy's."""
    version, words, gauss = random.getstate()
    name, key, place, has_gauss, cached = np.random.get_state()  # noqa: NPY002  (a user's model may draw from it)
    assert name == "MT19937"
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": [version, torch.tensor(words), gauss],
        "numpy": [torch.tensor(np.asarray(key, dtype=np.int64)), place, has_gauss, cached],
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Goes on from `random_state()`."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    key, *rest = state["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), *rest))  # noqa: NPY002


class Writer:
    """Writes checkpoints in a background thread. The training loop waits only for the copy to the CPU.

    Args:
        timeout: seconds that a write may take.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._thread: threading.Thread | None = None
        self._path = Path()
        self._error: BaseException | None = None

    def write(self, paths: list[Path], state: dict[str, Any]) -> None:
        """Starts writing `state` to every path, once the write before has ended."""
        self.wait()
        copied = snapshot(state)
        self._path = paths[0]
        self._thread = threading.Thread(target=self._write, args=(paths, copied), name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, paths: list[Path], state: dict[str, Any]) -> None:
        try:
            for path in paths:
                save(path, state)
        except BaseException as error:  # noqa: BLE001  (raised where the loop waits)
            self._error = error

    def wait(self) -> None:
        """Waits for the write that is running, and raises its error if it failed.

        Raises:
            InputError: what `save` raises, or the write takes longer than the timeout.
        """
        if self._thread is not None:
            self._thread.join(self._timeout)
            if self._thread.is_alive():
                raise InputError(
                    f"The checkpoint {self._path} has not been written after {self._timeout:g} s: see whether its disk still "
                    "answers, or raise train.timeout; the one before it is untouched."
                )
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raises what went wrong so far, without waiting."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
