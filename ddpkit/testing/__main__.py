"""The command line: `python -m ddpkit.testing STRATEGY`, or one of the campaigns of `CAMPAIGNS`."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from ddpkit.errors import InputError
from ddpkit.testing.suite import run_conformance

CAMPAIGNS = {"faults": "ddpkit.testing.faults.campaign", "disagreements": "ddpkit.testing.disagreements"}
"""Word -> module whose `main` takes the words that follow and returns the exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the conformance suite, or a campaign."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in CAMPAIGNS:
        return int(importlib.import_module(CAMPAIGNS[words[0]]).main(words[1:]))
    return _conformance(words)


def _conformance(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m ddpkit.testing", description="Puts a strategy through its paces.")
    parser.add_argument(
        "strategy",
        help="custom, overlap, standard, ingraph or an import path such as mypackage.MySync; "
        f"or a campaign: {', '.join(CAMPAIGNS)} (each with --help)",
    )
    parser.add_argument("--world-size", type=int, nargs="+", default=[1, 2, 3, 4], help="numbers of ranks")
    parser.add_argument("--comm", nargs="+", default=["torch"], choices=["torch", "mpi"])
    parser.add_argument(
        "--compile",
        action="store_true",
        help="through a compiled ddpkit.make_step; what a strategy that acts in it needs",
    )
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="the strategy's own, such as reduce_dtype=bfloat16",
    )
    parser.add_argument("--cases", nargs="+", help="cases of ddpkit.sync.conformance; default: all that apply")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help="how far gradients may be from the mean over ranks, for a strategy that rounds or compresses what it sends",
    )
    chosen = parser.parse_args(words)
    options = _options(chosen.options)
    sys.path.insert(0, str(Path.cwd()))
    failures = 0
    for comm in chosen.comm:
        for size in chosen.world_size:
            outcomes = run_conformance(
                chosen.strategy,
                size,
                comm,
                cases=chosen.cases,
                compile=chosen.compile,
                tolerance=chosen.tolerance,
                **options,
            )
            for outcome in outcomes:
                failures += outcome.state == "failed"
                print(
                    f"{chosen.strategy} ranks={size} comm={comm}  {outcome.state:7}{outcome.case}  {outcome.why}",
                    flush=True,
                )
    print(f"{failures} failed." if failures else "All passed but what the strategy cannot do.")
    return 1 if failures else 0


def _options(words: Sequence[str]) -> dict[str, Any]:
    """Options by name, their values read as in a configuration: YAML, and numbers such as 1e9."""
    options = {}
    for word in words:
        name, is_one, value = word.partition("=")
        if not is_one or not name.isidentifier():
            raise InputError(f"--options {word} is no option: write NAME=VALUE.")
        options[name] = yaml.safe_load(value)
        with suppress(TypeError, ValueError):
            options[name] = float(options[name]) if isinstance(options[name], str) else options[name]
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
