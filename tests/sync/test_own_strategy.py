import subprocess
import sys
from pathlib import Path

import pytest
import torch
from strategies import Aborts, DropsOthers, Forgetful, ModelAlone, Plain, Sleeps, Summing, Unloadable

import ddpkit
from ddpkit.errors import InputError
from ddpkit.testing import RankFailure, run_conformance
from ddpkit.testing.__main__ import main

HERE = Path(__file__).parent


def test_a_strategy_of_two_lines_averages():
    cases = [
        "union_batch",
        "zero_grad_in_place",
        "different_seeds",
        "accumulation",
        "mismatch_of_names",
        "drift",
        "stats",
    ]
    outcomes = run_conformance(Plain, 2, cases=cases)
    assert [(o.case, o.state) for o in outcomes] == [(name, "passed") for name in cases]


@pytest.mark.parametrize("wrong", [Forgetful, Summing])
def test_the_suite_fails_a_wrong_strategy(wrong):
    (outcome,) = run_conformance(wrong, 2, cases=["union_batch"])
    assert outcome.state == "failed"
    assert "rank 0" in outcome.why


@pytest.mark.parametrize("comm", ["torch", "mpi"])
def test_a_case_that_kills_its_ranks_fails_by_name_and_the_others_are_kept(comm):
    expected = {"union_batch": "passed", "partly_used": "failed", "stats": "passed"}
    outcomes = run_conformance(Aborts, 2, comm, cases=list(expected))
    assert {o.case: o.state for o in outcomes} == expected, outcomes
    assert "the library ends here" in outcomes[1].why
    assert "\n" not in outcomes[1].why
    assert comm == "mpi" or "rank 0 was ended by SIGABRT" in outcomes[1].why


def test_a_case_that_does_not_end_fails_by_name():
    (outcome,) = run_conformance(Sleeps, 1, cases=["union_batch"], timeout=10.0)
    assert (outcome.case, outcome.state) == ("union_batch", "failed")
    assert "rank 0 did not end in time" in outcome.why


def test_ranks_that_come_to_no_case_tell_nothing_of_it():
    with pytest.raises(RankFailure, match="cannot be rebuilt"):
        run_conformance(Unloadable(), 1, cases=["union_batch"])


def test_the_command_takes_an_import_path():
    cases = ["--world-size", "1", "--cases", "union_batch", "no_gradient"]
    command = [sys.executable, "-m", "ddpkit.testing", "strategies.Summing", *cases]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "union_batch" in done.stdout
    assert "failed." in done.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["in_graph.OneByOne"], "strategy=in_graph.OneByOne acts in the compiled step.*--compile"),
        (["in_graph.OneByOne", "--compile", "--cases", "drift"], "acts in the compiled step"),
        (["custom", "--cases", "nope"], "no case 'nope': use some of .*union_batch"),
        (["nowhere.MySync"], "cannot be imported"),
        (["custom", "--options", "reduce_dtype"], "--options reduce_dtype is no option: write NAME=VALUE"),
    ],
)
def test_what_tells_nothing_of_a_strategy_is_refused_at_once(words, sentence):
    with pytest.raises(InputError, match=sentence) as raised:
        main(words)
    assert "\n" not in str(raised.value)


def test_options_of_the_command_reach_the_strategy(capsys):
    assert main(["custom", "--world-size", "1", "--cases", "union_batch", "--options", "buckets=2"]) == 1
    assert "no option 'buckets'" in capsys.readouterr().out
    words = ["--options", "check_finite=false", "reduce_dtype=null", "timeout=1e2"]
    assert main(["custom", "--world-size", "1", "--cases", "union_batch", *words]) == 0


def test_names_classes_paths_and_partials_make_a_strategy():
    from functools import partial

    for strategy in (
        "custom",
        "ddpkit.sync.flat.FlatSync",
        ddpkit.FlatSync,
        partial(ddpkit.FlatSync, check_finite=False),
    ):
        assert isinstance(ddpkit.make_sync(strategy, torch.nn.Linear(2, 2)), ddpkit.FlatSync)


@pytest.mark.parametrize(
    ("strategy", "options", "words"),
    [
        ("ddp", {}, "standard, custom"),
        ("nowhere.MySync", {}, "cannot be imported"),
        ("ddpkit.sync.flat.NoSuchSync", {}, "cannot be imported"),
        ("ddpkit.sync.buckets.Bucket", {}, "derive it from"),
        ("ingraph", {}, "make_step"),
        ("custom", {"bucket_mb": 3}, "no option 'bucket_mb'"),
        ("custom", {"comm": "smoke"}, "torch or mpi"),
        ("standard", {"comm": "mpi"}, "not comm=mpi"),
        ("custom", {"reduce_dtype": "float8"}, "float32 or bfloat16"),
        ("overlap", {"bucket_mb": 0}, "positive"),
        ("custom", {"timeout": 0}, "positive"),
    ],
)
def test_bad_choices_are_one_sentence(strategy, options, words):
    with pytest.raises(InputError, match=words) as raised:
        ddpkit.make_sync(strategy, torch.nn.Linear(2, 2), **options)
    assert "\n" not in str(raised.value)


def test_ranks_without_a_process_group_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="init_process_group"):
        ddpkit.make_sync("custom", torch.nn.Linear(2, 2))


class Criterion(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))


def made_of_one(model, **options):
    return ddpkit.FlatSync(model, **options)


def made_of_two(model, criterion):
    return ddpkit.FlatSync(model, criterion)


def made_of_many(*modules, **options):
    return ddpkit.FlatSync(*modules, **options)


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (ModelAlone, r"ModelAlone takes no further modules.*def __init__\(self, module, \*others"),
        (DropsOthers, r"DropsOthers leaves out 'Criterion\.weight'.*super\(\).__init__\(module, \*others"),
        (made_of_one, "made_of_one takes no further modules"),
        ("strategies.ModelAlone", "ModelAlone takes no further modules"),
    ],
)
def test_a_strategy_without_a_place_for_further_modules_is_told_so(strategy, words):
    with pytest.raises(InputError, match=words) as raised:
        ddpkit.make_sync(strategy, torch.nn.Linear(2, 2), Criterion())
    assert "\n" not in str(raised.value)


def test_further_modules_reach_any_kind_of_strategy():
    from functools import partial

    model = torch.nn.Linear(2, 2)
    for strategy in (
        "custom",
        "overlap",
        "standard",
        "none",
        "ddpkit.sync.flat.FlatSync",
        ddpkit.FlatSync,
        partial(ddpkit.FlatSync, check_finite=False),
        made_of_many,
    ):
        sync = ddpkit.make_sync(strategy, model, Criterion(), Criterion())
        assert list(sync.parameters) == ["weight", "bias", "Criterion.weight", "Criterion_2.weight"]
        sync.close()
    ddpkit.make_sync(made_of_two, model, Criterion()).close()
    with pytest.raises(InputError, match=r"square was given after the model.*options by their names"):
        ddpkit.make_sync("custom", model, torch.square)
