"""The campaign's command: references, trials side by side, and their record."""

import argparse
import csv
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ddpkit
from ddpkit.errors import InputError
from ddpkit.testing.faults import inside, judge, strikes
from ddpkit.testing.faults.job import Job, pause_in
from ddpkit.testing.faults.judge import End
from ddpkit.testing.faults.material import write_clusters
from ddpkit.testing.faults.plan import FAULTS, Plan, Run, Trial
from ddpkit.testing.faults.report import latest, report

COLUMNS = (
    "trial", "seed", "fault", "phase_asked", "phase_hit", "strategy", "compiled", "rank", "ended", "seconds", "exit_code",
    "status", "sentence", "processes_left", "went_on", "equal", "verdict", "why", "recorded",
)  # fmt: skip
_TRIES = 3  # for a moment that the driver missed
_WHOLE = 300.0  # seconds that an undisturbed run may take


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run.

    Attributes:
        folder: its run folder.
        seconds: that it took.
        phases: each phase that its first rank went through, with its seconds.
    """

    folder: Path
    seconds: float
    phases: list[tuple[str, float]]


class Campaign:
    """Runs trials and judges them.

    Args:
        out: for everything.
        ranks: of a run.
        device: `cpu` or `cuda`.
        timeout: `train.timeout` of the runs, seconds.
    """

    def __init__(self, out: Path, ranks: int = 2, device: str = "cpu", timeout: float = 15.0) -> None:
        self.out, self.ranks, self.device, self.timeout = out.resolve(), ranks, device, timeout
        self.out.mkdir(parents=True, exist_ok=True)
        hook = self.out / "inside"
        hook.mkdir(exist_ok=True)
        shutil.copyfile(inside.__file__, hook / "sitecustomize.py")
        self._data = self.out / "clusters.extxyz"
        if not self._data.exists():
            write_clusters(self._data)
        self._code = _code()
        self._started = f"{os.getpid()}-{time.time_ns()}"
        self._references: dict[Run, Reference | str] = {}
        self._locks: dict[Run, threading.Lock] = {}
        self._lock = threading.Lock()
        self._jobs = 0
        self._live: list[Job] = []
        self.abandoned = False

    def abandon(self) -> None:
        """Ends what is under way; what it led to then means nothing."""
        with self._lock:
            self.abandoned = True
            for job in self._live:
                job.kill()

    # -- runs ------------------------------------------------------------------------------------------------------

    def _start(self, overrides: Sequence[str], output: Path, compiler: Path, fault: str = "") -> Job:
        path = os.pathsep.join([str(self.out / "inside"), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": path,
            "DDPKIT_FAULT": fault,
            "TORCHINDUCTOR_CACHE_DIR": str(compiler),
        }
        words = [sys.executable, "-m", "ddpkit.experiments", "run", *overrides]
        with self._lock:
            if self.abandoned:
                raise RuntimeError("the campaign was abandoned")
            self._jobs += 1
            job = Job(words, self.ranks, variables, output, f"{self._started}-{self._jobs}")
            self._live = [job, *(other for other in self._live if other.mpirun.poll() is None)]
        return job

    def overrides(self, run: Run, cache: Path) -> list[str]:
        """What makes a run: 36 steps of a few milliseconds, a checkpoint every five, three validations."""
        return [
            "model._target_=ddpkit.testing.faults.model.Pairs", "model.r_max=4.0", f"device={self.device}", "data=files",
            f"data.path={self._data}", f"data.cache={cache}", "data.split=[0.8,0.1,0.1]", "train.batch_size=4",
            "train.max_epochs=3", "train.checkpoint_every=5", "train.ema_decay=0.9", f"train.timeout={self.timeout}",
            "deterministic=true", f"strategy={run.strategy}", f"compile={str(run.compiled).lower()}",
            *(["cuda_graphs=true"] if run.recorded else []),
            *(["compiler=interpreted"] if run.recorded and self.device == "cpu" else []),
        ]  # fmt: skip

    def reference(self, run: Run) -> Reference:
        """The uninterrupted run of a kind, made once and kept.

        Raises:
            InputError: such a run does not work here.
        """
        with self._lock:
            lock = self._locks.setdefault(run, threading.Lock())
        with lock:
            if run not in self._references:
                for _ in range(_TRIES):
                    self._references[run] = self._make_reference(run)
                    if isinstance(self._references[run], Reference):
                        break
        made = self._references[run]
        if isinstance(made, str):
            raise InputError(made)
        return made

    def _make_reference(self, run: Run) -> Reference | str:
        overrides = self.overrides(run, self.out / "cache")
        identity = hashlib.sha256(json.dumps([self._code, self.ranks, *overrides]).encode()).hexdigest()[:12]
        folder = self.out / "references" / f"{run.label}-{identity}"
        facts = folder / "reference.json"
        for _ in range(
            0 if facts.exists() else 1 + run.compiled
        ):  # trials find compiled code: so must what tells the times
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            began = time.monotonic()
            with self._start(
                [*overrides, f"run_dir={folder / 'run'}"], folder / "output.txt", self._compiler(run)
            ) as job:
                phases = _phases(job, began + _WHOLE)
                ended = job.wait(10.0)
            seconds = time.monotonic() - began
            status, error = judge.read_summary(folder / "run")
            if not ended or status != "finished":
                why = error or (folder / "output.txt").read_text(errors="replace")[-300:]
                return (
                    f"An undisturbed run of {run.label} does not finish here ({' '.join(why.split())}): see {folder}."
                )
            if run.recorded and not judge.replayed(folder / "run"):
                return f"No step of an undisturbed run of {run.label} was replayed here: see {folder}."
        if not facts.exists():
            facts.write_text(json.dumps({"seconds": seconds, "phases": phases}))
        known = json.loads(facts.read_text())
        return Reference(folder / "run", known["seconds"], [(name, length) for name, length in known["phases"]])

    # -- a trial ---------------------------------------------------------------------------------------------------

    def run(self, trial: Trial) -> dict[str, Any]:
        """Makes one trial; a row of `trials.csv`.

        The trial's folder is removed where all was well.
        """
        row: dict[str, Any] = {
            "trial": trial.number, "seed": trial.seed, "fault": trial.fault, "phase_asked": trial.phase,
            "strategy": trial.run.strategy, "compiled": int(trial.run.compiled), "recorded": int(trial.run.recorded),
            "rank": trial.rank,
        }  # fmt: skip
        try:
            reference = self.reference(trial.run)
        except InputError as error:
            return row | {"verdict": "skipped", "why": str(error)}
        folder = self.out / "trials" / f"{trial.seed}-{trial.number}"
        for attempt in range(_TRIES):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            with strikes.small_disk(folder / "disk") as disk:
                try:
                    outcome = self._attempt(trial, reference, folder, disk, 0.5**attempt)
                except Exception as error:  # noqa: BLE001  (the other trials go on)
                    (folder / "error.txt").write_text(traceback.format_exc())
                    outcome = {"verdict": "failed", "why": f"the campaign itself failed: {error!r}"}
                if outcome["verdict"] == "failed":
                    shutil.copytree(folder / "disk", folder / "kept", dirs_exist_ok=True)
            if outcome["verdict"] != "missed":
                break
        if outcome["verdict"] == "passed":
            shutil.rmtree(folder, ignore_errors=True)
        return row | outcome

    def _attempt(
        self, trial: Trial, reference: Reference, folder: Path, disk: Path | None, earlier: float
    ) -> dict[str, Any]:
        """One go at a trial, `earlier` being the share of its delay that is waited for."""
        run = folder / "disk" / "run"
        cache = folder / "cache" if trial.phase == "data" else self.out / "cache"
        # Half of the compilations find no code on the disk. On GPUs another compilation may choose other kernels.
        compiles = trial.phase == "compile" and trial.entry < 0.5 and self.device == "cpu"
        overrides, compiler = (
            self.overrides(trial.run, cache),
            folder / "compiler" if compiles else self._compiler(trial.run),
        )
        words = [*overrides, f"run_dir={run}"]
        bound = self.timeout + 15.0 + 2 * reference.seconds + (60.0 if compiles else 0.0)
        full = disk if trial.rank == 0 else None  # a full disk or a limit of the size of files
        with self._start(words, folder / "struck.txt", compiler, trial.fault) as job:
            hit = _await(job, trial, reference, earlier, time.monotonic() + _WHOLE)
            if hit and not strikes.strike(trial.fault, job, trial.rank, full):
                hit = ""
            end = _end(job, bound, run, folder / "struck.txt")
        outcome = {
            "phase_hit": hit, "ended": int(end.ended), "seconds": f"{end.seconds:.1f}", "exit_code": end.code,
            "status": end.status, "sentence": end.sentence, "processes_left": len(end.left),
        }  # fmt: skip
        if not hit:
            return outcome | {"verdict": "missed", "why": "the run had ended, or was about to"}
        if full is not None:
            strikes.make_room(full)
        wrong = judge.faults_of_end(trial, end)
        how, more = self._go_on(trial, reference, folder, words, end, compiler)
        verdict = "failed" if wrong or more else "passed"
        return outcome | {"went_on": how, "equal": int(not more), "verdict": verdict, "why": "; ".join([*wrong, *more])}

    def _go_on(
        self, trial: Trial, reference: Reference, folder: Path, words: list[str], end: End, compiler: Path
    ) -> tuple[str, list[str]]:
        """Resumes what was struck, or starts it again; how, and what is wrong."""
        run = folder / "disk" / "run"
        last = run / "checkpoints" / "last.pt"
        if end.finished:
            return "finished", _said(judge.differences(run, reference.folder))
        before = {name: judge.rows(run / f"{name}s.csv") for name in ("step", "epoch")}
        wrong: list[str] = []
        how = "resumed"
        if last.is_file() and trial.fault in ("truncated", "garbage"):
            strikes.damage(last, trial.fault, trial.number)
            how, wrong = self._go_on_damaged(folder, run, compiler)
            if how == "finished":
                how = "resumed from an older checkpoint"
                return how, wrong + _said(judge.differences(run, reference.folder))
        if last.is_file():
            progress = _progress(last)
            again = self._complete([f"resume={run}"], run, folder / "resumed.txt", compiler)
            after = {name: judge.rows(run / f"{name}s.csv") for name in before}
            wrong += [text for name in before if (text := judge.lost(before[name], after[name], name, progress[name]))]
        else:
            how = "started again"
            again = self._complete(words, run, folder / "again.txt", compiler)
            if again.code == 2 and not again.finished:
                if not again.printed:
                    wrong.append("refused to start again without a word")
                how, run = "started again elsewhere", folder / "disk" / "again"
                words = [*words[:-1], f"run_dir={run}"]
                again = self._complete(words, run, folder / "elsewhere.txt", compiler)
            kept = [row for path in (folder / "disk").rglob("steps.csv") for row in judge.rows(path)]
            if gone := [row["step"] for row in before["step"] if row not in kept]:
                wrong.append(f"starting again lost the rows of steps {', '.join(gone[:5])}")
        if again.code or not again.finished:
            said = again.printed or again.output[-300:]
            return how, [*wrong, f"{how}, it did not finish (exit code {again.code}): {said}"]
        return how, wrong + _said(judge.differences(run, reference.folder))

    def _go_on_damaged(self, folder: Path, run: Path, compiler: Path) -> tuple[str, list[str]]:
        """What a run does with a damaged checkpoint: it must refuse, or go on from an older one by itself."""
        before = (run / "steps.csv").read_text()
        last, best = run / "checkpoints" / "last.pt", run / "checkpoints" / "best.pt"
        end = self._complete([f"resume={run}"], run, folder / "damaged.txt", compiler)
        if end.finished:
            return "finished", []
        wrong = []
        if end.code != 2 or "last.pt" not in end.printed:
            wrong.append(f"a damaged checkpoint is not refused by name (exit code {end.code}): {end.printed[:200]}")
        if (run / "steps.csv").read_text() != before:
            wrong.append("refusing a damaged checkpoint changed steps.csv")
        last.unlink()
        if best.is_file():
            shutil.copyfile(best, last)
            return "resumed from best.pt", wrong
        return "started again", wrong

    def _complete(self, words: list[str], run: Path, output: Path, compiler: Path) -> End:
        """Runs to the end, undisturbed; once more where mpirun itself did not come up."""
        for _ in range(_TRIES):
            with self._start(words, output, compiler) as job:
                end = _end(job, _WHOLE, run, output)
                if job.ranks() or not end.code:
                    break
        return end

    def _compiler(self, run: Run) -> Path:
        """Compiled code of a kind of run. Runs that share it wait for one another where it is missing, with no end in sight."""
        return self.out / "compiler" / run.label


def _await(job: Job, trial: Trial, reference: Reference, earlier: float, deadline: float) -> str:
    """Waits for the trial's moment. The phase that is under way then; empty if the run ended first."""
    # What a run does at its end takes milliseconds, what Python does seconds.
    share = trial.share**3 if trial.phase == "end" else trial.share
    lengths = [length for name, length in reference.phases if name == trial.phase]
    wanted = int(trial.entry * len(lengths))
    delay = earlier * share * lengths[wanted] if lengths else 0.0
    before, seen = "", -1
    while time.monotonic() < deadline:
        now = job.phase(trial.rank)
        if now == "gone":
            return ""
        if now == trial.phase != before:
            seen += 1
            if seen == wanted:
                time.sleep(delay)
                now = job.phase(trial.rank)
                return "" if now == "gone" else now
        before = now
        time.sleep(pause_in(now))
    return ""


def _phases(job: Job, deadline: float) -> list[tuple[str, float]]:
    """The phases that rank 0 goes through, with their seconds."""
    phases: list[tuple[str, float]] = []
    now, began = "", time.monotonic()
    while now != "gone" and time.monotonic() < deadline:
        then = job.phase(0)
        if then != now:
            if now:
                phases.append((now, time.monotonic() - began))
            now, began = then, time.monotonic()
        time.sleep(pause_in(now))
    return phases


def _end(job: Job, bound: float, run: Path, output: Path) -> End:
    began = time.monotonic()
    ended = job.wait(bound)
    seconds = time.monotonic() - began
    left = list((job.stragglers() if ended else job.left()).values())
    status, error = judge.read_summary(run)
    code = job.mpirun.poll()
    return End(
        ended,
        seconds,
        -1 if code is None else code,
        left if ended else [],
        status,
        error,
        output.read_text(errors="replace"),
    )


def _progress(checkpoint: Path) -> dict[str, int]:
    """Steps and whole epochs that a checkpoint holds."""
    import torch

    progress = torch.load(checkpoint, map_location="cpu", weights_only=True)["progress"]
    return {"step": progress["step"], "epoch": progress["epoch"]}


def _said(text: str) -> list[str]:
    return [text] if text else []


def _code() -> str:
    """What tells one state of the package from another: references hold for one alone."""
    home = Path(ddpkit.__file__).parent
    files = sorted(home.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


# -- the command ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Runs `python -m ddpkit.testing faults`.

    Raises:
        InputError: an argument cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m ddpkit.testing faults",
        description="Strikes runs at random moments: each must end soon, say why, and go on bit for bit. Results come as "
        "they are had: the same command goes on where it was stopped.",
    )
    parser.add_argument("--count", type=int, default=20, metavar="N", help="trials 1 to N (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the campaign (default: %(default)s)")
    parser.add_argument(
        "--trial", type=int, nargs="+", metavar="N", help="these trials again, whatever their record says"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="trials side by side (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("faults"), metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="of a run (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=15.0, help="train.timeout of the runs, s (default: %(default)s)"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME",
        help=f"faults ({', '.join(FAULTS)}), phases or runs (custom, custom-compiled, "
        "custom-recorded, ...); the numbers of trials change",
    )  # fmt: skip
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="write the table of a campaign again; nothing is run"
    )
    chosen = parser.parse_args(argv)
    if chosen.report is not None:
        print(report(chosen.report))
        return 0
    if min(chosen.count, chosen.jobs) < 1 or chosen.ranks < 2:
        raise InputError("--count and --jobs need at least 1, --ranks at least 2: with one rank nobody can be missing.")
    plan = Plan(chosen.seed, chosen.ranks, chosen.only)
    record = Record(chosen.out / "trials.csv")
    numbers = chosen.trial or [n for n in range(1, chosen.count + 1) if (chosen.seed, n) not in record.known]
    campaign = Campaign(chosen.out, chosen.ranks, chosen.device, chosen.timeout)
    for number in (signal.SIGTERM, signal.SIGINT):  # a shell has what it puts into the background ignore SIGINT
        signal.signal(number, signal.default_int_handler)
    done = 0

    def make(number: int) -> None:
        nonlocal done
        row = campaign.run(plan.trial(number))
        if campaign.abandoned:
            return
        record.add(row)
        done += 1
        _tell(row, done, len(numbers))

    pool = ThreadPoolExecutor(chosen.jobs)
    try:
        list(pool.map(make, numbers))
    except KeyboardInterrupt:
        print("Ended before all was tried: the same command goes on.")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        campaign.abandon()
        pool.shutdown()
    print(report(chosen.out))
    return 1 if any(row["verdict"] == "failed" for row in latest(chosen.out)) else 0


class Record:
    """`trials.csv`: one row a trial, as it ends."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._lock = path, threading.Lock()
        if not path.exists():
            self._append(COLUMNS)
        with path.open(newline="") as file:
            if next(csv.reader(file), None) != [*COLUMNS]:
                raise InputError(f"{path} has other columns than this version writes: give another --out.")
        made = [row for row in self.rows() if row["verdict"] in ("passed", "failed")]
        self.known = {(int(row["seed"]), int(row["trial"])) for row in made}

    def rows(self) -> list[dict[str, str]]:
        """All trials so far."""
        return judge.rows(self._path)

    def add(self, row: dict[str, Any]) -> None:
        """Appends a trial."""
        words = [" ".join(str(row.get(column, "")).split()) for column in COLUMNS]
        with self._lock:
            self._append(words)

    def _append(self, words: Sequence[str]) -> None:
        with self._path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(words)


def _tell(row: dict[str, Any], done: int, count: int) -> None:
    kind = Run(row["strategy"], bool(row["compiled"]), bool(row["recorded"])).label
    hit = row.get("phase_hit") or row["phase_asked"]
    why = f"  {row['why']}" if row.get("why") else ""
    print(
        f"[{done:>3}/{count}] {row['verdict']:<7} trial {row['trial']:>3}: {row['fault']} in {hit}, rank {row['rank']}, {kind}, "
        f"{row.get('seconds', '-')} s, {row.get('went_on', '-')}{why}",
        flush=True,
    )
