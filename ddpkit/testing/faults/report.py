"""The table of a campaign."""

from pathlib import Path

from ddpkit.errors import InputError
from ddpkit.ranks.phase import PHASES
from ddpkit.testing.faults.judge import rows
from ddpkit.testing.faults.plan import FAULTS, Run

CONFIDENCE = 0.95


def upper_bound(failures: int, trials: int) -> float:
    """The largest rate of failures that such a count leaves possible at 95 % (Clopper and Pearson 1934, one-sided)."""
    from scipy.stats import beta

    return 1.0 if failures >= trials else float(beta.ppf(CONFIDENCE, failures + 1, trials - failures))


def latest(out: Path) -> list[dict[str, str]]:
    """The last record of each trial."""
    return list({(row["seed"], row["trial"]): row for row in rows(out / "trials.csv")}.values())


def report(out: Path) -> str:
    """Writes `report.md` beside `trials.csv`: faults by phases, passed of tried; and what failed.

    Returns:
        The text.

    Raises:
        InputError: there is no campaign.
    """
    made = latest(out)
    trials = [row for row in made if row["verdict"] in ("passed", "failed")]
    if not made:
        raise InputError(f"{out} holds no trials.csv with trials: give the folder of a campaign.")
    failed = [row for row in trials if row["verdict"] == "failed"]
    phases = [phase for phase in PHASES if any(row["phase_hit"] == phase for row in trials)]
    lines = [
        f"{len(trials)} faults (seed {', '.join(sorted({row['seed'] for row in trials}))}), {len(failed)} failures: at most "
        f"{upper_bound(len(failed), len(trials)):.1%} fail, at 95 % confidence. Passed of tried, by the phase that was hit:"
        if trials
        else "No trial was made.",
        "",
        f"| fault | {' | '.join(phases)} | all |",
        f"|---|{'---|' * (len(phases) + 1)}",
    ]
    for fault, kind in FAULTS.items():
        mine = [row for row in trials if row["fault"] == fault]
        if mine:
            cells = [_score([row for row in mine if row["phase_hit"] == phase]) for phase in phases]
            lines.append(f"| {kind.does} | {' | '.join(cells)} | {_score(mine)} |")
    totals = [_score([row for row in trials if row["phase_hit"] == phase]) for phase in phases]
    lines += [f"| all | {' | '.join(totals)} | {_score(trials)} |", ""]
    runs = sorted({_kind(row) for row in trials})
    by_run = [f"{kind} {_score([row for row in trials if _kind(row) == kind])}" for kind in runs]
    ways = sorted({row["went_on"] for row in trials})
    by_way = [f"{way} {sum(row['went_on'] == way for row in trials)}" for way in ways]
    seconds = sorted(float(row["seconds"]) for row in trials if row["seconds"])
    if seconds:
        lines.append(
            f"By run: {', '.join(by_run)}. Afterwards: {', '.join(by_way)}. Seconds from the fault until the last process had "
            f"ended: median {seconds[len(seconds) // 2]:.1f}, largest {seconds[-1]:.1f}."
        )
    for verdict in ("missed", "skipped"):
        if count := sum(row["verdict"] == verdict for row in made):
            lines.append(f"Not counted: {count} {verdict}.")
    lines += [
        f"- trial {row['trial']} of seed {row['seed']}: {row['fault']} in {row['phase_hit']}, rank {row['rank']}, "
        f"{_kind(row)}: {row['why']}"
        for row in failed
    ]
    text = "\n".join(lines) + "\n"
    (out / "report.md").write_text(text)
    return text


def _kind(row: dict[str, str]) -> str:
    """The kind of run of a trial; records of earlier versions have no column for recorded steps."""
    return Run(row["strategy"], row["compiled"] == "1", row.get("recorded") == "1").label


def _score(some: list[dict[str, str]]) -> str:
    return f"{sum(row['verdict'] == 'passed' for row in some)}/{len(some)}" if some else ""
