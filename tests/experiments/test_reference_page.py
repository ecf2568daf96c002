"""The reference page is that of the docstrings."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_what_the_docstrings_make():
    made = runpy.run_path(str(DOCS / "make_reference.py"))["page"]()
    assert (DOCS / "reference.md").read_text() == made, "run python docs/make_reference.py"
    assert "| `train.timeout` | `600.0` | seconds that a rank waits" in made
    assert "| `check_every` | `0` | compare checksums" in made
