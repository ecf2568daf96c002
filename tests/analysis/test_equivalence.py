import itertools
import math

import numpy as np
import pytest
from scipy import stats
from simulated_runs import falling, wander, write_run

from ddpkit.analysis import claims, numerics
from ddpkit.analysis.equivalence import LEVEL, MARGIN, PLANNED, distances, ratio_test
from ddpkit.analysis.runs import read_runs

STEPS = 120
RUNS = 400


def _diverging(rng, runs, scale=1.0):
    """Trajectories that wander apart: noise of each step plus a random walk, growing in time."""
    walk = np.cumsum(rng.normal(size=(runs, STEPS)), axis=1) / math.sqrt(STEPS)
    return scale * (walk + rng.normal(size=(runs, STEPS))) * np.linspace(0.05, 1.0, STEPS)


def _spiky(rng, runs, scale=1.0):
    return scale * rng.standard_t(3, size=(runs, STEPS)) * np.linspace(0.05, 1.0, STEPS)


def _test(custom, standard):
    pairwise = distances(np.vstack([custom, standard]))
    c, s = range(len(custom)), range(len(custom), len(custom) + len(standard))
    return ratio_test(pairwise, (s, c), (c, c))


def _scale_for(ratio):
    """Spread of the one arm that makes the ratio of mean distances `ratio`: Gaussian differences add in squares."""
    return math.sqrt(2 * ratio**2 - 1)


@pytest.mark.parametrize(("customs", "standards"), [(6, 5), (6, 3), (4, 8)])
def test_error_rate_at_the_margin_and_power(customs, standards):
    """At a true ratio of 1.5 neither verdict comes in more than 5 % of studies; at 1 the stated power is met."""
    rng = np.random.default_rng(customs * 100 + standards)
    at_margin = [_test(_diverging(rng, customs), _diverging(rng, standards, _scale_for(MARGIN))) for _ in range(RUNS)]
    three_sigma = 3 * math.sqrt(LEVEL * (1 - LEVEL) / RUNS)
    assert np.mean([t.below() for t in at_margin]) <= LEVEL + three_sigma
    assert np.mean([t.above() for t in at_margin]) <= LEVEL + three_sigma
    assert np.median([t.ratio for t in at_margin]) == pytest.approx(MARGIN, rel=0.05)
    equal = [_test(_diverging(rng, customs), _diverging(rng, standards)) for _ in range(RUNS)]
    assert np.median([t.ratio for t in equal]) == pytest.approx(1, rel=0.05)
    assert np.mean([t.above() for t in equal]) <= 0.01
    found = np.mean([t.below() for t in equal])
    assert found > 0.6
    assert np.mean([t.power() for t in equal]) == pytest.approx(found, abs=0.1)


def test_error_rate_with_spikes():
    rng = np.random.default_rng(5)
    wide = _scale_for(MARGIN)
    # Heavy tails do not add in squares: find what makes the ratio 1.5 from many runs.
    pool, other = _spiky(rng, 300), _spiky(rng, 300)
    low, high = 1.0, 2 * wide
    for _ in range(40):
        middle = (low + high) / 2
        ratio = np.abs(pool - middle * other).mean() / np.abs(pool[:150] - pool[150:]).mean()
        low, high = (middle, high) if ratio < MARGIN else (low, middle)
    tests = [_test(_spiky(rng, 6), _spiky(rng, 5, low)) for _ in range(RUNS)]
    assert np.mean([t.below() for t in tests]) <= LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / RUNS)


def test_a_shifted_arm_is_found_out():
    rng = np.random.default_rng(6)
    shift = np.linspace(0, 8, STEPS)
    tests = [_test(_diverging(rng, 6), _diverging(rng, 5) + shift) for _ in range(100)]
    assert np.mean([t.above() for t in tests]) > 0.9


def test_more_runs_as_advised_reach_a_verdict():
    rng = np.random.default_rng(8)
    small = [_test(_diverging(rng, 3), _diverging(rng, 3)) for _ in range(200)]
    wanted = [t.more_runs() for t in small if not t.below() and t.ratio < 1.15]
    assert all(n is not None and n > 0 for n in wanted)
    each = 3 + math.ceil(np.median(wanted) / 2)
    enough = [_test(_diverging(rng, each), _diverging(rng, each)) for _ in range(200)]
    assert np.mean([t.below() for t in enough]) > 0.7


def test_jackknife_recomputed_by_hand():
    rng = np.random.default_rng(7)
    runs = _diverging(rng, 7)
    custom, standard = [0, 1, 2, 3], [4, 5, 6]

    def log_ratio(left_out):
        c = [i for i in custom if i != left_out]
        s = [i for i in standard if i != left_out]
        top = [np.abs(runs[i] - runs[j]).mean() for i in s for j in c]
        below = [np.abs(runs[i] - runs[j]).mean() for i, j in itertools.combinations(c, 2)]
        return math.log(np.mean(top) / np.mean(below))

    variance = 0.0
    for arm in (custom, standard):
        values = [log_ratio(i) for i in arm]
        variance += (len(arm) - 1) / len(arm) * sum((v - np.mean(values)) ** 2 for v in values)
    test = _test(runs[custom], runs[standard])
    assert math.log(test.ratio) == pytest.approx(log_ratio(None))
    assert test.standard_error == pytest.approx(math.sqrt(variance))
    assert test.freedom == 2
    reach = stats.t.ppf(0.95, 2) * math.sqrt(variance)
    assert test.upper == pytest.approx(math.exp(log_ratio(None) + reach))
    assert test.lower == pytest.approx(math.exp(log_ratio(None) - reach))


def test_distances_leave_out_what_is_not_finite():
    runs = np.array([[1.0, 2.0, np.nan], [2.0, 4.0, 5.0], [1.0, 2.0, 7.0]])
    assert distances(runs).tolist() == [[0, 1.5, 0], [1.5, 0, 1.5], [0, 1.5, 0]]
    assert np.isnan(distances(np.full((2, 3), np.nan))[0, 1])


def _claims(folder):
    data = claims.trajectories(numerics.study(read_runs(folder)[0]))
    return {c.claim.split(" ")[0]: c for c in claims.numerics_claims(data)}, data


def _write_arm(folder, label, losses, **config):
    for i, row in enumerate(losses, start=1):
        write_run(folder, label if i == 1 else f"{label}_{i}", row, **config)


def _study_folder(folder, rng, *, standard=1.0, compiled=1.0, spike=0.0, runs=5):
    base = falling(STEPS)
    size = 1e-3
    write_run(folder, "baseline", base + size * _spiky(rng, 1)[0])
    _write_arm(folder, "rerun", base + size * _spiky(rng, runs))
    _write_arm(folder, "standard", base + size * _spiky(rng, runs, standard), **{"strategy.name": "standard"})
    arm = base + size * _spiky(rng, runs, compiled)
    arm[0, 50] += spike
    _write_arm(folder, "compiled", arm, compile=True)
    for i in range(runs):
        write_run(folder, f"new_seed_{i + 1}", base + 20 * size * _spiky(rng, 1)[0], seed=10 + i)


def test_verdicts_hold_where_they_should(tmp_path):
    _study_folder(tmp_path, np.random.default_rng(1), compiled=6.0)
    found, _ = _claims(tmp_path)
    assert found["Standard"].verdict == "holds"
    assert "5 and 6 runs an arm" in found["Standard"].reason
    assert "with probability" in found["Standard"].reason
    assert found["Compiled"].verdict == "holds"
    assert found["A"].verdict == "holds"


def test_verdicts_fail_where_they_should(tmp_path):
    _study_folder(tmp_path, np.random.default_rng(2), standard=6.0)
    found, _ = _claims(tmp_path)
    assert found["Standard"].kind == "fails"
    assert found["Compiled"].kind == "fails"


def test_one_spike_alone_settles_nothing(tmp_path):
    """The paper's one point near 0.33 moves the mean of one run, not the verdict on runs, and not the medians."""
    _study_folder(tmp_path, np.random.default_rng(3), spike=0.33)
    found, data = _claims(tmp_path)
    assert found["Compiled"].kind == "open"
    assert "more are needed" in found["Compiled"].verdict
    by_median = data.test(("compiled", "custom"), ("custom", "custom"), by_median=True)
    assert by_median.ratio == pytest.approx(1, abs=0.2)
    assert f"the ratio is {by_median.ratio:.3g}"[:18] in found["Compiled"].reason


def test_too_few_runs_say_how_many_more(tmp_path):
    rng = np.random.default_rng(4)
    base = falling(STEPS)
    write_run(tmp_path, "baseline", base)
    write_run(tmp_path, "rerun", base + wander(rng, STEPS, 1e-3))
    write_run(tmp_path, "standard", base + wander(rng, STEPS, 1e-3), **{"strategy.name": "standard"})
    found, _ = _claims(tmp_path)
    more = (PLANNED - 2) + (PLANNED - 1)
    assert found["Standard"].verdict == f"cannot be told from these runs: about {more} more are needed"
    assert found["Compiled"].verdict == f"cannot be told from these runs: about {PLANNED} more are needed"
    assert found["Compiled"].reason == "there is no compiled run"


def test_identical_runs_test_nothing(tmp_path):
    base = falling(30)
    for label, change in (
        ("baseline", {}),
        ("rerun", {}),
        ("rerun_2", {}),
        ("standard", {"strategy.name": "standard"}),
        ("compiled", {"compile": True}),
    ):
        write_run(tmp_path, label, base, **change)
    write_run(tmp_path, "new_seed", base + 0.1, seed=2)
    found, _ = _claims(tmp_path)
    assert found["Standard"].verdict == "holds: identical"
    assert "nothing is tested" in found["Standard"].reason
    assert found["Compiled"].verdict == "does not hold: identical"
    assert found["A"].verdict == "holds"


def test_a_difference_without_rerun_noise_is_told_as_such(tmp_path):
    base = np.full(30, 0.5)
    write_run(tmp_path, "baseline", base)
    write_run(tmp_path, "rerun", base)
    write_run(tmp_path, "standard", base + 2.0**-20, **{"strategy.name": "standard"})
    write_run(tmp_path, "compiled", base + 2.0**-21, compile=True)
    found, _ = _claims(tmp_path)
    assert found["Standard"].verdict == "cannot be told from these runs, in which reruns agree to the last bit"
    assert "differs from them by 9.54e-7 on average, 1.91e-6 of the loss" in found["Standard"].reason
    assert found["Compiled"].verdict == found["Standard"].verdict
    assert found["Compiled"].kind == "open"


def test_short_runs_and_other_kernels_stay_out_of_the_tests(tmp_path):
    base = falling(30)
    write_run(tmp_path, "baseline", base)
    write_run(tmp_path, "rerun", base)
    write_run(tmp_path, "standard", base[:5], status="running", **{"strategy.name": "standard"})
    write_run(tmp_path, "det", base, deterministic=True)
    _, data = _claims(tmp_path)
    assert data.left_out == ("standard",)
    assert [data.study.runs[i].label for i in data.members["custom"]] == ["baseline", "rerun"]
