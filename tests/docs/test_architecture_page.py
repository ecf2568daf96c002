"""The map of rooms and the table of words are what the code has."""

import ast
import re
import sys
import tomllib

import pytest
from pages import DOCS, ROOT, rows, section

sys.path.insert(0, str(DOCS))
from making.rooms import folder

PAGE = "architecture.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTRACTS = {contract["name"]: contract for contract in PROJECT["tool"]["importlinter"]["contracts"]}
ROOMS = {name: (place, imports) for name, place, _, imports in rows(section(PAGE, "## Rooms"))}


def words(cell):
    return [word for word in cell.replace(",", " ").split() if word]


def room_of(module):
    return max((name for name in ROOMS if module == name or module.startswith(f"{name}.")), key=len)


def imported(path):
    """The modules of ours that a file names in its imports, wherever they stand."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "ddpkit")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ddpkit":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_package_is_a_room_and_every_room_a_package():
    code = {
        name for name in PROJECT["tool"]["setuptools"]["packages"] if not name.startswith("ddpkit.experiments.conf")
    }
    assert set(ROOMS) == code


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_lies_where_the_page_says_and_imports_what_it_says(room):
    place, told = ROOMS[room]
    assert folder(room) == ROOT / place.rstrip("/")
    names = (name for path in folder(room).glob("*.py") for name in imported(path))
    assert {room_of(name) for name in names} - {room} == set(words(told))


def test_contracts_are_those_of_the_page():
    told = {name: (sources, words(forbidden)) for name, sources, forbidden in rows(section(PAGE, "## Contracts"))}
    assert set(told) == set(CONTRACTS)
    for name, (sources, forbidden) in told.items():
        assert CONTRACTS[name]["type"] == "forbidden"
        assert CONTRACTS[name]["forbidden_modules"] == forbidden
        if sources.startswith("all of ddpkit"):
            assert set(CONTRACTS[name]["source_modules"]) == of_library(), name
        else:
            assert CONTRACTS[name]["source_modules"] == words(sources)


def of_library():
    """The modules and packages of the folder ddpkit: a new one must be under contract too."""
    inside = (ROOT / "ddpkit").iterdir()
    names = {path.stem for path in inside if path.suffix == ".py" or (path / "__init__.py").exists()} - {"__init__"}
    return {f"ddpkit.{name}" for name in names}


def test_rooms_that_a_contract_forbids_are_not_allowed_in_the_map():
    for contract in CONTRACTS.values():
        for source in set(contract["source_modules"]) & set(ROOMS):
            assert not set(words(ROOMS[source][1])) & set(contract["forbidden_modules"])


@pytest.mark.parametrize(("word", "meaning", "place"), rows(section(PAGE, "## Words")), ids=lambda cell: cell[:20])
def test_a_word_is_used_where_the_page_says(word, meaning, place):
    path = ROOT / place
    assert meaning.endswith(".")
    used = re.sub(r"[\s_-]+", " ", path.read_text())
    spelt = re.sub(r"[\s_-]+", " ", word)
    assert re.search(rf"\b{spelt}(s|es|ed)?\b", used, re.IGNORECASE)


def test_words_stand_once():
    told = [word for word, _, _ in rows(section(PAGE, "## Words"))]
    assert len(told) == len(set(told))


def test_files_of_a_step_are_there():
    named = re.findall(r"`([\w/]+\.py)`", section(PAGE, "## One step"))
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_each_room_lists_its_files():
    headings = re.findall(r"^### `(.+)`$", section(PAGE, "## Files, room by room"), re.MULTILINE)
    assert headings == list(ROOMS)
    listed = {name for name, _ in rows(section(PAGE, "## Files, room by room"))}
    every = {
        path for room in ROOMS for path in folder(room).glob("*.py") if ast.get_docstring(ast.parse(path.read_text()))
    }
    assert listed == {str(path.relative_to(ROOT)) for path in every}


def test_a_file_says_what_it_holds():
    files = (path for room in ROOMS for path in folder(room).glob("*.py") if path.name != "__init__.py")
    assert [path for path in files if not ast.get_docstring(ast.parse(path.read_text()))] == []
