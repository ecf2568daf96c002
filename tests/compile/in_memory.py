"""Code of interpreted steps that is kept in memory, as compiled code is on disk: what the same objects trace is traced once."""

import contextlib
import copy
from dataclasses import replace
from unittest.mock import patch

from ddpkit.compile import forces, gradients
from ddpkit.compile.backend import using
from ddpkit.compile.stored import Entry, Stored

CODES = {}


class InMemory(Stored):
    """Knows code by what the files on disk are known by."""

    def find(self, layout, every):
        entry = CODES.get(self._path(layout))
        return entry if entry is not None and entry.serves(every) else None

    def load(self, entry):
        self._state.rewritten |= entry.rewritten
        return replace(entry.code, conditions=copy.copy(entry.code.conditions))

    def keep(self, layout, sizes, code, conditions):
        if (path := self._path(layout)) is not None:
            CODES[path] = Entry(sizes, conditions, set(self._state.rewritten), "", [], code)

    def forget(self, layout):
        CODES.pop(self._path(layout), None)

    def _made_path(self, layout):
        with using("inductor"):
            return super()._made_path(layout)


@contextlib.contextmanager
def interpreted_once():
    """For tests of what is done with the code of steps: graphs are interpreted, and traced once, which takes a second."""
    with using("interpreted"), patch.object(gradients, "Stored", InMemory), patch.object(forces, "Stored", InMemory):
        yield


def keep_in_memory():
    """The same for as long as the process lives."""
    gradients.Stored = forces.Stored = InMemory
