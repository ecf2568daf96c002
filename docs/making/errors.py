"""`reference/errors.md`: the classes of errors, and every sentence that the code raises, by area."""

import ast
import html
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from ddpkit import errors
from making.docstrings import first, table

ROOT = Path(__file__).parents[2]
ROOMS = ("ddpkit", "models", "experiments", "analysis")

AREAS = {
    "Ranks: starting, meeting, waiting, ending": ("ddpkit/ranks/",),
    "Synchronisation and strategies": ("ddpkit/sync/",),
    "Steps, compilation and recordings": (
        "ddpkit/compile/", "ddpkit/capture/", "ddpkit/step.py", "ddpkit/trained.py", "ddpkit/update.py", "ddpkit/kernels.py",
        "ddpkit/nvrtc.py", "ddpkit/padding.py", "ddpkit/packing.py", "ddpkit/torch_private.py",
    ),
    "Run folders, checkpoints and training": (
        "ddpkit/record.py", "ddpkit/lock.py", "ddpkit/checkpoint.py", "ddpkit/train.py", "ddpkit/ledger.py", "ddpkit/schedule.py",
        "ddpkit/average.py", "ddpkit/errors.py", "ddpkit/loss.py", "ddpkit/batch.py", "ddpkit/evaluate.py",
        "ddpkit/projection.py", "ddpkit/profiler.py", "experiments/run.py", "experiments/setup.py", "experiments/turns.py",
    ),
    "Configuration and commands": ("experiments/config.py", "experiments/cli.py"),
    "Data": (
        "ddpkit/data/", "experiments/data.py", "experiments/run_data.py", "experiments/structures.py", "experiments/torsion.py",
    ),
    "Models and their weights": ("models/", "experiments/models_table.py"),
    "Inference, ASE and LAMMPS": (
        "ddpkit/inference/", "ddpkit/calculator.py", "experiments/inference.py", "experiments/lammps.py", "experiments/export.py",
        "experiments/lammps_forces.py", "experiments/model_calls.py", "experiments/md_check.py", "experiments/conservation.py",
    ),
    "Lightning": ("ddpkit/lightning.py",),
    "Files of nequip": (
        "experiments/nequip_file.py", "experiments/nequip_model.py", "experiments/nequip_training.py",
        "experiments/convert_config.py", "experiments/peers.py",
    ),
    "Studies and analysis": (
        "analysis/", "experiments/experiment.py", "experiments/studies.py", "experiments/evaluate.py",
        "experiments/nequip_trainer.py", "experiments/nequip_clock.py",
    ),
    "Benchmarks, doctor and predict": (
        "experiments/bench_", "experiments/doctor.py", "experiments/predict.py", "experiments/counting.py",
        "experiments/check.py",
    ),
    "Tests of strategies, models and runs": ("ddpkit/testing/",),
}  # fmt: skip
"""Heading -> beginnings of the paths whose sentences stand below it."""

_WORDED_ELSEWHERE = ("ddpkit/ranks/", "ddpkit/sync/", "ddpkit/ledger.py", "ddpkit/data/labels.py")
"""Where sentences are put together by functions of their own, apart from where they are raised."""
_LONG = 40  # characters of what is taken for a sentence there


def kinds() -> dict[str, type[BaseException]]:
    """The classes of errors that ddpkit defines for its users, by name."""
    found = vars(errors).items()
    return {name: kind for name, kind in found if inspect.isclass(kind) and kind.__module__ == errors.__name__}


def classes() -> str:
    """The classes in a table; the exit code is that of commands (`experiments/cli.py`)."""
    rows = [
        (
            f"`{name}`",
            f"`{kind.__bases__[0].__name__}`",
            "2" if name in ("InputError", "RankDisagreementError") else "1",
            first(kind.__doc__ or ""),
        )
        for name, kind in kinds().items()
    ]
    return table(("class", "is a", "exit code", "what it tells"), rows)


def sentences() -> str:
    """Every sentence, by area and file; what is filled in stands as an ellipsis."""
    out = []
    for heading, starts in AREAS.items():
        out.append(f"### {heading}")
        for path in sources():
            if path.startswith(starts) and (lines := [*dict.fromkeys(of_file(path))]):
                out.append(f"`{path}`")
                out.append("\n".join(f"- {_code(name)}{text}" for name, text in lines))
    return "\n\n".join(out)


def _code(name: str) -> str:
    return f"*{name}*: " if name and name != "InputError" else ""


def sources() -> list[str]:
    """The files of the rooms."""
    return sorted(str(path.relative_to(ROOT)) for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def of_file(path: str) -> Iterator[tuple[str, str]]:
    """Class and sentence of what a file raises, in its order; no class where a function only words it."""
    tree = ast.parse((ROOT / path).read_text())
    known = {*kinds(), "DistError"}
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and _name(n.func) in known and n.args]
    found = [(call.lineno, _name(call.func), _text(call.args[0])) for call in calls]
    if path.startswith(_WORDED_ELSEWHERE):
        raised = {part for call in calls for part in ast.walk(call.args[0])}
        worded = [n for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) and n not in raised]
        found += [(node.lineno, "", _text(node)) for node in worded if _is_sentence(_text(node))]
    yield from ((name, _markdown(text)) for _, name, text in sorted(found) if text)


def _name(function: ast.expr) -> str:
    return (
        function.id if isinstance(function, ast.Name) else function.attr if isinstance(function, ast.Attribute) else ""
    )


def _text(node: ast.expr) -> str:
    """A literal's text with an ellipsis for what is filled in; empty where it is no literal."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
        return re.sub("…+", "…", "".join(map(str, parts)))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [_text(node.left), _text(node.right)]
        return "".join(part or "…" for part in parts) if any(parts) else ""
    return ""


def _is_sentence(text: str) -> bool:
    return len(text) >= _LONG and " " in text and (text[0].isupper() or text[0] == "…") and "\n" not in text[:-1]


def _markdown(text: str) -> str:
    """A sentence on one line, of which Markdown makes nothing else."""
    return html.escape(re.sub(r"([\\*_\[\]`])", r"\\\1", " ".join(text.split())), quote=False)


BLOCKS = {"classes of errors": classes, "sentences": sentences}
