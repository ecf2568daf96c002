"""A system divided among ranks that are threads, which exchange rows as processes would."""

import threading
from dataclasses import dataclass

import numpy as np
import torch

from ddpkit.data.neighbours import neighbour_list
from ddpkit.inference.exchange import exchanging
from ddpkit.inference.inputs import inputs_of

PATIENCE = 120.0  # seconds for the others to come


@dataclass
class Part:
    """The atoms and edges of one rank, with where each ghost comes from."""

    owned: np.ndarray  # atoms of the system
    ghosts: np.ndarray  # atoms of the system that the ghosts are images of
    centre: torch.Tensor
    neighbour: torch.Tensor
    vectors: torch.Tensor


def divide(frame, r_max, rank_of):
    """Parts by `rank_of` `[atoms]`; a ghost for every image of an atom that a centre sees."""
    centre, neighbour, shift = neighbour_list(frame, r_max)
    vectors = frame.positions[neighbour] + shift - frame.positions[centre]
    parts = []
    for rank in range(rank_of.max() + 1):
        owned = np.flatnonzero(rank_of == rank)
        place = {(atom, (0, 0, 0)): n for n, atom in enumerate(owned)}
        mine = np.flatnonzero(np.isin(centre, owned))
        ghosts, ends = [], []
        for edge in mine:
            key = neighbour[edge], tuple(np.round(shift[edge] * 1e6).astype(int))
            if key not in place:
                place[key] = len(owned) + len(ghosts)
                ghosts.append(neighbour[edge])
            ends.append(place[key])
        parts.append(
            Part(
                owned,
                np.array(ghosts, int),
                torch.from_numpy(np.searchsorted(owned, centre[mine])),
                torch.tensor(ends, dtype=torch.int64),
                torch.from_numpy(vectors[mine]),
            )
        )
    return parts


class Threads:
    """Exchanges of ranks that are threads: `exchange(rank)` is one's own."""

    def __init__(self, parts):
        self.parts, self.board = parts, [None] * len(parts)
        self.barrier = threading.Barrier(len(parts), timeout=PATIENCE)
        self.owner = {atom: (r, n) for r, part in enumerate(parts) for n, atom in enumerate(part.owned)}
        self.calls = []

    def exchange(self, rank):
        part, together = self.parts[rank], self

        class Mine:
            def from_owners(self, rows, number):
                rows_of = together.meet(rank, rows, "from_owners")
                ghosts = [rows_of[r][n] for r, n in (together.owner[atom] for atom in part.ghosts)]
                assert number == rows.shape[0] + len(ghosts)
                return torch.cat((rows, torch.stack(ghosts))) if ghosts else rows.clone()

            def to_owners(self, rows, number):
                total = rows[:number].clone()
                for other, theirs in zip(together.parts, together.meet(rank, rows, "to_owners"), strict=True):
                    first = theirs.shape[0] - len(other.ghosts)  # what pads stands between
                    for n, atom in enumerate(other.ghosts):
                        if together.owner[atom][0] == rank:
                            total[together.owner[atom][1]] += theirs[first + n]
                return total

        return Mine()

    def meet(self, rank, rows, what):
        """Everybody's rows."""
        self.board[rank] = rows.clone()  # compiled code overwrites its own once it has them back
        self.barrier.wait()
        everybody = list(self.board)
        self.calls += [what] if rank == 0 else []
        self.barrier.wait()
        return everybody


def compute(module, frame, species, r_max, rank_of):
    """Energies `[atoms]` and forces `[atoms, 3]` of a system divided among threads, and what was exchanged."""
    parts = divide(frame, r_max, rank_of)
    together = Threads(parts)
    results, failures = [None] * len(parts), []

    def work(rank):
        part = parts[rank]
        inputs = inputs_of(
            part.vectors, species[np.concatenate((part.owned, part.ghosts))], part.centre, part.neighbour,
            len(part.owned), message_passing=module.message_passing, beyond=2 * r_max,
        )  # fmt: skip
        try:
            with exchanging(together.exchange(rank)):
                results[rank] = module(*inputs.arguments())
        except BaseException as error:  # noqa: BLE001  (raised again by the thread that asked)
            failures.append(error)
            together.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    energies, forces = torch.zeros(len(frame), dtype=torch.float64), torch.zeros(len(frame), 3, dtype=torch.float64)
    for part, (atomic, slopes) in zip(parts, results, strict=True):
        atoms = torch.from_numpy(np.concatenate((part.owned, part.ghosts)))
        energies[atoms[: len(part.owned)]] = atomic[: len(part.owned)]
        real = slopes[: len(part.centre)]
        forces.index_add_(0, atoms[part.centre], real).index_add_(0, atoms[part.neighbour], real, alpha=-1)
    return energies, forces, together.calls
