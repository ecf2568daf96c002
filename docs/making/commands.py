"""`reference/commands.md`: every command and option, from the parsers and the commands' own texts."""

import argparse
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ddpkit.experiments.cli import SEVERAL_RANKS, VERBS
from ddpkit.testing import __main__ as suite
from making.docstrings import table


def overview() -> str:
    """Every command in a row."""
    rows = [
        (
            f"[`ddpkit {verb}`](#{_anchor(verb)})",
            does,
            "key=value" if overrides else "options",
            "yes" if verb in SEVERAL_RANKS else "",
        )
        for verb, (_, does, overrides) in VERBS.items()
    ]
    return table(("command", "does", "takes", "several ranks"), rows)


def _anchor(verb: str) -> str:
    return "ddpkit-" + verb.replace(" ", "-")


def commands() -> str:
    """Every command: what it says of itself, and its options."""
    return "\n\n".join(part for verb in VERBS for part in _command(verb))


def _command(verb: str) -> Iterator[str]:
    home, does, overrides = VERBS[verb]
    module = importlib.import_module(home)
    yield f"## `ddpkit {verb}`"
    if overrides:
        yield f"```text\n{module.__doc__.strip()}\n```"
        if verb == "experiment":
            yield "### `ddpkit experiment inference`"
            yield f"```text\n{module.inference.__doc__.strip()}\n```"
        return
    parser = argparse.ArgumentParser(prog=f"ddpkit {verb}", description=does[0].upper() + does[1:] + ".")
    module.add_arguments(parser)
    yield from _parser(parser)


def _parser(parser: argparse.ArgumentParser, text: str = "") -> Iterator[str]:
    if says := parser.description or text:
        yield f"{says[0].upper()}{' '.join(says.split())[1:].removesuffix('.')}."
    below: list[tuple[argparse.ArgumentParser, str]] = []
    rows = []
    for action in parser._actions:  # noqa: SLF001  (argparse tells of its options nowhere else)
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            texts = {choice.dest: choice.help or "" for choice in action._choices_actions}  # noqa: SLF001
            below += [(one, texts.get(name, "")) for name, one in action.choices.items()]
        elif not isinstance(action, argparse._HelpAction):  # noqa: SLF001
            rows.append((_called(action), _meaning(parser, action)))
    if rows:
        yield table(("argument", "what it does"), rows)
    for one, says in below:
        yield f"### `{one.prog}`"
        yield from _parser(one, says)


def _called(action: argparse.Action) -> str:
    """How an argument is written."""
    values = f"{{{','.join(map(str, action.choices))}}}" if action.choices else ""
    value = str(action.metavar or values or action.dest.upper())
    repeated = f"{value} ..." if action.nargs in ("+", "*") else value
    if not action.option_strings:
        return f"`[{repeated}]`" if action.nargs in ("?", "*") else f"`{repeated}`"
    takes = action.nargs != 0
    return ", ".join(f"`{name} {repeated}`" if takes else f"`{name}`" for name in action.option_strings)


def _meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """What an argument does, with its values and its default."""
    text = parser._get_formatter()._expand_help(action) if action.help else ""  # noqa: SLF001
    text = re.sub(r"\s+", " ", text).replace(str(Path.home()), "~")
    extra = []
    if action.choices and action.metavar:
        extra.append(f"one of {', '.join(map(str, action.choices))}")
    is_flag = action.nargs == 0
    if "default" not in text and not is_flag and action.default not in (None, argparse.SUPPRESS, []):
        shown = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        extra.append(f"default: {shown}")
    return f"{text} ({'; '.join(extra)})".strip() if extra else text


def tests() -> str:
    """The commands of `ddpkit.testing`."""
    mains = {"": suite.main} | {name: importlib.import_module(home).main for name, home in suite.CAMPAIGNS.items()}
    out = []
    for name, main in mains.items():
        parser = _of(main)
        out += [f"### `{parser.prog}`"] if name else []
        out += _parser(parser)
    return "\n\n".join(out)


class _Seen(Exception):  # noqa: N818  (no error: carries a parser out)
    pass


def _of(main: Callable[[list[str]], Any]) -> argparse.ArgumentParser:
    """The parser that a command makes for itself."""

    def show(parser: argparse.ArgumentParser, *_: object) -> None:
        raise _Seen(parser)

    with patch.object(argparse.ArgumentParser, "parse_args", show):
        try:
            main([])
        except _Seen as seen:
            return seen.args[0]
    raise AssertionError(main)


BLOCKS = {"overview of commands": overview, "commands": commands, "tests as commands": tests}
