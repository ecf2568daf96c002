"""The program `ddpkit`, with `ddpkit-run` and `ddpkit-analyze` under their own names."""

import argparse
import atexit
import difflib
import importlib
import logging
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from ddpkit import __version__
from ddpkit.errors import InputError, ParityError, RankDisagreementError, RankLostError, own, unusable_path
from ddpkit.ranks import phase, watchdog
from ddpkit.ranks.launchers import any_rank, place

# verb -> (module, what it does, whether it takes Hydra overrides)
VERBS = {
    "run": ("ddpkit.experiments.run", "train, under mpirun, torchrun, srun or alone", True),
    "experiment": (
        "ddpkit.experiments.experiment",
        "run every configuration of a study: numerics, speed, accuracy or inference",
        True,
    ),
    "check": ("ddpkit.experiments.check", "compare a compiled step with the eager one", True),
    "analyze": ("ddpkit.analysis.cli", "turn run folders into tables, figures and a report", False),
    "models": ("ddpkit.experiments.models_table", "list the named models with their parameters", False),
    "data": ("ddpkit.experiments.data", "make, prepare or describe data", False),
    "eval": ("ddpkit.experiments.evaluate", "accuracy tables of a run or checkpoint", False),
    "md-check": ("ddpkit.experiments.md_check", "whether a model conserves energy and momentum in dynamics", False),
    "lammps": ("ddpkit.experiments.lammps", "run an exported model in LAMMPS", True),
    "export": ("ddpkit.experiments.export", "compile a trained model into one file for Python, ASE and LAMMPS", False),
    "convert-config": (
        "ddpkit.experiments.convert_config",
        "a training file of nequip as a configuration of ddpkit",
        False,
    ),
    "bench sync": ("ddpkit.experiments.bench_sync", "time gradient synchronisation", False),
    "bench step": ("ddpkit.experiments.bench_step", "time a training step, beside the peer's", False),
    "bench comm": ("ddpkit.experiments.bench_comm", "time all-reduces", False),
    "bench host": ("ddpkit.experiments.bench_host", "time the host's part of a run's step", False),
    "bench loader": ("ddpkit.experiments.bench_loader", "time the making of batches", False),
    "bench nequip": ("ddpkit.experiments.bench_nequip", "time nequip's own trainer, to set it beside ours", True),
    "doctor": (
        "ddpkit.experiments.doctor",
        "what launcher, network, GPUs and libraries look like, and what is wrong",
        False,
    ),
    "predict": ("ddpkit.experiments.predict", "step time of each strategy on N ranks", False),
}

# What several ranks run together; doctor has its own bound.
SEVERAL_RANKS = ("run", "check", "eval", "bench sync", "bench comm")

_HELP = ("-h", "--help")
_START = 8.0  # seconds that ranks may need longer than others to start


def main() -> None:
    """Entry point of `ddpkit`."""
    _leave(lambda: _dispatch(sys.argv[1:]))
    _end()


def run() -> None:
    """Entry point of `ddpkit-run`."""
    _leave(lambda: _dispatch(["run", *sys.argv[1:]]))
    _end()


def analyze() -> None:
    """Entry point of `ddpkit-analyze`."""
    _leave(lambda: _dispatch(["analyze", *sys.argv[1:]]))
    _end()


def _dispatch(arguments: Sequence[str]) -> None:
    if arguments and arguments[0] == "help":
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in _HELP:
        print(_overview(VERBS))
        return
    if arguments[0] == "--version":
        print(f"ddpkit {__version__}")
        return
    if (group := _group(arguments[0])) and len(arguments) > 1 and arguments[1] in _HELP:
        print(_overview(group))
        return
    verb, rest = _verb(arguments)
    if verb in SEVERAL_RANKS and not any(word in ("-h", "--help", "--cfg") for word in rest):
        phase.enter("import")
        watchdog.start(rest)
    module_name, does, takes_overrides = VERBS[verb]
    module = importlib.import_module(module_name)
    if takes_overrides:
        if any(word in _HELP for word in rest):
            if verb == "experiment" and rest[0] == "inference":
                module = module.inference
            print(module.__doc__)
            return
        module.main(rest)
        return
    parser = _Parser(prog=f"ddpkit {verb}", description=does[0].upper() + does[1:] + ".")
    module.add_arguments(parser)
    parsed = parser.parse_args(rest)
    _require_writable(parsed)
    module.main(parsed)


def _group(word: str) -> dict[str, tuple[str, str, bool]]:
    """The commands of two words that begin with this one."""
    return {verb: facts for verb, facts in VERBS.items() if verb.startswith(f"{word} ")}


def _verb(arguments: Sequence[str]) -> tuple[str, list[str]]:
    for words in (2, 1):
        verb = " ".join(arguments[:words])
        if verb in VERBS:
            return verb, list(arguments[words:])
    if group := _group(arguments[0]):
        raise InputError(f"ddpkit has no command {' '.join(arguments[:2])!r}: use one of {', '.join(group)}.")
    close = difflib.get_close_matches(arguments[0], VERBS, n=1)
    remedy = f"did you mean {close[0]}?" if close else f"use one of {', '.join(VERBS)}."
    raise InputError(f"ddpkit has no command {arguments[0]!r}: {remedy}")


def _overview(verbs: Mapping[str, tuple[str, str, bool]]) -> str:
    rows = "\n".join(f"  {verb:<12} {does}" for verb, (_, does, _) in verbs.items())
    return f"usage: ddpkit VERB ...\n\n{rows}\n\n`ddpkit VERB --help` tells more."


def _require_writable(options: argparse.Namespace) -> None:
    """Refuses a `--csv` or `--plot` that cannot be written now rather than after the measurement."""
    for name in ("csv", "plot"):
        path = getattr(options, name, None)
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
            if path.exists():
                path.open("a").close()
        except OSError as error:
            raise InputError(f"--{name} {path} cannot be written ({error.strerror}): give another path.") from error
        if name == "plot":
            from matplotlib.backend_bases import FigureCanvasBase

            kinds = FigureCanvasBase.get_supported_filetypes()
            if path.suffix.lstrip(".") not in {"", *kinds}:
                raise InputError(f"--plot {path} is of no known kind: end it in .png, .pdf or .svg.")


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are input errors."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise InputError(f"{message[0].upper()}{message[1:]}: see `{self.prog} --help`.")


def _leave(work: Callable[[], None]) -> None:
    """Runs a command and ends the process with the exit code it earned."""
    try:
        with _logs_printed():
            work()
    except (InputError, RankDisagreementError) as error:
        _abandon(2, str(error), error)
    except (FloatingPointError, ParityError, RankLostError) as error:
        if os.environ.get("DDPKIT_TRACEBACK"):
            traceback.print_exc()
        _abandon(1, str(error), error)
    except KeyboardInterrupt as interrupt:
        _abandon(130, str(interrupt) or "interrupted.", interrupt)
    except BrokenPipeError as error:
        _abandon(1, "", error)
    except Exception as error:  # noqa: BLE001  (the last place where it can be told)
        if refused := unusable_path(error):
            _abandon(2, str(refused), error)
        if os.environ.get("DDPKIT_TRACEBACK") or not isinstance(error, RuntimeError):
            traceback.print_exc()
        sentence = getattr(error, "told", f"{type(error).__name__}: {error}")
        if not _is_running_with_others() and _is_one_of_several():  # before the ranks had met, so nobody else can tell
            sentence = f"Rank {_rank()} failed in phase {phase.current()[0] or 'import'}: {sentence}"
            own(error)
        _abandon(1, sentence, error)


def _end() -> None:
    """Does what Python does at its end, and leaves before it takes the interpreter down.

    A thread that computes in a C++ library by then, such as one of a user's model or loader, is stopped where that library does
    not expect it, which aborts the process ("terminate called without an active exception") although all was well.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001  (waits for all threads but daemons; no public name)
    atexit._run_exitfuncs()  # noqa: SLF001  (likewise)
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


@contextmanager
def _logs_printed() -> Iterator[None]:
    """While this is open, what the library logs is printed on stderr, as the commands' own sentences are."""
    log, printer = logging.getLogger("ddpkit"), logging.StreamHandler()
    printer.setLevel(logging.WARNING)  # whatever level other packages have given the root
    printer.setFormatter(logging.Formatter("ddpkit: %(message)s"))
    log.addHandler(printer)
    before, log.propagate = log.propagate, False  # a handler of the root would print it a second time
    try:
        yield
    finally:
        log.propagate = before
        log.removeHandler(printer)


def _abandon(code: int, sentence: str, error: BaseException) -> None:
    """Says why and leaves at once: an orderly end would wait in MPI for ranks that may wait for this one.

    What every rank knows is said by rank 0 alone; the others give it the time to, since a launcher ends all once one has left.
    Before the ranks have met it may still have to start; what it has not said by then, they say. `said` marks what has been said
    already, `own` what this rank alone knows.
    """
    rank = _rank()
    if getattr(error, "said", False):
        sentence = ""
    is_own = getattr(error, "own", False)
    have_met = _is_running_with_others()
    speaks = rank == 0 or is_own or (have_met and not getattr(error, "everywhere", False))
    if not speaks:
        time.sleep(_START if sentence and not have_met else 1.0)
    if sentence and (speaks or not have_met):
        with suppress(OSError):  # whoever read it is gone
            print(f"ddpkit: {sentence}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _rank() -> int:
    try:
        return place().rank
    except InputError:
        return any_rank()


def _is_one_of_several() -> bool:
    with suppress(InputError):
        return place().world_size > 1
    return True


def _is_running_with_others() -> bool:
    """Whether this process had joined a group when it failed."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()
