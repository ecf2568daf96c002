"""What launchers tell a process through its environment variables: its rank, and how many ranks there are.

Several may speak at once: Open MPI's `mpirun` starts its daemons as a SLURM step, whose variables the ranks inherit; a shell
keeps the variables of the step it was started in. What says more than one rank is believed over what says one, and SLURM's own
variables are believed last. What cannot be read, or contradicts itself, is refused: ranks that do not know of one another would
each train alone.
"""

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ddpkit.errors import InputError

BY_HAND = (
    "set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each rank, or start with mpirun or torchrun"
)


@dataclass(frozen=True)
class Place:
    """Where a launcher puts a process.

    Attributes:
        launcher: its name.
        rank: of this process.
        world_size: number of ranks.
        local_rank: number of this process among those of its host.
        local_size: number of ranks on its host.
        counted: whether the launcher told the local numbers; where it did not, ranks of one host count themselves when they meet.
        said: the variables that were read, for messages.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int
    counted: bool = field(default=True, compare=False)
    said: str = field(default="", compare=False)


@dataclass(frozen=True)
class Launcher:
    """The variables of a launcher; of several names, the first that is set counts.

    Attributes:
        sure: whether its rank alone shows that it started this process (others' may be left over from elsewhere).
    """

    name: str
    rank: tuple[str, ...]
    size: tuple[str, ...]
    local_rank: tuple[str, ...] = ()
    local_size: tuple[str, ...] = ()
    sure: bool = True


def _regular(name: str, prefix: str) -> Launcher:
    return Launcher(
        name, (f"{prefix}RANK",), (f"{prefix}SIZE",), (f"{prefix}LOCAL_RANK",), (f"{prefix}LOCAL_SIZE",)
    )  # fmt: skip


TORCHRUN = Launcher("torchrun", ("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",), sure=False)
SRUN = Launcher("srun", ("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS",), ("SLURM_LOCALID",))
LAUNCHERS = (
    TORCHRUN,
    _regular("mpirun", "OMPI_COMM_WORLD_"),
    _regular("mvapich", "MV2_COMM_WORLD_"),
    _regular("mvapich", "MVP_COMM_WORLD_"),
    _regular("jsrun", "JSM_NAMESPACE_"),
    Launcher("flux", ("FLUX_TASK_RANK",), ("FLUX_JOB_SIZE",), ("FLUX_TASK_LOCAL_ID",)),
    Launcher(
        "pals", ("PALS_RANKID",), ("PALS_SIZE", "PMI_SIZE"),
        ("PALS_LOCAL_RANKID", "PMI_LOCAL_RANK"), ("PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"),
    ),
    Launcher(
        "mpiexec", ("PMI_RANK", "PMI_ID"), ("PMI_SIZE",),
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"), ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ),
    _regular("horovod", "HOROVOD_"),
    Launcher("mvapich", ("MPIRUN_RANK",), ("MPIRUN_NPROCS",)),
    Launcher("poe", ("MP_CHILD",), ("MP_PROCS",)),
    Launcher("aprun", ("ALPS_APP_PE",), ()),
    Launcher("pmix", ("PMIX_RANK",), ()),
)  # fmt: skip
# Steps that SLURM makes by itself: the batch script, the shell of salloc, what belongs to none.
_FIRST_OWN_STEP = 4294967290


def place(variables: Mapping[str, str] = os.environ) -> Place:
    """Reads rank and sizes from the variables that launchers set.

    Raises:
        InputError: they speak of several ranks but cannot be read, or contradict each other.
    """
    step = _srun(variables)
    spoken = [told for launcher in LAUNCHERS if (told := _read(launcher, variables)) is not None]
    if "TORCHELASTIC_RUN_ID" in variables and spoken and spoken[0].launcher == "torchrun":
        return spoken[0]
    several = [told for told in spoken if told.world_size > 1 and not _same(told, step)]
    if any(not _same(told, several[0]) for told in several):
        one, other = several[0], next(told for told in several if not _same(told, several[0]))
        raise InputError(
            f"Two launchers contradict each other ({one.said}; {other.said}): unset the variables of the one that did not start "
            "these ranks."
        )
    for told in (*several, *spoken):
        if told.world_size > 1:
            return told
    if step is not None and step.world_size > 1:
        return step
    _refuse_unread(variables, spoken if step is None else [*spoken, step])
    return spoken[0] if spoken and spoken[0].launcher == "torchrun" else Place("alone", 0, 1, 0, 1)


def any_rank(variables: Mapping[str, str] = os.environ) -> int:
    """A rank that some launcher tells, for deciding who prints a refusal; 0 where none does."""
    for launcher in (*LAUNCHERS, SRUN):
        for name in launcher.rank:
            if variables.get(name, "").isdigit():
                return int(variables[name])
    return 0


def _same(one: Place, other: Place | None) -> bool:
    return other is not None and (one.rank, one.world_size) == (other.rank, other.world_size)


def _read(launcher: Launcher, variables: Mapping[str, str]) -> Place | None:
    """What a launcher says; None unless it tells both rank and size."""
    rank_name, size_name = _first(launcher.rank, variables), _first(launcher.size, variables)
    if rank_name is None or size_name is None:
        return None
    local_names = _first(launcher.local_rank, variables), _first(launcher.local_size, variables)
    numbers = [_integer(name, variables) for name in (rank_name, size_name, *filter(None, local_names))]
    rank, size, *local = numbers
    said = f"{rank_name}={rank}, {size_name}={size}"
    if not 0 <= rank < size:
        raise InputError(f"The launcher's variables are no rank of a job ({said}): unset them, or {BY_HAND}.")
    local_rank = local.pop(0) if local_names[0] else 0
    known_size = local.pop(0) if local_names[1] else None
    # torchrun always tells both; who sets LOCAL_RANK by hand means one host.
    if known_size is None and launcher is TORCHRUN and local_names[0]:
        known_size = size
    name = "by hand" if launcher is TORCHRUN and local_names[0] is None else launcher.name
    counted = local_names[0] is not None and known_size is not None
    return Place(name, rank, size, local_rank, known_size or local_rank + 1, counted, said)


def _srun(variables: Mapping[str, str]) -> Place | None:
    """The step that `srun` started this process in. A batch script and the shell of `salloc` have SLURM_PROCID too."""
    step = variables.get("SLURM_STEP_ID", variables.get("SLURM_STEPID", ""))
    if step.isdigit() and int(step) >= _FIRST_OWN_STEP:
        return None
    told = _read(SRUN, variables)
    if told is None:
        return None
    tasks = re.match(r"\d+", variables.get("SLURM_STEP_TASKS_PER_NODE", ""))
    # "8(x2),4" tells nothing of this host: the first number is right where all are alike
    alike = "," not in variables.get("SLURM_STEP_TASKS_PER_NODE", ",")
    size = int(tasks[0]) if tasks else told.local_rank + 1
    counted = "SLURM_LOCALID" in variables and tasks is not None and alike
    return Place("srun", told.rank, told.world_size, told.local_rank, size, counted, told.said)


def _refuse_unread(variables: Mapping[str, str], spoken: list[Place]) -> None:
    """Raises where variables speak of several ranks that no launcher above explains."""
    known = {told.rank for told in spoken}
    for launcher in (*LAUNCHERS, SRUN):
        rank_name, size_name = _first(launcher.rank, variables), _first(launcher.size, variables)
        if rank_name and size_name is None:
            rank = _integer(rank_name, variables)
            harmless = rank in known if known else rank == 0 and (not launcher.sure or launcher is SRUN)
            if not harmless:
                wanted = f" and not {launcher.size[0]}" if launcher.size else ", but nothing tells how many there are"
                raise InputError(f"{rank_name}={rank} is set{wanted}, so this is one of several ranks: {BY_HAND}.")
        # srun sets SLURM_STEP_NUM_TASKS with SLURM_PROCID; a job's size alone is told to its shells as well
        if size_name and rank_name is None and launcher != SRUN and size_name != "FLUX_JOB_SIZE":
            size = _integer(size_name, variables)
            if size > 1:
                raise InputError(
                    f"{size_name}={size} is set but {launcher.rank[0]} is not, so this rank does not know which it is: "
                    f"{BY_HAND}; or unset {size_name} to run alone."
                )
    for rank_name, size_name in _pairs(variables):
        raise InputError(
            f"{rank_name}={variables[rank_name]} and {size_name}={variables[size_name]} look like a launcher that ddpkit does "
            f"not know, and the ranks would train apart: {BY_HAND}; or unset them to run alone."
        )


def _pairs(variables: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Variables of one prefix that look like a rank and a number of ranks above one."""
    read = {name for launcher in (*LAUNCHERS, SRUN) for name in (*launcher.rank, *launcher.size)}
    partial = re.compile(r"(LOCAL|NODE|GROUP|ROLE|HOST|CROSS)")  # of a host, or of hosts
    whole = [
        name for name, value in variables.items() if value.isdigit() and name not in read and not partial.search(name)
    ]
    prefix = {name: name.split("_")[0] for name in whole if "_" in name and not name.startswith("SLURM_")}
    ranks = [name for name in prefix if re.search(r"(RANK|RANK_?ID|PROC_?ID|TASK_?ID)$", name)]
    sizes = [name for name in prefix if re.search(r"(SIZE|RANKS|PROCS|NTASKS|NUM_TASKS|NUM_PROC)$", name)]
    for rank, size in itertools.product(ranks, sizes):
        if prefix[rank] == prefix[size] and int(variables[size]) > max(1, int(variables[rank])):
            yield rank, size


def _first(names: tuple[str, ...], variables: Mapping[str, str]) -> str | None:
    return next((name for name in names if name in variables), None)


def _integer(name: str, variables: Mapping[str, str]) -> int:
    try:
        return int(variables[name])
    except ValueError:
        raise InputError(
            f"The launcher's variables are not numbers ({name}={variables[name]}): unset them or start with mpirun."
        ) from None
