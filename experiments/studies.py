"""The studies' configurations: what is run, in which blocks, at which size, and what is declared beforehand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from ddpkit.analysis.plan import DISTANCE, FORCE_ERROR, NUMERICS, SPEED, SPREAD, Declared

Overrides = tuple[str, ...]


@dataclass(frozen=True)
class Arm:
    """One run: its label, which is its folder's name, and what sets it apart.

    Attributes:
        nequip: of a run of nequip's own trainer, its scheme (`ddpkit bench nequip`); None: the run is ours.
    """

    label: str
    overrides: Overrides
    nequip: str | None = None

    def numbered(self, number: int, *more: str) -> "Arm":
        """Its run in a block: `standard`, `standard_2` ..., with further overrides that its own replace."""
        own = {word.partition("=")[0] for word in self.overrides}
        kept = tuple(word for word in more if word.partition("=")[0] not in own)
        label = self.label if number == 1 else f"{self.label}_{number}"
        return replace(self, label=label, overrides=(*kept, *self.overrides))


@dataclass(frozen=True)
class Numerics:
    """A study of numerics at one size.

    Each seed, of weights and of data order alike, is a block: all arms, in random order. `spread` further reruns of the first
    seed show how much one seed varies; arms of `once` are run for that seed alone.
    """

    ranks: int
    overrides: Overrides
    arms: tuple[Arm, ...]
    seeds: int
    spread: int = 0
    primary: tuple[Declared, ...] = NUMERICS
    ranks_per_node: int = 8
    once: tuple[Arm, ...] = ()

    def blocks(self, seeds: int | None = None, spread: int | None = None) -> list[list[Arm]]:
        """The runs, seed by seed."""
        blocks = []
        for seed in range(1, (seeds or self.seeds) + 1):
            own = f"seed={seed}", f"data.seed={seed}"
            block = [_seeded(arm, seed).numbered(seed, *own) for arm in self.arms]
            Random(seed).shuffle(block)
            blocks.append(block)
        first = "seed=1", "data.seed=1"
        rerun = next((arm.overrides for arm in self.arms if arm.label == "rerun"), ())
        again = [_seeded(arm, 1).numbered(1, *first) for arm in self.once]
        count = self.spread if spread is None else spread
        again += [Arm(SPREAD, rerun).numbered(n, *first) for n in range(1, count + 1)]
        return [*blocks, again] if again else blocks

    def only(self, labels: Sequence[str]) -> "Numerics":
        """The study of some of its arms alone."""
        arms, once = (tuple(arm for arm in which if arm.label in labels) for which in (self.arms, self.once))
        left_out = {arm.label for arm in (*self.arms, *self.once)} - set(labels)
        return replace(self, arms=arms, once=once, primary=tuple(c for c in self.primary if c.arm not in left_out))


@dataclass(frozen=True)
class Accuracy(Numerics):
    """A study of errors on test frames: blocks as in one of numerics; `ddpkit eval` follows each run that has finished."""

    primary: tuple[Declared, ...] = ()


@dataclass(frozen=True)
class Ranks:
    """Studies of numerics at several numbers of ranks, each in a sub-folder of its own."""

    parts: dict[str, Numerics]
    ranks_per_node: int = 4


@dataclass(frozen=True)
class Speed:
    """A study of speed at one size.

    A block is one launch of each of its arms, which are there at the same time and take turns, an epoch at a time, after a first
    epoch that warms up; all of them must fit into memory, on GPUs but for what only a running epoch needs. `launches` blocks of
    all arms are the pilot, whose spread tells how many blocks of `pair`, which the declared claims are about, come after it;
    without `pair` the claims are about these blocks.
    Where arms do not fit at once, the blocks of a launch are `groups` in place of `arms`, each with a standard eager of its own.
    `ready` runs get ready at a time.
    """

    ranks: int
    overrides: Overrides
    arms: tuple[Arm, ...]
    launches: int
    pair: tuple[Arm, ...] = ()
    primary: tuple[Declared, ...] = SPEED
    ranks_per_node: int = 8
    turns: bool = True
    groups: tuple[tuple[Arm, ...], ...] = ()
    ready: int = 1

    def blocks(self, launches: int | None = None) -> list[list[Arm]]:
        """The pilot, launch by launch."""
        numbers = range(1, (launches or self.launches) + 1)
        return [_shuffled(group, n) for n in numbers for group in self.groups or (self.arms,)]

    def pairs(self, count: int, after: int) -> list[list[Arm]]:
        """The pairs of launches after so many of the pilot."""
        return [_shuffled(self.pair, after + number) for number in range(1, count + 1)]

    @property
    def known(self) -> tuple[Arm, ...]:
        """All arms that may be named: those of a launch, and those of nequip's own trainer."""
        return (*(arm for group in self.groups or (self.arms,) for arm in group), *PEERS)

    def only(self, names: Sequence[str]) -> "Speed":
        """Launches of some arms, named with their size or for all sizes without it, and of standard eager of the same sizes.

        No pairs follow and nothing is declared: all that such a study tells are estimates.
        """
        chosen = [arm for arm in self.known if {arm.label, of_any_size(arm)} & set(names)]
        sizes = [width for width in WIDTHS if any(arm.label.endswith(f"-{width}") for arm in chosen)]
        chosen += [arm for arm in speed_arms(("standard",), sizes, _eager) if arm not in chosen]
        by_size = tuple(tuple(arm for arm in chosen if arm.label.endswith(f"-{width}")) for width in sizes)
        return replace(self, arms=tuple(chosen), groups=by_size if self.groups else (), pair=(), primary=())


def of_any_size(arm: Arm) -> str:
    """The name of an arm of a study of speed without its size."""
    return arm.label.rpartition("-")[0]


def _shuffled(arms: Sequence[Arm], number: int) -> list[Arm]:
    block = [arm.numbered(number) for arm in arms]
    Random(number).shuffle(block)
    return block


def _seeded(arm: Arm, seed: int) -> Arm:
    """An arm whose own seed is a new one, made new for each block."""
    fresh = {"seed=new": f"seed={seed + 1}", "data.seed=new": f"data.seed={1000 + seed}"}
    return replace(arm, overrides=tuple(fresh.get(word, word) for word in arm.overrides))


_COMPILED = ("compile=true", "cuda_graphs=false")
_EAGER = ("compile=false", "cuda_graphs=false")
BASELINE = Arm("baseline", ("strategy=custom", *_EAGER))
RERUN = Arm("rerun", BASELINE.overrides)
NEW_SEED = Arm("new_seed", (*BASELINE.overrides, "seed=new"))
PAPER_NUMERICS = (
    BASELINE,
    Arm("standard", ("strategy=standard", *_EAGER)),
    Arm("compiled", ("strategy=custom", *_COMPILED)),
    RERUN,
    NEW_SEED,
)
_ALIKE = tuple(arm for arm in PAPER_NUMERICS if arm.label in ("standard", "compiled"))
OUR_NUMERICS = (
    Arm("interpreted", ("strategy=custom", *_COMPILED, "compiler=interpreted")),
    Arm("standard_compiled", ("strategy=standard", *_COMPILED)),
    Arm("ingraph", ("strategy=ingraph", *_COMPILED)),
    Arm("overlap", ("strategy=overlap", *_EAGER)),
)
CAPTURED = Arm("captured", ("strategy=custom", "compile=true", "cuda_graphs=true"))
# Each differs from the baseline, or from one other arm, in one thing.
CAUSES = (
    BASELINE,
    RERUN,
    NEW_SEED,
    Arm("new_order", (*BASELINE.overrides, "data.seed=new")),
    Arm("deterministic", (*BASELINE.overrides, "deterministic=true")),
    Arm("deterministic_rerun", (*BASELINE.overrides, "deterministic=true")),
    Arm("ring", (*BASELINE.overrides, "nccl_algo=Ring")),
    Arm("tree", (*BASELINE.overrides, "nccl_algo=Tree")),
    Arm("overlap", ("strategy=overlap", *_EAGER)),
    Arm("small_buckets", ("strategy=overlap", "+strategy.bucket_mb=0.1", *_EAGER)),
    Arm("interpreted", ("strategy=custom", *_COMPILED, "compiler=interpreted")),
    Arm("compiled", ("strategy=custom", *_COMPILED)),
    Arm("other_code", ("strategy=custom", *_COMPILED, "compiler=public")),
    Arm("tf32", (*BASELINE.overrides, "tf32=true")),
)


def emulated(label: str, *overrides: str) -> Arm:
    """An arm of emulated ranks."""
    return Arm(label, ("strategy=emulated", "cuda_graphs=false", *overrides))


EMULATED = (
    emulated("baseline"),
    emulated("rerun"),
    emulated("new_seed", "seed=new"),
    emulated("tree", "strategy.order=tree"),
    emulated("halving_doubling", "strategy.order=halving_doubling"),
    emulated("buckets", "strategy.bucket_mb=0.1"),
)


EMULATED_RANKS = (1, 2, 4, 8, 16, 64)
_BUCKETS = 0.25  # MiB; torch's first bucket would hold most of a small model


def emulated_ranks(ranks: int) -> Numerics:
    """So many ranks on one process: what rerunning, bucketing and compiling change; at 64 a tree of sums as well."""
    count, buckets = f"strategy.ranks={ranks}", f"strategy.bucket_mb={_BUCKETS}"
    arms = [
        emulated("baseline", count),
        emulated("rerun", count),
        emulated("standard", count, buckets),
        emulated("compiled", count, "compile=true"),
    ]
    primary: tuple[Declared, ...] = ()
    if ranks == max(EMULATED_RANKS):
        arms += [
            emulated("tree", count, "strategy.order=tree"),
            emulated("tree_buckets", count, "strategy.order=tree", buckets),
        ]
        named = "emulated compiled", f"emulated, bucket_mb={_BUCKETS}", "emulated, order=tree"
        primary = tuple(Declared(FORCE_ERROR, name) for name in named)
    return Numerics(1, _RANKS_NUMERICS, tuple(arms), seeds=6, primary=primary)


def speed_arms(
    strategies: Sequence[str],
    widths: Sequence[int],
    compiled: Callable[[str], Sequence[bool]],
    name: str = "{strategy}",
) -> tuple[Arm, ...]:
    """{strategies} x {eager, compile} x {embedding widths}."""
    return tuple(
        Arm(
            f"{name.format(strategy=strategy)}-{'compile' if compile_ else 'eager'}-{width}",
            (f"strategy={strategy}", *(_COMPILED if compile_ else _EAGER), f"model.type_embedding_dim={width}"),
        )
        for width in widths
        for strategy in strategies
        for compile_ in compiled(strategy)
    )


def _both(strategy: str) -> Sequence[bool]:
    return (True,) if strategy == "ingraph" else (False, True)


def _custom(strategy: str) -> Sequence[bool]:
    return (False, True) if strategy == "custom" else (False,)


def _eager(_: str) -> Sequence[bool]:
    return (False,)


def _node_groups(width: int) -> tuple[tuple[Arm, ...], ...]:
    """What the paper has, its lower bound, and what it leaves out; our extensions."""
    paper = speed_arms(("standard", "custom"), (width,), _both) + speed_arms(("none",), (width,), _eager)
    more = speed_arms(("overlap",), (width,), _eager) + speed_arms(("ingraph",), (width,), _both)
    captured = Arm(f"custom-captured-{width}", (*CAPTURED.overrides, f"model.type_embedding_dim={width}"))
    return paper, (*speed_arms(("standard",), (width,), _eager, "{strategy}_again"), *more, captured)


WIDTHS = (32, 128)
PAIR = (
    *speed_arms(("standard", "custom"), WIDTHS, _eager),
    *speed_arms(("standard",), WIDTHS, _eager, "{strategy}_again"),  # against itself: whether the times are calibrated
)

# nequip's own trainer, beside ours where it is asked for
PEERS = tuple(
    Arm(f"nequip-{scheme}{suffix}-{width}", (*how, f"model.type_embedding_dim={width}"), nequip=scheme)
    for width in WIDTHS
    for scheme, suffix, how in (("ddp", "", _EAGER), ("simple", "", _EAGER), ("simple", "-compiled", _COMPILED))
)

_DEMO_NUMERICS = (
    "model=allegro_tiny",
    "data=generated",
    "data.frames=300",
    "data.shifts=fitted",
    "train.max_epochs=8",
    "train.batch_size=16",
    "train.ema_decay=0.95",
    "train.plateau.factor=1",
    "train.projection=true",
    "device=cpu",
)
_WORKSTATION_NUMERICS = (
    "model=allegro_small",
    "data=generated",
    "data.frames=2000",
    "train.max_epochs=4",
    "train.batch_size=16",
    "train.plateau.factor=1",
    "train.projection=true",
)
# One batch of 256 frames a step, as published, however many ranks share it: the order of sums is all that their number changes.
_RANKS_NUMERICS = (
    "model=allegro_small",
    "data=generated",
    "data.frames=4000",
    "train.max_epochs=1000",
    "train.max_steps=500",
    "train.batch_size=256",
    "train.validate_every=1000",
    "train.checkpoint_every=50",
    "train.plateau.factor=1",
    "train.projection=true",
)
_DEMO_SPEED = (
    "model=nequip_tiny",
    "data=generated_crystals",
    "data.frames=120",
    "train.max_epochs=6",
    "train.batch_size=8",
    "train.validate=false",
    "train.checkpoint_every=never",
    "loss.stress=1.0",
    "device=cpu",
)

_NODE_SPEED = (
    "model=nequip_xl",
    "data=generated_crystals",
    "data.frames=4000",
    "data.split=[0.96,0.02,0.02]",  # 12 batches of 320 to train on
    "precision=float32",
    "tf32=true",
    "train.max_epochs=4",
    "train.batch_size=320",
    "train.validate=false",
    "train.checkpoint_every=never",
    "loss.stress=1.0",
    "device=cuda",
)

_MOLECULE = ("experiment=small_molecule", "data.path=${oc.env:DDPKIT_MOLECULE}")
# The recipe, and one choice of it undone in each arm.
CHOICES = (
    Arm("baseline", ()),
    Arm("constant_rate", ("scheduler=plateau", "train.plateau.factor=1")),
    Arm("no_average", ("train.ema_decay=0",)),
    Arm("energy-1", ("loss.energy=1",)),
    Arm("isolated_shifts", ("data.shifts=isolated",)),
    Arm("batch-10", ("train.batch_size=10",)),
    Arm("tf32", ("precision=float32", "tf32=true")),
)
STRATEGIES = (
    Arm("baseline", ("strategy=standard", *_EAGER)),
    Arm("custom", ("strategy=custom", *_EAGER)),
    Arm("compiled", ("strategy=custom", *_COMPILED)),
    CAPTURED,
)
_DEMO_ACCURACY = (
    "model=allegro_tiny",
    "data=generated",
    "data.frames=300",
    "data.split=[0.6,0.2,0.2]",
    "train.max_epochs=12",
    "train.batch_size=8",
    "train.ema_decay=0.95",
    "scheduler=cosine",
    "device=cpu",
)

STUDIES: dict[str, dict[str, Numerics | Ranks | Speed]] = {
    "accuracy": {
        "choices": Accuracy(1, _MOLECULE, CHOICES, seeds=3),
        "frames": Accuracy(
            1,
            (
                "experiment=small_molecule",
                "model=allegro_small",
                "data=generated",
                "data.frames=4000",
                "data.shifts=isolated",
                "train.batch_size=16",
            ),
            tuple(Arm(f"frames-{count}", (f"data.train_frames={count}",)) for count in (200, 400, 800, 1600, 3200)),
            seeds=3,
        ),
        "strategies": Accuracy(
            4,
            (*_MOLECULE, "train.batch_size=8", "train.max_steps=20000", "device=cuda"),
            STRATEGIES,
            seeds=5,
            ranks_per_node=4,
        ),
        "demo": Accuracy(
            1, _DEMO_ACCURACY, (CHOICES[0], CHOICES[1], Arm("no_average", ("train.ema_decay=0",))), seeds=2
        ),
    },
    "numerics": {
        "demo": Numerics(2, _DEMO_NUMERICS, PAPER_NUMERICS, seeds=1),
        "workstation": Numerics(2, _WORKSTATION_NUMERICS, (*PAPER_NUMERICS, *OUR_NUMERICS), seeds=6, spread=5),
        "causes": Numerics(2, _WORKSTATION_NUMERICS, CAUSES, seeds=3),
        "emulated": Numerics(
            1,
            (*_WORKSTATION_NUMERICS, "model=allegro_tiny", "train.batch_size=128", "data.shifts=fitted"),
            EMULATED,
            seeds=6,
            spread=5,
            primary=(
                Declared(FORCE_ERROR, "emulated, order=tree"),
                Declared(DISTANCE, "emulated, order=tree"),
                Declared(DISTANCE, "emulated, bucket_mb=0.1"),
            ),
        ),
        "ranks": Ranks(
            {
                f"emulated-{ranks}": emulated_ranks(ranks) for ranks in reversed(EMULATED_RANKS)
            }  # what takes longest begins
            | {"real-4": Numerics(4, _RANKS_NUMERICS, (BASELINE, RERUN, *_ALIKE), seeds=6, primary=())}
        ),
        "node": Numerics(
            4,
            (
                "model=allegro_medium",
                "data=generated",
                "data.frames=4000",
                "train.max_epochs=1000",
                "train.max_steps=8000",
                "train.batch_size=32",
                "train.validate_every=20",
                "train.checkpoint_every=500",
                "train.plateau.factor=1",
                "train.projection=true",
                "device=cuda",
            ),
            (
                BASELINE,
                RERUN,
                *_ALIKE,
                # by default all gradients of this model fit into one bucket
                Arm("overlap", ("strategy=overlap", f"+strategy.bucket_mb={_BUCKETS}", *_EAGER)),
                Arm("ingraph", ("strategy=ingraph", *_COMPILED)),
                CAPTURED,
            ),
            seeds=6,
            spread=5,
            ranks_per_node=4,
            once=(NEW_SEED,),
        ),
        "paper": Numerics(
            64,
            (
                "model=allegro_medium",
                "data=files",
                "data.path=${oc.env:DDPKIT_SPICE}",
                "train.max_epochs=4",
                "train.batch_size=256",
                "train.log_every=100",
                "train.plateau.factor=1",
                "train.projection=true",
                "device=cuda",
            ),
            (*PAPER_NUMERICS, *OUR_NUMERICS),
            seeds=6,
            spread=5,
            ranks_per_node=4,
        ),
    },
    "speed": {
        "demo": Speed(2, _DEMO_SPEED, speed_arms(("standard", "custom", "none"), WIDTHS, _custom), launches=1),
        "workstation": Speed(
            2,
            (
                "model=nequip_small",
                "data=generated_crystals",
                "data.frames=500",
                "train.max_epochs=3",
                "train.batch_size=16",
                "train.validate=false",
                "train.checkpoint_every=never",
                "loss.stress=1.0",
            ),
            speed_arms(("standard", "custom", "none", "ingraph"), WIDTHS, _both),
            launches=3,
            pair=PAIR,
        ),
        "node": Speed(
            4,
            _NODE_SPEED,
            arms=(),
            launches=3,
            pair=tuple(Arm(arm.label, (*arm.overrides, "train.max_epochs=3")) for arm in PAIR),
            ranks_per_node=4,
            groups=tuple(group for width in WIDTHS for group in _node_groups(width)),
            ready=4,
        ),
        # the paper's number of GPUs and batch of each, on built-in crystals
        "eight": Speed(
            8,
            (*_NODE_SPEED, "data.frames=8000", "train.batch_size=640", "train.max_epochs=6"),
            arms=PAIR,
            launches=8,
            ready=len(PAIR),
        ),
        "paper": Speed(
            8,
            (
                "experiment=mptrj",
                "data=files",
                "data.path=${oc.env:DDPKIT_MPTRJ}",
                "data.split_by=group",
                "train.max_epochs=3",
                "train.validate=false",
                "train.checkpoint_every=never",
                "device=cuda",
            ),
            speed_arms(("standard", "custom", "none", "ingraph"), WIDTHS, _both),
            launches=3,
            pair=PAIR,
            turns=False,
        ),
    },
}
