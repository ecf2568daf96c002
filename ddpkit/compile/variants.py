"""Compiled code for batches of several forms: when to make it, when to use it, when not to."""

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ddpkit.batch import Batch
from ddpkit.compile import parity
from ddpkit.compile.conditions import Conditions
from ddpkit.compile.garbage import garbage_collection_paused
from ddpkit.compile.layout import Flat, Layout, describe, sizes_of
from ddpkit.compile.stored import Entry, Stored
from ddpkit.errors import InputError, ParityError
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

    def sizes(self, batch: Flat) -> dict[str, int] | None:
        """The sizes of a batch that the code holds for; None if it does not."""
        sizes = self.layout.sizes(batch.leaves, batch.structure)
        return sizes if sizes is not None and self.conditions.hold(sizes) else None


@dataclass(frozen=True)
class Verdict:
    """The result of comparing code with eager code.

    Attributes:
        differences: of all tensors on all batches, within the tolerance or not.
        ones: names of the sizes for which the code was found right at 1.
        is_checked: whether at least one batch could be compared.
        fixed_at: the line of the model that fixed or compared a size, if the code does not hold for some batch.
    """

    differences: list[parity.Difference]
    ones: set[str]
    is_checked: bool
    fixed_at: str | None


C = TypeVar("C", bound=Code)
T = TypeVar("T")


class Variants(Generic[C]):
    """All code that was compiled of one function, for batches of different forms and sizes.

    A batch is flattened (`Flat.of`), its code is looked up and run. Compiling and checking are separate from that.

    Args:
        trace: example batches and sizes to tune for -> a graph.
        lower: the graph -> code.
        compare: code, batch, its sizes -> differences from eager code.
        tally: shared with the code for other states of the model.
        stored: the first code on disk.
        stand_in: if comparing communicates: runs the same collectives on a rank that has no batch to compare. All ranks then
            compile and check all code together. None if comparing does not communicate.

    Attributes:
        codes: the code so far, the latest first.
    """

    def __init__(
        self,
        trace: Callable[[Sequence[Any], dict[str, int]], T],
        lower: Callable[[T], C],
        compare: Callable[[C, Flat, dict[str, int]], Sequence[parity.Difference]],
        tally: parity.Tally,
        stored: Stored[C],
        stand_in: Callable[[], None] | None = None,
    ) -> None:
        self._trace, self._lower, self._compare, self._tally, self._stand_in = trace, lower, compare, tally, stand_in
        self._stored = stored
        self.codes: list[C] = []

    # --- choosing -------------------------------------------------------------------------------------------------

    def look_up(self, batch: Flat) -> tuple[C, dict[str, int]] | None:
        """The checked code that serves a batch, and the batch's sizes; None if there is none."""
        for code in self.codes:
            if code.is_checked and (sizes := code.sizes(batch)) is not None:
                return code, sizes
        return None

    def find(self, batch: Flat) -> tuple[C, dict[str, int]] | None:
        """The same; first compiles and checks code if none serves the batch. None if the batch must be run eagerly."""
        return self.look_up(batch) or self._get_ready(batch)

    def cause(self, batch: Flat) -> str:
        """Why no code serves a batch, as the end of a sentence; empty if no line of the model is the reason."""
        for code in self.codes:
            sizes = code.layout.sizes(batch.leaves, batch.structure)
            line = None if sizes is None else code.conditions.broken_at(sizes)
            if line is not None:
                return f", because {sizes_fixed(line)}"
        return ""

    # --- making ---------------------------------------------------------------------------------------------------

    def prepare(self, batch: Any, *, together: bool = True, before_check: Callable[[C], None] | None = None) -> None:
        """Traces and compiles the first code, or takes it from the disk, and checks it.

        Args:
            batch: an example.
            together: whether all ranks call this, so that one on each host compiles.
            before_check: called with the code before it is compared.

        Raises:
            InputError: the model fixes sizes, so that the code would hold for no other batch; or, with `together`, its loss is
                not finite.
            ParityError: it computes something else than eager code.
        """
        began = time.perf_counter()
        examples = [batch, *self._tally.examples] if together else [batch, *self._kin(Layout.of([batch]))]
        layout = Layout.of(examples)
        entry = self._stored.find(layout, [sizes_of(layout, example) for example in examples])
        sizes, is_stored = (_tuned_for(examples), False) if entry is None else (entry.sizes, True)
        if together:
            sizes, is_stored = _as_on_first_rank(layout, sizes, is_stored=is_stored)
        if not is_stored or (entry is not None and entry.sizes != sizes):
            entry = None
        checked = len(self._tally.differences)
        try:
            self._prepare(examples, layout, sizes, entry, together=together, before_check=before_check)
        except Exception as error:
            is_told_to_all = isinstance(error, ParityError) or getattr(error, "everywhere", False)
            if not is_stored or isinstance(error, InputError) or not is_told_to_all:
                raise
            self._stored.forget(layout)
            del self._tally.differences[checked:]
            self._prepare(examples, layout, sizes, None, together=together, before_check=before_check)
        self._tally.seconds += time.perf_counter() - began

    def _prepare(
        self,
        examples: Sequence[Any],
        layout: Layout,
        sizes: dict[str, int],
        entry: Entry | None,
        *,
        together: bool,
        before_check: Callable[[C], None] | None,
    ) -> None:
        """Does so, with code from the disk where there is an entry; an error there is one on all ranks, if all do it together."""

        def trace() -> Any:
            return self._trace(examples, sizes) if entry is None else entry

        def lower(traced: Any) -> C:
            nonlocal entry
            if not isinstance(traced, Entry):
                return self._lower(traced)
            code = self._stored.load(traced)
            if code is not None:
                code.is_checked, code.fixed_at, code.conditions.ones = False, None, set()
                return code
            entry = None
            return self._lower(self._trace(examples, sizes))

        with garbage_collection_paused():
            code = in_turn(trace, lower) if together else lower(trace())
        if before_check is not None:
            before_check(code)
        with agree("comparing compiled with eager code") if together else nullcontext():
            verdict = self._check(code, examples)
            self._settle(code, verdict)
            if together:
                parity.require_finite(verdict.differences)
            if not code.is_checked and code.fixed_at is not None:
                raise InputError(
                    f"The model cannot be compiled for batches of other sizes than the first, because "
                    f"{sizes_fixed(code.fixed_at)}, or train with compile=False."
                )
        self.codes = [code]
        if code.is_checked and entry is None:
            self._stored.keep(layout, sizes, code, code.conditions)

    def _kin(self, layout: Layout) -> list[Any]:
        """The examples that a batch of this form may share code with."""
        return [example for example in self._tally.examples if Layout.of([example]).same_form(layout)]

    def _get_ready(self, batch: Flat) -> tuple[C, dict[str, int]] | None:
        """Checks code that no batch was fit for before, or makes code where there is none yet; None where eager code has to do.

        A `Batch` has a known form, so that new code for one with sizes of 0 or 1 would be no better.
        """
        for code in self.codes:
            sizes = None if code.is_checked or self._stand_in is not None else code.sizes(batch)
            if sizes is not None:
                self._settle(code, self._check(code, [batch.batch]))
                if code.is_checked:
                    return code, sizes
        layout = Layout.of([batch.batch])
        has_kin = any(code.layout.same_form(layout) for code in self.codes)
        shape, cause = describe(sizes_of(layout, batch.batch)), self.cause(batch)
        if self._stand_in is not None or len(self.codes) >= _MOST or (has_kin and isinstance(batch.batch, Batch)):
            self._tally.eager += 1
            warnings.warn(
                f"A batch of {shape} runs eagerly: the compiled code does not hold for it{cause}.", stacklevel=5
            )
            return None
        if cause:
            warnings.warn(
                f"The step is compiled anew for a batch of {shape}: the code so far does not hold for it{cause}. After {_MOST} "
                "forms of batches others run eagerly.",
                stacklevel=5,
            )
        began = time.perf_counter()
        examples = [*self._kin(layout)[-3:], batch.batch]
        self._tally.examples[:] = examples
        with garbage_collection_paused():
            code = self._lower(self._trace(examples, _tuned_for(examples)))
        self._settle(code, self._check(code, examples))
        self.codes.insert(0, code)
        self._tally.seconds += time.perf_counter() - began
        if code.is_checked and (sizes := code.sizes(batch)) is not None:
            return code, sizes
        self._tally.eager += 1
        return None

    # --- checking -------------------------------------------------------------------------------------------------

    def _check(self, code: C, examples: Sequence[Any]) -> Verdict:
        """Compares code with eager code; a size of 1 for which they differ is left to eager code.

        Batches on which neither has a finite loss or gradient tell nothing.
        """
        fixed_at = code.fixed_at
        ready = []
        for batch in [Flat.of(sample) for example in examples for sample in parity.samples(example)]:
            sizes = code.layout.sizes(batch.leaves, batch.structure)
            ones = {name for name, size in (sizes or {}).items() if size == 1}
            if sizes is not None and code.conditions.hold(sizes, ones):
                ready.append((batch, sizes, ones))
            elif sizes is not None:
                fixed_at = fixed_at or code.conditions.broken_at(sizes)
        # What averages over ranks is run equally often by all.
        missing = 0 if self._stand_in is None else most_on_ranks(len(ready)) - len(ready)
        right = set(code.conditions.ones)
        measured: list[parity.Difference] = []
        for batch, sizes, ones in ready:
            differences = self._compare(code, batch, sizes)
            if ones & code.conditions.not_one - right and not all(d.is_fine for d in differences):
                continue
            right |= ones
            measured += differences
        for _ in range(missing):
            assert self._stand_in is not None
            self._stand_in()
        told = {d.shape for d in measured} - {d.shape for d in measured if not d.is_finite}
        return Verdict(measured, right, bool(told or missing), fixed_at)

    def _settle(self, code: C, verdict: Verdict) -> None:
        """Lets code be used, as far as it was right.

        Raises:
            ParityError: it computes something else than eager code.
        """
        code.fixed_at = verdict.fixed_at
        self._tally.differences += verdict.differences
        parity.require(verdict.differences)
        code.conditions.ones = verdict.ones
        code.is_checked = verdict.is_checked


def sizes_fixed(line: str) -> str:
    """What a line of the model does to sizes, and what helps.

    Args:
        line: as `Conditions.broken_at` gives it.
    """
    return (
        f"the model fixes or compares a size ({line}): use sizes as x.shape and x.numel() give them, without len(), int(), "
        "float(), range(), lists of that length or comparisons"
    )


def _as_on_first_rank(layout: Layout, sizes: dict[str, int], *, is_stored: bool) -> tuple[dict[str, int], bool]:
    """Rank 0's sizes by this rank's names, or `sizes` where its batches have another form; and whether rank 0 has code on disk.

    Ranks that tune code for the same sizes generate the same code.
    """
    own = [layout.form(), [sizes[name] for name in layout.names], is_stored]
    form, values, is_stored = share(lambda: own, "choosing the sizes to compile for")
    return dict(zip(layout.names, values, strict=True)) if form == own[0] else sizes, is_stored


def _tuned_for(examples: Sequence[Any]) -> dict[str, int]:
    """The sizes of the example in which the fewest are 1, or the same as another."""
    layout = Layout.of(examples)
    sizes = [sizes_of(layout, example) for example in examples]
    return max(sizes, key=lambda s: (min(s.values(), default=2) > 1, len(set(s.values()))))
