"""The pages of the reference hold everything that there is, as the code has it."""

import ast
import inspect
import re
import runpy
import sys

import pytest
from omegaconf import OmegaConf
from pages import DOCS, ROOT, rows, section, text

import ddpkit
from ddpkit.errors import InputError
from ddpkit.experiments.cli import VERBS
from ddpkit.experiments.config import flat, read
from ddpkit.sync import STRATEGIES, GradientSync, find_strategy

sys.path.insert(0, str(DOCS))
from making import configuration, errors

MAKER = runpy.run_path(str(DOCS / "make_reference.py"))
CODE = [path for room in errors.ROOMS for path in (ROOT / room).rglob("*.py")]


@pytest.mark.parametrize("page", MAKER["PAGES"])
def test_a_page_is_what_the_code_makes(page):
    assert text(page) == MAKER["filled"](text(page)), "run python docs/make_reference.py"


def test_a_page_is_filled_in_where_it_says():
    assert MAKER["filled"]("a\n<!-- made: classes of errors -->\nold\n<!-- end -->\nb") != "a"
    with pytest.raises(KeyError):
        MAKER["filled"]("<!-- made: nothing that there is -->\n<!-- end -->")


# --- configuration ------------------------------------------------------------------------------------------------------------


def described():
    """Key -> cells of its row."""
    return {row[0]: row[1:] for row in rows(text("reference/configuration.md"))}


def choices():
    for group in configuration.GROUPS:
        for name in configuration.options(group):
            yield f"{group}={name}"


@pytest.mark.parametrize("override", choices())
def test_every_key_of_every_file_is_described(override):
    needed = ["data.path=frames.xyz"] if override in ("data=files", "experiment=small_molecule") else []
    keys = set(flat(read([override, *needed])))
    told = described()
    named = {"model._target_", "strategy._target_", "strategy.name"}  # in the text
    missing = sorted(keys - told.keys() - named)
    assert missing == []
    assert all(told[key][-1] for key in keys - named)
    assert all(f"`{name}`" in text("reference/configuration.md") for name in named)


def test_defaults_are_those_of_a_run():
    config, compared = read([]), 0
    for key, _, default, _ in rows(section("reference/configuration.md", "## Keys of a run")):
        value = configuration.written(OmegaConf.select(config, key)) if key not in configuration.GROUPS else config
        if "(" not in default and key != "data.cache" and value is not config:
            compared += 1
            assert default == value, key
    assert compared > 45


def test_values_are_those_that_are_taken():
    assert described()["train.timeout"][1:] == [
        "600.0",
        "seconds that a rank waits for the others before it ends the run.",
    ]
    assert described()["strategy.check_every"][1].startswith("compare checksums")
    assert described()["precision"][0] == "mixed, float32, float64"
    assert described()["train.timeout"][0] == "a number (greater than 0 and at most 1e8 (three years))"
    assert described()["train.max_steps"][0] == "a whole number (at least 1), null"
    for key, (values, *_) in described().items():
        if "at least 1" in values:
            with pytest.raises(InputError, match="out of range"):
                read([f"{key}=0"])


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_option_of_a_strategy_is_described(name):
    told = {row[0] for row in rows(section("reference/configuration.md", f"### `strategy={name}`"))}
    own, of_all = (inspect.signature(kind).parameters.values() for kind in (find_strategy(name), GradientSync))
    taken = {f"strategy.{p.name}" for p in (*own, *of_all) if p.kind is p.KEYWORD_ONLY} - {"strategy.comm"}
    assert told - {"strategy.NAME"} == taken
    assert ("strategy.NAME" in told) == (name == "standard")  # those of torch's wrapper


def test_every_variable_of_the_environment_is_described():
    files = [*CODE, *(ROOT / "experiments" / "conf").rglob("*.yaml")]
    there = {name for path in files for name in re.findall(r"\bDDPKIT_[A-Z]+\b", path.read_text())}
    of_ours_alone = {
        "DDPKIT_RANK",
        "DDPKIT_RANKS",
        "DDPKIT_LAMMPS",
        "DDPKIT_FAULT",
        "DDPKIT_CAMPAIGN",
    }  # set by ddpkit itself
    table = rows(section("reference/configuration.md", "## Environment variables"))
    told = {name for names, _ in table for name in names.split(", ") if name.startswith("DDPKIT_")}
    assert told == there - of_ours_alone


# --- commands and names -------------------------------------------------------------------------------------------------------


def test_every_command_has_a_part():
    told = re.findall(r"^## `ddpkit (.+)`$", text("reference/commands.md"), re.MULTILINE)
    assert told == list(VERBS)


def test_options_are_there_with_what_they_do():
    told = {row[0]: row[1] for row in rows(section("reference/commands.md", "## `ddpkit analyze`"))}
    assert told["--warmup EPOCHS"].startswith("epochs to leave out")
    assert rows(section("reference/commands.md", "### `ddpkit data prepare ase`"))
    assert "Home" not in text("reference/commands.md")


def test_every_public_name_has_a_part():
    told = set(re.findall(r"^### `(\w+)`$", text("reference/api.md"), re.MULTILINE))
    strategies = {name for name in ddpkit.__all__ if name.endswith("Sync") and name != "GradientSync"}
    assert set(ddpkit.__all__) - strategies - {"InputError", "__version__"} <= told
    configured = text("reference/configuration.md")
    assert all(f"`{name}`" in configured for name in strategies)


# --- errors -------------------------------------------------------------------------------------------------------------------


def raised():
    """Names of the classes that are raised in the code and end in Error, with those of ours that are defined anywhere."""
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any(
                ast.unparse(base).endswith(("Error", "Exception")) for base in node.bases
            ):
                yield node.name


def test_every_class_of_errors_has_a_row():
    told = {row[0] for row in rows(section("reference/errors.md", "## Classes"))}
    assert set(raised()) - {"RankFailure", "UnknownError"} == told  # of tests alone; caught where it is raised


def test_exit_codes_are_those_of_commands():
    told = {row[0]: row[2] for row in rows(section("reference/errors.md", "## Classes"))}
    for name, code in told.items():
        assert leaves_with(errors.kinds()[name]("why")) == int(code), name


def leaves_with(error):
    """The exit code of a command that meets an error."""
    import os
    from contextlib import redirect_stderr
    from io import StringIO
    from unittest.mock import patch

    from ddpkit.experiments import cli

    class Left(BaseException):
        pass

    def leave(code):
        raise Left(code)

    def fail():
        raise error

    with patch.object(os, "_exit", leave), redirect_stderr(StringIO()), pytest.raises(Left) as left:
        cli._leave(fail)
    return left.value.args[0]


def test_every_file_belongs_to_one_area():
    for path in errors.sources():
        areas = [area for area, starts in errors.AREAS.items() if path.startswith(starts)]
        assert len(areas) == 1 if [*errors.of_file(path)] else len(areas) <= 1, path
    for starts in errors.AREAS.values():
        assert all(any(path.startswith(start) for path in errors.sources()) for start in starts)


def test_every_sentence_is_there():
    count = 0
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in errors.kinds() and node.args:
                count += isinstance(node.args[0], ast.Constant | ast.JoinedStr)
    assert count > 450
    sentences = re.findall(r"^- (.+)$", section("reference/errors.md", "## Every sentence"), re.MULTILINE)
    assert len(sentences) > 0.9 * count  # some are raised in several places of a file


def plain(markdown):
    """A sentence as it is read."""
    words = re.sub(r"\\(.)", r"\1", markdown)
    return words.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def test_words_to_look_for_are_words_of_the_code():
    """What the tables quote is found below, or in the code where sentences are put together."""
    every = plain(section("reference/errors.md", "## Every sentence"))
    joined = "".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text()) for path in CODE)
    code = re.sub(r"\{[^{}\"]*\}", "…", joined)
    table = rows(section("reference/errors.md", "## Why a run stopped"))
    quoted = [words for row in table for words in re.findall(r'"(.+?)"', row[0])]
    assert len(quoted) > 30
    assert [words for words in quoted if words not in every and words not in code] == []
