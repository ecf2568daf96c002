"""Draws one step under each strategy, and a recorded one: `python docs/figures/strategies.py [FOLDER]`.

Lengths are chosen so that the parts can be told apart; nothing here was measured.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

HOST, COMPUTE, NETWORK = "host", "compute", "communication"
LANES = (HOST, COMPUTE, NETWORK)
COLOURS = {  # Okabe and Ito's, with text that is read on them
    "forward": ("#56B4E9", "black"),
    "backward": ("#0072B2", "white"),
    "copy": ("#B8B8B8", "black"),
    "all-reduce": ("#E69F00", "black"),
    "sum": ("#E69F00", "black"),
    "update": ("#009E73", "white"),
    "launch": ("#D9D9D9", "black"),
}
PAPER, INK, QUIET = "#FBFBFA", "#222222", "#666666"  # a light card, which is read on light and on dark pages
END = 15.4


@dataclass(frozen=True)
class Bar:
    """Something that takes time.

    Attributes:
        lane: one of `LANES`.
        kind: one of `COLOURS`.
        begin: when.
        length: how long.
        label: what stands on it; by default its kind.
    """

    lane: str
    kind: str
    begin: float
    length: float
    label: str | None = None


@dataclass(frozen=True)
class Picture:
    """A step.

    Attributes:
        title: of the picture.
        bars: what takes time.
        exposed: from when to when nothing but communication goes on.
        framed: from when to when one thing runs, and what that is.
    """

    title: str
    bars: tuple[Bar, ...]
    exposed: tuple[float, float] | None = None
    framed: tuple[float, float, str] | None = None


def _buckets(ends: tuple[float, ...], lengths: tuple[float, ...]) -> tuple[Bar, ...]:
    return tuple(
        Bar(NETWORK, "all-reduce", begin, length, str(n + 1))
        for n, (begin, length) in enumerate(zip(ends, lengths, strict=True))
    )


_EAGER = Bar(COMPUTE, "forward", 0.4, 3), Bar(COMPUTE, "backward", 3.4, 6)
_HOOKED = Bar(HOST, "launch", 0, 8.2, "launches all; hooks start each bucket")

PICTURES = {
    "standard": Picture(
        "standard: torch's DistributedDataParallel",
        (
            _HOOKED,
            *_EAGER,
            *_buckets((5.2, 6.9, 8.3, 9.4), (0.9, 0.9, 0.9, 0.9)),
            Bar(COMPUTE, "update", 10.3, 1.2),
        ),
        exposed=(9.4, 10.3),
    ),
    "custom": Picture(
        "custom: one flat all-reduce after the backward pass",
        (
            Bar(HOST, "launch", 0, 8.9, "launches all of it, ahead of the device"),
            *_EAGER,
            Bar(COMPUTE, "copy", 9.4, 1),
            Bar(NETWORK, "all-reduce", 10.4, 3),
            Bar(COMPUTE, "update", 13.4, 1.2),
        ),
        exposed=(10.4, 13.4),
    ),
    "overlap": Picture(
        "overlap: buckets from gradient hooks, without a wrapper",
        (
            _HOOKED,
            *_EAGER,
            *_buckets((4.3, 6.7, 9.4), (0.45, 1.5, 1.05)),
            Bar(COMPUTE, "update", 10.45, 1.2),
        ),
        exposed=(9.4, 10.45),
    ),
    "ingraph": Picture(
        "ingraph, compile=true: the all-reduce is part of the compiled step",
        (
            Bar(HOST, "launch", 0, 4.3, "calls one program"),
            Bar(COMPUTE, "forward", 0.4, 1.7),
            Bar(COMPUTE, "backward", 2.1, 3),
            Bar(COMPUTE, "copy", 5.1, 1),
            Bar(NETWORK, "all-reduce", 6.1, 3),
            Bar(COMPUTE, "copy", 9.1, 1),
            Bar(COMPUTE, "update", 10.5, 1.2),
        ),
        exposed=(6.1, 9.1),
        framed=(0.3, 10.2, "one compiled program"),
    ),
    "recorded": Picture(
        "custom, compile=true cuda_graphs=true: the step is one recording",
        (
            Bar(HOST, "launch", 0, 1.2, "replay"),
            Bar(COMPUTE, "forward", 0.6, 1.3),
            Bar(COMPUTE, "backward", 1.9, 2.3),
            Bar(NETWORK, "all-reduce", 4.2, 3),
            Bar(COMPUTE, "update", 7.2, 1.2),
        ),
        exposed=(4.2, 7.2),
        framed=(0.5, 8.5, "one recording"),
    ),
    "none": Picture(
        "none: no communication",
        (
            Bar(HOST, "launch", 0, 8.2, "launches all of it, ahead of the device"),
            *_EAGER,
            Bar(COMPUTE, "update", 9.4, 1.2),
        ),
    ),
    "emulated": Picture(
        "emulated: four ranks on one process",
        (
            Bar(HOST, "launch", 0, 11.6, "launches the micro-batch of each rank in turn"),
            *(
                bar
                for n in range(4)
                for bar in (
                    Bar(COMPUTE, "forward", 0.4 + 2.95 * n, 0.9, ""),
                    Bar(COMPUTE, "backward", 1.3 + 2.95 * n, 1.7, f"rank {n}"),
                    Bar(COMPUTE, "copy", 3.0 + 2.95 * n, 0.35, ""),
                )
            ),
            Bar(COMPUTE, "sum", 12.2, 1.2, "sum"),
            Bar(COMPUTE, "update", 13.4, 1.2),
        ),
    ),
}


def _round(size: float) -> str:
    return f"round,pad=0,rounding_size={size}"


def _arrow(axis: Axes, begin: float, end: float, y: float, style: str, colour: str) -> None:
    look = {"arrowstyle": style, "color": colour, "lw": 0.9, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", (end, y), (begin, y), arrowprops=look)


def draw(picture: Picture) -> Figure:
    """One picture."""
    with mpl.rc_context(
        {"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Arial", "sans-serif"], "font.size": 9}
    ):
        figure = Figure(figsize=(8.4, 2.35), facecolor=PAPER)
        axis = figure.add_axes((0.0, 0.0, 1.0, 1.0), facecolor=PAPER)
        axis.set_xlim(-2.75, END + 0.2)
        axis.set_ylim(-1.15, 3.75)
        axis.axis("off")
        axis.text(-2.55, 3.25, picture.title, color=INK, fontsize=10, fontweight="bold", va="center")
        for lane, y in zip(LANES, (2.2, 1.2, 0.2), strict=True):
            axis.text(-0.25, y + 0.3, lane, color=INK, ha="right", va="center")
            axis.plot([0, END], [y - 0.1, y - 0.1], color="#DDDDDD", lw=0.8, zorder=0)
        for bar in picture.bars:
            y = {HOST: 2.2, COMPUTE: 1.2, NETWORK: 0.2}[bar.lane]
            colour, ink = COLOURS[bar.kind]
            axis.add_patch(
                FancyBboxPatch(
                    (bar.begin + 0.03, y), bar.length - 0.06, 0.6, boxstyle=_round(0.07), fc=colour, ec="none"
                )
            )
            label = bar.kind if bar.label is None else bar.label
            axis.text(bar.begin + bar.length / 2, y + 0.29, label, color=ink, ha="center", va="center", fontsize=8.5)
        if picture.framed is not None:
            begin, end, label = picture.framed
            axis.add_patch(
                FancyBboxPatch(
                    (begin, 0.02), end - begin, 1.93, boxstyle=_round(0.1), fc="none", ec=QUIET, lw=1, ls=(0, (4, 3))
                )
            )
            axis.text(end + 0.1, 0.5, label, color=QUIET, va="center", fontsize=8.5)
        if picture.exposed is not None:
            begin, end = picture.exposed
            _arrow(axis, begin, end, -0.22, "<->", INK)
            axis.text((begin + end) / 2, -0.55, "exposed", color=INK, ha="center", va="center", fontsize=8.5)
        _arrow(axis, 0, END, -0.9, "->", QUIET)
        axis.text(-0.25, -0.9, "time", color=QUIET, ha="right", va="center")
    return figure


def main(folder: Path) -> None:
    """Writes a file for each picture."""
    # Text stays text, and equal pictures are equal files.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ddpkit"}):
        for name, picture in PICTURES.items():
            draw(picture).savefig(folder / f"{name}.svg", facecolor=PAPER, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
