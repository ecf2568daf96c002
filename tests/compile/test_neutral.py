"""The compiler serves strategies through what they say of themselves, and knows none of them."""

import re
from pathlib import Path

import ddpkit.compile
from ddpkit.sync import STRATEGIES

NAMES = {*STRATEGIES} - {"none"}
CLASSES = {path.rpartition(".")[2] for path in STRATEGIES.values()}
OPTIONS = {"optimizer_in_graph", "reduce_dtype", "bucket_mb"}
OTHERWISE = ("standard library",)


def test_no_strategy_is_known_by_name():
    words = re.compile(rf"\b({'|'.join(sorted(NAMES | CLASSES | OPTIONS))})\b")
    files = sorted(Path(ddpkit.compile.__file__).parent.glob("*.py"))
    assert len(files) > 10
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            for harmless in OTHERWISE:
                line = line.replace(harmless, "")  # noqa: PLW2901
            assert not words.search(line), f"{file.name}:{number}: {line.strip()}"


def test_no_strategy_is_imported():
    for file in Path(ddpkit.compile.__file__).parent.glob("*.py"):
        modules = re.findall(r"(?:from|import) ddpkit\.sync\.(\w+)", file.read_text())
        assert set(modules) <= {"after", "base", "agreement"}, file.name
