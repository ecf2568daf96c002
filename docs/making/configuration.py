"""`reference/configuration.md`: every key, from the dataclasses, the files in `conf/` and the classes that take the keys."""

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

import yaml

from ddpkit.experiments.config import ALLOWED, BOUNDS, RunConfig
from ddpkit.models import Allegro, NequIP
from ddpkit.models.config import PotentialConfig
from ddpkit.sync import STRATEGIES, GradientSync, find_strategy
from making.docstrings import said, sections, table

CONF = files("ddpkit.experiments.conf")
GROUPS = ("model", "data", "strategy", "optimizer", "scheduler", "experiment")
HEADS = ("key", "values", "default", "what it does")

# Of the groups whose keys are arguments of torch's classes.
OF_TORCH = {
    "optimizer._target_": ("an import path", "class of the optimizer: one of `torch.optim`, or your own."),
    "optimizer.lr": ("a number", "learning rate; a scheduler or `train.plateau` moves it."),
    "optimizer.weight_decay": ("a number", "what AdamW takes from each weight at a step, relative, over `lr`."),
    "optimizer.fused": (
        "true, false",
        "update all parameters by one kernel; then a GPU skips a non-finite gradient by itself, and the update can be recorded.",
    ),
    "scheduler._target_": (
        "an import path, null",
        "class of the scheduler, one of `torch.optim.lr_scheduler`; null leaves the rate to `train.plateau`.",
    ),
    "scheduler.per": ("step, epoch", "what the scheduler counts."),
    "scheduler.T_max": (
        "a number, `all`",
        "of CosineAnnealingLR: over how many steps or epochs the rate falls; `all`: the run's.",
    ),
    "scheduler.eta_min": ("a number", "of CosineAnnealingLR: the rate at the end."),
}
_PLAIN: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true, false", str: "a text", Any: ""}


def keys() -> str:
    """The keys of `RunConfig` and below."""
    return table(HEADS, _keys(RunConfig))


def _keys(kind: Any, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    told, hints = sections(kind.__doc__)["Attributes"], typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _keys(hints[field.name], f"{key}.")
        else:
            yield f"`{key}`", _values(key, hints[field.name]), _default(key, field), told[field.name]


def _values(key: str, hint: Any) -> str:
    if key in GROUPS:
        return "a name"
    if key in ALLOWED:
        return ", ".join(written(value) for value in ALLOWED[key])
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    names = [_PLAIN.get(kind, "a list of numbers") for kind in kinds if kind is not type(None)]
    bound = next((f" ({must})" for keys, _, must in BOUNDS if key in keys), "")
    text = must if key == "train.checkpoint_every" and (must := bound.strip(" ()")) else " or ".join(names) + bound
    return f"{text}, null" if type(None) in kinds else text


def _default(key: str, field: "dataclasses.Field[Any]") -> str:
    if key.startswith("data."):
        return _by_source(field)
    if key in GROUPS:
        chosen = {name: value for part in _base()["defaults"] if isinstance(part, dict) for name, value in part.items()}
        return f"`{written(chosen.get(key))}`"
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return f"`{written(value)}`"


def _by_source(field: "dataclasses.Field[Any]") -> str:
    """The default of a key of `data`, which the file of each source sets."""
    plain = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    found = {name: settings.get(field.name, plain) for name, settings in options("data").items()}
    if field.name == "cache":
        return "`$DDPKIT_CACHE`, or `~/.cache/ddpkit`"
    if len({str(value) for value in found.values()}) == 1:
        return f"`{written(next(iter(found.values())))}`"
    return ", ".join(f"`{written(value)}` ({name})" for name, value in found.items())


def _base() -> Mapping[str, Any]:
    loaded: Mapping[str, Any] = yaml.safe_load((CONF / "config.yaml").read_text())
    return loaded


def options(group: str) -> dict[str, dict[str, Any]]:
    """What each file of a group sets, by its name."""
    found = sorted(
        (path.name.removesuffix(".yaml"), path) for path in (CONF / group).iterdir() if path.name.endswith(".yaml")
    )
    return {name: yaml.safe_load(path.read_text()) for name, path in found}


def written(value: Any) -> str:
    """A value as YAML has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def experiments() -> str:
    """The files of the group `experiment`, by their comments."""
    rows = []
    for name in options("experiment"):
        lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
        comment = [line[1:].strip() for line in _leading(lines) if "@package" not in line]
        rows.append((f"`{name}`", " ".join(" ".join(comment).split("  ")[0].split())))
    return table(("experiment", "what it is for"), rows)


def _leading(lines: list[str]) -> Iterator[str]:
    """The first paragraph of comments."""
    for line in lines:
        if not line.startswith("#") or line == "#":
            return
        yield line


def sizes(family: str) -> str:
    """The named models of a family: their keys in rows."""
    named = {name: settings for name, settings in options("model").items() if name.startswith(family)}
    order = sorted(named, key=_place)
    every = dict.fromkeys(key for name in order for key in named[name] if key != "_target_")
    rows = [(f"`{key}`", *(written(named[name].get(key, "")) for name in order)) for key in every]
    return table(("", *(f"`{name}`" for name in order)), rows)


def _place(name: str) -> int:
    return ("tiny", "molecule", "small", "medium", "large", "xl").index(name.rpartition("_")[2])


def of_all_models() -> str:
    """The keys of `PotentialConfig`, whose meaning stands below each in the code."""
    (declared,) = ast.parse(textwrap.dedent(inspect.getsource(PotentialConfig))).body
    assert isinstance(declared, ast.ClassDef)
    rows = []
    for field, text in zip(declared.body, declared.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            default = "" if field.value is None else f"`{written(ast.literal_eval(field.value))}`"
            rows.append((f"`model.{ast.unparse(field.target)}`", default, " ".join(str(text.value.value).split())))
    return table(("key", "default", "what it does"), rows)


def of_model(model: Any) -> str:
    """The keys that one model alone has."""
    defaults = inspect.signature(model).parameters
    rows = [
        (f"`model.{name}`", f"`{written(defaults[name].default)}`", text)
        for name, text in sections(model.__doc__)["Args"].items()
        if name not in ("species", "shared")
    ]
    return table(("key", "default", "what it does"), rows)


def sources_of_models() -> str:
    """Where the formulas of the keys come from."""
    return re.sub(r"(?m)^    (?=\[)", "- ", said(PotentialConfig)).partition("\n\n")[2]


def strategies() -> str:
    """Each strategy: what it does, and its options; what carries the all-reduce is a key of the run."""
    out = []
    for name in STRATEGIES:
        kind: Any = find_strategy(name)
        carried = " or ".join(f"`comm={comm}`" for comm in kind.comms)
        out += [f"### `strategy={name}`", said(kind), f"Class `{kind.__name__}`; with {carried}."]
        out.append(table(("key", "default", "what it does"), _options(kind)))
    return "\n\n".join(out)


def _options(kind: type[GradientSync]) -> Iterator[tuple[str, str, str]]:
    told = sections(kind.__doc__ or "").get("Args", {})
    of_all = inspect.signature(GradientSync).parameters
    for name, parameter in inspect.signature(kind).parameters.items():
        if name in ("module", "comm") or parameter.kind is parameter.VAR_POSITIONAL:
            continue
        if parameter.kind is not parameter.VAR_KEYWORD:
            yield f"`strategy.{name}`", f"`{written(parameter.default)}`", _meaning(kind, name)
        elif "GradientSync" in told[name]:
            for other in ("timeout", "check_every"):
                yield f"`strategy.{other}`", f"`{written(of_all[other].default)}`", _meaning(GradientSync, other)
        else:
            yield "`strategy.NAME`", "", told[name]


def _meaning(kind: type, option: str) -> str:
    """What an option of a strategy does, also where its class only says that it is as in another."""
    for one in kind.__mro__:
        text = sections(vars(one).get("__doc__") or "").get("Args", {}).get(option, "")
        if text and not text.startswith("as in "):
            return text
    raise LookupError(f"{kind.__name__} does not say what {option} does")


def of_torch(group: str) -> str:
    """The keys of a group that torch's classes take, with the default of each file that has it."""
    rows = []
    for key in dict.fromkeys(f"{group}.{key}" for settings in options(group).values() for key in settings):
        name = key.partition(".")[2]
        defaults = ", ".join(f"`{written(s[name])}` ({choice})" for choice, s in options(group).items() if name in s)
        values, text = OF_TORCH[key]
        rows.append((f"`{key}`", values, defaults, text))
    return table(HEADS, rows)


BLOCKS = {
    "keys": keys,
    "experiments": experiments,
    "sizes of Allegro": lambda: sizes("allegro"),
    "sizes of NequIP": lambda: sizes("nequip"),
    "keys of all models": of_all_models,
    "sources of models": sources_of_models,
    "keys of Allegro": lambda: of_model(Allegro),
    "keys of NequIP": lambda: of_model(NequIP),
    "strategies": strategies,
    "keys of optimizer": lambda: of_torch("optimizer"),
    "keys of scheduler": lambda: of_torch("scheduler"),
}
