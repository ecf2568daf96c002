"""The documentation's pages and their blocks of code."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOT_RUN = {"text"}  # output, scripts of other programs
LANGUAGES = {"bash", "python", "yaml", *NOT_RUN}

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?(?P<rest>.*)$")


@dataclass(frozen=True)
class Block:
    """A block of code: where it stands, and what it is."""

    page: str
    line: int
    language: str
    title: str  # the file that it is, if any
    text: str

    def __str__(self):
        return f"{self.page}, line {self.line}"


def pages():
    """Every page that is written by hand or made: the README, CONTRIBUTING, and all of docs/."""
    of_runs = re.compile(r"docs/results/[^/]+/(?!README\.md)")  # tables beside run folders
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [name for path in found if not of_runs.match(name := path.relative_to(ROOT).as_posix())]


def blocks(page):
    """The blocks of a page, in order."""
    made, opened, lines = [], None, []
    for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is None and fence:
            assert not fence["rest"].strip(), f"{page}, line {number}: {line.strip()!r} is no opening of a block"
            opened, lines = (number, fence), []
        elif opened and line.strip() == "```":
            start, fence = opened
            made.append(Block(page, start, fence["language"], fence["title"] or "", "\n".join(lines) + "\n"))
            opened = None
        elif opened:
            lines.append(line.removeprefix(opened[1]["indent"]))
    assert opened is None, f"{page}: the block of line {opened[0]} does not end"
    return made
