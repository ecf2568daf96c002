"""MPtrj: relaxation trajectories of the Materials Project in one JSON object (Deng et al., Nat. Mach. Intell. 5, 1031 (2023))."""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ddpkit.data.frame import NUMBERS, Frame
from ddpkit.data.prepared import Block, Filters
from ddpkit.errors import InputError

KILOBAR = 0.1 * 0.006241509074  # eV/Å^3
ENERGIES = {"uncorrected": "uncorrected_total_energy", "corrected": "corrected_total_energy"}

_PIECE = 4 << 20  # bytes
_READ = 8 << 20
_SPECIAL = np.zeros(256, dtype=bool)
_SPECIAL[list(b'"{}')] = True
_ESCAPED = re.compile(rb"\\.", re.DOTALL)


class MPtrj:
    """An MPtrj file as a source of frames.

    The object is cut where a material ends, which tells strings and braces alone; the pieces are parsed in parallel.

    Args:
        path: the file.
        energy: `uncorrected` (plain DFT totals) or `corrected` (with the Materials Project's corrections).

    Raises:
        InputError: the file does not exist or is no JSON object.
    """

    unit = "B"

    def __init__(self, path: Path, energy: str = "uncorrected") -> None:
        self.files = [path]
        self.settings: dict[str, Any] = {"made_by": "ddpkit data prepare mptrj", "energy": energy}
        self.facts: dict[str, Any] = {
            "labels": f"{ENERGIES[energy]} of MPtrj (GGA and GGA+U)",
            "keys": {"energy": ENERGIES[energy], "forces": "force", "stress": "stress"},
        }
        self._energy = ENERGIES[energy]
        try:
            self.total = path.stat().st_size
            with path.open("rb") as file:
                start = file.read(4096).lstrip()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): give the path of an MPtrj file") from error
        if not start.startswith(b"{"):
            raise InputError(f"{path} is no JSON object: it is no MPtrj file")

    def pieces(self, position: Any) -> Iterator[tuple[Any, Any, int]]:
        """Some materials at a time, as the bytes they span."""
        for start, end in split_object(self.files[0], position or 0):
            yield (start, end), end, end - start

    def blocks(self, r_max: float, filters: Filters) -> Callable[[tuple[int, int]], Block]:
        """Parses the materials of a piece."""
        return partial(_read, self.files[0], self._energy, r_max, filters)

    def done(self, position: Any) -> int:
        """Bytes done."""
        return position or 0


def split_object(path: Path, start: int = 0, size: int = _PIECE) -> Iterator[tuple[int, int]]:
    """Cuts one large JSON object of objects into ranges of bytes, each of whole members.

    Args:
        path: the file.
        start: 0, or the end of a range given before.
        size: ranges are at least so long, but for the last.

    Raises:
        InputError: the file ends within the object, or goes on after it.
    """
    depth, in_string = (1 if start else 0), False
    begin = last = offset = start
    with path.open("rb") as file:
        file.seek(start)
        while content := _read_some(file):
            plain = _ESCAPED.sub(b"__", content) if b"\\" in content else content
            codes = np.frombuffer(plain, dtype=np.uint8)
            where = np.flatnonzero(_SPECIAL[codes])
            marks = codes[where]
            quote = marks == ord('"')
            inside = (np.cumsum(quote) + in_string) % 2 == 1
            step = np.where(marks == ord("{"), 1, -1)
            step[quote | inside] = 0
            depths = depth + np.cumsum(step)
            ends = where[(step == -1) & (depths == 1)] + 1 + offset
            for end in ends.tolist():
                last = end
                if end - begin >= size:
                    yield begin, end
                    begin = end
            closing = np.flatnonzero((step == -1) & (depths == 0))
            if len(closing):
                if (content[where[closing[0]] + 1 :] + file.read(_READ)).strip():
                    raise InputError(f"{path} goes on after its JSON object ends: it is no MPtrj file")
                if last > begin:
                    yield begin, last
                return
            if len(where):
                depth, in_string = int(depths[-1]), bool(inside[-1])
            offset += len(content)
    raise InputError(f"{path} ends within its JSON object, at byte {offset}: the download is incomplete, repeat it")


def _read_some(file: BinaryIO) -> bytes:
    """The next bytes, not ending within an escape sequence."""
    content = file.read(_READ)
    while content.endswith(b"\\") and (more := file.read(1)):
        content += more
    return content


def _read(path: Path, energy: str, r_max: float, filters: Filters, span: tuple[int, int]) -> Block:
    start, end = span
    with path.open("rb") as file:
        file.seek(start)
        text = file.read(end - start)
    text = text + b"}" if start == 0 else text.replace(b",", b"{", 1) + b"}"
    try:
        materials = json.loads(text)
    except ValueError as error:
        raise InputError(
            f"{path} is no valid JSON between bytes {start} and {end} ({error}): download it again"
        ) from error
    return Block.of(_frames(path, energy, materials), r_max, filters)


def _frames(path: Path, energy: str, materials: dict[str, Any]) -> Iterator[Frame]:
    for material, entries in materials.items():
        for number, entry in entries.items():
            name = f"frame {number!r} of {path}"
            try:
                yield _frame(entry, energy, material, name)
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                raise InputError(
                    f"{name} is not in the MPtrj layout ({type(error).__name__}: {error}): repair it"
                ) from error


def _frame(entry: dict[str, Any], energy: str, material: str, name: str) -> Frame:
    """One frame; a label that is missing or null is NaN, and a missing stress is none."""
    structure = entry["structure"]
    sites = structure["sites"]
    kinds = [site["species"] for site in sites]
    if any(len(kind) != 1 or kind[0].get("occu", 1) != 1 for kind in kinds):
        raise ValueError("a site is shared by several elements")
    count = len(sites)
    force, stress, total = entry.get("force"), entry.get("stress"), entry.get(energy)
    return Frame(
        numbers=np.array([NUMBERS[kind[0]["element"]] for kind in kinds], dtype=np.int64),
        positions=np.array([site["xyz"] for site in sites], dtype=np.float64).reshape(count, 3),
        energy=float("nan") if total is None else float(total),
        forces=np.full((count, 3), np.nan) if force is None else np.array(force, dtype=np.float64).reshape(count, 3),
        cell=np.array(structure["lattice"]["matrix"], dtype=np.float64).reshape(3, 3),
        pbc=np.array(structure["lattice"].get("pbc", [True] * 3), dtype=bool),
        # VASP's sign is the opposite of ASE's.
        stress=None if stress is None else -KILOBAR * np.array(stress, dtype=np.float64).reshape(3, 3),
        subset="MPtrj",
        group=material,
        name=name,
    )
