"""The outcome of a run in its folder's `summary.json`, also where nothing but Python's own library is loaded."""

import json
import os
import threading
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that readers see the old one or the new one, never half of one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def failure(path: Path) -> str:
    """Why the run of a folder failed, as its `summary.json` has it; empty where it says nothing of the kind."""
    try:
        facts = json.loads((path / "summary.json").read_text())
    except (OSError, ValueError):
        return ""
    return str(facts.get("error") or "") if facts.get("status") == "failed" else ""


def record_failure(path: Path, error: str, **more: object) -> None:
    """Has the `summary.json` of a run that is said to be running tell that it failed, and why. Any rank may do this.

    Args:
        path: the run folder.
        error: why.
        more: what else is known, such as how many updates were lost.
    """
    summary = path / "summary.json"
    try:
        facts = json.loads(summary.read_text())
    except (OSError, ValueError):
        return
    if facts.get("status") != "running":
        return
    text = json.dumps(facts | {"status": "failed", "error": error} | more, indent=2) + "\n"
    try:
        write_atomically(summary, text)
    except OSError:  # on a full disk there is still the room that the file has
        with suppress(OSError), summary.open("r+") as file:
            file.write(text)
            file.truncate()
