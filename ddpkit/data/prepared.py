"""The one format on disk: a folder of flat arrays that all ranks of a host map into memory, and a manifest."""

import hashlib
import json
import math
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from ddpkit.data.frame import SYMBOLS, Frame
from ddpkit.data.neighbours import TOUCHING, Counts, count_edges
from ddpkit.data.once import made_once
from ddpkit.data.parallel import cores, ordered_map
from ddpkit.errors import InputError

VERSION = 1
UNITS = {
    "positions": "Å",
    "cell": "Å",
    "energy": "eV",
    "forces": "eV/Å",
    "stress": "eV/Å^3",
    "charge": "e",
    "r_max": "Å",
}

# name -> (type, shape of an entry, whether an entry belongs to an atom rather than to a frame)
_COLUMNS: dict[str, tuple[str, tuple[int, ...], bool]] = {
    "numbers": ("|u1", (), True),
    "positions": ("<f8", (3,), True),
    "forces": ("<f8", (3,), True),
    "atoms": ("<i4", (), False),
    "edges": ("<i4", (), False),
    "most": ("<i4", (), False),
    "energy": ("<f8", (), False),
    "charge": ("<i2", (), False),
    "subset": ("<i4", (), False),
    "group": ("<i4", (), False),
    "cell": ("<f8", (3, 3), False),
    "pbc": ("|b1", (3,), False),
    "stress": ("<f8", (3, 3), False),
    "digest": ("<u8", (), False),
}
_PERIODIC = ("cell", "pbc", "stress")
_CONTENT = ("numbers", "positions", "forces", "atoms", "energy", "charge", "subset", "group", *_PERIODIC)
_SAME_ENERGY = 1e-3  # eV; energies of isolated atoms of one element that differ by more contradict one another
TESTED = ("charged", "unlabelled", "free atoms", "isolated atoms")
"""Why frames are left out, in the order in which they are tested for it."""


@dataclass(frozen=True)
class Filters:
    """Which frames to leave out."""

    charged: bool = False  # of a total charge other than zero
    isolated: bool = False  # with an atom that has no neighbour within the cutoff
    unlabelled: bool = False  # with an energy, force or position that is missing, NaN or infinite


@dataclass
class Block:
    """Some frames as flat arrays, filtered and with their edges counted: what readers hand to the writer.

    Neutral free atoms (one atom, without a cell or called isolated) are no frames to train on: their energies become reference
    energies of the set.
    """

    arrays: dict[str, NDArray[Any]]  # those of the prepared set but `subset` and `group`
    subset: list[str]
    group: list[str]
    read: int  # frames that were looked at
    dropped: dict[str, int]  # by filter
    atom_energies: dict[str, float]

    @classmethod
    def of(cls, frames: Iterable[Frame], r_max: float, filters: Filters, closest: float = TOUCHING) -> "Block":
        """Packs frames.

        Args:
            frames: some.
            r_max: cutoff in Å that edges are counted with.
            filters: which frames to leave out.
            closest: frames with atoms closer than this, in Å, are refused.

        Raises:
            InputError: a frame has no atoms or some on top of one another, or contradicts the energy of an isolated atom.
        """
        kept, counts = [], []
        atom_energies: dict[str, float] = {}
        dropped: Counter[str] = Counter()
        read = 0
        for frame in frames:
            read += 1
            finite = (
                np.isfinite(frame.energy) and np.isfinite(frame.forces).all() and np.isfinite(frame.positions).all()
            )
            if filters.charged and frame.charge != 0:
                dropped["charged"] += 1
            elif filters.unlabelled and not finite:
                dropped["unlabelled"] += 1
            elif len(frame) == 1 and (frame.isolated or (frame.cell is None and frame.charge == 0)):
                dropped["free atoms"] += 1
                if frame.charge == 0 and math.isfinite(frame.energy):
                    _add_reference(atom_energies, SYMBOLS[int(frame.numbers[0])], frame.energy, frame.name)
            else:
                count = count_edges(frame, r_max, closest)
                if filters.isolated and count.isolated:
                    dropped["isolated atoms"] += 1
                else:
                    kept.append(frame)
                    counts.append(count)
        if any(not len(frame) for frame in kept):
            raise InputError(f"{next(f.name or 'a frame' for f in kept if not len(f))} has no atoms: remove it")
        arrays = {name: np.asarray(values, dtype=_COLUMNS[name][0]) for name, values in _columns(kept, counts).items()}
        return cls(arrays, [f.subset for f in kept], [f.group for f in kept], read, dict(dropped), atom_energies)


def _add_reference(known: dict[str, float], symbol: str, energy: float, name: str) -> None:
    """Adds the energy of an isolated atom, unless it contradicts one that is known."""
    if abs(known.setdefault(symbol, energy) - energy) > _SAME_ENERGY:
        raise InputError(
            f"{name or 'a frame'} is an isolated {symbol} atom of {energy:.6g} eV, but another one has "
            f"{known[symbol]:.6g} eV, and an "
            "element has one reference energy: keep the one of the level of theory that is trained on"
        )


def _digest(frame: Frame) -> int:
    """Tells structures apart: species, positions, cell and charge, to the last bit."""
    found = hashlib.blake2b(digest_size=8)
    for values, dtype in ((frame.numbers, "|u1"), (frame.positions, "<f8"), (frame.pbc, "|b1")):
        found.update(np.ascontiguousarray(values, dtype=dtype).tobytes())
    if frame.cell is not None:
        found.update(np.ascontiguousarray(frame.cell, dtype="<f8").tobytes())
    found.update(str(frame.charge).encode())
    return int.from_bytes(found.digest(), "little")


def _columns(frames: list[Frame], counts: list[Counts]) -> dict[str, Any]:
    no_vectors, no_stress = np.zeros((0, 3)), np.full((3, 3), np.nan)
    return {
        "numbers": np.concatenate([np.zeros(0, dtype=np.int64), *(f.numbers for f in frames)]),
        "positions": np.concatenate([no_vectors, *(f.positions for f in frames)]),
        "forces": np.concatenate([no_vectors, *(f.forces for f in frames)]),
        "atoms": [len(f) for f in frames],
        "edges": [count.edges for count in counts],
        "most": [count.most for count in counts],
        "energy": [f.energy for f in frames],
        "charge": [f.charge for f in frames],
        "cell": np.reshape([np.zeros((3, 3)) if f.cell is None else f.cell for f in frames], (-1, 3, 3)),
        "pbc": np.reshape([f.pbc for f in frames], (-1, 3)),
        "stress": np.reshape([no_stress if f.stress is None else f.stress for f in frames], (-1, 3, 3)),
        "digest": np.array([_digest(f) for f in frames], dtype=np.uint64),
    }


class Writer:
    """Writes a prepared set block by block; what was written survives a kill, and the set appears when it is complete.

    Until `finish()` the files lie beside `path` under a hidden name. A writer that is opened again goes on after the last
    `checkpoint()`, whose `position` tells the reader where.

    Args:
        path: the folder to be.
        source: what the set is made from and with which settings, plain JSON. Only a set begun with the same is gone on with.
        r_max: cutoff in Å that `edges` were counted with.
        name: of what is read, for messages; that of the folder where None.

    Raises:
        InputError: the folder exists already.
    """

    def __init__(
        self, path: str | os.PathLike[str], source: Mapping[str, Any], r_max: float, name: str | None = None
    ) -> None:
        self.path, self.name = Path(path), name or str(path)
        if self.path.exists():
            raise InputError(f"{self.path} exists already: remove it or choose another name")
        self._folder = self.path.parent / f".{self.path.name}.partial"
        self._state_path = self._folder / "state.json"
        self._source = json.loads(json.dumps({**source, "r_max": r_max}))
        self.r_max = r_max
        self.position: Any = None  # of the reader, at the last checkpoint; None at the start
        self.read = 0
        self.dropped: dict[str, int] = {}
        self.atom_energies: dict[str, float] = {}
        self.unlabelled = {"energy": 0, "forces": 0, "stress": 0}  # frames whose label is missing, NaN or infinite
        self.edges = 0
        self._rows = dict.fromkeys(_COLUMNS, 0)
        self._crc = dict.fromkeys(_COLUMNS, 0)
        self._subsets: dict[str, int] = {}
        self._groups: dict[str, int] = {}
        self._groups_saved = 0
        self._species = np.zeros(256, dtype=np.int64)
        self._frames_of_subset: dict[int, int] = {}
        self._resume() if self._can_resume() else self._begin()
        self._files = {name: self._open(name) for name in _COLUMNS}
        self._groups_file = (self._folder / "groups.jsonl").open("a", encoding="utf-8")

    @property
    def frames(self) -> int:
        """Frames written so far."""
        return self._rows["atoms"]

    def append(self, block: Block) -> None:
        """Adds a block's frames."""
        self.read += block.read
        for name, count in block.dropped.items():
            self.dropped[name] = self.dropped.get(name, 0) + count
        for symbol, energy in block.atom_energies.items():
            _add_reference(self.atom_energies, symbol, energy, f"a frame of {self.name}")
        finite = np.isfinite(block.arrays["forces"]).all(axis=1)
        of_atom = np.repeat(np.arange(len(block.subset)), block.arrays["atoms"])
        self.edges += int(np.sum(block.arrays["edges"]))
        self.unlabelled["stress"] += int((~np.isfinite(block.arrays["stress"])).any(axis=(1, 2)).sum())
        self.unlabelled["energy"] += int((~np.isfinite(block.arrays["energy"])).sum())
        self.unlabelled["forces"] += len(np.unique(of_atom[~finite]))
        arrays = dict(block.arrays)
        arrays["subset"] = self._numbers_of(block.subset, self._subsets)
        arrays["group"] = self._numbers_of(block.group, self._groups)
        for name, (dtype, _, _) in _COLUMNS.items():
            values = np.ascontiguousarray(arrays[name], dtype=dtype)
            content = values.tobytes()
            self._files[name].write(content)
            self._crc[name] = zlib.crc32(content, self._crc[name])
            self._rows[name] += len(values)
        self._species += np.bincount(arrays["numbers"].astype(np.int64), minlength=256)
        for number, count in zip(*np.unique(arrays["subset"], return_counts=True), strict=True):
            self._frames_of_subset[int(number)] = self._frames_of_subset.get(int(number), 0) + int(count)

    def checkpoint(self, position: Any) -> None:
        """Makes what was appended so far survive a kill; `position` is plain JSON."""
        new_groups = list(self._groups)[self._groups_saved :]
        self._groups_file.writelines(json.dumps(name) + "\n" for name in new_groups)
        self._groups_saved = len(self._groups)
        self._groups_file.flush()
        os.fsync(self._groups_file.fileno())
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.position = position
        state = {
            "source": self._source,
            "position": position,
            "read": self.read,
            "dropped": self.dropped,
            "atom_energies": self.atom_energies,
            "unlabelled": self.unlabelled,
            "edges": self.edges,
            "rows": self._rows,
            "crc": self._crc,
            "subsets": list(self._subsets),
            "groups": len(self._groups),
            "species": self._species.tolist(),
            "frames_of_subset": list(self._frames_of_subset.items()),
        }
        _write_json(self._state_path, state)

    def finish(self, **facts: Any) -> "PreparedSet":
        """Writes the manifest and gives the folder its name.

        Args:
            facts: more for the manifest: `labels` (the level of theory), `atom_energies` in eV by symbol ...

        Raises:
            InputError: no frames are left.
        """
        if not self.frames:
            self.discard()
            left_out = ", ".join(f"{count} {name}" for name, count in self.dropped.items()) or "none"
            raise InputError(
                f"no frames are left of the {self.read} of {self.name} (dropped: {left_out}): look at the input and its filters"
            )
        self.checkpoint(self.position)
        self.close()
        periodic = bool(np.load(self._header("pbc"), mmap_mode="r").any())
        for name in _COLUMNS:
            self._header(name)
            if name in _PERIODIC and not periodic:
                (self._folder / f"{name}.npy").unlink()
        manifest = {
            "format": "ddpkit prepared set",
            "version": VERSION,
            "source": self._source,
            "atom_energies": self.atom_energies,
            **facts,
            "frames": self.frames,
            "atoms": self._rows["numbers"],
            "edges": self.edges,
            "r_max": self.r_max,
            "periodic": periodic,
            "species": {SYMBOLS[int(z)]: int(self._species[z]) for z in np.flatnonzero(self._species)},
            "subsets": {name: self._frames_of_subset.get(number, 0) for name, number in self._subsets.items()},
            "groups": len(self._groups),
            "read": self.read,
            "dropped": self.dropped,
            "unlabelled": self.unlabelled,
            "units": UNITS,
            "arrays": {
                name: {"dtype": dtype, "shape": [self._rows[name], *shape], "crc32": f"{self._crc[name]:08x}"}
                for name, (dtype, shape, _) in _COLUMNS.items()
                if periodic or name not in _PERIODIC
            },
        }
        _write_json(self._folder / "manifest.json", manifest)
        self._state_path.unlink()
        try:
            self._folder.rename(self.path)
        except OSError:
            # Another process finished the same set first.
            if not (self.path / "manifest.json").exists():
                raise
            shutil.rmtree(self._folder)
        return PreparedSet(self.path)

    def close(self) -> None:
        """Closes the files; what was written since the last checkpoint is given up."""
        self._groups_file.close()
        for file in self._files.values():
            file.close()

    def discard(self) -> None:
        """Gives up what was written."""
        self.close()
        shutil.rmtree(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.position is None and self._folder.exists():
            self.discard()  # nothing to go on from
        self.close()

    def _can_resume(self) -> bool:
        try:
            state = json.loads(self._state_path.read_text())
            return bool(state["source"] == self._source and state["rows"].keys() == _COLUMNS.keys())
        except (OSError, ValueError, KeyError):
            return False

    def _begin(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        for name in _COLUMNS:
            with (self._folder / f"{name}.npy").open("wb") as file:
                _write_header(file, name, 0)
        (self._folder / "groups.jsonl").touch()

    def _resume(self) -> None:
        state = json.loads(self._state_path.read_text())
        self.position, self.read, self.dropped = state["position"], state["read"], state["dropped"]
        self.atom_energies, self.unlabelled, self.edges = state["atom_energies"], state["unlabelled"], state["edges"]
        self._rows, self._crc = state["rows"], state["crc"]
        self._subsets = {name: number for number, name in enumerate(state["subsets"])}
        self._species = np.array(state["species"], dtype=np.int64)
        self._frames_of_subset = {number: count for number, count in state["frames_of_subset"]}  # noqa: C416
        lines = (self._folder / "groups.jsonl").read_text(encoding="utf-8").split("\n")[: state["groups"]]
        (self._folder / "groups.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        self._groups = {json.loads(line): number for number, line in enumerate(lines)}
        self._groups_saved = len(self._groups)

    def _open(self, name: str) -> BinaryIO:
        dtype, shape, _ = _COLUMNS[name]
        file = (self._folder / f"{name}.npy").open("r+b")
        header = _write_header(file, name, 0)
        end = header + self._rows[name] * np.dtype(dtype).itemsize * int(np.prod(shape))
        file.truncate(end)
        file.seek(end)
        return file

    def _header(self, name: str) -> Path:
        """Tells the array's length in its header, now that it is known."""
        path = self._folder / f"{name}.npy"
        with path.open("r+b") as file:
            _write_header(file, name, self._rows[name])
        return path

    @staticmethod
    def _numbers_of(names: list[str], known: dict[str, int]) -> NDArray[np.int64]:
        return np.array([known.setdefault(name, len(known)) for name in names], dtype=np.int64)


class PreparedSet:
    """A prepared set, mapped into memory.

    Attributes:
        path: the folder.
        manifest: what it says of itself.
        species: chemical symbols present, by atomic number.
        atoms: `[frames]` atoms of each frame.
        charge: `[frames]` total charge.
        subset_index, group_index: `[frames]` number of each frame's subset (in `subsets`) and group.
        subsets: names of the subsets.

    Raises:
        InputError: no prepared set lies there, or one that this version cannot read, or files of the wrong length.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.manifest: dict[str, Any] = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path} holds no prepared set (no readable manifest.json): make one with `ddpkit data prepare`"
            ) from error
        facts = self.manifest if isinstance(self.manifest, dict) else {}
        if facts.get("format") != "ddpkit prepared set" or facts.get("version") != VERSION or "arrays" not in facts:
            raise InputError(
                f"{self.path} is no prepared set of version {VERSION}: make it again with `ddpkit data prepare`"
            )
        self._arrays = {name: self._map(name, facts) for name, facts in self.manifest["arrays"].items()}
        self.atoms: NDArray[np.int64] = self._arrays["atoms"].astype(np.int64)
        self._first = np.concatenate([[0], np.cumsum(self.atoms)])
        self.charge: NDArray[np.int64] = self._arrays["charge"].astype(np.int64)
        self.subset_index: NDArray[np.int64] = self._arrays["subset"].astype(np.int64)
        self.group_index: NDArray[np.int64] = self._arrays["group"].astype(np.int64)
        self.subsets: tuple[str, ...] = tuple(self.manifest["subsets"])
        self.species: tuple[str, ...] = tuple(self.manifest["species"])
        self._groups: list[str] | None = None
        self._counts: dict[float, dict[str, NDArray[np.int64]]] = {}  # by cutoff

    def __len__(self) -> int:
        return len(self.atoms)

    def __repr__(self) -> str:
        return f"PreparedSet({str(self.path)!r}, frames={len(self)}, species={' '.join(self.species)})"

    @property
    def periodic(self) -> bool:
        """Whether any frame is."""
        return bool(self.manifest["periodic"])

    @property
    def atom_energies(self) -> dict[str, float]:
        """Energies of isolated atoms in eV by symbol, as far as they are known."""
        return dict(self.manifest.get("atom_energies") or {})

    @property
    def labels(self) -> dict[str, Any]:
        """What was read as labels: the key in the files (None where not known), the unit here, and how it was converted."""
        keys = self.manifest.get("keys") or {}
        labels = ["energy", "forces"]
        if self.periodic and self.manifest.get("unlabelled", {}).get("stress", 0) < len(self):
            labels.append("stress")
        theory = self.manifest.get("labels")
        found: dict[str, Any] = {name: {"key": keys.get(name), "unit": UNITS[name]} for name in labels}
        if "stress" in found and "virial" in str(keys.get("stress")).lower():
            found["stress"]["from"] = "virial [eV], as -virial / volume"
        return found | ({"theory": theory} if theory else {})

    @property
    def fingerprint(self) -> str:
        """Tells whether two sets hold the same frames and labels in the same order, by the checksums in the manifest."""
        arrays = self.manifest["arrays"]
        content = {name: [arrays[name]["shape"], arrays[name]["crc32"]] for name in _CONTENT if name in arrays}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def bytes(self) -> int:
        """Size of all arrays."""
        return sum(values.nbytes for values in self._arrays.values())

    @property
    def digests(self) -> NDArray[np.uint64] | None:
        """`[frames]` numbers that are equal where structures are; None in a set of an older version."""
        return self._arrays.get("digest")

    def has_stress(self, indices: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of some frames have a stress."""
        if "stress" not in self._arrays:
            return np.zeros(len(indices), dtype=bool)
        labelled: NDArray[np.bool_] = ~np.isnan(self._arrays["stress"][indices]).any(axis=(1, 2))
        return labelled

    def array(self, name: str) -> NDArray[Any]:
        """A flat array of the set (read only): `numbers`, `positions`, `forces` by atom, `energy`, `cell` ... by frame."""
        return self._arrays[name]

    def atom_range(self, index: int) -> tuple[int, int]:
        """Where a frame's atoms begin and end in the flat arrays."""
        return int(self._first[index]), int(self._first[index + 1])

    def frame(self, index: int) -> Frame:
        """One frame, copied out of the arrays."""
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        first, last = self.atom_range(index)
        a = self._arrays
        cell = stress = None
        pbc = np.zeros(3, dtype=bool)
        if self.periodic and a["pbc"][index].any():
            cell, pbc = a["cell"][index].copy(), a["pbc"][index].copy()
            if not np.isnan(a["stress"][index]).any():
                stress = a["stress"][index].copy()
        return Frame(
            numbers=a["numbers"][first:last].astype(np.int64),
            positions=a["positions"][first:last].copy(),
            energy=float(a["energy"][index]),
            forces=a["forces"][first:last].copy(),
            cell=cell,
            pbc=pbc,
            stress=stress,
            charge=int(a["charge"][index]),
            subset=self.subsets[self.subset_index[index]],
            group=self.groups[self.group_index[index]],
            name=f"frame {index} of {self.path}",
        )

    @property
    def groups(self) -> list[str]:
        """Names of the groups."""
        if self._groups is None:
            lines = (self.path / "groups.jsonl").read_text(encoding="utf-8").split("\n")
            self._groups = [json.loads(line) for line in lines if line]
        return self._groups

    def edges(self, r_max: float) -> NDArray[np.int64]:
        """`[frames]` edges of each frame within a cutoff in Å.

        Those of the set's own cutoff are kept in it; for another they are counted once, on all cores, and kept in its folder
        where that can be written.
        """
        return self._counted("edges", r_max)

    def most_neighbours(self, r_max: float) -> NDArray[np.int64]:
        """`[frames]` neighbours within a cutoff in Å of the atom of each frame that has most.

        Kept like `edges`; a set of an older version has none, and they are counted once.
        """
        return self._counted("most", r_max)

    def _counted(self, name: str, r_max: float) -> NDArray[np.int64]:
        if self._has_counts(name, r_max):
            return self._arrays[name].astype(np.int64)
        kept = self.path / f"{name}_{r_max:.12g}.npy"
        if not kept.exists():
            if not os.access(self.path, os.W_OK):
                return self._count(r_max)[name]
            made_once(kept, lambda temporary: self._keep_counts(temporary, name, r_max))
        counts: NDArray[np.int64] = np.load(kept)
        return counts

    def _has_counts(self, name: str, r_max: float) -> bool:
        """Whether counts are those that the set was made with."""
        return bool(r_max == self.manifest["r_max"]) and name in self._arrays

    def _keep_counts(self, path: Path, name: str, r_max: float) -> None:
        """Writes one kind of counts to `path`, and beside it what was counted along with it."""
        counts = self._count(r_max)
        for other in counts.keys() - {name}:
            target = self.path / f"{other}_{r_max:.12g}.npy"
            if not (
                self._has_counts(other, r_max) or target.exists()
            ):  # no lock: who makes that one may wait for this one
                beside = path.with_name(f".{target.name}.{os.getpid()}.beside")
                _save(beside, counts[other])
                beside.rename(target)
        _save(path, counts[name])

    def verify(self) -> None:
        """Compares every array with its checksum.

        Raises:
            InputError: naming the first that differs.
        """
        for name, facts in self.manifest["arrays"].items():
            values = self._arrays[name]
            crc, step = 0, max(1, (1 << 24) // max(1, values[:1].nbytes))
            for start in range(0, len(values), step):
                crc = zlib.crc32(values[start : start + step].tobytes(), crc)
            if f"{crc:08x}" != facts["crc32"]:
                raise InputError(
                    f"{self.path / name}.npy does not match its checksum: the file is damaged, make the set again"
                )

    def _count(self, r_max: float) -> dict[str, NDArray[np.int64]]:
        if r_max not in self._counts:
            step = 2000
            starts = range(0, len(self), step)
            tasks = [(str(self.path), r_max, start, min(start + step, len(self))) for start in starts]
            processes = min(cores(), len(tasks)) if len(tasks) > 8 else 0
            edges, most = np.concatenate(
                [np.zeros((2, 0), dtype=np.int64), *ordered_map(_count_range, tasks, processes)], axis=1
            )
            self._counts[r_max] = {"edges": edges, "most": most}
        return self._counts[r_max]

    def _map(self, name: str, facts: Mapping[str, Any]) -> NDArray[Any]:
        path = self.path / f"{name}.npy"
        try:
            values = np.load(path, mmap_mode="r", allow_pickle=False) if facts["shape"][0] else np.load(path)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}): make the set again") from error
        if list(values.shape) != facts["shape"] or values.dtype.str != facts["dtype"]:
            raise InputError(f"{path} is not what the manifest says: make the set again")
        plain: NDArray[Any] = values.view(np.ndarray)
        return plain


def write_prepared(
    path: str | os.PathLike[str],
    frames: Iterable[Frame],
    *,
    r_max: float,
    source: Mapping[str, Any] | None = None,
    **facts: Any,
) -> PreparedSet:
    """Writes frames as a prepared set.

    Args:
        path: the folder to be; it appears when it is complete.
        frames: the frames, consumed one after another.
        r_max: cutoff in Å that edges are counted with.
        source: where they come from, plain JSON.
        facts: more for the manifest (`labels`, `atom_energies` ...).

    Raises:
        InputError: the folder exists, or there are no frames.
    """
    with Writer(path, {"made_by": "write_prepared", **(source or {})}, r_max) as writer:
        remaining = iter(frames)
        while some := list(islice(remaining, 512)):
            writer.append(Block.of(some, r_max, Filters()))
        return writer.finish(**facts)


def _count_range(task: tuple[str, float, int, int]) -> NDArray[np.int64]:
    """`[2, frames]` edges, and neighbours of the atom that has most."""
    path, r_max, start, stop = task
    frames = PreparedSet(path)
    counts = [count_edges(frames.frame(i), r_max) for i in range(start, stop)]
    return np.array([(count.edges, count.most) for count in counts], dtype=np.int64).T


def _write_header(file: BinaryIO, name: str, rows: int) -> int:
    """Writes an array's header at the start of the file; its length does not depend on the number of rows."""
    dtype, shape, _ = _COLUMNS[name]
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": (rows, *shape)})
    return file.tell()


def _write_json(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _save(path: Path, values: NDArray[Any]) -> None:
    with path.open("wb") as file:
        np.save(file, values)
