"""Compiled code for batches of several forms: when to make it, when to use it, when not to."""

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch.utils import _pytree as pytree

from ddpkit.batch import Batch
from ddpkit.compile import parity
from ddpkit.compile.graph import Conditions
from ddpkit.compile.layout import Layout, describe, sizes_of
from ddpkit.errors import InputError
from ddpkit.ranks.agree import agree, in_turn, most_on_ranks, share

_MOST = 8  # forms of batches; any further ones run eagerly


@dataclass
class Code:
    """Compiled code for batches of one form.

    Attributes:
        layout: the form.
        conditions: the sizes it holds for.
        is_checked: whether it has been compared with eager code.
        fixed_at: the line of the model that fixed or compared a size, if a batch has been met for which it does not hold.
    """

    layout: Layout
    conditions: Conditions
    is_checked: bool = field(default=False, kw_only=True)
    fixed_at: str | None = field(default=None, kw_only=True)


@dataclass
class Tally:
    """What all code of a model has cost and shown.

    Attributes:
        examples: batches of other shapes than the first, to tell what varies in them and to check with.
        differences: what the checks have found so far, good or bad.
        seconds: spent on tracing, compiling and checking.
        eager: batches so far for which eager code had to do.
    """

    examples: list[Any]
    differences: list[parity.Difference] = field(default_factory=list)
    seconds: float = 0.0
    eager: int = 0


C = TypeVar("C", bound=Code)
T = TypeVar("T")


class Variants(Generic[C]):
    """What has been compiled of a function of batches.

    Args:
        trace: example batches and sizes to tune for -> a graph.
        lower: the graph -> code.
        compare: code, batch, its leaves and sizes -> differences from eager code.
        tally: shared with what has been compiled for other states of the model.
        stand_in: where comparing communicates, does so in place of a comparison for which this rank has no batch. All code is
            then made and checked by all ranks together.

    Attributes:
        codes: what there is, the latest first.
    """

    def __init__(
        self,
        trace: Callable[[Sequence[Any], dict[str, int]], T],
        lower: Callable[[T], C],
        compare: Callable[[C, Any, Sequence[Any], dict[str, int]], Sequence[parity.Difference]],
        tally: Tally,
        stand_in: Callable[[], None] | None = None,
    ) -> None:
        self._trace, self._lower, self._compare, self._tally, self._stand_in = trace, lower, compare, tally, stand_in
        self.codes: list[C] = []

    def prepare(self, batch: Any, *, together: bool = True, before_check: Callable[[C], None] | None = None) -> None:
        """Traces, compiles and checks the first code.

        Args:
            batch: one that it is for.
            together: whether all ranks come by, so that one on each host compiles.
            before_check: is told of the code before that is compared.

        Raises:
            InputError: the model fixes sizes, so that the code would hold for no other batch; or, with `together`, its loss is
                not finite.
            ParityError: it computes something else than eager code.
        """
        began = time.perf_counter()
        examples = [batch, *self._tally.examples] if together else [batch, *self._kin(batch)]
        sizes = _tuned_for(examples)
        if together:
            sizes = _as_on_first_rank(Layout.of(examples), sizes)
            code = in_turn(lambda: self._trace(examples, sizes), self._lower)
        else:
            code = self._lower(self._trace(examples, sizes))
        if before_check is not None:
            before_check(code)
        with agree("comparing compiled with eager code") if together else nullcontext():
            found = self._check(code, examples)
            if together:
                parity.require_finite(found)
            if not code.is_checked and code.fixed_at is not None:
                raise InputError(
                    f"The model cannot be compiled for batches of other sizes than the first, because "
                    f"{sizes_fixed(code.fixed_at)}, or train with compile=False."
                )
        self.codes = [code]
        self._tally.seconds += time.perf_counter() - began

    def _kin(self, batch: Any) -> list[Any]:
        """The examples that a batch may share code with."""
        layout = Layout.of([batch])
        return [example for example in self._tally.examples if Layout.of([example]).same_form(layout)]

    def find(self, batch: Any, leaves: Sequence[Any], structure: pytree.TreeSpec) -> tuple[C, dict[str, int]] | None:
        """The code for a batch, and the batch's sizes; None where eager code has to do.

        Makes code where there is none yet. A `Batch` has a known form, so that new code for one with sizes of 0 or 1 would be no
        better.

        Args:
            batch: a batch.
            leaves: the same, flattened.
            structure: likewise.
        """
        for code in self.codes:
            sizes = code.layout.sizes(leaves, structure)
            if sizes is not None and code.conditions.hold(sizes) and self._is_good(code, batch):
                return code, sizes
        layout = Layout.of([batch])
        kin = [code for code in self.codes if code.layout.same_form(layout)]
        shape, cause = describe(sizes_of(layout, batch)), self.cause(leaves, structure)
        if self._stand_in is not None or len(self.codes) >= _MOST or (kin and isinstance(batch, Batch)):
            self._tally.eager += 1
            warnings.warn(
                f"A batch of {shape} runs eagerly: the compiled code does not hold for it{cause}.", stacklevel=4
            )
            return None
        if cause:
            warnings.warn(
                f"The step is compiled anew for a batch of {shape}: the code so far does not hold for it{cause}. After {_MOST} "
                "forms of batches others run eagerly.",
                stacklevel=4,
            )
        began = time.perf_counter()
        examples = [*self._kin(batch)[-3:], batch]
        self._tally.examples[:] = examples
        code = self._lower(self._trace(examples, _tuned_for(examples)))
        self._check(code, examples)
        self.codes.insert(0, code)
        self._tally.seconds += time.perf_counter() - began
        sizes = sizes_of(code.layout, batch)
        if code.conditions.hold(sizes) and code.is_checked:
            return code, sizes
        self._tally.eager += 1
        return None

    def cause(self, leaves: Sequence[Any], structure: pytree.TreeSpec) -> str:
        """Why no code holds for a batch, as the end of a sentence; empty where no line of the model is why.

        Args:
            leaves: the batch, flattened.
            structure: likewise.
        """
        for code in self.codes:
            sizes = code.layout.sizes(leaves, structure)
            line = None if sizes is None else code.conditions.broken_at(sizes)
            if line is not None:
                return f", because {sizes_fixed(line)}"
        return ""

    def _is_good(self, code: C, batch: Any) -> bool:
        """Whether code has been checked; does so now if no batch was fit for that before."""
        if not code.is_checked and self._stand_in is None:
            self._check(code, [batch])
        return code.is_checked

    def _check(self, code: C, examples: Sequence[Any]) -> list[parity.Difference]:
        """Compares code with eager code; a size of 1 for which they differ is left to eager code.

        Batches on which neither has a finite loss or gradient tell nothing.
        """
        ready = []
        for batch in [sample for example in examples for sample in parity.samples(example)]:
            leaves, structure = pytree.tree_flatten(batch)
            sizes = code.layout.sizes(leaves, structure)
            ones = {name for name, size in (sizes or {}).items() if size == 1}
            if sizes is not None and code.conditions.hold(sizes, ones):
                ready.append((batch, leaves, sizes, ones))
            elif sizes is not None:
                code.fixed_at = code.fixed_at or code.conditions.broken_at(sizes)
        # What averages over ranks is run equally often by all.
        missing = 0 if self._stand_in is None else most_on_ranks(len(ready)) - len(ready)
        found: list[parity.Difference] = []
        for batch, leaves, sizes, ones in ready:
            before = code.conditions.ones
            code.conditions.ones = before | ones
            differences = self._compare(code, batch, leaves, sizes)
            if code.conditions.ones & code.conditions.not_one - before and not all(d.is_fine for d in differences):
                code.conditions.ones = before
                continue
            found += differences
        for _ in range(missing):
            assert self._stand_in is not None
            self._stand_in()
        self._tally.differences += found
        parity.require(found)
        told = {d.shape for d in found} - {d.shape for d in found if not d.is_finite}
        code.is_checked = bool(told or missing)
        return found


def sizes_fixed(line: str) -> str:
    """What a line of the model does to sizes, and what helps.

    Args:
        line: as `Conditions.broken_at` gives it.
    """
    return (
        f"the model fixes or compares a size ({line}): use sizes as x.shape gives them, without len(), int(), range(), lists of "
        "that length or comparisons"
    )


def _as_on_first_rank(layout: Layout, sizes: dict[str, int]) -> dict[str, int]:
    """Rank 0's sizes by this rank's names, or `sizes` where its batches have another form.

    Ranks that tune code for the same sizes generate the same code.
    """
    own = [layout.form(), [sizes[name] for name in layout.names]]
    form, values = share(lambda: own, "choosing the sizes to compile for")
    return dict(zip(layout.names, values, strict=True)) if form == own[0] else sizes


def _tuned_for(examples: Sequence[Any]) -> dict[str, int]:
    """The sizes of the example in which the fewest are 1, or the same as another."""
    layout = Layout.of(examples)
    sizes = [sizes_of(layout, example) for example in examples]
    return max(sizes, key=lambda s: (min(s.values(), default=2) > 1, len(set(s.values()))))
