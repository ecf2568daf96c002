"""The studies' configurations: what is run, in which order, at which size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """One run: its label, which is its folder's name, and what sets it apart."""

    label: str
    overrides: tuple[str, ...]

    def repeat(self, number: int) -> "Arm":
        """Its first, second ... run: `new_seed`, `new_seed_2` ...; where it sets the seed, each has a seed of its own."""
        if number == 1:
            return self
        own = [f"seed={int(word[5:]) + number - 1}" if word.startswith("seed=") else word for word in self.overrides]
        return Arm(f"{self.label}_{number}", tuple(own))


@dataclass(frozen=True)
class Scale:
    """A study at one size.

    `overrides` are common to all runs. Repeats are interleaved: the second of every arm comes after the first of every arm, so
    that a drift of the machine falls on all arms alike. With `turns` the runs of a repeat are there at the same time and take
    turns, an epoch at a time, after a first epoch that warms up; all of them must fit into memory.
    """

    ranks: int
    overrides: tuple[str, ...]
    first: tuple[Arm, ...]
    repeated: tuple[Arm, ...]
    repeats: int
    ranks_per_node: int = 8
    turns: bool = False

    def arms(self, repeats: int | None = None) -> list[Arm]:
        """Every run in order; repeats are labelled `standard_2`, `standard_3` ..."""
        runs = list(self.first)
        for repeat in range(1, (repeats or self.repeats) + 1):
            runs += [arm.repeat(repeat) for arm in self.repeated]
        return runs


BASELINE = Arm("baseline", ("strategy=custom", "compile=false"))
PAPER_NUMERICS = (
    Arm("standard", ("strategy=standard", "compile=false")),
    Arm("compiled", ("strategy=custom", "compile=true")),
    Arm("rerun", ("strategy=custom", "compile=false")),
    Arm("new_seed", ("strategy=custom", "compile=false", "seed=2")),
)
OUR_NUMERICS = (
    Arm("standard_compiled", ("strategy=standard", "compile=true")),
    Arm("ingraph", ("strategy=ingraph", "compile=true")),
    Arm("overlap", ("strategy=overlap", "compile=false")),
)


def speed_arms(
    strategies: Sequence[str], widths: Sequence[int], compiled: Callable[[str], Sequence[bool]]
) -> tuple[Arm, ...]:
    """{strategies} x {eager, compile} x {embedding widths}."""
    return tuple(
        Arm(
            f"{strategy}-{'compile' if compile_ else 'eager'}-{width}",
            (f"strategy={strategy}", f"compile={str(compile_).lower()}", f"model.type_embedding_dim={width}"),
        )
        for width in widths
        for strategy in strategies
        for compile_ in compiled(strategy)
    )


def _both(strategy: str) -> Sequence[bool]:
    return (True,) if strategy == "ingraph" else (False, True)


def _custom(strategy: str) -> Sequence[bool]:
    return (False, True) if strategy == "custom" else (False,)


_DEMO_NUMERICS = (
    "model=allegro_tiny",
    "data=generated",
    "data.frames=300",
    "data.shifts=fitted",
    "train.max_epochs=8",
    "train.batch_size=16",
    "train.ema_decay=0.95",
    "train.plateau.factor=1",
    "device=cpu",
)
_DEMO_SPEED = (
    "model=nequip_tiny",
    "data=generated_crystals",
    "data.frames=120",
    "train.max_epochs=6",
    "train.batch_size=8",
    "train.validate=false",
    "train.checkpoint_every=0",
    "loss.stress=1.0",
    "device=cpu",
)

STUDIES: dict[str, dict[str, Scale]] = {
    "numerics": {
        "demo": Scale(2, _DEMO_NUMERICS, (BASELINE,), PAPER_NUMERICS, repeats=1),
        "workstation": Scale(
            2,
            ("model=allegro_small", "data=generated", "data.frames=2000", "train.max_epochs=4", "train.batch_size=16"),
            (BASELINE,),
            (*PAPER_NUMERICS, *OUR_NUMERICS),
            repeats=5,
        ),
        "paper": Scale(
            64,
            (
                "model=allegro_medium",
                "data=files",
                "data.path=${oc.env:DDPKIT_SPICE}",
                "train.max_epochs=4",
                "train.batch_size=256",
                "train.log_every=100",
                "train.plateau.factor=1",
                "device=cuda",
            ),
            (BASELINE,),
            (*PAPER_NUMERICS, *OUR_NUMERICS),
            repeats=5,
            ranks_per_node=4,
        ),
    },
    "speed": {
        "demo": Scale(
            2,
            _DEMO_SPEED,
            (),
            speed_arms(("standard", "custom", "none"), (32, 128), _custom),
            repeats=1,
            turns=True,
        ),
        "workstation": Scale(
            2,
            (
                "model=nequip_small",
                "data=generated_crystals",
                "data.frames=500",
                "train.max_epochs=3",
                "train.batch_size=16",
                "train.validate=false",
                "train.checkpoint_every=0",
                "loss.stress=1.0",
            ),
            (),
            speed_arms(("standard", "custom", "none", "ingraph"), (32, 128), _both),
            repeats=3,
            turns=True,
        ),
        "paper": Scale(
            8,
            (
                "experiment=mptrj",
                "data=files",
                "data.path=${oc.env:DDPKIT_MPTRJ}",
                "data.split_by=group",
                "model.kernels=openequivariance",
                "train.max_epochs=3",
                "train.validate=false",
                "train.checkpoint_every=0",
                "device=cuda",
            ),
            (),
            speed_arms(("standard", "custom", "none", "ingraph"), (32, 128), _both),
            repeats=3,
        ),
    },
}
