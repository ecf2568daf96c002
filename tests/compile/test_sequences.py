"""Whatever happens between steps, compiled and eager training take the same steps.

Graphs are interpreted, but for the tests that are marked as long. As there, code that was made of the same before is used again.
"""

import contextlib
import copy
import random
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_memory import interpreted_once
from torch import nn

import ddpkit
from ddpkit.compile.backend import using
from ddpkit.testing import run_ranks

ARMS = {
    "none": {"strategy": "none"},
    "custom": {"strategy": "custom"},
    "standard": {"strategy": "standard", "find_unused_parameters": True},
    "overlap": {"strategy": "overlap", "bucket_mb": 1e-4, "first_bucket_mb": 1e-4},
    "ingraph": {"strategy": "ingraph", "buckets": 2},
    "optimizer_in_graph": {"strategy": "ingraph", "optimizer_in_graph": True},
}
ALONE = {**ARMS, "standard": {"strategy": "standard"}}


class Model(nn.Module):
    """Has tied, empty, frozen and unused parameters, a mode, attributes of several kinds, and a count of its calls."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))
        self.last = nn.Linear(4, 1, dtype=torch.float64)
        self.third.weight = self.first.weight
        self.last.bias.requires_grad_(False)
        self.empty = nn.Parameter(torch.zeros(0, 4, dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.temperature = 1.0
        self.config = {"skip": False, "powers": [1, 2]}
        self.noted = None

    def forward(self, x):
        if self.training:
            self.calls += 1
        y = torch.tanh(self.first(x) / self.temperature)
        if not self.config["skip"]:
            y = y + torch.tanh(self.second(y)) * (1.0 if self.training else 0.5)
        y = self.third(y) ** self.config["powers"][0]
        self.noted = y.detach()
        return self.last(y) + self.empty.sum()


class Criterion(nn.Module):
    """Has a learned weight and an attribute."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.weight = 1.0

    def forward(self, output, batch):
        error = (output[:, 0] - batch.sum(1)).square().mean()
        return {"loss": self.weight * torch.exp(-self.scale) * error + self.scale, "error": error}


OPTIMIZERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1),
}


class Arm:
    """A model in training, by compiled code or not."""

    def __init__(self, arm, optimizer, rank=0, *, compiled):
        torch.manual_seed(0)
        self.model, self.criterion, self.rank = Model(), Criterion(), rank
        self.in_graph = arm == "optimizer_in_graph"
        others = [self.model.empty, self.model.unused, *self.model.second.parameters()]
        mine = [p for p in self.model.parameters() if not any(p is q for q in others)]
        self.late = None if self.in_graph else [self.model.empty, self.model.unused]  # given to the optimizer later
        groups = [{"params": [*mine, *self.criterion.parameters()]}, {"params": others[2:], "lr": 0.01}]
        if self.in_graph:
            groups[0]["params"] += others[:2]
        self.optimizer = OPTIMIZERS[optimizer](groups)
        options = dict(ARMS[arm] if torch.distributed.is_initialized() else ALONE[arm])
        if not compiled and options["strategy"] == "ingraph":
            options = {"strategy": "custom"}
        self.step = ddpkit.make_step(
            self.model,
            self.criterion,
            self.optimizer,
            compile=compiled,
            clip_norm=1.0,
            examples=[torch.ones(5, 4, dtype=torch.float64), torch.ones(6, 4, dtype=torch.float64)] if compiled else (),
            **options,
        )
        self.saved = None
        self.losses = []

    def batch(self, number, rows):
        generator = torch.Generator().manual_seed(100 * number + self.rank)
        return torch.randn(rows + self.rank, 4, generator=generator, dtype=torch.float64)

    def do(self, what, number):
        model, optimizer = self.model, self.optimizer
        match what:
            case "step":
                self.losses.append(self.step(self.batch(number, 5))["loss"])
            case "other shape":
                self.losses.append(self.step(self.batch(number, 9))["loss"])
            case "accumulate":
                self.losses.append(self.step([self.batch(number, 5), self.batch(number + 50, 7)])["loss"])
            case "freeze":
                model.first.requires_grad_(False)
            case "freeze the criterion":
                self.criterion.requires_grad_(False)
            case "unfreeze":
                model.first.requires_grad_(True)
                self.criterion.requires_grad_(True)
            case "zero_grad":
                optimizer.zero_grad()
            case "zero_grad in place":
                optimizer.zero_grad(set_to_none=False)
            case "save":
                self.saved = copy.deepcopy((model.state_dict(), self.criterion.state_dict(), optimizer.state_dict()))
            case "load":
                if self.saved is not None and len(self.saved[2]["param_groups"]) == len(optimizer.param_groups):
                    model.load_state_dict(self.saved[0])
                    self.criterion.load_state_dict(self.saved[1])
                    optimizer.load_state_dict(copy.deepcopy(self.saved[2]))
            case "add_param_group":
                if self.late is not None:
                    optimizer.add_param_group({"params": self.late, "lr": 0.03})
                    self.late = None
            case "eval":
                model.eval()
            case "train":
                model.train()
            case "temperature":
                model.temperature = 1.5 if model.temperature == 1.0 else 1.0
            case "config":
                model.config["skip"] = not model.config["skip"]
                model.config["powers"][0] = 3 - model.config["powers"][0]
            case "weight":
                self.criterion.weight = 0.5 if self.criterion.weight == 1.0 else 1.0
            case "rate":
                for group in optimizer.param_groups:
                    group["lr"] *= 0.7
            case "moments":
                for group in optimizer.param_groups:
                    if "betas" in group:
                        group["betas"], group["eps"] = (0.8, group["betas"][1] * 0.99), 1e-6
                    else:
                        group["momentum"] *= 0.9
            case "rate as a tensor":
                for group in optimizer.param_groups:
                    group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float64)


ACTIONS = [
    "step", "other shape", "accumulate", "freeze", "freeze the criterion", "unfreeze", "zero_grad", "zero_grad in place",
    "save", "load", "add_param_group", "eval", "train", "temperature", "config", "weight", "rate", "moments",
]  # fmt: skip


def run(arm, optimizer, actions, rank=0):
    """Does the same to both, and compares after each step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair = [Arm(arm, optimizer, rank, compiled=compiled) for compiled in (True, False)]
        for number, what in enumerate(["step", *actions, "step"]):
            for one in pair:
                one.do(what, number)
            compare(*pair, (arm, optimizer, actions[:number], what))
        for one in pair:
            one.step.sync.close()


def compare(compiled, eager, where):
    if compiled.losses:
        torch.testing.assert_close(compiled.losses[-1], eager.losses[-1], rtol=1e-9, atol=1e-9, msg=f"{where}: loss")
    for (name, p), q in zip(
        nn.ModuleList([compiled.model, compiled.criterion]).named_parameters(),
        nn.ModuleList([eager.model, eager.criterion]).parameters(),
        strict=True,
    ):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{where}: {name}: {m}")
        if not p.requires_grad and where[-1] in ("step", "other shape", "accumulate"):
            assert p.grad is None, (where, name)
            assert q.grad is None, (where, name)
    assert compiled.model.calls == eager.model.calls, where


@pytest.mark.parametrize("arm", ARMS)
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(optimizer=st.sampled_from(list(OPTIMIZERS)), actions=st.lists(st.sampled_from(ACTIONS), max_size=10))
def test_any_sequence_on_one_rank(arm, optimizer, actions):
    with interpreted_once():
        run(arm, optimizer, actions)


def some_sequences(count, *, compiles):
    rank = torch.distributed.get_rank()
    choice = random.Random(0)
    with contextlib.nullcontext() if compiles else interpreted_once():
        for number in range(count):
            arm = list(ARMS)[number % len(ARMS)]
            optimizer = choice.choice(list(OPTIMIZERS))
            run(arm, optimizer, choice.choices(ACTIONS, k=10), rank)


def test_sequences_on_two_ranks():
    run_ranks(some_sequences, 2, 12, compiles=False, timeout=300)


@pytest.mark.long
def test_sequences_on_two_ranks_with_the_compiler():
    run_ranks(some_sequences, 2, 12, compiles=True, timeout=3000)


@pytest.mark.long
@pytest.mark.parametrize("arm", ARMS)
def test_everything_in_turn_with_the_compiler(arm):
    for optimizer in OPTIMIZERS:
        run(arm, optimizer, [x for what in ACTIONS[2:] for x in (what, "step")])


@pytest.mark.parametrize("arm", ARMS)
def test_everything_in_turn(arm):
    """Everything is traced anew, as code that is found must not hide what is wrong with a second trace."""
    optimizer = list(OPTIMIZERS)[list(ARMS).index(arm) % 2]
    with using("interpreted"):
        run(arm, optimizer, [x for what in [*ACTIONS[2:], "rate as a tensor"] for x in (what, "step")])
