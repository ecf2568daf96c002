"""Run every configuration of a study under mpirun, into one folder.

usage: ddpkit experiment numerics|speed [scale=demo|workstation|paper] [out=DIR] [ranks=N] [--slurm] [OVERRIDES...]
       numerics: [seeds=N] [spread=N] [arms=A,B,...] [together=N] [scale=causes|emulated|node|ranks] [parts=P,Q,...]
       speed: [launches=N] [pairs=N] [arms=A,B,...] [scale=node|eight]      both: [within=SECONDS]
       ddpkit experiment accuracy scale=choices|frames|strategies|demo [seeds=N] [together=N] ...
       ddpkit experiment inference ...                molecular dynamics in LAMMPS: see `ddpkit experiment inference --help`

Each configuration becomes a run folder below `out` (default: studies/STUDY-SCALE). What is complete is skipped and what was
interrupted is resumed, so that the same command can be given again; a run that failed of itself, as by NaN, is kept: it counts
against its arm. within=SECONDS stops in time, as Ctrl-C does. Further overrides go to every run (deterministic=true has a default
folder of its own, beside which `ddpkit-analyze report studies` finds it). `--slurm` prints a job script for the study instead of
running it.

Before the first run `plan.json` declares which claims will get a verdict; write one of your own there to declare others.

The study of numerics runs all arms for one seed after another; claims are tested from six seeds on. together=N has N runs under
way at a time, on the same devices: what is told of them is no time. scale=causes has one arm for each cause of difference,
scale=emulated 64 ranks on one process, scale=node four GPUs of one host; scale=ranks has 1 to 64 ranks on one process and four
real ones, each in a sub-folder (parts=emulated-64 is one of them alone). Where there are several GPUs, runs of one process are
dealt out to them seed by seed. arms= leaves arms out, spread= is the number of further reruns of the first seed.

In the study of accuracy `ddpkit eval` follows each run, on the test part of its data: scale=choices undoes one choice of
experiment=small_molecule in each arm (export DDPKIT_MOLECULE=FILE), scale=frames trains on fewer and fewer frames of the
built-in set, scale=strategies compares synchronisation eager, compiled and captured on four GPUs at one global batch.

In the study of speed all arms are launched together and take turns, an epoch at a time, so that drift of the machine falls on all
alike (where so many do not fit into memory at once, they follow one another). After three such launches, the pilot, pairs of
launches of custom and standard follow: eight, or as many as resolve one per cent. scale=eight has eight launches of these alone,
on the paper's number of GPUs. within= begins no launch that would be cut off.
arms= launches some arms alone, such as custom-eager (at both sizes) or custom-eager-32, with standard eager beside them; no pairs
follow and nothing is declared. Then nequip-ddp, nequip-simple and nequip-simple-compiled are arms too: nequip's own trainer
(`ddpkit bench nequip`), which takes its turns with ours.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch

from ddpkit.analysis import plan, speed
from ddpkit.analysis.outcomes import ended
from ddpkit.analysis.runs import read_runs
from ddpkit.errors import InputError
from ddpkit.experiments import inference, nequip_trainer
from ddpkit.experiments.config import read
from ddpkit.experiments.studies import STUDIES, Accuracy, Arm, Numerics, Ranks, Speed, of_any_size
from ddpkit.experiments.turns import Turns, order
from ddpkit.ranks.mpirun import mpirun

_COUNTS = ("ranks", "seeds", "spread", "launches", "pairs", "together", "within")
_NAMES = ("arms", "parts")
_OF = {"numerics": ("seeds", "spread", "together", "parts"), "speed": ("launches", "pairs")}
_POLL = 0.05  # seconds between looks at runs under way
# What Python, torch and a small model take; pages that ranks share are counted once.
_BYTES_OF_A_RANK = 400e6


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    study: str
    scale: str
    out: Path
    ranks: int | None
    seeds: int | None
    launches: int | None
    pairs: int | None
    together: int | None
    spread: int | None
    within: int | None
    arms: tuple[str, ...]
    parts: tuple[str, ...]
    slurm: bool
    overrides: tuple[str, ...]


def main(arguments: Sequence[str]) -> None:
    """Runs a study.

    Raises:
        InputError: an unknown study or scale, pairs= of one that has none, or runs that failed.
    """
    if arguments and arguments[0] == "inference":
        with _stopped_like_ctrl_c():
            inference.main(arguments[1:])
        return
    options = _parse(arguments)
    scale = _some_of(STUDIES[options.study][options.scale], options)
    if isinstance(scale, Ranks):
        if options.slurm or options.ranks:
            raise InputError(f"scale={options.scale} has several numbers of ranks: leave --slurm and ranks= out.")
        with _stopped_like_ctrl_c(options.within):
            _numerics(scale.parts, options)
        return
    ranks = options.ranks or scale.ranks
    if options.slurm:
        print(slurm_script(options, scale, ranks))
    elif isinstance(scale, Numerics):
        with _stopped_like_ctrl_c(options.within):
            runs = _numerics({"": scale}, options)
            if isinstance(scale, Accuracy):
                _evaluate(runs, options)
    else:
        if options.pairs and not scale.pair:
            what = "arms=" if options.arms else f"scale={options.scale}"
            raise InputError(f"pairs={options.pairs} is not for {what}, which no pairs follow: give launches=N.")
        read([*scale.overrides, *options.overrides])
        for arm in scale.arms:
            if arm.nequip is not None:
                config = read([*scale.overrides, *options.overrides, *arm.overrides])
                nequip_trainer.require_plain(config, arm.nequip)
                nequip_trainer.batch_of_rank(config, ranks)
        with _stopped_like_ctrl_c():
            _speed(scale, options, ranks)


def _some_of(scale: Numerics | Ranks | Speed, options: Options) -> Numerics | Ranks | Speed:
    """The scale without what arms= and parts= leave out.

    Raises:
        InputError: a name that it does not have.
    """
    if isinstance(scale, Ranks):
        _require_known("parts", options.parts, scale.parts)
        chosen = {name: part for name, part in scale.parts.items() if name in (options.parts or scale.parts)}
        _require_known("arms", options.arms, {arm.label for part in chosen.values() for arm in part.arms})
        return Ranks({name: part.only(options.arms) if options.arms else part for name, part in chosen.items()})
    _require_known("parts", options.parts, ())
    if not options.arms:
        return scale
    if isinstance(scale, Speed):
        return _some_launched(scale, options)
    _require_known("arms", options.arms, [arm.label for arm in (*scale.arms, *scale.once)])
    return scale.only(options.arms)


def _some_launched(scale: Speed, options: Options) -> Speed:
    """A study of speed of some arms alone.

    Raises:
        InputError: an arm that it does not have, or one of nequip's trainer where that is not installed.
    """
    names = list(dict.fromkeys(of_any_size(arm) for arm in scale.known))
    for name in options.arms:
        if name not in {*names, *(arm.label for arm in scale.known)}:
            raise InputError(
                f"arms={','.join(options.arms)} is not for speed: {name!r} is none of its arms, which are {', '.join(names)}, "
                "each also with its size (as in custom-eager-32)."
            )
    chosen = scale.only(options.arms)
    if peers := [arm for arm in chosen.arms if arm.nequip]:
        nequip_trainer.require_installed(f"The arm {of_any_size(peers[0])}")
    return chosen


def _require_known(key: str, given: Sequence[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            choice = f"use some of {', '.join(sorted(known))}" if known else f"this scale has no {key}"
            raise InputError(f"{key}={','.join(given)}: {name!r} is unknown: {choice}.")


def _numerics(parts: Mapping[str, Numerics], options: Options) -> "list[StudyRun]":
    """Runs studies of numerics, each in the sub-folder of its name; all their runs, seed by seed."""
    single: dict[int, list[StudyRun]] = {}
    several: dict[int, list[StudyRun]] = {}
    for name, scale in parts.items():
        read([*scale.overrides, *options.overrides])  # a wrong override is told here, not by the first run
        own, ranks = replace(options, out=options.out / name), options.ranks or scale.ranks
        blocks = _runs(scale.blocks(options.seeds, options.spread), scale, own, ranks, name)
        _declare(own, scale, blocks, ranks=ranks, seeds=options.seeds or scale.seeds)
        for number, block in enumerate(blocks):
            (several if ranks > 1 else single).setdefault(number, []).extend(block)
    everything = [_dealt(list(single.values()), gpus() if single else 0), *several.values()]
    _work(everything, options)
    return [run for block in everything for run in block]


def _dealt(blocks: "Sequence[Sequence[StudyRun]]", count: int) -> "list[StudyRun]":
    """The runs of so many blocks side by side, then of the next ones: each block on a GPU of its own."""
    if count < 2:
        return [run for block in blocks for run in block]
    dealt: list[StudyRun] = []
    for first in range(0, len(blocks), count):
        placed = [[replace(run, gpu=n) for run in block] for n, block in enumerate(blocks[first : first + count])]
        dealt += [run for row in zip_longest(*placed) for run in row if run is not None]
    return dealt


def gpus() -> int:
    """How many GPUs this process may use."""
    return torch.cuda.device_count()


def _speed(scale: Speed, options: Options, ranks: int) -> None:
    """The pilot, and the pairs that it asks for."""
    launches = options.launches or scale.launches
    pilot = scale.blocks(launches)
    blocks = _runs(pilot, scale, options, ranks)
    numbers = tuple(range(1, launches + 1)) if scale.pair else ()
    _declare(options, scale, blocks, numbers, ranks=ranks)
    _work(blocks, options, scale)
    if not scale.pair:
        return
    known = plan.read(options.out, scale.primary)
    pairs = known.pairs or options.pairs or _pairs(options.out, known)
    blocks += _runs(scale.pairs(pairs, launches), scale, options, ranks)
    labels = tuple(run.label for block in blocks for run in block)
    plan.write(options.out, plan.Plan(known.primary, labels, numbers, pairs), ranks=ranks)
    print(f"{pairs} pairs of launches follow the pilot.", flush=True)
    _work(blocks[len(pilot) :], options, scale)


def _pairs(out: Path, declared: plan.Plan) -> int:
    """How many pairs the pilot asks for: those of the arm and size that scatter most."""
    data = speed.study(read_runs(out)[0], plan.Plan(declared.primary))
    cells = [cell for cell in data.times if cell.name in {claim.arm for claim in declared.primary}]
    return max([speed.pairs_needed(data, cell) for cell in cells], default=plan.FEWEST[plan.TIME])


def _declare(
    options: Options, scale: Numerics | Speed, blocks: "list[list[StudyRun]]", pilot: tuple[int, ...] = (), **more: int
) -> None:
    """Writes the plan before the first run; later it must be the same.

    Raises:
        InputError: the folder's plan has other runs.
    """
    labels = tuple(run.label for block in blocks for run in block)
    known = plan.read(options.out, scale.primary)
    if known.runs and not set(labels) <= set(known.runs):
        raise InputError(
            f"{options.out}/plan.json declared {len(known.runs)} runs and not {len(labels)}: what is tested is fixed before the "
            "first run; give another out=."
        )
    if not known.runs:
        plan.write(options.out, plan.Plan(known.primary, labels, pilot, known.pairs), **more)


def _runs(
    blocks: Sequence[Sequence[Arm]], scale: Numerics | Speed, options: Options, ranks: int, part: str = ""
) -> "list[list[StudyRun]]":
    common = (*scale.overrides, *options.overrides)
    return [
        [
            StudyRun(options.out / arm.label, (*common, *arm.overrides), ranks, part=part, nequip=arm.nequip)
            for arm in block
        ]
        for block in blocks
    ]


def _work(blocks: "Sequence[Sequence[StudyRun]]", options: Options, timed: Speed | None = None) -> None:
    """Runs what is not complete; a study of speed takes turns.

    Raises:
        InputError: runs that failed.
    """
    everything = [run for block in blocks for run in block]
    complete = [run for run in everything if run.is_complete()]
    options.out.mkdir(parents=True, exist_ok=True)
    together = max(map(len, blocks), default=0) * (everything[0].ranks if everything else 1)
    if timed and timed.turns and _fit_into_memory(together):
        failed = _take_turns(blocks, timed, options)
    else:
        failed = _few_at_a_time(everything, options.together or 1)
    lost = [run.title for run in failed if not run.has_ended()]
    if lost:
        raise InputError(
            f"{len(lost)} of {len(everything)} runs failed ({', '.join(lost)}): see what they said above, then give the same "
            "command."
        )
    if evidence := [run.title for run in everything if not run.has_finished()]:
        print(f"{len(evidence)} runs failed of themselves and count against their arms: {', '.join(evidence)}.")
    print(f"{options.study}: {len(everything)} runs in {options.out} ({len(complete)} were complete before).")


def _evaluate(runs: "Sequence[StudyRun]", options: Options) -> None:
    """Evaluates the runs that have finished, as many at a time as were run together.

    Raises:
        InputError: some could not be evaluated.
    """
    waiting = [run for run in runs if run.has_finished() and not run.is_evaluated()]
    processes: dict[str, subprocess.Popen[bytes]] = {}
    with _saved_on_ctrl_c(processes.values()):
        for run in waiting:
            _await_place(processes.values(), options.together or 1)
            print(f"evaluating {run.label}", flush=True)
            processes[run.label] = run.evaluate()
        for process in processes.values():
            process.wait()
    if lost := [run.label for run in waiting if not run.is_evaluated()]:
        raise InputError(
            f"{len(lost)} of {len(runs)} runs could not be evaluated ({', '.join(lost)}): see what was said above, then give the "
            "same command."
        )
    print(
        f"Errors on test frames are in evaluation/test of each run; `ddpkit-analyze accuracy {options.out}` compares them."
    )


def _parse(arguments: Sequence[str]) -> Options:
    words = list(arguments)
    if not words or words[0] not in STUDIES:
        given = f"{words[0]!r} is no study" if words else "No study was named"
        raise InputError(
            f"{given}: use `ddpkit experiment numerics`, `ddpkit experiment speed` or the like for accuracy or inference."
        )
    study, slurm, overrides = words[0], False, []
    named = {"scale": "workstation" if "workstation" in STUDIES[study] else next(iter(STUDIES[study]))}
    for word in words[1:]:
        key, _, value = word.partition("=")
        if word == "--slurm":
            slurm = True
        elif key in ("scale", "out", *_COUNTS, *_NAMES):
            named[key] = value
        elif key in ("repeats", "seed", "data.seed"):
            raise InputError(
                f"{word} is for the study to choose: give seeds=N (numerics, accuracy), launches=N or pairs=N (speed)."
            )
        else:
            overrides.append(word)
    if named["scale"] not in STUDIES[study]:
        raise InputError(f"scale={named['scale']} is unknown: use one of {', '.join(STUDIES[study])}.")
    for key in _COUNTS:
        least = 0 if key == "spread" else 1
        if key in named and not (re.fullmatch(r"\d+", named[key]) and int(named[key]) >= least):
            what = "seconds" if key == "within" else key
            raise InputError(f"{key}={named[key]} is no number of {what}: give a whole number from {least}.")
    for key in _OF["numerics" if study == "speed" else "speed"]:
        if key in named:
            raise InputError(
                f"{key}={named[key]} is not for {study}: give seeds=N or together=N (numerics, accuracy), launches=N or pairs=N "
                "(speed)."
            )
    counts = {key: int(named[key]) for key in _COUNTS if key in named}
    suffix = "-deterministic" if "deterministic=true" in overrides else ""
    return Options(
        study,
        named["scale"],
        Path(named.get("out") or f"studies/{study}-{named['scale']}{suffix}"),
        ranks=counts.get("ranks"),
        seeds=counts.get("seeds"),
        launches=counts.get("launches"),
        pairs=counts.get("pairs"),
        together=counts.get("together"),
        spread=counts.get("spread"),
        within=counts.get("within"),
        arms=_names(named.get("arms")),
        parts=_names(named.get("parts")),
        slurm=slurm,
        overrides=tuple(overrides),
    )


def _names(given: str | None) -> tuple[str, ...]:
    return tuple(given.split(",")) if given else ()


@dataclass(frozen=True)
class StudyRun:
    """One run of a study: its folder, its configuration, and its process.

    Attributes:
        gpu: the one of several that it is to run on; None: all.
        part: the sub-folder of the study that it belongs to, for messages.
        nequip: the scheme of nequip's own trainer, which has no checkpoint to go on from; None: the run is ours.
    """

    folder: Path
    overrides: tuple[str, ...]
    ranks: int
    gpu: int | None = None
    part: str = ""
    nequip: str | None = None

    @property
    def label(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"{self.part}/{self.label}" if self.part else self.label

    def is_complete(self) -> bool:
        """Whether this very run has finished, or failed of itself.

        Raises:
            InputError: the folder holds a run of another configuration.
        """
        made_as = self.folder / "study.json"
        if not made_as.is_file():
            return False
        if {k: v for k, v in json.loads(made_as.read_text()).items() if k != "starts"} != self._identity():
            raise InputError(
                f"{self.folder} holds a run of another configuration: give another out=, or remove that folder."
            )
        return self.has_ended()

    def has_ended(self) -> bool:
        """Whether there is nothing to go on with: the run has finished, or failed of itself."""
        return ended(self._summary()).kind != "interrupted"

    def has_finished(self) -> bool:
        """Whether the run's summary says so."""
        return self._summary().get("status") == "finished"

    def is_evaluated(self) -> bool:
        """Whether its errors on the test part of its data are known."""
        return (self.folder / "evaluation" / "test" / "accuracy.csv").is_file()

    def evaluate(self) -> "subprocess.Popen[bytes]":
        """Starts `ddpkit eval` of it, on one rank and the device that it was trained on."""
        device = str(read(self.overrides).device)
        command = [
            sys.executable,
            "-m",
            "ddpkit.experiments",
            "eval",
            str(self.folder),
            "--device",
            device,
            "--worst",
            "0",
        ]
        return subprocess.Popen(command, start_new_session=True)

    def _summary(self) -> dict[str, object]:
        path = self.folder / "summary.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def start(self, *more: str) -> "subprocess.Popen[bytes]":
        """Starts it under mpirun, or resumes it, with further overrides."""
        self.folder.mkdir(parents=True, exist_ok=True)
        made_as = self.folder / "study.json"
        starts = json.loads(made_as.read_text()).get("starts", 1) + 1 if made_as.is_file() else 1
        made_as.write_text(json.dumps(self._identity() | {"starts": starts}))
        head, variables = mpirun(self.ranks)
        if self.gpu is not None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            variables["CUDA_VISIBLE_DEVICES"] = visible[self.gpu] if visible != [""] else str(self.gpu)
        resumes = (self.folder / "checkpoints" / "last.pt").is_file()
        where = f"resume={self.folder}" if resumes else f"run_dir={self.folder}"
        verb = ["run"] if self.nequip is None else ["bench", "nequip", self.nequip]
        command = [*head, sys.executable, "-m", "ddpkit.experiments", *verb, *self.overrides, *more, where]
        # In a session of its own: Ctrl-C reaches us alone, and mpirun, which would kill the ranks, hands on what we send.
        return subprocess.Popen(command, env=variables, start_new_session=True)

    def _identity(self) -> dict[str, object]:
        known = {"overrides": list(self.overrides), "ranks": self.ranks}
        return known if self.nequip is None else known | {"nequip": self.nequip}


def _few_at_a_time(runs: Sequence[StudyRun], together: int) -> list[StudyRun]:
    """Runs what is not complete, so many at a time; those that failed."""
    waiting = [run for run in runs if not run.is_complete()]
    processes: dict[Path, subprocess.Popen[bytes]] = {}
    started = time.monotonic()
    with _saved_on_ctrl_c(processes.values()):
        for number, run in enumerate(runs, 1):
            if run not in waiting:
                print(f"[{number}/{len(runs)}] {run.title}: complete, kept")
                continue
            ended = _await_place(processes.values(), together)
            left = (time.monotonic() - started) / ended * (len(waiting) - ended) if ended else None
            print(f"[{number}/{len(runs)}] {run.title}{_left(left)}", flush=True)
            processes[run.folder] = run.start()
        for process in processes.values():
            process.wait()
    return [run for run in waiting if not run.has_finished()]


def _await_place(processes: "Collection[subprocess.Popen[bytes]]", together: int) -> int:
    """Waits until fewer than so many processes are under way; how many have ended."""
    while True:
        ended = sum(process.poll() is not None for process in processes)
        if len(processes) - ended < together:
            return ended
        time.sleep(_POLL)


def _take_turns(blocks: Sequence[Sequence[StudyRun]], scale: Speed, options: Options) -> list[StudyRun]:
    """Has the runs of each block take turns; those that failed."""
    total = sum(map(len, blocks))
    for left_behind in options.out.glob(".turns-*"):
        shutil.rmtree(left_behind)
    failed, before = [], 0
    started, longest = time.monotonic(), 0.0
    for block in blocks:
        these = []
        for number, run in enumerate(block, before + 1):
            if run.is_complete():
                print(f"[{number}/{total}] {run.label}: complete, kept")
            else:
                these.append((number, run))
        before += len(block)
        if these and options.within and time.monotonic() - started + longest > options.within:
            print("No time is left for another launch.")
            raise KeyboardInterrupt
        if these:
            began = time.monotonic()
            # Named after now, so that the analysis can tell which runs were there at the same time.
            turns = options.out / f".turns-{time.strftime('%Y%m%d-%H%M%S')}"
            epochs = int(read(these[0][1].overrides).train.max_epochs)
            failed += _side_by_side(these, total, epochs, turns, scale.ready)
            longest = max(longest, time.monotonic() - began)
    return failed


def _fit_into_memory(processes: int) -> bool:
    """Whether so many ranks are likely to fit into this host's memory at once; says so where not."""
    facts = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+) kB", facts.read_text()) if facts.is_file() else None
    if found is None or int(found[1]) * 1024 > processes * _BYTES_OF_A_RANK:
        return True
    gigabytes = processes * _BYTES_OF_A_RANK / 1e9
    print(f"{processes} ranks at once need about {gigabytes:.0f} GB, which are not free: the runs follow one another.")
    return False


def _side_by_side(
    numbered: Sequence[tuple[int, StudyRun]], total: int, epochs: int, folder: Path, ready: int
) -> list[StudyRun]:
    """Starts runs, so many at a time, lets each do its first epoch, and then all take turns."""
    turns = Turns(folder)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    with turns, _saved_on_ctrl_c(processes.values()):
        for first in range(0, len(numbered), ready):
            these = numbered[first : first + ready]
            for number, run in these:
                print(f"[{number}/{total}] {run.label}: getting ready", flush=True)
                processes[run.label] = run.start(f"train.turns={folder}")
            for _, run in these:
                turns.await_ready(run.label, 0, processes[run.label])
            for _, run in these:
                turns.give(run.label, 0)
                turns.await_ready(run.label, 1, processes[run.label])
        labels = [label for label, process in processes.items() if process.poll() is None]
        seconds = 0.0
        for done in range(1, epochs):
            print(
                f"epoch {done + 1} of {epochs}, {len(labels)} runs in turns{_left(seconds * (epochs - done) or None)}",
                flush=True,
            )
            started = time.monotonic()
            for label in order(labels, done):
                process = processes[label]
                turns.give(label, done)
                turns.await_ready(label, done + 1, process)
            seconds = time.monotonic() - started
        for label in labels:
            turns.give(label, epochs)
        for process in processes.values():
            process.wait()
    return [run for _, run in numbered if not run.has_finished()]


def _left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f" (about {seconds / 60:.0f} min left)" if seconds >= 90 else f" (about {seconds:.0f} s left)"


@contextmanager
def _stopped_like_ctrl_c(within: int | None = None) -> Iterator[None]:
    """Has SIGTERM and SIGUSR1, which job schedulers send, act as Ctrl-C does; and so many seconds, where given."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM, signal.SIGUSR1] + [signal.SIGALRM] * (within is not None)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    if within is not None:
        signal.alarm(within)
    try:
        yield
    finally:
        if within is not None:
            signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _saved_on_ctrl_c(processes: "Collection[subprocess.Popen[bytes]]") -> Iterator[None]:
    """On Ctrl-C, has the runs save where they stand before it goes on its way; on any other error, ends them."""
    try:
        yield
    except BaseException as error:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGUSR1)
        for process in processes:
            process.wait()
        if isinstance(error, KeyboardInterrupt):
            print("\nStopped; the same command goes on from here.")
        raise


def slurm_script(options: Options, scale: Numerics | Speed, ranks: int) -> str:
    """A SLURM job script that runs the study."""
    per_node = min(ranks, scale.ranks_per_node)
    nodes = -(-ranks // per_node)
    given = {key: getattr(options, key) for key in _COUNTS if key not in ("ranks", "within")}
    counts = "".join(f" {key}={value}" for key, value in given.items() if value)
    counts += "".join(f" {key}={','.join(names)}" for key in _NAMES if (names := getattr(options, key)))
    words = "".join(f" {shlex.quote(word)}" for word in options.overrides)
    out = shlex.quote(str(options.out))
    return f"""#!/bin/bash
#SBATCH --job-name=ddpkit-{options.study}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={per_node}
#SBATCH --gpus-per-node={per_node}
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300

# Give it again after a time limit: complete runs are kept, the interrupted one is resumed.
ddpkit experiment {options.study} scale={options.scale} out={out} ranks={ranks}{counts}{words} &
study=$!
trap 'kill -USR1 $study' USR1
wait $study || wait $study  # the first is cut short by the signal
ddpkit-analyze {"accuracy" if isinstance(scale, Accuracy) else "report"} {out}"""
