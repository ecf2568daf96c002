"""The data of a run: made or opened, divided, compared with what they were, and looked at for what is wrong with them."""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from ddpkit.data import PreparedSet, generated, prepare, split
from ddpkit.data.ase_files import READER, AseFiles
from ddpkit.data.frame import SYMBOLS
from ddpkit.data.labels import Advice, Choice, as_options, as_overrides
from ddpkit.data.once import made_once
from ddpkit.data.prepared import Filters
from ddpkit.errors import InputError
from ddpkit.experiments.data import told
from ddpkit.ranks.agree import agree, first_rank_first
from ddpkit.record import RunFolder

_QUICK = 256 << 20  # bytes; smaller sets are compared with their checksums at the start of a run


@dataclass(frozen=True)
class Data:
    """A set and its three parts."""

    frames: PreparedSet
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def open_data(config: DictConfig, advice: Advice = as_overrides) -> Data:
    """Makes or finds the set on one rank of each host, then opens and splits it on all.

    Args:
        config: the configuration.
        advice: how the user makes settings of the data, for messages.

    Raises:
        InputError: on every rank, what was wrong with the data on any.
    """
    with first_rank_first("preparing the data", per_host=True) as goes_first:
        if goes_first:
            made = PreparedSet(_prepare(config, advice))
            if made.bytes <= _QUICK:
                made.verify()
            made.edges(float(config.model.r_max))  # counted once
    with agree("opening the data"):
        frames = PreparedSet(_prepare(config, advice))
        usable = np.arange(len(frames))
        if config.data.neutral:
            usable = usable[frames.charge[usable] == 0]
        if config.data.source == "files" and config.data.frames is not None:
            usable = usable[: config.data.frames]
        groups = frames.group_index[usable] if config.data.split_by == "group" else None
        parts = split(len(usable), config.data.split, config.data.seed, groups)
        train, validation, test = (usable[part] for part in parts)
        if config.data.train_frames is not None:
            train = _some(train, config.data.train_frames, config.data.seed)
    return Data(frames, train, validation, test)


def _some(train: np.ndarray, count: int, seed: int) -> np.ndarray:
    """So many of the frames to train on; fewer are some of more.

    Raises:
        InputError: there are not so many.
    """
    if count > len(train):
        raise InputError(
            f"data.train_frames={count:,} is more than the {len(train):,} frames to train on: give more data or a smaller number."
        )
    return np.sort(np.random.default_rng([seed, 1]).permutation(train)[:count])


def _prepare(config: DictConfig, advice: Advice) -> Path:
    """The prepared set that the configuration speaks of; made where it is missing."""
    data, cache = config.data, Path(config.data.cache)
    keys = {name: data[name] for name in ("energy_key", "forces_key", "stress_key") if data[name] is not None}
    if data.source != "files":
        if keys:
            raise InputError(
                f"{advice(**keys)} is for data=files, and data={data.source} has labels of its own: leave it out."
            )
        return generated(data.source, cache, frames=data.frames)
    path = Path(data.path)
    if (path / "manifest.json").is_file():
        _refuse_other_keys(path, keys, advice)
        return path
    if not path.is_file():
        raise InputError(f"data.path={path} does not exist: give a prepared set or a file that ASE reads.")
    facts = path.stat()
    choice = Choice(**keys, allow_missing=data.allow_missing)
    identity = f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns} {config.model.r_max} {READER} {choice}"
    target = cache / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"

    def make(temporary: Path) -> None:
        source = AseFiles([path], choice, advice=advice)
        prepare(
            source, temporary, r_max=config.model.r_max, filters=Filters(), processes=0, progress=False, resumable=False
        )

    return made_once(target, make)


def _refuse_other_keys(path: Path, keys: dict[str, str], advice: Advice) -> None:
    """Looks whether a prepared set was read from the keys that are asked for."""
    read = PreparedSet(path).labels
    for name, key in keys.items():
        quantity = name.removesuffix("_key")
        was = read.get(quantity, {}).get("key")
        if (was or "").lower() != key.lower():
            raise InputError(
                f"{path} is a prepared set whose {quantity} was read from {was or 'keys that are not known'}, not {key}: "
                f"leave {advice(**{name: key})} out, or prepare the files anew with {as_options(**{name: key})}."
            )


def refuse_missing_labels(config: DictConfig, data: Data) -> None:
    """Looks whether the frames have what the loss asks for.

    Raises:
        InputError: frames to train or validate on lack an energy or forces; stress is to be trained on and no frame, or not every
            periodic one, has it; or no frame has an edge.
    """
    frames, used = data.frames, np.concatenate([data.train, data.validation])
    energy = ~np.isfinite(frames.array("energy")[used])
    forces = (
        np.array([not np.isfinite(frames.frame(int(i)).forces).all() for i in used])
        if _lacks_forces(frames)
        else ~energy & energy
    )
    for what, missing in (("energy", energy), ("forces", forces)):
        if missing.any():
            raise InputError(
                f"{missing.sum():,} of the {len(used):,} frames to train and validate on have no {what} or one that is "
                f"NaN or infinite, frame {used[missing].min()} of {frames.path} first: prepare the files again with "
                "`ddpkit data prepare ... --drop-unlabelled`."
            )
    if not frames.edges(float(config.model.r_max))[data.train].any():
        raise InputError(
            f"No frame of {frames.path} to train on has two atoms within model.r_max={config.model.r_max:g} Å: raise the cutoff."
        )
    if not config.loss.stress:
        return
    asked = f"loss.stress={config.loss.stress:g}"
    has, periodic = frames.has_stress(data.train), _periodic(frames, data.train)
    if not periodic.any():
        raise InputError(
            f"{asked}, but no frame to train on in {frames.path} is periodic, and a stress needs a cell: set loss.stress=0."
        )
    if not has.any():
        others = frames.has_stress(np.arange(len(frames))).sum()
        where = f"though {others:,} others of {frames.path} do" if others else f"nor has any other of {frames.path}"
        raise InputError(
            f"{asked}, but none of the {len(has):,} frames to train on has a stress, {where}: set loss.stress=0, or "
            "choose data that have one (an unusual key is named with data.stress_key for a file that ASE reads, with "
            "--stress-key of `ddpkit data prepare ase` for a prepared set)."
        )
    lacking = periodic & ~has
    if lacking.any() and not config.data.allow_missing:
        raise InputError(
            f"{asked}, but {lacking.sum():,} of the {periodic.sum():,} periodic frames to train on have no stress, frame "
            f"{data.train[lacking].min()} of {frames.path} first: leave them out, or train on the stress of the others "
            "alone with data.allow_missing=true."
        )


def _lacks_forces(frames: PreparedSet) -> bool:
    return bool(frames.manifest.get("unlabelled", {}).get("forces", 0))


def _periodic(frames: PreparedSet, indices: np.ndarray) -> np.ndarray:
    if not frames.periodic:
        return np.zeros(len(indices), dtype=bool)
    periodic: np.ndarray = frames.array("pbc")[indices].any(axis=1)
    return periodic


def peculiarities(config: DictConfig, data: Data) -> list[str]:
    """What a user should know of the data, a sentence each: frames that two parts share, species that training never sees, labels
    that some frames lack, frames without edges.
    """
    frames = data.frames
    notes = [*frames.manifest.get("notes", ())]
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    if frames.digests is not None:
        digests = {name: frames.digests[part] for name, part in parts.items()}
        for name, other in (("validation", "train"), ("test", "train"), ("test", "validation")):
            if same := int(np.isin(digests[name], digests[other]).sum()):
                notes.append(
                    f"{same:,} of the {len(parts[name]):,} {name} frames are identical to {other} frames, so that errors "
                    "on them say little of new frames: remove duplicates from the data"
                )
    notes += _never_trained_on(frames, parts)
    if bare := int((frames.edges(float(config.model.r_max))[data.train] == 0).sum()):
        notes.append(f"{bare:,} of the {len(data.train):,} frames to train on have no two atoms within model.r_max")
    if config.loss.stress and (lacking := int((~frames.has_stress(data.train)).sum())):
        notes.append(
            f"{lacking:,} of the {len(data.train):,} frames to train on have no stress and add nothing to its term"
        )
    return notes


def tell_data(config: DictConfig, data: Data, folder: RunFolder, state: dict[str, Any] | None) -> None:
    """Prints and records what a run trains on."""
    labels = data.frames.labels
    folder.summarize(labels=labels, data_fingerprint=fingerprint(config, data))
    print(f"labels: {told(labels)}", flush=True)
    notes = peculiarities(config, data)
    if state is not None and state.get("data") is None:
        notes.append(
            "the run was begun by a version that kept no fingerprint of its data: whether they have changed is not known"
        )
    for note in notes:
        print(f"ddpkit: warning: {note}.", flush=True)


def _never_trained_on(frames: PreparedSet, parts: Mapping[str, np.ndarray]) -> list[str]:
    """Species that frames to validate or test on have, and none to train on."""
    part_of_frame = np.full(len(frames), len(parts), dtype=np.int64)
    for number, part in enumerate(parts.values()):
        part_of_frame[part] = number
    part_of_atom, numbers = np.repeat(part_of_frame, frames.atoms), frames.array("numbers")
    counts = np.bincount(256 * part_of_atom + numbers, minlength=256 * (len(parts) + 1)).reshape(-1, 256)
    place = dict(zip(parts, counts, strict=False))
    return [
        f"{SYMBOLS[number]} is in {len(_with(frames, number, parts[name])):,} of the {len(parts[name]):,} {name} frames "
        "and in none to train on: what the model says of it means nothing"
        for name in ("validation", "test")
        for number in np.flatnonzero((place[name] > 0) & (place["train"] == 0)).tolist()
    ]


def _with(frames: PreparedSet, number: int, part: np.ndarray) -> np.ndarray:
    """The frames of a part that have an element."""
    of_atom = np.searchsorted(np.cumsum(frames.atoms), np.flatnonzero(frames.array("numbers") == number), side="right")
    return np.intersect1d(of_atom, part)


def fingerprint(config: DictConfig, data: Data) -> dict[str, str]:
    """Tells whether two runs see the same data: what the frames are, how they are divided, in which order they are trained on."""
    parts = hashlib.sha256()
    for part in (data.train, data.validation, data.test):
        parts.update(len(part).to_bytes(8, "little") + np.ascontiguousarray(part, dtype="<i8").tobytes())
    order = np.random.default_rng([config.data.seed, 0]).permutation(len(data.train))
    return {
        "frames": data.frames.fingerprint,
        "split": parts.hexdigest()[:16],
        "order": hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16],
        "set": str(data.frames.path.resolve()),
    }


def changed(before: Mapping[str, str], now: Mapping[str, str], *, order: bool = True) -> str | None:
    """What differs between two fingerprints, in words; None where nothing does.

    Args:
        before: of a run.
        now: of the data as they are.
        order: whether the order matters too.
    """
    if before.get("frames") != now["frames"]:
        return "its frames or labels are others"
    if before.get("split") != now["split"]:
        return "its frames are divided otherwise into training, validation and test"
    if order and before.get("order") != now["order"]:
        return "its frames come in another order"
    return None


def refuse_changed_data(config: DictConfig, data: Data, state: dict[str, Any] | None) -> None:
    """Looks whether a run that goes on sees the data that it began with. Checkpoints of older versions cannot tell.

    Raises:
        InputError: it would see others.
    """
    before = (state or {}).get("data")
    if before is not None and (what := changed(before, fingerprint(config, data))):
        where = data.frames.path if config.data.path is None else f"data.path={config.data.path}"
        raise InputError(
            f"The data of the run in {config.run_dir} ({where}) have changed since it began: {what}; restore "
            f"them{kept(before)}, or start a new run."
        )


def kept(before: Mapping[str, str]) -> str:
    """Where the data of a fingerprint still are, as part of a sentence; empty where they are not."""
    with suppress(InputError):
        if PreparedSet(before["set"]).fingerprint == before["frames"]:
            return f" (they are kept in the prepared set {before['set']})"
    return ""
