"""Writes docs/reference.md from the docstrings: `python docs/make_reference.py`."""

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import ddpkit
from ddpkit.experiments.config import RunConfig
from ddpkit.models import Allegro, NequIP
from ddpkit.models.config import PotentialConfig
from ddpkit.sync import STRATEGIES, find_strategy

MODELS = (
    "Keys below `model`, and keywords of `ddpkit.models.Allegro` and `ddpkit.models.NequIP`. In a run, `species`, "
    "`avg_num_neighbors`, `shifts` and `scales` are those of the data unless they are given, and `precision` is the run's."
)
PAGE = Path(__file__).with_name("reference.md")
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


def keys(kind: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Key, default and meaning of each field of a configuration, those below it included."""
    told = sections(kind.__doc__)["Attributes"]
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from keys(field.type, f"{prefix}{field.name}.")
            continue
        value = field.default
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        shown = "" if value is dataclasses.MISSING or value == "???" else f"`{_yaml(value)}`"
        yield f"`{prefix}{field.name}`", shown, told[field.name]


def shared_by_models() -> Iterator[tuple[str, str, str]]:
    """Key, default and meaning of each field of `PotentialConfig`, whose meaning stands below it."""
    (declared,) = ast.parse(textwrap.dedent(inspect.getsource(PotentialConfig))).body
    assert isinstance(declared, ast.ClassDef)
    for field, text in zip(declared.body, declared.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            default = "" if field.value is None else f"`{_yaml(ast.literal_eval(field.value))}`"
            yield f"`{ast.unparse(field.target)}`", default, " ".join(str(text.value.value).split())


def own_of(model: Any) -> Iterator[tuple[str, str, str]]:
    """The same of the keys that one model alone has."""
    defaults = inspect.signature(model).parameters
    for name, text in sections(model.__doc__)["Args"].items():
        if name not in ("species", "shared"):
            yield f"`{name}`", f"`{_yaml(defaults[name].default)}`", text


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def table(rows: Iterator[tuple[str, ...]], heads: tuple[str, ...]) -> list[str]:
    """A Markdown table."""
    cells = [heads, ("---",) * len(heads), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


def described(name: str, thing: Any) -> Iterator[str]:
    """A public name: how it is called, and its docstring."""
    signature = ""
    with suppress(TypeError, ValueError):  # a protocol, an exception
        given = inspect.signature(thing).parameters.values()
        signature = str(inspect.Signature([one.replace(annotation=inspect.Parameter.empty) for one in given]))
    yield f"### `{name}{signature}`"
    parts = sections(thing.__doc__ or "")
    yield parts.pop("")[""].strip()
    for heading, items in parts.items():
        if items:
            yield f"**{heading}**"
            yield "\n".join(f"- `{item}`: {text}" if item else f"- {text}" for item, text in items.items())


def page() -> str:
    """The whole page."""
    out = [
        "# Reference",
        "Made from the docstrings by `python docs/make_reference.py`; `ddpkit VERB --help` tells of each command.",
        "## Configuration",
        "Keys of `ddpkit-run`, `ddpkit check` and `ddpkit experiment`, with their defaults. `ddpkit-run --cfg` prints a run's.",
        "\n".join(table(keys(RunConfig), ("key", "default", "meaning"))),
        "## Models",
        MODELS,
        re.sub(r"(?m)^    (?=\[)", "- ", sections(PotentialConfig.__doc__)[""][""].strip()),
        "\n".join(table(shared_by_models(), ("key", "default", "meaning"))),
        *(
            text
            for model in (Allegro, NequIP)
            for text in (f"### {model.__name__}", "\n".join(table(own_of(model), ("key", "default", "meaning"))))
        ),
        "## Strategies",
        "Options are keys below `strategy` (`+strategy.check_every=100`), and keywords of `make_sync` and `make_step`.",
    ]
    for name in STRATEGIES:
        kind: Any = find_strategy(name)
        out += [f"### `{name}`: `{kind.__name__}`", sections(kind.__doc__)[""][""].strip()]
        options = sections(kind.__doc__).get("Args", {})
        defaults = inspect.signature(kind).parameters
        own = [option for option in options if option not in ("module", "others")]
        rows = ((f"`{option}`", _default(defaults.get(option)), options[option]) for option in own)
        if own:
            out.append("\n".join(table(rows, ("option", "default", "meaning"))))
    out.append("## Library")
    for name in ddpkit.__all__:
        if name != "__version__" and not name.endswith("Sync"):
            out += described(name, getattr(ddpkit, name))
    out += described("GradientSync", ddpkit.GradientSync)
    return "\n\n".join(out) + "\n"


def _default(parameter: inspect.Parameter | None) -> str:
    return "" if parameter is None or parameter.default is inspect.Parameter.empty else f"`{parameter.default!r}`"


if __name__ == "__main__":
    PAGE.write_text(page())
