"""What a shell command of the documentation would do, as far as it can be known without doing it.

A command must exist, and take the words that it is given: options are parsed by the programs' own parsers, and settings of a run
composed to a configuration.
"""

import argparse
import importlib
import re
import shlex
import string
import tomllib
from unittest import mock

from fences import ROOT

from ddpkit.experiments import experiment, inference
from ddpkit.experiments.cli import VERBS, _Parser, _verb
from ddpkit.experiments.config import read
from ddpkit.experiments.studies import STUDIES, Ranks

# Programs of others: their names are all that is known of them here.
OTHERS = {"[", "cd", "fi", "grep", "head", "if", "kill", "ls", "nequip-train", "ps", "sbatch", "sleep", "then", "wait"}
# Options of launchers: whether a value follows.
MPIRUN = {
    "-n": 1,
    "-x": 1,
    "--host": 1,
    "--hostfile": 1,
    "--bind-to": 1,
    "--oversubscribe": 0,
    "--allow-run-as-root": 0,
}
SLURM = {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time", "--signal", "--job-name"}
_ASSIGNMENT = re.compile(r"(\w+)=(.*)", re.DOTALL)


class Shell:
    """Reads blocks of shell commands, and remembers what they set."""

    def __init__(self):
        self.variables = {"PWD": "."}

    def commands(self, text):
        """The single commands of a block, as lists of words, with its variables put in."""
        for line in text.replace("\\\n", " ").splitlines():
            if match := re.match(r"#SBATCH (--[\w-]+)=", line):
                assert match[1] in SLURM, f"{match[1]} is no known option of sbatch"
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            command, is_file = [], False
            for word in [*lexer, ";"]:
                if set(word) <= set("();|&"):
                    yield from self._plain(command)
                    command = []
                elif not is_file and word not in ("<", ">", ">>"):
                    command.append(word)
                is_file = word in ("<", ">", ">>")

    def _plain(self, words):
        """A command without what it sets for itself, and without the shell's own words."""
        while words and words[0] in ("then", "if", "fi"):
            words = words[1:]
        while words and (match := _ASSIGNMENT.fullmatch(words[0])) and not match[1].startswith("-"):
            self.variables[match[1]] = " ".join(self._filled(match[2]))
            words = words[1:]
        if words:
            yield [part for word in words for part in self._filled(word)]

    def _filled(self, word):
        """A word with its variables; several, where it is one variable with several words."""
        filled = string.Template(word).safe_substitute(self.variables)
        return filled.split() if word.startswith("$") and " " in filled else [filled]


def check(words, folder):
    """Raises where a command does not exist or does not take its words.

    Args:
        words: of a single command.
        folder: where files that it names may lie, beside the project's own.
    """
    program, *rest = words
    if program == "export":
        assert all(_ASSIGNMENT.fullmatch(word) for word in rest), words
    elif program == "mpirun":
        check(_without_options(rest, MPIRUN), folder)
    elif program in ("srun", "salloc"):
        while rest and rest[0].startswith("-"):
            assert rest.pop(0).partition("=")[0] in SLURM, words
        assert program == "salloc" or rest, words
        if rest:
            check(rest, folder)
    elif program == "torchrun":
        _torchrun(rest, folder)
    elif program.endswith(("python", "python3")):
        _python(rest, folder)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets), words
    elif program.endswith("pip"):
        _pip(rest)
    elif program.removeprefix(".venv/bin/") in ("ddpkit-run", "ddpkit-analyze"):
        ddpkit([program.rpartition("-")[2], *rest])
    elif program == "ddpkit":
        ddpkit(rest)
    else:
        assert program in OTHERS, f"{program} is no command that is known here"


def ddpkit(words):
    """Parses the words of `ddpkit` as it would."""
    if not words or words[0] == "help" or "--help" in words or words == ["--version"]:
        assert not words or words[0].startswith("-") or words[0] == "help" or _verb(words)
        return
    verb, rest = _verb(words)
    if verb in ("run", "check"):
        read([word for word in rest if word != "--cfg"])
    elif verb == "experiment" and rest[0] == "inference":
        inference.parse(rest[1:])
    elif verb == "experiment":
        options = experiment._parse(rest)
        scale = STUDIES[options.study][options.scale]
        for one in scale.parts.values() if isinstance(scale, Ranks) else [scale]:
            read([*one.overrides, *options.overrides])
    elif verb == "lammps":
        assert rest == ["build"] or "-in" in rest, words
    else:
        parser = _Parser(prog=f"ddpkit {verb}")
        importlib.import_module(VERBS[verb][0]).add_arguments(parser)
        parser.parse_args(rest)


def _without_options(words, known):
    """What comes after the options of a launcher."""
    while words and words[0].startswith("-"):
        assert words[0] in known, f"{words[0]} is no known option"
        words = words[1 + known[words[0]] :]
    assert words, "nothing is started"
    return words


def _torchrun(words, folder):
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(words)
    module = ["-m"] if parsed.module else []
    _python([*module, parsed.training_script, *parsed.training_script_args], folder)


def _python(words, folder):
    if words[0] == "-c":
        compile(words[1], "-c", "exec")
    elif words[0] != "-m":
        assert (ROOT / words[0]).is_file() or (folder / words[0]).is_file(), f"{words[0]} is no file"
    elif words[1] == "ddpkit.experiments":
        ddpkit(words[2:])
    elif words[1] == "ddpkit.testing":
        _testing(words[2:])
    elif words[1] == "pip":
        _pip(words[2:])
    else:
        assert words[1] in ("build", "pytest", "venv"), words


def _testing(words):
    """Has the parsers of `python -m ddpkit.testing` read the words; what comes after them is left out."""
    main = importlib.import_module("ddpkit.testing.__main__").main
    parsed = argparse.ArgumentParser.parse_args

    class Parsed(Exception):  # noqa: N818  (no error)
        pass

    def only_parse(parser, *arguments):
        parsed(parser, *arguments)
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", only_parse):
        try:
            main(words)
        except Parsed:
            return
    raise AssertionError(f"{words} were not parsed")


def _pip(words):
    """Extras that are installed must be there."""
    assert words[0] == "install", words
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for match in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(match.split(",")) <= set(extras), words
