"""What sets a run apart from another, read from its configuration and never from its label."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ddpkit.analysis.runs import Run

MOST_EAGER = 0.01
"""A run of which a larger share of the steps ran eagerly is not called compiled."""

RERUN, NEW_SEED, NEW_ORDER = "rerun", "new seed", "new order"
_NO_OPTION = frozenset({"name", "_target_", "timeout", "check_every"})


@dataclass(frozen=True)
class Settings:
    """Everything that the studies of numerics vary, but for the seeds.

    Attributes:
        strategy: name of the gradient synchronisation.
        options: its options that are set, such as the size of buckets.
        comm: what carries the all-reduce.
        nccl_algo: the algorithm that NCCL was held to.
        mode: `eager`, `interpreted` (traced, not compiled), `compiled`, `torch.compile` (the same graph, compiled by
            `torch.compile`), or `partly compiled`.
        graphs: whether steps are replayed as captured.
        tf32: whether products may be taken in TF32.
        deterministic: whether kernels had to be deterministic.
    """

    strategy: str
    options: tuple[tuple[str, str], ...]
    comm: str
    nccl_algo: str
    mode: str
    graphs: str
    tf32: bool
    deterministic: bool

    def differing(self, other: "Settings") -> tuple[str, ...]:
        """Names of the settings in which two differ."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name))


def settings(run: Run) -> Settings:
    """What a run was."""
    strategy = run.config.get("strategy")
    options = strategy if isinstance(strategy, Mapping) else {}
    chosen = {k: str(v) for k, v in options.items() if k not in _NO_OPTION and v is not None}
    return Settings(
        strategy=run.strategy,
        options=tuple(sorted(chosen.items())),
        comm=run.comm,
        nccl_algo=str(run.config.get("nccl_algo") or ""),
        mode=mode(run),
        graphs=_graphs(run.config.get("cuda_graphs")),
        tf32=bool(run.config.get("tf32", False)),
        deterministic=run.deterministic,
    )


def mode(run: Run) -> str:
    """How the steps were computed."""
    if not run.compiled:
        return "eager"
    if run.config.get("compiler") == "interpreted":
        return "interpreted"
    if run.eager_share > MOST_EAGER:
        return "partly compiled"
    return "torch.compile" if run.config.get("compiler") == "public" else "compiled"


def name(run: Settings, baseline: Settings) -> str:
    """What tables call an arm: `standard`, `compiled`, `overlap, bucket_mb=1` ...; `rerun` where it is as the baseline."""
    differing = run.differing(baseline)
    if not differing:
        return RERUN
    scheme = run.strategy
    if run.mode != "eager" and not (run.strategy == "ingraph" and run.mode == "compiled"):
        scheme = run.mode if run.strategy == "custom" else f"{run.strategy} {run.mode}"
    options, before = dict(run.options), dict(baseline.options)
    added = [f"{key}={value}" for key, value in options.items() if before.get(key) != value]
    added += [_said(run, setting) for setting in differing if setting not in ("strategy", "options", "mode")]
    return ", ".join([scheme, *added])


def _said(run: Settings, setting: str) -> str:
    value: Any = getattr(run, setting)
    if setting in ("tf32", "deterministic"):
        what = {"tf32": "TF32", "deterministic": "deterministic"}[setting]
        return what if value else f"not {what}"
    return {"comm": f"over {value}", "nccl_algo": value or "any NCCL algorithm", "graphs": f"captured: {value}"}[
        setting
    ]


def _graphs(value: Any) -> str:
    return {None: "", True: "yes", False: "no"}.get(value, str(value))
