"""The clock of a run: phases that are entered and left, and the seconds that each took of its own."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Mark(Protocol):
    """What shows a phase in a profiler."""

    def push(self, name: str) -> None:
        """A range of this name begins."""

    def pop(self) -> None:
        """The range that began last ends."""


class Phase:
    """A part of a run. Time inside `with phase:` is its own, but for the phases that are entered inside.

    Attributes:
        name: what it is called in ledgers and profilers.
        seconds: its own time so far.
    """

    __slots__ = ("_phases", "name", "seconds")

    def __init__(self, name: str, phases: Phases):
        self.name = name
        self.seconds = 0.0
        self._phases = phases

    def __enter__(self) -> None:
        phases = self._phases
        now = time.perf_counter()
        phases.current.seconds += now - phases.since
        phases.outer.append(phases.current)
        phases.current, phases.since = self, now

    def __exit__(self, *error: object) -> None:
        phases = self._phases
        now = time.perf_counter()
        phases.current.seconds += now - phases.since
        phases.current, phases.since = phases.outer.pop(), now


class MarkedPhase(Phase):
    """A phase that profilers see, too."""

    __slots__ = ("_marks",)

    def __init__(self, name: str, phases: Phases, marks: Sequence[Mark]):
        super().__init__(name, phases)
        self._marks = marks

    def __enter__(self) -> None:
        for mark in self._marks:
            mark.push(self.name)
        super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for mark in reversed(self._marks):
            mark.pop()


class Phases:
    """One clock for the thread that trains: at any time one phase is current, so that all of them sum to the whole.

    It starts in `init`; `ready` ends that. Outside of a run nothing is counted.

    Args:
        imported: seconds that the import took before the clock was there.
        marks: what shows phases in profilers.

    Attributes:
        current: the phase that the run is in.
    """

    def __init__(self, imported: float = 0.0, marks: Sequence[Mark] = ()):
        def phase(name: str) -> Phase:
            return MarkedPhase(name, self, marks) if marks else Phase(name, self)

        self.imported = phase("import")
        self.imported.seconds = imported
        self.init = phase("init")
        self.trace = phase("trace")
        self.lower = phase("lower")
        self.compile = phase("compile")
        self.first = phase("first step")
        self.data = phase("data")
        self.dispatch = phase("dispatch")
        self.drain = phase("drain")
        self.log = phase("log")
        self.save = phase("save")
        self.validate = phase("validate")
        self.validate_data = phase("validate, data")
        self.plot = phase("plot")
        self.profile = phase("profile")
        self.other = Phase("other", self)
        self._counted = [value for value in vars(self).values() if isinstance(value, Phase)]
        self._outside = Phase("outside", self)
        self.outer: list[Phase] = []
        self.current, self.since = self.init, time.perf_counter()

    def ready(self) -> None:
        """The start is over: from here, what is in no phase is outside of the run."""
        with self._outside:
            pass
        self.current = self._outside

    def seconds(self) -> dict[str, float]:
        """Each phase's own time so far, by name."""
        taken = {phase.name: phase.seconds for phase in self._counted}
        if self.current.name in taken:
            taken[self.current.name] += time.perf_counter() - self.since
        return taken

    def waiting(self, phase: Phase, items: Iterable[T]) -> Iterator[T]:
        """The same items; the time until each is there is the phase's."""
        iterator = iter(items)
        while True:
            with phase:
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item
