import argparse
import csv
import itertools
import json
import math

import numpy as np
import pytest

from ddpkit import InputError
from ddpkit.experiments import predict
from ddpkit.experiments.predict import COMPILED, MIB, Link, Step, fit, table

LINK = Link(2e-5, 5e9)
EAGER = Step(0.4, 400_000_000, overlap=0.5)


def ddpkit_predict(*words):
    parser = argparse.ArgumentParser()
    predict.add_arguments(parser)
    predict.main(parser.parse_args([str(word) for word in words]))


def ring(size, ranks, latency, bandwidth):
    """Every rank sends the chunk it holds to the next, in 2 (p - 1) rounds."""
    return sum(latency + (size / ranks) / bandwidth for _ in range(2 * (ranks - 1)))


def simulated(strategy, step, ranks, link):
    """The end of the last bucket after the end of the compute time, bucket by bucket."""
    if strategy in ("custom", "ingraph"):
        return ring(step.gradients, ranks, link.latency, link.bandwidth)
    buckets = math.ceil(step.gradients / step.bucket)
    window = step.overlap * step.compute * step.imbalance
    free = -math.inf
    for number in range(1, buckets + 1):
        full = -window * (1 - number / buckets)
        free = max(free, full) + ring(step.gradients / buckets, ranks, link.latency, link.bandwidth)
    return free


@pytest.mark.parametrize("ranks", [2, 3, 16, 1000])
@pytest.mark.parametrize("step", [EAGER, Step(0.01, 3_000_000, 0.9), Step(1.0, 100 * MIB, 1.0, 10 * MIB, 1.2)])
@pytest.mark.parametrize("strategy", ["standard", "custom", "overlap", "ingraph"])
def test_exposed_communication_is_that_of_a_simulation(strategy, step, ranks):
    assert step.communication(strategy, ranks, LINK)[1] == pytest.approx(simulated(strategy, step, ranks, LINK))


def test_limits():
    values = table([1, 2, 8], LINK, EAGER, Step(0.3, 400_000_000))
    alone = values[values["ranks"] == 1]
    assert (alone["seconds_communication"] == 0).all()
    assert (alone["efficiency"] == 1).all()
    free = table([1, 2, 8], Link(0.0, math.inf), EAGER, Step(0.3, 400_000_000))
    for compiled, strategy in itertools.product((False, True), COMPILED):
        mine = free[(free["compile"] == compiled) & (free["strategy"] == strategy)]["seconds_per_step"]
        none = free[(free["compile"] == compiled) & (free["strategy"] == "none")]["seconds_per_step"]
        assert (mine.to_numpy() == none.to_numpy()[: len(mine)]).all()
    # With everything hidden but the last bucket, and with nothing hidden.
    buckets = math.ceil(400_000_000 / (25 * MIB))
    one = LINK.all_reduce(400_000_000 / buckets, 8)
    assert Step(1e6, 400_000_000, 1.0).communication("overlap", 8, LINK)[1] == pytest.approx(one)
    assert Step(0.4, 400_000_000, 0.0).communication("overlap", 8, LINK)[1] == pytest.approx(buckets * one)
    # The cost of sending tends to twice the data; that of messages grows with the ranks.
    assert Link(0.0, 1e9).all_reduce(1e9, 10_000) == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("strategy", ["standard", "custom", "overlap"])
def test_monotonic(strategy):
    def seconds(step=EAGER, ranks=8, link=LINK):
        return step.slowest(ranks) + step.communication(strategy, ranks, link)[1]

    changes = {
        "ranks": [seconds(ranks=n) for n in (1, 2, 4, 8, 64, 512)],
        "slower link": [seconds(link=Link(2e-5, b)) for b in (1e12, 1e10, 1e9, 1e8)],
        "latency": [seconds(link=Link(a, 5e9)) for a in (0, 1e-5, 1e-3, 1e-1)],
        "gradients": [seconds(Step(0.4, n, 0.5)) for n in (10**4, 10**7, 10**8, 10**9)],
        "imbalance": [seconds(Step(0.4, 10**8, 0.5, imbalance=x)) for x in (1.0, 1.1, 1.5)],
        "less overlap": [seconds(Step(0.4, 10**9, x, bucket=10 * MIB)) for x in (1.0, 0.5, 0.0)],
    }
    for name, values in changes.items():
        steps = np.diff(values)
        assert (steps >= 0).all(), name
        assert steps.any() or (name == "less overlap" and strategy == "custom")


def test_fit_recovers_the_link_it_was_measured_on():
    rng = np.random.default_rng(0)
    ranks = rng.choice([2, 4, 8], size=60).tolist()
    sizes = (4.0 ** rng.integers(1, 15, size=60)).tolist()
    true = [ring(n, p, 3e-5, 2e9) for p, n in zip(ranks, sizes, strict=True)]
    exact, error = fit(ranks, sizes, true)
    assert (exact.latency, exact.bandwidth) == pytest.approx((3e-5, 2e9))
    assert error < 1e-9
    noisy, error = fit(ranks, sizes, (np.array(true) * rng.normal(1, 0.05, size=60)).tolist())
    assert (noisy.latency, noisy.bandwidth) == pytest.approx((3e-5, 2e9), rel=0.05)
    assert 0.01 < error < 0.1
    assert fit([2, 2], [1e3, 1e9], [1e-3, 1e-3])[0].bandwidth > 1e11


@pytest.fixture
def files(tmp_path):
    """A measured link, and runs of 1000 parameters that differ in what their steps.csv can tell."""
    with (tmp_path / "comm.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["comm", "backend", "device", "ranks", "hosts", "bytes", "seconds", "seconds_min"])
        for comm, latency, bandwidth in (("torch", 1e-3, 1e9), ("mpi", 1e-4, 2e9)):
            rows.writerows([comm, "x", "cpu", 2, 1, n, ring(n, 2, latency, bandwidth), 0] for n in (4, 10**4, 10**8))
    columns = "step,epoch,loss,seconds,seconds_data,seconds_compute,seconds_sync,seconds_optimizer"
    for name, split, strategy, ranks, precision, compiled in (
        ("custom", "0.01,0.2,0.3,0.03", "custom", 2, "mixed", "false"),
        ("double", "0.01,0.2,0.3,0.03", "custom", 2, "float64", "false"),
        ("compiled", "0.01,0.1,0.3,0.01", "custom", 2, "mixed", "true"),
        ("standard", "0.01,,,0.03", "standard", 2, "mixed", "false"),
        ("alone", "0.01,,,0.03", "standard", 1, "mixed", "false"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        rows = [f"{n},1,1.0,{9.0 if n == 1 else 0.6},{split}" for n in range(1, 6)]
        (folder / "steps.csv").write_text("\n".join([columns, *rows]) + "\n")
        (folder / "config.yaml").write_text(f"strategy: {strategy}\nprecision: {precision}\ncompile: {compiled}\n")
        (folder / "summary.json").write_text(json.dumps({"parameters": 1000 if name != "double" else 1001}))
        (folder / "environment.json").write_text(json.dumps({"world_size": ranks}))
    return tmp_path


def rows_of(path):
    with path.open(newline="") as file:
        return {(int(r["ranks"]), r["strategy"], r["compile"]): r for r in csv.DictReader(file)}


def test_constants_from_files(files, capsys):
    ddpkit_predict("--run", files / "custom", files / "compiled", "--comm-csv", files / "comm.csv", "--ranks", 1, 4,
                   "--csv", files / "out.csv", "--plot", files / "out.png", "--imbalance", 1.5)  # fmt: skip
    found = rows_of(files / "out.csv")
    assert len(found) == 2 * (4 + 5)
    for compiled, compute in (("false", 0.24), ("true", 0.12)):
        row = found[4, "custom", compiled]
        sent = ring(4000, 4, 1e-3, 1e9)
        assert float(row["seconds_exposed"]) == pytest.approx(sent, rel=1e-6)
        assert float(row["seconds_per_step"]) == pytest.approx(1.5 * compute + sent, rel=1e-6)
        assert float(row["efficiency"]) == pytest.approx(compute / (1.5 * compute + sent), rel=1e-6)
        assert float(found[1, "custom", compiled]["seconds_per_step"]) == pytest.approx(compute)
    assert float(found[4, "standard", "false"]["relative_percent"]) == 0
    assert float(found[1, "ingraph", "true"]["relative_percent"]) == pytest.approx(-50)
    said = capsys.readouterr().out
    assert "latency 1e+03 µs and bandwidth 1 GB/s" in said
    assert (files / "out.png").read_bytes().startswith(b"\x89PNG")


def test_other_sources_of_constants(files):
    def custom_on_two(*words):
        ddpkit_predict(*words, "--ranks", 2, "--csv", files / "out.csv")
        return float(rows_of(files / "out.csv")[2, "custom", "false"]["seconds_per_step"])

    link = ("--latency", 1e-3, "--bandwidth", 1)
    assert custom_on_two("--run", files / "double", *link) == pytest.approx(0.24 + ring(8008, 2, 1e-3, 1e9))
    assert custom_on_two("--run", files / "alone", *link) == pytest.approx(0.6 + ring(4000, 2, 1e-3, 1e9))
    told = ("--compute", 0.5, "--parameters", "114M", "--bytes-per-parameter", 2)
    mpi = ("--comm-csv", files / "comm.csv", "--comm", "mpi")
    assert custom_on_two(*told, *mpi) == pytest.approx(0.5 + ring(228_000_000, 2, 1e-4, 2e9))


def test_bad_input_is_one_sentence(files):
    (files / "torn.csv").write_text("comm,ranks\ntorch,2\n")
    (files / "words.csv").write_text("comm,ranks,bytes,seconds\ntorch,2,many,few\n")
    (files / "one.csv").write_text("comm,ranks,bytes,seconds\ntorch,2,4,1e-5\ntorch,2,4,1e-5\n")
    step = ("--compute", 1, "--parameters", "1M")
    link = ("--latency", 0, "--bandwidth", 1)
    cases = [
        (step, "link is not known"),
        ((*step, "--latency", 1), "link is not known"),
        (link, "compute time is not known"),
        ((*link, "--compute", 1), "number of parameters is not known"),
        ((*link, "--compute", 1, "--parameters", "few"), "no number of parameters"),
        ((*link, *step, "--comm-csv", files / "comm.csv"), "leave --latency"),
        ((*step, "--comm-csv", files / "nothing.csv"), "make it again"),
        ((*step, "--comm-csv", files / "torn.csv"), "make it again"),
        ((*step, "--comm-csv", files / "words.csv"), "make it again"),
        ((*step, "--comm-csv", files / "one.csv"), "fewer than two sizes"),
        ((*step, "--comm-csv", files / "one.csv", "--comm", "mpi"), "fewer than two sizes"),
        ((*link, "--run", files / "nothing"), "no run folder"),
        ((*link, "--run", files / "standard"), "does not tell compute apart"),
        ((*link, *step, "--run", files / "custom"), "told twice"),
        ((*link, "--run", files / "double", files / "compiled"), "1,001 and 1,000 parameters"),
        *(
            ((*link, *step, f"--{name}", value), f"--{name} must be")
            for name, value in {"ranks": 0, "compute": 0, "compute-compiled": -1, "latency": -1, "bandwidth": 0,
                                "overlap": 1.5, "bucket-mb": 0, "imbalance": 0.9}.items()
        ),
    ]  # fmt: skip
    for words, sentence in cases:
        with pytest.raises(InputError, match=sentence) as caught:
            ddpkit_predict(*words)
        assert "\n" not in str(caught.value)
