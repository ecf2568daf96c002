"""Run every configuration of a study under mpirun, one after another, into one folder.

usage: ddpkit experiment numerics|speed [scale=demo|workstation|paper] [out=DIR] [ranks=N] [repeats=N] [--slurm] [OVERRIDES...]

Each configuration becomes a run folder below `out` (default: studies/STUDY-SCALE). What is complete is skipped and what was
interrupted is resumed, so that the same command can be given again. Further overrides go to every run. `--slurm` prints a job
script for the study instead of running it.
"""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpkit.errors import InputError
from ddpkit.experiments.studies import STUDIES, Arm, Scale
from ddpkit.launch import mpirun


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    study: str
    scale: str
    out: Path
    ranks: int | None
    repeats: int | None
    slurm: bool
    overrides: tuple[str, ...]


def main(arguments: Sequence[str]) -> None:
    """Runs a study.

    Raises:
        InputError: an unknown study or scale, or a run that failed.
    """
    options = _parse(arguments)
    scale = STUDIES[options.study][options.scale]
    ranks = options.ranks or scale.ranks
    arms = scale.arms(options.repeats)
    if options.slurm:
        print(slurm_script(options, scale, ranks))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    _run_all(options, scale, arms, ranks)


def _parse(arguments: Sequence[str]) -> Options:
    words = list(arguments)
    if not words or words[0] not in STUDIES:
        given = f"{words[0]!r} is no study" if words else "No study was named"
        raise InputError(f"{given}: use `ddpkit experiment numerics` or `ddpkit experiment speed`.")
    study, named, slurm, overrides = words[0], {"scale": "workstation"}, False, []
    for word in words[1:]:
        key, _, value = word.partition("=")
        if word == "--slurm":
            slurm = True
        elif key in ("scale", "out", "ranks", "repeats"):
            named[key] = value
        else:
            overrides.append(word)
    if named["scale"] not in STUDIES[study]:
        raise InputError(f"scale={named['scale']} is unknown: use one of {', '.join(STUDIES[study])}.")
    for key in ("ranks", "repeats"):
        if key in named and not re.fullmatch(r"[1-9]\d*", named[key]):
            raise InputError(f"{key}={named[key]} is no number of {key}: give a whole number from 1.")
    return Options(
        study,
        named["scale"],
        Path(named.get("out") or f"studies/{study}-{named['scale']}"),
        int(named["ranks"]) if "ranks" in named else None,
        int(named["repeats"]) if "repeats" in named else None,
        slurm,
        tuple(overrides),
    )


def _run_all(options: Options, scale: Scale, arms: Sequence[Arm], ranks: int) -> None:
    durations: list[float] = []
    done = 0
    for number, arm in enumerate(arms, 1):
        folder = options.out / arm.label
        overrides = [*scale.overrides, *arm.overrides, *options.overrides]
        if _is_complete(folder, overrides, ranks):
            print(f"[{number}/{len(arms)}] {arm.label}: complete, kept")
            done += 1
            continue
        left = _left(durations, len(arms) - number + 1)
        print(f"[{number}/{len(arms)}] {arm.label}{left}", flush=True)
        started = time.monotonic()
        _run(folder, overrides, ranks)
        durations.append(time.monotonic() - started)
    print(f"{options.study}: {len(arms)} runs in {options.out} ({done} were complete before).")


def _left(durations: Sequence[float], runs: int) -> str:
    if not durations:
        return ""
    seconds = sum(durations) / len(durations) * runs
    return f" (about {seconds / 60:.0f} min left)" if seconds >= 90 else f" (about {seconds:.0f} s left)"


def _is_complete(folder: Path, overrides: Sequence[str], ranks: int) -> bool:
    """Whether this very run has finished.

    Raises:
        InputError: the folder holds a run of another configuration.
    """
    made_as = folder / "study.json"
    if not made_as.is_file():
        return False
    if json.loads(made_as.read_text()) != {"overrides": list(overrides), "ranks": ranks}:
        raise InputError(f"{folder} holds a run of another configuration: give another out=, or remove that folder.")
    return _has_finished(folder)


def _has_finished(folder: Path) -> bool:
    summary = folder / "summary.json"
    return summary.is_file() and json.loads(summary.read_text()).get("status") == "finished"


def _run(folder: Path, overrides: Sequence[str], ranks: int) -> None:
    """Runs one configuration under mpirun, or resumes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps({"overrides": list(overrides), "ranks": ranks}))
    head, variables = mpirun(ranks)
    resumes = (folder / "checkpoints" / "last.pt").is_file()
    where = f"resume={folder}" if resumes else f"run_dir={folder}"
    command = [*head, sys.executable, "-m", "ddpkit.experiments", "run", *overrides, where]
    # In a session of its own: Ctrl-C reaches us alone, and mpirun, which would kill the ranks, hands on what we send.
    process = subprocess.Popen(command, env=variables, start_new_session=True)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGUSR1)  # the ranks save where they stand
        process.wait()
        print(f"\nStopped; the same command goes on with {folder}.")
        raise
    if not _has_finished(folder):
        raise InputError(
            f"The run in {folder} ended with exit code {code}: see what it said above, then give the same command."
        )


def slurm_script(options: Options, scale: Scale, ranks: int) -> str:
    """A SLURM job script that runs the study."""
    per_node = min(ranks, scale.ranks_per_node)
    nodes = -(-ranks // per_node)
    extra = "".join(f" {word}" for word in options.overrides)
    return f"""#!/bin/bash
#SBATCH --job-name=ddpkit-{options.study}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={per_node}
#SBATCH --gpus-per-node={per_node}
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=SIGUSR1@300

# Give it again after a time limit: complete runs are kept, the interrupted one is resumed.
ddpkit experiment {options.study} scale={options.scale} out={options.out} ranks={ranks}{extra}
ddpkit-analyze report {options.out}"""
