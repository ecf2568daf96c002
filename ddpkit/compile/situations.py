"""What has been compiled for each state of the Python objects that code depends on."""

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ddpkit.compile.snapshot import Snapshot
from ddpkit.compile.state import State

_KEPT = 8  # states, so that what comes and goes is not compiled anew
_AT_ONCE = 3  # times that another value of an attribute is compiled for at once
_STEADY = 50  # steps that a further one must have stood for


@dataclass
class Situation:
    """What was made for one state of some objects.

    Attributes:
        state: the tensors of the objects.
        steps_to_wait: number of steps before code is compiled for it.
    """

    state: State
    steps_to_wait: int = field(default=0, kw_only=True)


S = TypeVar("S", bound=Situation)


class Situations(Generic[S]):
    """Looks up, or makes, the situation for the present state of some objects.

    Args:
        roots: the objects by name.
        make: a snapshot of them -> the situation.
        beside: returns what else the situation depends on, hashable.
        cost: what a further value of an attribute costs and what is done about it, in words.

    Attributes:
        unsteady: path of the last attribute that changed too often for code to be compiled at once.
    """

    def __init__(
        self,
        roots: Mapping[str, Any],
        make: Callable[[Snapshot], S],
        beside: Callable[[], Hashable] = tuple,
        cost: str = "code had to be compiled for each: from now on steps run eagerly",
    ) -> None:
        self._roots, self._make, self._beside, self._cost = roots, make, beside, cost
        self._ignored: frozenset[str] = frozenset()
        self._changed: Counter[str] = Counter()
        self._made: OrderedDict[Hashable, S] = OrderedDict()
        self._snapshot: Snapshot | None = None
        self._other: Hashable = None
        self._current: S
        self.unsteady = ""

    def now(self) -> S:
        """The situation for the present state."""
        other = self._beside()
        if self._snapshot is not None and other == self._other and self._snapshot.stands():
            return self._current
        snapshot = Snapshot(self._roots, self._ignored)
        key = (snapshot.key, other)
        if key not in self._made:
            made = self._make(snapshot)
            if self._snapshot is not None:
                made.steps_to_wait = self._note_changes(self._snapshot, snapshot)
            self._made[key] = made
        self._made.move_to_end(key)
        self._snapshot, self._other, self._current = snapshot, other, self._made[key]
        self._forget()
        return self._current

    def ignore(self, paths: set[str]) -> None:
        """Ignores attributes from now on that the objects change themselves when they are called."""
        if paths <= self._ignored:
            return
        self._ignored |= paths
        self._snapshot = Snapshot(self._roots, self._ignored)
        self._made = OrderedDict({(self._snapshot.key, self._other): self._current})

    def _note_changes(self, before: Snapshot, now: Snapshot) -> int:
        """How many steps to wait before code is made for a state that differs from the last one."""
        changes = before.changes(now)
        if not changes or not all(path in now.values and not path.endswith(".training") for path in changes):
            return 0
        self._changed.update(changes)
        path, times = max(((path, self._changed[path]) for path in changes), key=lambda pair: pair[1])
        if times <= _AT_ONCE:
            return 0
        self.unsteady = path
        if times == _AT_ONCE + 1:
            warnings.warn(
                f"{path} has had {times + 1} values, and {self._cost} until a value has stood for {_STEADY} steps. Make it a "
                "tensor (register_buffer) and change that in place (fill_): such a change needs no other code.",
                stacklevel=5,
            )
        return _STEADY

    def _forget(self) -> None:
        """Drops the situations that were used least recently, and those for which nothing was compiled."""
        for key in [k for k, made in self._made.items() if made.steps_to_wait and made is not self._current]:
            del self._made[key]
        while len(self._made) > _KEPT:
            self._made.popitem(last=False)
