"""Which keys of a file hold its labels: energy, forces and stress of one level of theory, the same keys in every frame."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddpkit.errors import InputError

Floats = NDArray[np.float64]

# Spellings of each quantity without case, the preferred one first. What stands before one names the level of theory.
_SPELLINGS = {
    "energy": ("energy", "total_energy", "totenergy", "free_energy", "e"),
    "forces": ("forces", "force", "f"),
    "stress": ("stress", "virial", "virials"),
}
_KEY = re.compile(r"(.+?)[_\-. ](total_energy|totenergy|free_energy|energy|forces|force|stress|virials|virial)")
_USUAL = ("", "ref", "reference", "dft")  # levels that are trained on without being named
_PREDICTIONS = ("predicted",)  # levels that `ddpkit eval` writes beside the labels
_PLACES = {"energy": ("results", "info"), "forces": ("results", "arrays"), "stress": ("results", "info")}
_SHOWN = 8  # keys that a message lists
_ISOLATED = re.compile(r"isol(ated)?[_\- ]?(atoms?)?", re.IGNORECASE)  # values of config_type
FAR = 7.0  # Å; in no crystal of one element are atoms so far apart
_ASYMMETRY = 1e-2  # of the largest component: beyond rounding, an order of components that is not understood

Advice = Callable[..., str]
"""Says how settings are made where the reader of a message stands: a command, a configuration or a call."""


def in_python(**settings: Any) -> str:
    """As arguments of `read_ase`."""
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def as_options(**settings: Any) -> str:
    """As options of `ddpkit data prepare ase`."""
    return " ".join(
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in settings.items()
    )


def by_preparing(**settings: Any) -> str:
    """With a prepared set."""
    return f"`ddpkit data prepare ase FILE --out SET {as_options(**settings)}` and the SET that it makes"


def as_overrides(**settings: Any) -> str:
    """As overrides of `ddpkit-run`."""
    if "drop_unlabelled" in settings:
        return by_preparing(**settings)
    return " ".join(f"data.{name}={'true' if value is True else value}" for name, value in settings.items())


@dataclass(frozen=True)
class Choice:
    """What the user says of labels.

    Attributes:
        energy_key: name of the energy; None where it is to be found.
        forces_key: likewise.
        stress_key: likewise, of a stress in eV/Å^3 or, where `virial` is part of the name, of a virial in eV.
        allow_missing: whether some of the periodic frames may lack the stress that others have.
    """

    energy_key: str | None = None
    forces_key: str | None = None
    stress_key: str | None = None
    allow_missing: bool = False

    def key(self, quantity: str) -> str | None:
        """The name of a quantity, where it is given."""
        name: str | None = getattr(self, f"{quantity}_key")
        return name


class Values(NamedTuple):
    """The labels of a frame; None where it has no such label."""

    energy: float | None
    forces: Floats | None  # [atoms, 3]
    stress: Floats | None  # [3, 3]


class _Key(NamedTuple):
    """A key that may hold a label."""

    level: str  # in lower case
    quantity: str
    spelling: str  # in lower case
    name: str  # as the file spells it
    value: Any


class Labels:
    """Reads the labels of frames one after another, all from the same keys.

    The level of theory is the one that the first frame has both an energy and forces of; where it has several, the one that all
    frames have. Anything else is refused, and the message names the keys with the number of frames that have each.

    Args:
        choice: what the user says.
        everything: gives all frames anew (ASE's `Atoms`), to count the keys in them.
        source: the name of the file or files, for messages.
        required: whether every frame must have an energy and forces.
        advice: how the user makes settings.
    """

    def __init__(
        self,
        choice: Choice,
        everything: Callable[[], Iterable[Any]],
        source: str,
        *,
        required: bool = True,
        advice: Advice = in_python,
    ) -> None:
        self.choice, self.required = choice, required
        self._everything, self._source, self.advice = everything, source, advice
        self._level: str | None = None  # once it is chosen; isolated atoms choose among energies alone
        self._lower = {q: None if choice.key(q) is None else str(choice.key(q)).lower() for q in _SPELLINGS}
        self._used: dict[str, dict[str, None]] = {quantity: {} for quantity in _SPELLINGS}  # names, in order
        self._other: dict[str, None] = {}  # keys of a stress of another level
        self._frames = self._periodic = self._stressed = 0
        self._first_without = ""  # stress

    @property
    def keys(self) -> dict[str, str | None]:
        """The names of the keys that were used, by quantity; None where no frame had such a label."""
        return {quantity: " or ".join(names) or None for quantity, names in self._used.items()}

    @property
    def notes(self) -> list[str]:
        """What a user should know of the choice."""
        if not self._other or self._used["stress"]:
            return []
        note = (
            f"no stress was read: {', '.join(self._other)} may be of another level of theory than {self.keys['energy']}; "
            "name it as the stress key to read it all the same"
        )
        return [note]

    def of(self, atoms: Any, name: str) -> Values:
        """The labels of a frame.

        Args:
            atoms: ASE's.
            name: of the frame, for messages.

        Raises:
            InputError: the frame has no such labels, or it cannot be told which of them are meant.
        """
        self._frames += 1
        keys = list(_keys(atoms))
        given = {q: _named(atoms, q, key, name) for q, key in self._lower.items() if key is not None}
        chosen = self._energy_and_forces(keys, given, name, atoms)
        energy, forces = chosen.get("energy"), chosen.get("forces")
        if energy is not None and is_isolated(atoms):  # a reference energy needs no more
            self._used["energy"].setdefault(energy.name)
            return Values(_energy(energy, name), None, None)
        if self.required or (energy is not None and forces is not None):
            lacking = [quantity for quantity, key in (("energy", energy), ("forces", forces)) if key is None]
            if lacking:
                lacking.sort(
                    key=lambda quantity: self.choice.key(quantity) is None
                )  # what was named is spoken of first
                raise InputError(self._lacking(lacking[0], name, keys, atoms))
        for quantity, key in (("energy", energy), ("forces", forces)):
            if key is not None:
                self._used[quantity].setdefault(key.name)
        stress = None
        if atoms.pbc.any():
            stress = self._stress(atoms, keys, given.get("stress"), name)
            self._periodic += 1
            self._stressed += stress is not None
            if stress is None:
                self._first_without = self._first_without or name
        elif (virial := given.get("stress")) is not None and self._is_virial(virial):
            raise InputError(
                f"{name} has {virial.name} but no periodic cell, and a stress is a virial over a volume: give "
                "it a cell, or leave the frame out"
            )
        return Values(
            None if energy is None else _energy(energy, name),
            None if forces is None else _forces(forces, atoms, name),
            stress,
        )

    def finish(self) -> None:
        """Looks back, after the last frame.

        Raises:
            InputError: no frame has a key that was named, or only some of the periodic ones have a stress.
        """
        for quantity, name in ((q, self.choice.key(q)) for q in _SPELLINGS):
            if quantity == "stress" and name is not None and self._frames and not self._periodic:
                raise InputError(
                    f"No frame of {self._source} is periodic, so none has a stress: leave {self.advice(stress_key=name)} out"
                )
            if name is not None and self._frames and not self._used[quantity]:
                raise InputError(
                    f"None of the {self._frames:,} frames of {self._source} has {quantity} under {name} "
                    f"({self._counted()}): correct {self.advice(**{f'{quantity}_key': name})}"
                )
        if 0 < self._stressed < self._periodic and not self.choice.allow_missing:
            raise InputError(
                f"{self._periodic - self._stressed:,} of the {self._periodic:,} periodic frames of {self._source} have "
                f"no stress under {self.keys['stress']}, {self._first_without} first: leave them out, or keep them "
                f"without with {self.advice(allow_missing=True)}"
            )

    # -- energy and forces ---------------------------------------------------------------------------------------------

    def _energy_and_forces(
        self, keys: list[_Key], given: Mapping[str, _Key | None], name: str, atoms: Any
    ) -> dict[str, _Key | None]:
        if "energy" in given and "forces" in given:
            return {"energy": given["energy"], "forces": given["forces"]}
        for quantity, other in (("energy", "forces"), ("forces", "energy")):
            if quantity in given:
                return {quantity: given[quantity], other: self._beside(given[quantity], other, keys, name)}
        if self._level is None:
            self._level = self._choose(_levels(atoms), name)
        if self._level is None:
            return {}
        return {q: self._one(q, self._level, keys, name) for q in ("energy", "forces")}

    def _choose(self, levels: set[str], name: str) -> str | None:
        """The level of theory to read, by those of the first frame that has any."""
        if len(levels) > 1:
            levels = self._common()
            if len(levels) != 1:
                raise InputError(
                    f"{self._source} has labels of several levels of theory ({self._counted()}): choose "
                    f"one{self._example(levels)}"
                )
        if not levels:
            return None
        (level,) = levels
        if level not in _USUAL:
            raise InputError(
                f"{name} has no energy and forces under a known name ({self._counted()}): name those to train "
                f"on{self._example(levels)}"
            )
        return level

    def _common(self) -> set[str]:
        """The levels that all frames have."""
        common: set[str] | None = None
        for atoms in self._everything():
            levels = _levels(atoms)
            if levels or self.required:
                common = levels if common is None else common & levels
        return common or set()

    def _one(self, quantity: str, level: str, keys: Iterable[_Key], name: str) -> _Key | None:
        """The key of a quantity at a level; the same one as in the frames before."""
        here = [key for key in keys if key.quantity == quantity and key.level == level]
        if not here:
            return None
        here.sort(key=lambda key: _SPELLINGS[quantity].index(key.spelling))
        used = {other.lower() for other in self._used[quantity]}
        same = [key for key in here if key.name.lower() in used]
        if used and not same:
            return None
        first = (same or here)[0]
        for key in here:
            # ASE's free energy belongs to the same calculation: the energy that the forces are exact derivatives of.
            if key.spelling != "free_energy" and not _equal(key, first) and first.spelling != "free_energy":
                raise InputError(
                    f"{name} has two values for its {quantity}, {first.name} and {key.name}, which differ: say which is "
                    f"meant with {self.advice(**{f'{quantity}_key': first.name})} or {key.name}"
                )
        return first

    def _beside(self, given: _Key | None, quantity: str, keys: list[_Key], name: str) -> _Key | None:
        """Energy or forces where the user named the other of them: of the same level, else the only ones in the frame."""
        if given is None:
            return None
        if (same := self._one(quantity, given.level, keys, name)) is not None or self._used[quantity]:
            if same is not None:
                return same
            used = {other.lower() for other in self._used[quantity]}
            return next((key for key in keys if key.quantity == quantity and key.name.lower() in used), None)
        levels = {key.level for key in keys if key.quantity == quantity and key.level not in _PREDICTIONS}
        if len(levels) > 1:
            names = ", ".join(key.name for key in keys if key.quantity == quantity)
            raise InputError(
                f"{name} has {quantity} of several levels of theory ({names}), and none that belong to {given.name} by "
                f"name: choose one with {self.advice(**{f'{quantity}_key': 'KEY'})}"
            )
        return self._one(quantity, levels.pop(), keys, name) if levels else None

    # -- stress --------------------------------------------------------------------------------------------------------

    def _stress(self, atoms: Any, keys: list[_Key], given: _Key | None, name: str) -> Floats | None:
        if self.choice.stress_key is not None:
            if given is None:
                return None
            self._used["stress"].setdefault(given.name)
            return self._as_stress(given, atoms, name)
        here = [key for key in keys if key.quantity == "stress"]
        levels = self._levels_used()
        # A stress of no level in particular belongs to the only level of the frame.
        bare = not any(key.level == "" and key.quantity != "stress" for key in keys)
        mine = [key for key in here if {key.level} == levels] or [key for key in here if bare and key.level == ""]
        self._other.update(dict.fromkeys(key.name for key in here if key.level not in _PREDICTIONS))
        values = [(key, self._as_stress(key, atoms, name)) for key in mine]
        known = [(key, value) for key, value in values if value is not None]
        if not known:
            return None
        known.sort(key=lambda pair: _SPELLINGS["stress"].index(pair[0].spelling))
        first, stress = known[0]
        for key, value in known[1:]:
            if np.abs(value - stress).max() > 1e-3 * np.abs(stress).max() + 1e-6:
                raise InputError(
                    f"{name} has two values for its stress, {first.name} and {key.name} (a virial is -stress times "
                    f"volume), which differ: say which is meant with {self.advice(stress_key=first.name)} or {key.name}"
                )
        self._used["stress"].setdefault(first.name)
        return stress

    def _levels_used(self) -> set[str]:
        """The level or levels that energy and forces are of."""
        if self._level is not None:
            return {self._level}
        names = [name for quantity in ("energy", "forces") for name in self._used[quantity]]
        return {(_parsed(name) or ("?",))[0] for name in names}

    @staticmethod
    def _is_virial(key: _Key) -> bool:
        return "virial" in key.name.lower()

    def _as_stress(self, key: _Key, atoms: Any, name: str) -> Floats | None:
        """A stress or virial as `[3, 3]` stress; None where it is not finite."""
        value = _square(key, name)
        if not np.isfinite(value).all():
            return None
        if not self._is_virial(key):
            return value
        volume = abs(float(np.linalg.det(np.asarray(atoms.cell[:], dtype=np.float64))))
        if not volume > 0:
            raise InputError(
                f"{name} has {key.name} but a cell of no volume, and a stress is a virial over a volume: repair its cell"
            )
        return -value / volume

    # -- messages ------------------------------------------------------------------------------------------------------

    def _lacking(self, quantity: str, name: str, keys: list[_Key], atoms: Any) -> str:
        """Why a frame that must have a label has none that can be used."""
        given = self.choice.key(quantity)
        used = self.keys[quantity]
        if used is not None:
            common = self._common()
            choose = f"choose keys that all frames have{self._example(common)}, or " if common else ""
            return (
                f"{name} has no {quantity} under {used}, as the frames before it have ({self._counted()}): {choose}leave "
                f"such frames out with {self.advice(drop_unlabelled=True)}"
            )
        setting = self.advice(**{f"{quantity}_key": given or "KEY"})
        if given is not None:
            return f"{name} has no {quantity} under {given} ({self._counted()}): correct {setting}"
        names = ", ".join(
            sorted(map(str, {*_results(atoms), *atoms.info, *atoms.arrays} - {"numbers", "positions"}))[:_SHOWN]
        )
        if not any(key.quantity in ("energy", "forces") for key in keys):
            return f"{name} has no {quantity} under a known name (it has {names or 'no labels'}): name the key with {setting}"
        missing = "energy" if any(key.quantity == "forces" for key in keys) else "forces"
        if not {"energy", "forces"} <= {key.quantity for key in keys}:
            setting = self.advice(**{f"{missing}_key": "KEY"})
            return f"{name} has no {missing} under a known name (it has {names}): name the key with {setting}"
        return (
            f"{name} has no energy and forces of one level of theory ({self._counted()}): if two of these belong "
            f"together, name them with {self.advice(energy_key='KEY', forces_key='KEY')}"
        )

    def _example(self, levels: Iterable[str]) -> str:
        """How to choose one of some levels, by the keys that most frames have."""
        counts: Counter[tuple[str, str, str]] = Counter()
        order: dict[str, int] = {}
        for atoms in self._everything():
            for key in _keys(atoms):
                counts[key.level, key.quantity, key.name] += 1
                order[key.name] = _SPELLINGS[key.quantity].index(key.spelling)
        for level in sorted(levels, key=lambda level: (level == "" or level not in _USUAL, level)):
            names = {
                quantity: min(
                    (name for where, what, name in counts if (where, what) == (level, quantity)),
                    key=lambda name: (-counts[level, quantity, name], order[name]),
                    default=None,
                )
                for quantity in ("energy", "forces")
            }
            if all(names.values()):
                return f", for example with {self.advice(**{f'{what}_key': name for what, name in names.items()})}"
        return f" with {self.advice(energy_key='KEY', forces_key='KEY')}"

    def _counted(self) -> str:
        """The keys that may hold labels, with the number of frames that have each."""
        counts: Counter[str] = Counter()
        total = 0
        for atoms in self._everything():
            total += 1
            counts.update({key.name for key in _keys(atoms)} | self._given_in(atoms))
        shown = [f"{name} in {count:,}" for name, count in counts.most_common(_SHOWN)]
        if not shown:
            return f"none of its {total:,} frames has labels"
        return f"of {total:,} frames: {', '.join(shown)}{', ...' if len(counts) > _SHOWN else ''}"

    def _given_in(self, atoms: Any) -> set[str]:
        """The keys of a frame that the user named."""
        names = {str(name) for place in (_results(atoms), atoms.info, atoms.arrays) for name in place}
        return {name for name in names if name.lower() in self._lower.values()}


def _results(atoms: Any) -> Mapping[str, Any]:
    return getattr(atoms.calc, "results", None) or {}


def _parsed(name: str) -> tuple[str, str, str] | None:
    """Level, quantity and spelling of a key; None where it names no label."""
    lower = name.lower()
    for quantity, names in _SPELLINGS.items():
        if lower in names:
            return "", quantity, lower
    match = _KEY.fullmatch(lower)
    if match is None:
        return None
    level, spelling = match[1], match[2]
    return level, next(q for q, names in _SPELLINGS.items() if spelling in names), spelling


def _keys(atoms: Any) -> Iterable[_Key]:
    """The keys of a frame that may hold labels."""
    places = {"results": _results(atoms), "info": atoms.info, "arrays": atoms.arrays}
    for place, content in places.items():
        for name, value in content.items():
            parsed = _parsed(str(name))
            if parsed is not None and place in _PLACES[parsed[1]] and _fits(parsed[1], value):
                yield _Key(*parsed, str(name), value)


def _fits(quantity: str, value: Any) -> bool:
    """Whether a value can be such a label."""
    if value is None:
        return False
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        return False
    return array.size == 1 if quantity == "energy" else array.ndim > 0


def is_isolated(atoms: Any) -> bool:
    """Whether a frame is an isolated atom: by its `config_type`, or because it has no image within `FAR`."""
    if len(atoms) != 1:
        return False
    kind = next((value for name, value in atoms.info.items() if str(name).lower() == "config_type"), "")
    if _ISOLATED.fullmatch(str(kind).strip()) or not atoms.pbc.any():
        return True
    from ase.geometry import minkowski_reduce

    if np.linalg.matrix_rank(atoms.cell[atoms.pbc]) < atoms.pbc.sum():
        return False  # no cell at all
    vectors, _ = minkowski_reduce(np.asarray(atoms.cell[:]), pbc=atoms.pbc)  # so that the shortest are among them
    return bool(np.linalg.norm(vectors[atoms.pbc], axis=1).min() > FAR)


def _levels(atoms: Any) -> set[str]:
    """The levels that a frame has both an energy and forces of; of an isolated atom an energy is enough."""
    levels: dict[str, set[str]] = {}
    for key in _keys(atoms):
        if key.level not in _PREDICTIONS:
            levels.setdefault(key.level, set()).add(key.quantity)
    complete = {level for level, quantities in levels.items() if {"energy", "forces"} <= quantities}
    if complete or not is_isolated(atoms):
        return complete
    return {level for level, quantities in levels.items() if "energy" in quantities}


def _named(atoms: Any, quantity: str, lower: str, frame: str) -> _Key | None:
    """The key of a name that the user gave."""
    places = {"results": _results(atoms), "info": atoms.info, "arrays": atoms.arrays}
    keys = [
        _Key((_parsed(str(name)) or ("?", "", ""))[0], quantity, lower, str(name), value)
        for place in _PLACES[quantity]
        for name, value in places[place].items()
        if str(name).lower() == lower and value is not None
    ]
    if not keys:
        return None
    for key in keys[1:]:
        if not _equal(key, keys[0]):
            raise InputError(f"{frame} has {keys[0].name} in two places with different values: repair the file")
    return keys[0]


def _equal(a: _Key, b: _Key) -> bool:
    if a is b:
        return True
    x, y = np.asarray(a.value, dtype=np.float64), np.asarray(b.value, dtype=np.float64)
    if a.quantity == "stress":
        x, y = _square(a, "a frame"), _square(b, "a frame")
    return x.size == y.size and bool(np.allclose(x.reshape(-1), y.reshape(-1), rtol=1e-6, atol=1e-6, equal_nan=True))


def _energy(key: _Key, name: str) -> float:
    value = np.asarray(key.value)
    if value.size != 1 or value.dtype.kind not in "fiu":
        raise InputError(
            f"{name} has no number under {key.name} but {_short(key.value)}: name another key, or repair the file"
        )
    return float(value.reshape(-1)[0])


def _forces(key: _Key, atoms: Any, name: str) -> Floats:
    value = np.asarray(key.value)
    if value.shape != (len(atoms), 3) or value.dtype.kind not in "fiu":
        raise InputError(
            f"{name} has forces of shape {value.shape} under {key.name} for {len(atoms)} atoms: name another key, or "
            "repair the file"
        )
    return np.array(value, dtype=np.float64)


def _square(key: _Key, name: str) -> Floats:
    """Six components in Voigt's order (xx, yy, zz, yz, xz, xy), nine, or a matrix, as `[3, 3]`."""
    value = np.asarray(key.value)
    if value.dtype.kind not in "fiu" or value.size not in (6, 9):
        raise InputError(
            f"{name} has {key.name} of shape {value.shape}, where six numbers (xx, yy, zz, yz, xz, xy) or nine were "
            "expected: name another key, or repair the file"
        )
    value = value.astype(np.float64)
    if value.size == 6:
        xx, yy, zz, yz, xz, xy = value.reshape(-1)
        return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    value = value.reshape(3, 3)
    largest = np.abs(value).max()
    if np.isfinite(largest) and np.abs(value - value.T).max() > _ASYMMETRY * largest + 1e-6:
        raise InputError(f"{name} has {key.name} that is no symmetric matrix, as a stress is: repair the file")
    return value


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) < 40 else text[:37] + "..."
