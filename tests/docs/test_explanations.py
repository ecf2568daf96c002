"""The explanations hold what they claim of the code, and each strategy has its picture."""

import re
import runpy
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from pages import DOCS, rows, section, text

from ddpkit.analysis import plan, speed, statistics
from ddpkit.capture import steps
from ddpkit.data import capacities
from ddpkit.experiments.setup import _REPEATABLE
from ddpkit.sync import STRATEGIES, find_strategy

DRAWN = runpy.run_path(str(DOCS / "figures" / "strategies.py"))
PAGE = "explanation/strategies.md"
SVG = "{http://www.w3.org/2000/svg}"


def test_each_strategy_has_its_part_and_its_picture():
    assert re.findall(r"^## `(\w+)`$", text(PAGE), re.MULTILINE) == [row[0] for row in rows(text(PAGE))]
    assert {row[0] for row in rows(text(PAGE))} == set(STRATEGIES)
    for name in STRATEGIES:
        assert f"](../figures/{name}.svg)" in section(PAGE, f"## `{name}`")
    assert "](../figures/recorded.svg)" in text("explanation/capture.md")
    assert set(DRAWN["PICTURES"]) == {*STRATEGIES, "recorded"}


def test_the_table_of_strategies_is_that_of_the_code():
    for name, when, eager, _, graphs, mpi in rows(text(PAGE)):
        kind = find_strategy(name)
        acts = {"in the compiled step": "in graph"}.get(when)
        assert acts is None or kind.acts == acts
        assert ("during" in when) <= (kind.acts == "during backward")
        assert when.startswith("never") == (name in ("none", "emulated"))
        assert (eager == "yes") == (kind.acts != "in graph")
        assert graphs == ("in parts" if name in ("standard", "emulated") else "yes")
        assert (mpi == "yes") == ("mpi" in kind.comms)


def words(path):
    """The texts of a picture and the colour of its ground."""
    tree = ET.parse(path)  # noqa: S314  (ours)
    return [element.text for element in tree.iter(f"{SVG}text")]


@pytest.mark.parametrize("name", DRAWN["PICTURES"])
def test_a_picture_is_the_one_that_the_script_draws(name, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "figures"
    if not folder.exists():
        folder.mkdir()
        DRAWN["main"](folder)
    known = DOCS / "figures" / f"{name}.svg"
    assert words(known) == words(folder / f"{name}.svg"), "run python docs/figures/strategies.py"
    assert {"host", "compute", "communication", "time"} <= set(words(known))
    assert DRAWN["PAPER"].lower() in known.read_text().lower()  # a ground of its own, on light and dark pages


@pytest.mark.parametrize("name", DRAWN["PICTURES"])
def test_bars_of_a_lane_do_not_overlap(name):
    picture = DRAWN["PICTURES"][name]
    for lane in DRAWN["LANES"]:
        bars = sorted((bar.begin, bar.begin + bar.length) for bar in picture.bars if bar.lane == lane)
        assert all(end <= begin + 1e-9 for (_, end), (begin, _) in pairwise(bars))
        assert all(end <= DRAWN["END"] for _, end in bars)


def test_numbers_of_the_statistics():
    page = text("explanation/statistics.md")
    assert f"from {plan.FEWEST[plan.FORCE_ERROR]} seeds on, or from {plan.FEWEST[plan.TIME]} pairs" in page
    assert plan.MARGINS == {plan.FORCE_ERROR: 0.05, plan.DISTANCE: 0.5}
    assert (statistics.LEVEL, statistics.CONFIDENCE) == (0.05, 0.95)
    assert f"from {plan.FEWEST[plan.TIME]} to {speed.MOST_PAIRS}" in page
    assert speed.RESOLUTION == 0.01
    assert f"{statistics.most_that_deviate(6):.0%}" == "39%"
    assert {claim.arm for claim in plan.NUMERICS} == {"compiled", "standard"}
    assert {claim.arm for claim in plan.SPEED} == {"custom"}


def test_numbers_of_capture():
    page = text("explanation/capture.md")
    assert f"At most {steps.MOST} are kept" in page
    assert f"stood for {steps.STEADY} steps" in page
    assert f"at most {steps.AHEAD} replays ahead" in page
    assert f"from {capacities._CHOSEN_BY} steps of the plan" in page
    assert f"on {capacities._MEASURED_ON} further steps, and at most 8" in page


def test_variables_of_deterministic_runs():
    page = text("explanation/determinism.md")
    assert all(f"`{name}={value}`" in page for name, value in _REPEATABLE.items())
