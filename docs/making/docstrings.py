"""Docstrings taken apart, and Markdown put together."""

import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):$")
_ITEM = re.compile(r"^(\*{0,2}\w[\w, .]*): (.*)$")


def sections(text: str) -> dict[str, dict[str, str]]:
    """The items of each section of a docstring, by its heading; what comes before is under the empty one."""
    parts: dict[str, dict[str, str]] = {"": {"": ""}}
    heading = name = ""
    for line in inspect.cleandoc(text).splitlines():
        if found := _SECTION.match(line):
            heading, name = found[1], ""
            parts[heading] = {}
        elif heading == "":
            parts[""][""] += line + "\n"
        elif line.startswith("    ") and not line.startswith("     ") and (item := _ITEM.match(line.strip())):
            name = item[1]
            parts[heading][name] = item[2]
        elif line.strip():
            parts[heading][name] = f"{parts[heading].get(name, '')} {line.strip()}".strip()
    return parts


def said(thing: Any) -> str:
    """What a docstring says before its sections."""
    return sections(thing.__doc__ or "")[""][""].strip()


def first(text: str) -> str:
    """The first paragraph of a text, on one line."""
    return " ".join(inspect.cleandoc(text).split("\n\n")[0].split())


def table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    cells = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)


def described(name: str, thing: Any, *, with_members: bool = True) -> Iterator[str]:
    """A public name: how it is called, its docstring, and of a class what it offers."""
    yield f"### `{name}`"
    with suppress(TypeError, ValueError):  # an exception
        yield f"`{name}{_signature(thing)}`"
    parts = sections(thing.__doc__ or "")
    # A fragment of a class is to be read, and cannot be run.
    yield parts.pop("")[""].strip().replace("```python", "```text")
    for heading, items in parts.items():
        if items:
            yield f"**{heading}**"
            yield "\n".join(f"- `{item}`: {text}" if item else f"- {text}" for item, text in items.items())
    if with_members and inspect.isclass(thing) and (offers := [*members(thing)]):
        yield "**Offers**"
        yield "\n".join(f"- `{call}`: {text}" for call, text in offers)


def members(kind: type) -> Iterator[tuple[str, str]]:
    """The public methods and properties that a class of ours defines itself, and the first paragraph of each docstring."""
    for name, member in vars(kind).items():
        text = inspect.getdoc(member) if callable(member) or isinstance(member, property) else None
        if name.startswith("_") or not text or inspect.isclass(member):
            continue
        yield name if isinstance(member, property) else f"{name}{_signature(member)}", first(text)


def _signature(thing: Any) -> str:
    given = list(inspect.signature(thing).parameters.values())
    if given and given[0].name == "self":
        given = given[1:]
    return str(inspect.Signature([one.replace(annotation=inspect.Parameter.empty) for one in given]))
