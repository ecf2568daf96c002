"""`architecture.md`: the files of each room, by the first sentence of each."""

import ast
from pathlib import Path

from making.docstrings import first, table

ROOT = Path(__file__).parents[2]
PLACES = {"ddpkit.models": "models", "ddpkit.experiments": "experiments", "ddpkit.analysis": "analysis"}
"""Where a package lies that is mapped into `ddpkit` (`[tool.setuptools.package-dir]`)."""


def folder(room: str) -> Path:
    """Where a room lies."""
    head = next((name for name in PLACES if room == name or room.startswith(f"{name}.")), None)
    return ROOT / (room if head is None else PLACES[head] + room.removeprefix(head)).replace(".", "/")


def files(room: str) -> str:
    """The files of a room in a table."""
    rows = []
    for path in sorted(folder(room).glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text()))
        if text:
            rows.append((f"`{path.relative_to(ROOT)}`", first(text)))
    return table(("file", "what it holds"), rows)
