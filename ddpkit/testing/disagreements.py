"""A campaign of disagreements: random models, optimizers and moments at which ranks do different things.

`python -m ddpkit.testing disagreements --count 200 --seed 1`. Each trial must end in one of two ways. *Detected*: every rank
raises a sentence, and one of them names a rank; or the ranks that go on are told of the one that has left. *Harmless*: all ranks
hold the same weights, and each averaged gradient is the mean of what the ranks should have had, computed apart in float64.
Anything else is a failure: a hang, a crash, ranks that drift apart, an average that is another one.
"""

import argparse
import copy
import faulthandler
import os
import pickle
import random
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpkit.errors import InputError, NonFiniteGradientError, RankDisagreementError
from ddpkit.ranks.watch import Watch
from ddpkit.sync import GradientSync, make_sync
from ddpkit.testing.ranks import RankFailure, run_ranks

TIMEOUT = 2.0  # seconds that a rank waits for the others
DEADLINE = 40.0  # seconds after which a trial counts as hanging
STEPS = 4

STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "custom": ("custom", {}),
    "overlap": ("overlap", {"bucket_mb": 1e-4, "first_bucket_mb": 1e-5}),
    "overlap, tiny": ("overlap", {"bucket_mb": 1e-6, "first_bucket_mb": 1e-6}),
    "overlap, one": ("overlap", {}),
    "standard": ("standard", {"find_unused_parameters": True}),
    "ingraph": ("ingraph", {"buckets": 2}),
}

BUILD = ("missing", "extra", "shape", "dtype", "order", "frozen", "tied", "buffer", "option", "strategy")
RUN = (
    "nan", "inf", "no backward", "two backwards", "no gradient of one", "no synchronize", "early end", "freeze", "unfreeze",
    "no step", "two steps", "other rate", "other decay", "gradients kept", "replaced", "written to", "buffer written to", "eval",
    "other criterion",
)  # fmt: skip
STEP = (
    "nan", "inf", "no call", "freeze", "unfreeze", "other rate", "other decay", "replaced", "written to", "buffer written to",
    "eval", "other criterion",
)  # fmt: skip

DRIFTS = (
    "other rate",
    "other decay",
    "two steps",
    "no step",
    "written to",
    "replaced",
)  # found by comparing parameters

# What cannot be found under a strategy, and why; such trials are not drawn.
CANNOT = {
    ("standard", "plain"): {
        "nan": "DistributedDataParallel averages NaN into all ranks",
        "inf": "likewise",
        "gradients kept": "nothing of the ranks' gradients is compared",
    },
}


@dataclass(frozen=True)
class Trial:
    """What ranks do.

    Attributes:
        number: within the campaign.
        seed: of the campaign.
        strategy: one of `STRATEGIES`.
        way: `plain` for a loop around `synchronize()`, `step` for `make_step`.
        kind: one of `BUILD`, `RUN` or `STEP`.
    """

    number: int
    seed: int
    strategy: str
    way: str
    kind: str


@dataclass
class Outcome:
    """What became of a trial on one rank.

    Attributes:
        state: `ended`, `raised` (a sentence) or `crashed` (another error).
        said: the message.
        step: at which it was raised.
        expected: for each step, this rank's own gradients in float64.
        averaged: for each step, what the strategy made of them.
        weights: in the end.
        skipped: updates that were not applied.
    """

    state: str = "ended"
    said: str = ""
    step: int = -1
    expected: list[dict[str, Tensor]] = field(default_factory=list)
    averaged: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    skipped: int = 0


def draw(count: int, seed: int) -> list[Trial]:
    """So many trials, each kind with each strategy about equally often."""
    all_ = [
        (strategy, way, kind)
        for strategy in STRATEGIES
        for way in ("plain", "step")
        for kind in ((*BUILD, *RUN) if way == "plain" else STEP)
        if kind not in CANNOT.get((strategy, way), {}) and (strategy != "ingraph" or way == "step")
    ]
    generator = random.Random(seed)
    chosen: list[tuple[str, str, str]] = []
    while len(chosen) < count:
        generator.shuffle(all_)
        chosen += all_
    return [Trial(number, seed, *what) for number, what in enumerate(chosen[:count])]


# --- models -----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A chain of layers with whatever makes trouble: several dtypes, a shared weight, an unused layer, an empty parameter."""

    def __init__(self, generator: random.Random, *, odd: str = "", normed: bool = True) -> None:
        super().__init__()
        depth, width = generator.randint(1, 5), generator.randint(2, 6)
        dtypes = generator.choice([[torch.float64], [torch.float32], [torch.float32, torch.float64]])
        kinds = [generator.choice(dtypes) for _ in range(depth)]
        victim = generator.randrange(depth)
        if odd == "dtype":
            kinds[victim] = torch.float32 if kinds[victim] == torch.float64 else torch.float64
        wide = [width + (odd == "shape" and n == victim) for n in range(depth)]
        names = [f"layer{n}" for n in range(depth)]
        if odd == "order":
            names.reverse()
        self.chain = [f"layer{n}" for n in range(depth)]
        for name in names:
            n = int(name.removeprefix("layer"))
            self.add_module(
                name, nn.Linear(width, wide[n], bias=not (odd == "missing" and n == victim), dtype=kinds[n])
            )
        if odd == "order" and depth == 1:
            self.add_module("layer0", _Turned(self._layer("layer0")))
        first = self._layer("layer0")
        if generator.random() < 0.4 and depth > 1 and kinds[0] == kinds[-1] and not odd:
            self._layer(f"layer{depth - 1}").weight = first.weight
        if odd == "tied":
            self.twice = first.weight
        if generator.random() < 0.5:
            self.unused = nn.Linear(2, 3)
        if generator.random() < 0.4:
            self.empty = nn.Parameter(torch.empty(0))
        if odd == "extra":
            self.extra = nn.Parameter(torch.zeros(3))
        self.register_buffer("scale", torch.ones(1 + (odd == "buffer")))
        # the gradient of a bias before it is rounding alone, which the comparison of compiled code does not bear
        if generator.random() < 0.3 and not odd and normed:
            self.norm = nn.BatchNorm1d(width)
        self.at_first_frozen = generator.choice(list(dict(self.named_parameters()))) if depth > 1 else None
        if self.at_first_frozen is not None:
            self.get_parameter(self.at_first_frozen).requires_grad_(False)
        if odd == "frozen":
            first.bias.requires_grad_(not first.bias.requires_grad)
        self.width = width

    def _layer(self, name: str) -> nn.Linear:
        return self.get_submodule(name)  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, width]` to the same, in float64."""
        for name in self.chain:
            layer = self._layer(name)
            x = torch.tanh(layer(x.to(layer.weight.dtype)) * self.get_buffer("scale").to(x.dtype)[:1])
        norm = getattr(self, "norm", None)
        if norm is not None:
            x = norm(x.to(norm.weight.dtype))
        return x.double()


class _Turned(nn.Module):
    """A linear layer whose bias comes first."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.bias, self.weight = layer.bias, layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Loss(nn.Module):
    """Mean squares times a factor; notes what the gradient should be, in float64."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = (model,)  # not as a part of this module
        self.factor = 1.0
        self.noted: dict[str, Tensor] = {}
        self.notes = True

    def forward(self, output: Tensor, batch: Tensor) -> Tensor:
        """The loss."""
        if self.notes:
            self.noted = self.gradients(batch)
        return output.square().mean() * self.factor

    def gradients(self, batch: Tensor, times: float = 1.0) -> dict[str, Tensor]:
        """By a copy of the model in float64."""
        twin = copy.deepcopy(self._model[0]).double()
        for parameter in twin.parameters():
            parameter.grad = None
        with torch.enable_grad():
            (twin(batch).square().mean() * self.factor * times).backward()  # type: ignore[no-untyped-call]
        return {
            n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in twin.named_parameters() if p.requires_grad
        }


# --- on each rank -----------------------------------------------------------------------------------------------------


class Actor:
    """One rank in one trial."""

    def __init__(self, trial: Trial, rank: int, size: int) -> None:
        self.trial, self.rank = trial, rank
        self.generator = random.Random(f"{trial.seed}/{trial.number}")
        self.guilty = self.generator.randrange(size)
        self.moment = self.generator.randrange(STEPS - 2)
        self.odd = rank == self.guilty
        self.outcome = Outcome()
        self.syncs: list[GradientSync] = []

    def play(self) -> Outcome:
        """Builds, trains and tells."""
        try:
            self._build()
            for step in range(STEPS):
                self.outcome.step = step
                if self.odd and self.trial.kind == "early end" and step == self.moment + 1:
                    break
                (self._plain_step if self.trial.way == "plain" else self._whole_step)(step)
        except (InputError, RankDisagreementError, NonFiniteGradientError) as error:
            self.outcome.state, self.outcome.said = "raised", str(error)
        except Exception:  # noqa: BLE001  (told)
            self.outcome.state, self.outcome.said = "crashed", traceback.format_exc()[-1500:]
        finally:
            for sync in self.syncs:
                sync.close()
        if self.outcome.state == "ended":
            self.outcome.weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        return self.outcome

    def _build(self) -> None:
        trial, generator = self.trial, self.generator
        at_build = trial.kind if self.odd and trial.kind in BUILD else ""
        torch.manual_seed(generator.randrange(10**6) + self.rank)
        name, options = STRATEGIES[trial.strategy]
        # what ranks do to their parameters apart shows in their values alone
        drifts = trial.kind in DRIFTS or (name, trial.kind) == ("standard", "no gradient of one")
        options = options | {
            "check_every": 1 if drifts else generator.choice([0, 0, 1, 2]),
            "timeout": TIMEOUT,
        }
        self.model = Net(generator, odd=at_build, normed=name != "ingraph")
        self.loss = Loss(self.model)
        if at_build == "option":
            options["check_every"] += 1
        if at_build == "strategy":
            name, options = ("overlap" if name == "custom" else "custom"), {"timeout": TIMEOUT}
        parameters = [p for n, p in self.model.named_parameters()]
        rate = 0.05
        self.optimizer: torch.optim.Optimizer = generator.choice(
            [
                lambda: torch.optim.SGD(parameters, lr=rate),
                lambda: torch.optim.SGD(parameters, lr=rate, momentum=0.9),
                lambda: torch.optim.AdamW(parameters, lr=rate),
                lambda: torch.optim.Adam(parameters, lr=rate, fused=True),
            ]
        )()
        self.to_none = generator.random() < 0.7 or trial.kind == "gradients kept"
        if trial.way == "plain":
            self.sync = make_sync(name, self.model, **options)
        else:
            from ddpkit.step import make_step

            compiled = name == "ingraph"
            self.loss.notes = not compiled
            self.step = make_step(
                self.model, self.loss, self.optimizer, strategy=name, compile=compiled, **options
            )  # fmt: skip
            self.sync = self.step.sync
        self.syncs.append(self.sync)

    def _batch(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * step + self.rank + 10 * self.trial.number)
        batch = torch.randn(3 + self.rank, self.model.width, dtype=torch.float64, generator=generator)
        if self.odd and step == self.moment and self.trial.kind in ("nan", "inf"):
            batch[0, 0] = float(self.trial.kind)
        return batch

    def _change(self, step: int) -> None:
        """What the guilty rank does before the forward pass; the lasting ones last."""
        kind, model = self.trial.kind, self.model
        if not self.odd or step != self.moment:
            return
        trained = [
            n for n, p in model.named_parameters() if p.requires_grad and p.numel() and not n.startswith("unused")
        ]
        name = self.generator.choice(trained)
        home, _, last = name.rpartition(".")
        if kind == "freeze":
            model.get_parameter(name).requires_grad_(False)
        elif kind == "unfreeze":
            frozen = model.at_first_frozen or name
            model.get_parameter(frozen).requires_grad_(model.at_first_frozen is not None)
        elif kind == "other rate":
            self.optimizer.param_groups[0]["lr"] *= 2
        elif kind == "other decay":
            self.optimizer.param_groups[0]["weight_decay"] = 0.1
        elif kind == "replaced":
            setattr(model.get_submodule(home), last, nn.Parameter(model.get_parameter(name).detach().clone()))
        elif kind == "written to":
            model.get_parameter(name).data.add_(1e-3)
        elif kind == "buffer written to":
            model.get_buffer("scale").mul_(1.1)
        elif kind == "eval":
            model.eval()
        elif kind == "other criterion":
            self.loss.factor = 3.0

    def _plain_step(self, step: int) -> None:
        kind, odd = self.trial.kind, self.odd and step == self.moment
        self._change(step)
        batch = self._batch(step)
        if odd and kind == "no backward":
            expected = {n: torch.zeros_like(p).double() for n, p in self.model.named_parameters() if p.requires_grad}
        else:
            self._backward(batch)
            expected = self.loss.noted
        if odd and kind == "two backwards":
            self._backward(batch)
            expected = self.loss.gradients(batch, 2.0)
        if odd and kind == "no gradient of one":
            name = self.generator.choice([n for n, p in self.model.named_parameters() if p.requires_grad])
            self.model.get_parameter(name).grad = None
            expected[name] = torch.zeros_like(expected[name])
        if not (odd and kind == "no synchronize"):
            self.sync.synchronize()
            self.sync.stats  # noqa: B018  (looks at what may be left to look at)
        self._note(expected)
        for _ in range(0 if odd and kind == "no step" else 2 if odd and kind == "two steps" else 1):
            self.optimizer.step()
        if not (odd and kind == "gradients kept"):
            self.optimizer.zero_grad(set_to_none=self.to_none)

    def _backward(self, batch: Tensor) -> None:
        with self.sync.around_backward():
            self.loss(self.sync.module(batch), batch).backward()  # type: ignore[no-untyped-call]

    def _whole_step(self, step: int) -> None:
        if self.odd and self.trial.kind == "no call" and step == self.moment:
            return
        self._change(step)
        batch = self._batch(step)
        expected = {} if self.loss.notes else self.loss.gradients(batch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.step(batch)
        self._note(self.loss.noted if self.loss.notes else expected)
        self.outcome.skipped = int(self.step.skipped)

    def _note(self, expected: dict[str, Tensor]) -> None:
        self.outcome.expected.append(expected)
        self.outcome.averaged.append(
            {n: p.grad.detach().double().clone() for n, p in self.model.named_parameters() if p.grad is not None}
        )


def work(trials: Sequence[Trial], folder: str) -> None:
    """Plays the trials on this rank; writes each one's outcome as it ends."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    base = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # type: ignore[attr-defined]
    from ddpkit.compile.backend import use
    from ddpkit.ranks import agree

    # What ranks count alike, which they no longer do after trials in which one of them did something alone.
    counters = ((Watch, "_made"), (agree, "_agreements"), (agree, "_exchanges"))
    use("interpreted")
    warnings.simplefilter("ignore")
    for trial in trials:
        faulthandler.dump_traceback_later(DEADLINE, exit=True)
        if not dist.is_initialized():
            shared = dist.PrefixStore(f"trial{trial.number}", base)  # type: ignore[attr-defined]
            dist.init_process_group(
                "gloo", store=shared, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT + 1)
            )
        for home, counter in counters:
            setattr(home, counter, 1000 * trial.number)
        outcome = Actor(trial, rank, size).play()
        target = Path(folder) / f"{trial.number}.{rank}"
        target.with_suffix(f".{rank}.part").write_bytes(pickle.dumps(outcome))
        target.with_suffix(f".{rank}.part").rename(target)
        base.set(f"state/{trial.number}/{rank}", outcome.state)
        keys = [f"state/{trial.number}/{other}" for other in range(size)]
        base.wait(keys, timedelta(seconds=DEADLINE))
        if any(base.get(key) != b"ended" for key in keys):
            dist.destroy_process_group()  # a collective may be under way that others never join
    faulthandler.cancel_dump_traceback_later()


# --- judging ----------------------------------------------------------------------------------------------------------


def judge(outcomes: Sequence[Outcome | None]) -> tuple[str, str]:
    """`detected`, `harmless` or `failed`, and why."""
    if any(outcome is None for outcome in outcomes):
        return "failed", f"a rank hung for more than {DEADLINE:.0f} s or died"
    told = [outcome for outcome in outcomes if outcome is not None]
    if crashed := [f"rank {rank}: {o.said}" for rank, o in enumerate(told) if o.state == "crashed"]:
        return "failed", "; ".join(crashed)
    said = " | ".join(f"rank {rank}: {o.said}" for rank, o in enumerate(told) if o.state == "raised")
    ended = [rank for rank, o in enumerate(told) if o.state == "ended"]
    if not ended:
        names = any(re.search(r"[Rr]anks? \d", o.said) or "'" in o.said for o in told)
        return ("detected" if names else "failed"), said
    if said:
        left = all(all(f"rank {rank}" in o.said for rank in ended) for o in told if o.state == "raised")
        return ("detected" if left else "failed"), f"{said} | ranks {ended} ended"
    if not all(torch.isfinite(g).all() for o in told for gradients in o.expected for g in gradients.values()):
        counted = all(o.skipped == 1 for o in told)
        return ("detected", "skipped and counted") if counted and _alike(told) else ("failed", "a bad gradient passed")
    if wrong := _wrong_average(told):
        return "failed", wrong
    return ("harmless", "") if _alike(told) else ("failed", "the ranks have drifted apart, unnoticed")


def _alike(told: Sequence[Outcome]) -> bool:
    first = told[0].weights
    return all(
        o.weights.keys() == first.keys() and all(torch.equal(o.weights[n], first[n]) for n in first) for o in told
    )


def _wrong_average(told: Sequence[Outcome]) -> str:
    """Where an average is not the mean of what the ranks should have had."""
    for step in range(max(len(o.expected) for o in told)):
        if any(len(o.expected) <= step for o in told):
            return f"only some ranks have made step {step}"
        means: dict[str, Tensor] = {}
        for o in told:
            for name, gradient in o.expected[step].items():
                means[name] = means.get(name, torch.zeros_like(gradient)) + gradient / len(told)
        scale = max(float(mean.abs().max()) for mean in means.values() if mean.numel())  # some are in float32
        for name, mean in means.items():
            for rank, o in enumerate(told):
                mine = o.averaged[step].get(name, torch.zeros_like(mean))
                if not torch.allclose(mine, mean, rtol=1e-3, atol=1e-3 * scale):
                    off = float((mine - mean).abs().max())
                    return f"on rank {rank} the average of {name!r} at step {step} is off by {off:.2g}"
    return ""


def run(trials: Sequence[Trial], ranks: int = 2) -> Iterator[tuple[Trial, str, str]]:
    """Plays trials on ranks that are started once, and again where they do not survive one.

    Yields:
        Each trial with its verdict, and why.
    """
    left = list(trials)
    while left:
        with tempfile.TemporaryDirectory(prefix="ddpkit-disagreements-") as folder:
            report = ""
            try:
                run_ranks(work, ranks, left, folder, initialize=False, timeout=DEADLINE * (1 + len(left)))
            except RankFailure as failure:
                report = str(failure)[-1500:]
            played = 0
            for trial in left:
                outcomes = [_read(Path(folder) / f"{trial.number}.{rank}") for rank in range(ranks)]
                if report and any(outcome is None for outcome in outcomes):
                    yield trial, "failed", f"{judge(outcomes)[1]}: {report}"
                    played += 1
                    break
                yield trial, *judge(outcomes)
                played += 1
        left = left[played:]


def _read(path: Path) -> Outcome | None:
    return pickle.loads(path.read_bytes()) if path.exists() else None  # type: ignore[no-any-return]  # noqa: S301  (written by work)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ddpkit.testing disagreements", description="Ranks that do different things: found, or harmless."
    )
    parser.add_argument("--count", type=int, default=200, help="number of trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of trials to play again")
    parser.add_argument("--verbose", action="store_true", help="print what was said")
    chosen = parser.parse_args(argv)
    if chosen.ranks < 2 or chosen.count < 1:
        raise InputError(
            f"--ranks {chosen.ranks} and --count {chosen.count}: ranks can disagree from 2 on, in 1 trial or more."
        )
    trials = [t for t in draw(chosen.count, chosen.seed) if chosen.only is None or t.number in chosen.only]
    table: Counter[tuple[str, str, str]] = Counter()
    failed, start = 0, time.monotonic()
    for trial, verdict, why in run(trials, chosen.ranks):
        table[trial.kind, trial.strategy, verdict] += 1
        failed += verdict == "failed"
        if verdict == "failed" or chosen.verbose:
            print(f"{verdict}: {trial}: {why}", flush=True)
    print(format_table(table))
    count = len(trials)
    bound = f", so with 95 % confidence fewer than {100 * (1 - 0.05 ** (1 / count)):.2g} % fail" if not failed else ""
    print(f"{failed} of {count} trials failed{bound}. {time.monotonic() - start:.0f} s.")
    return 1 if failed else 0


def format_table(table: Counter[tuple[str, str, str]]) -> str:
    """Kinds by strategies: so many detected, harmless, failed."""
    kinds = [kind for kind in dict.fromkeys((*BUILD, *RUN, *STEP)) if any(k == kind for k, _, _ in table)]
    rows = [["detected/harmless/failed", *STRATEGIES]]
    for kind in kinds:
        cells = [[table[kind, strategy, v] for v in ("detected", "harmless", "failed")] for strategy in STRATEGIES]
        rows.append([kind, *("/".join(map(str, cell)) if any(cell) else "-" for cell in cells)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
