"""Times the calls of a model in Python, in a process of its own: `python -m ddpkit.experiments.model_calls ENGINE MODEL FILE`.

It writes `calls.json` with the median seconds of a call of the model alone, on a graph that is made once, and of a whole step of
ASE's calculator, neighbour list included.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms, io

from ddpkit.calculator import Calculator
from ddpkit.data import Frame, collate

_WARM = 3


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=("package", "eager", "nequip"))
    parser.add_argument("model", type=Path)
    parser.add_argument("structure", type=Path)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    atoms = io.read(args.structure)
    started = time.monotonic()
    step, call, edges = (_peer if args.engine == "nequip" else _ours)(args.model, atoms, args.device)
    loading = time.monotonic() - started
    result = {
        "seconds_load": loading,
        "seconds_call": _median(call, args.calls, args.device),
        "seconds_step": _median(step, max(3, args.calls // 5), args.device),
        "edges": edges,
    }
    Path("calls.json").write_text(json.dumps(result, indent=1) + "\n")


def _median(function: Callable[[], object], calls: int, device: str) -> float:
    times = []
    for number in range(_WARM + calls):
        _wait(device)
        started = time.perf_counter()
        function()
        _wait(device)
        if number >= _WARM:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _jitter(atoms: Atoms) -> None:
    """Moves atoms a little, so that no calculator answers from memory."""
    atoms.positions += 1e-6 * np.random.default_rng(1).normal(size=atoms.positions.shape)


def _ours(path: Path, atoms: Atoms, device: str) -> tuple[Callable[[], object], Callable[[], object], int]:
    calculator = Calculator(path, device=device)
    atoms.calc = calculator
    periodic = bool(atoms.pbc.any())
    frame = Frame(
        atoms.numbers.astype(np.int64), np.array(atoms.positions), 0.0, np.zeros((len(atoms), 3)),
        cell=np.array(atoms.cell) if periodic else None, pbc=np.array(atoms.pbc),
    )  # fmt: skip
    model: Any = calculator.model
    batch = collate([frame], model.species, model.r_max, labels=False).to(calculator.device)

    def step() -> None:
        _jitter(atoms)
        atoms.get_forces()

    return step, lambda: model(batch), batch.edge_index.shape[1]


def _peer(path: Path, atoms: Atoms, device: str) -> tuple[Callable[[], object], Callable[[], object], int]:
    from nequip.integrations.ase import NequIPCalculator

    calculator = NequIPCalculator.from_compiled_model(path, device=device, chemical_species_to_atom_type_map=True)
    atoms.calc = calculator
    data = calculator.atoms_to_data(atoms)

    def step() -> None:
        _jitter(atoms)
        atoms.get_forces()

    return step, lambda: calculator.call_model(dict(data)), data["edge_index"].shape[1]


if __name__ == "__main__":
    main()
