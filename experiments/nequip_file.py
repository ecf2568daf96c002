"""A training file of `nequip`, read with its interpolations resolved, so that each of its keys is either taken or told."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ddpkit.errors import InputError

SECTIONS = ("run", "data", "trainer", "training_module")
NONE = "has no counterpart in ddpkit"
_LATER = re.compile(r"\$\{(training_data_stats|hydra|now):([^${}]*)\}")  # what only a running nequip-train knows
_NAMED = re.compile(r"\$\{\s*([A-Za-z_]\w*)\s*[.}\[]")
_RESOLVERS = {
    "int_mul": lambda a, b: int(a * b),
    "int_div": lambda a, b: a // b,
    "concat_lists": lambda *lists: [value for values in lists for value in values],
    "list_to_identity_dict": lambda names: {name: name for name in names},
    "list_to_constant_dict": dict.fromkeys,
}


class Section:
    """A mapping of the file. What is not taken out of it until `close` is told.

    Args:
        values: the mapping.
        name: its dotted key, which the remarks begin with.
        remarks: where they are added, a line each.

    Raises:
        InputError: it is no mapping.
    """

    def __init__(self, values: Any, name: str, remarks: list[str]) -> None:
        if not isinstance(values, dict):
            raise InputError(
                f"{name} is {_short(values)}, where nequip has a mapping of keys to values: correct the file."
            )
        self._values, self.name, self.remarks = dict(values), name, remarks

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._values))

    def key(self, key: str) -> str:
        """Its dotted name."""
        return f"{self.name}.{key}" if self.name else key

    def take(self, key: str, default: Any = None) -> Any:
        """The value, which then counts as converted."""
        return self._values.pop(key, default)

    def value(self, key: str) -> Any:
        """What `take` would give, which stays to be taken."""
        return self._values.get(key)

    def number(self, key: str, default: float | None = None) -> float | None:
        """The value, which is a number or null."""
        value = self.take(key, default)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return value
        raise InputError(f"{self.key(key)} is {_short(value)}, which is no number: correct the file.")

    def section(self, key: str) -> "Section":
        """The mapping below; an empty one where there is none."""
        return Section(self.take(key) or {}, self.key(key), self.remarks)

    def sections(self, key: str) -> list["Section"]:
        """The mappings of a list, or the one mapping that stands in its place."""
        values = self.take(key) or []
        values = values if isinstance(values, list) else [values]
        return [Section(value, f"{self.key(key)}[{n}]", self.remarks) for n, value in enumerate(values)]

    def tell(self, key: str, why: str = NONE, value: Any = None) -> None:
        """Says what becomes of a key."""
        value = self._values.pop(key, value)
        shown = f" ({', '.join(map(str, value))})" if isinstance(value, dict) else f"={_short(value)}"
        self.remarks.append(f"{self.key(key)}{shown} {why}.")

    def close(self, why: str = NONE) -> None:
        """Says of each key that is left that it is not converted."""
        for key in self:
            self.tell(key, why)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def read(path: Path, remarks: list[str]) -> dict[str, Any]:
    """The sections of a training file. What only a running `nequip-train` knows stands in it as `<resolver:name>`.

    Args:
        path: of the file.
        remarks: where keys that nothing uses are told.

    Raises:
        InputError: there is no such file, or it is not a training file of `nequip` 0.19.
    """
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: give a training file of nequip.") from error
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"{path} cannot be read as YAML ({why}): give a training file of nequip.") from error
    raw = OmegaConf.to_container(config, resolve=False)
    _refuse_other_files(path, raw)
    assert isinstance(raw, dict)
    with _resolvers():
        try:
            values = OmegaConf.to_container(OmegaConf.create(_marked(raw)), resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise InputError(
                f"{path} has a value that cannot be resolved ({str(error).splitlines()[0]}): write the value itself in its place."
            ) from error
    assert isinstance(values, dict)
    variables = set(_variables(raw))
    known = {*SECTIONS, "global_options"}
    top = Section({key: value for key, value in values.items() if key not in known | variables}, "", remarks)
    for key in ("hydra", "ckpt_path"):
        if key in top:
            top.tell(key, f"{NONE}, whose runs are put elsewhere by run_dir=DIR and continued by resume=DIR")
    top.close("is used nowhere in the file")
    return {str(key): values[key] for key in values if key in known}


def _refuse_other_files(path: Path, raw: Any) -> None:
    remedy = "give the file that `nequip-train` of nequip 0.19 is started with."
    if not isinstance(raw, dict):
        raise InputError(f"{path} is no training file of nequip: {remedy}")
    if raw.keys() & {"model_builders", "dataset_file_name", "n_train", "chemical_embedding_irreps_out"}:
        raise InputError(
            f"{path} is a training file of nequip 0.6 or older, whose keys and models are others: {remedy}"
        )
    if "defaults" in raw:
        raise InputError(
            f"{path} is put together by Hydra from several files (it has defaults): give one that holds it all."
        )
    lacking = [name for name in SECTIONS if name not in raw]
    if not lacking and "model" not in (raw["training_module"] or ()):
        lacking = ["training_module.model"]
    if lacking:
        raise InputError(f"{path} is no training file of nequip (it has no {', '.join(lacking)}): {remedy}")


def _marked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _marked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_marked(item) for item in value]
    return _LATER.sub(r"<\1:\2>", value) if isinstance(value, str) else value


def _variables(value: Any) -> Iterator[str]:
    """The top-level keys that interpolations name."""
    if isinstance(value, str):
        yield from _NAMED.findall(value)
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _variables(item)


@contextmanager
def _resolvers() -> Iterator[None]:
    """Those of nequip, which need not be installed."""
    own = [name for name in _RESOLVERS if not OmegaConf.has_resolver(name)]
    for name in own:
        OmegaConf.register_new_resolver(name, _RESOLVERS[name])
    try:
        yield
    finally:
        for name in own:
            OmegaConf.clear_resolver(name)
