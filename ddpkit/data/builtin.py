"""The built-in sets."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ddpkit.data.frame import Frame
from ddpkit.data.once import made_once
from ddpkit.data.prepared import PreparedSet, write_prepared
from ddpkit.errors import InputError

# source -> version of its recipe; a new one makes cached sets of the old be made again
RECIPES = {"generated": 1, "generated_crystals": 1}
_R_MAX = 6.0  # Å, for the edge counts in the manifest


def generated(
    source: str, cache: str | os.PathLike[str], *, frames: int, seed: int = 0, processes: int | None = None
) -> Path:
    """The prepared set of a built-in source; made on first use, by one of the processes that ask for it.

    Args:
        source: `generated` (molecules) or `generated_crystals`.
        cache: folder that sets are kept in.
        frames: how many.
        seed: of the generation; sets of one seed are identical.
        processes: how many label at a time; all cores where None.
    """
    if source not in RECIPES:
        raise InputError(f"there is no built-in set {source!r}: use one of {', '.join(RECIPES)}")
    target = Path(cache) / f"{source}-v{RECIPES[source]}-{frames}-seed{seed}"

    def make(temporary: Path) -> None:
        generate(source, temporary, frames=frames, seed=seed, processes=processes)

    return made_once(target, make)


def generate(
    source: str,
    path: str | os.PathLike[str],
    *,
    frames: int,
    seed: int = 0,
    processes: int | None = None,
    progress: bool = True,
) -> PreparedSet:
    """Makes a built-in set.

    `generated`: molecules labelled with GFN2-xTB, see `ddpkit.data.molecules`. `generated_crystals`: periodic crystals labelled
    with an analytic pair potential (no quantum chemistry), see `ddpkit.data.crystals`.

    Raises:
        InputError: an unknown source, no frames, or packages of the extra `generate` are missing.
    """
    from tqdm import tqdm

    if frames < 1 or seed < 0:
        raise InputError(f"frames={frames} and seed={seed}: ask for at least one frame, and a seed of 0 or more")
    facts: dict[str, object]
    make: Callable[[Callable[[int], object]], Iterator[Frame]]
    if source == "generated":
        make, facts = _molecules(frames, seed, processes)
    elif source == "generated_crystals":
        from ddpkit.data.crystals import LABELS, generate_crystals

        def make(done: Callable[[int], object]) -> Iterator[Frame]:
            return generate_crystals(frames, seed, done=done)

        facts = {"labels": LABELS}
    else:
        raise InputError(f"there is no built-in set {source!r}: use one of {', '.join(RECIPES)}")
    description = {"made_by": f"ddpkit data generate {source}", "recipe": RECIPES[source], "seed": seed}
    with tqdm(total=frames, desc=f"making {source}", unit="frame", disable=not progress, mininterval=1.0) as bar:
        return write_prepared(path, make(bar.update), r_max=_R_MAX, source=description, **facts)


def _molecules(
    frames: int, seed: int, processes: int | None
) -> tuple[Callable[[Callable[[int], object]], Iterator[Frame]], dict[str, object]]:
    try:
        import rdkit  # noqa: F401
        import tblite  # noqa: F401
    except ImportError as error:
        raise InputError(f"making molecules needs {error.name}: install ddpkit[generate]") from error
    from ddpkit.data import molecules

    def make(done: Callable[[int], object]) -> Iterator[Frame]:
        return molecules.generate_molecules(frames, seed, processes=processes, done=done)

    return make, {"labels": molecules.LABELS, "atom_energies": molecules.atom_energies()}
