"""Fills in what pages take from the code: `python docs/make_reference.py`.

A page says where: what stands between `<!-- made: NAME -->` and `<!-- end -->` is replaced.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

from making import api, commands, configuration, errors, rooms  # noqa: E402

PAGES = (
    "architecture.md",
    *(f"reference/{name}.md" for name in ("commands", "configuration", "api", "errors")),
)
_BLOCK = re.compile(r"(<!-- made: (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_FILES = "files of "


def filled(text: str) -> str:
    """A page with everything made anew that is made."""
    return _BLOCK.sub(lambda found: f"{found[1]}\n{_make(found[2])()}\n\n{found[4]}", text)


def _make(name: str) -> Callable[[], str]:
    if name.startswith(_FILES):
        return lambda: rooms.files(name.removeprefix(_FILES))
    makers: dict[str, Callable[[], str]] = {
        **configuration.BLOCKS, **commands.BLOCKS, **api.BLOCKS, **errors.BLOCKS,
    }  # fmt: skip
    return makers[name]


if __name__ == "__main__":
    for name in PAGES:
        page = DOCS / name
        page.write_text(filled(page.read_text()))
