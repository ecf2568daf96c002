"""The site is built without a warning: links, anchors and navigation hold. The README's links do too."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fences import ROOT, pages


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    variables = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    made = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "tutorials/first-study.html", "results/index.html"} <= made
    assert not [name for name in made if re.search(r"run|numerics", Path(name).parent.name)], "run folders stay out"


@pytest.mark.parametrize("page", [page for page in pages() if "/" not in page] + ["CHANGELOG.md"])
def test_links_of_pages_outside_the_site(page):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    missing = [one for one in targets if not one.startswith("https://") and not (ROOT / one).exists()]
    assert not missing


def test_files_that_the_code_names():
    """Pages that messages and docstrings point to."""
    names = set()
    for room in ("ddpkit", "models", "experiments", "analysis", "tests"):
        for path in (ROOT / room).rglob("*"):
            if path.suffix in (".py", ".yaml", ".html", ".cpp"):
                names |= set(re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text()))
    assert names
    assert not [name for name in sorted(names) if not (ROOT / name).is_file()]
