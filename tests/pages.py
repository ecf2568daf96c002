"""Pages of the documentation, read as their readers do."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def text(page):
    return (DOCS / page).read_text()


def section(page, heading):
    """What stands below a heading, up to the next one of its rank."""
    _, _, below = text(page).partition(f"\n{heading}\n")
    assert below, f"{page} has no heading {heading!r}"
    rank = len(heading) - len(heading.lstrip("#"))
    return re.split(rf"^#{{1,{rank}}} ", below, maxsplit=1, flags=re.MULTILINE)[0]


def rows(markdown):
    """The rows of all tables in a text, without their heads: cells as they are shown, without back-ticks."""
    found = []
    lines = markdown.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("|") and not re.match(r"\|[ -]+\|", line) and not _is_head(lines, number):
            cells = re.split(r"(?<!\\)\|", line.strip()[1:-1])
            found.append([cell.strip().replace("\\|", "|").replace("`", "") for cell in cells])
    return found


def _is_head(lines, number):
    return number + 1 < len(lines) and re.match(r"\|\s*-", lines[number + 1]) is not None
