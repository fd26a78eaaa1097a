"""Profiles a run's windows: each holds exactly its steps, and costs nothing outside."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import jax

from learnax.profiling import cudart
from learnax.profiling.phases import Mark, Phases
from learnax.profiling.windows import Window, covered

_logger = logging.getLogger("learnax")
_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


class Profiler(Protocol):
    """What a training loop tells of its steps."""

    def next_due(self, step: int) -> float:
        """The first number of steps, after this one, at which a window begins or ends."""

    def room(self, step: int, epoch: int) -> float:
        """Opens what begins with the next step; steps that its dispatch may make at most."""

    def steps(self, step: int, count: int) -> contextlib.AbstractContextManager[None]:
        """Is entered for the dispatch of `count` steps after `step`."""

    def leave(self, step: int, epoch: int) -> None:
        """Closes what the next step, which is in this epoch, does not lie in."""

    def close(self) -> None:
        """Closes what is open: the run ends."""


class NoProfiler:
    """A run that is not profiled."""

    def next_due(self, step: int) -> float:
        """Never."""
        return math.inf

    def room(self, step: int, epoch: int) -> float:
        """As many as there are."""
        return math.inf

    def steps(self, step: int, count: int) -> contextlib.AbstractContextManager[None]:
        """Nothing to enter."""
        return _NOTHING

    def leave(self, step: int, epoch: int) -> None:
        """Nothing to close."""

    def close(self) -> None:
        """Nothing to close."""


class WindowProfiler:
    """Opens and closes windows between steps, with no work in flight.

    A window that touches or overlaps another of the same tool is one with it. A step of a trace is a dispatch of its
    own, so that it has an annotation of its own.

    Args:
        windows: which.
        folder: where traces go.
        settle: waits for all steps that were dispatched.
        phases: the run's clock.
        marks: what shows steps in profilers.
    """

    def __init__(
        self,
        windows: Sequence[Window],
        folder: Path,
        settle: Callable[[], object],
        phases: Phases,
        marks: Sequence[Mark],
    ):
        self._windows = windows
        self._folder = folder
        self._settle = settle
        self._phases = phases
        self._marks = marks
        self._open: dict[str, contextlib.ExitStack] = {}
        self._waiting = list(windows)

    def next_due(self, step: int) -> float:
        """The first number of steps, after this one, at which a window begins or ends."""
        return min(window.next_edge(step) for window in self._windows)

    def room(self, step: int, epoch: int) -> float:
        """Opens what begins with the next step; steps that its dispatch may make at most."""
        for tool in ("cuda", "trace"):
            window = covered(self._windows, tool, step, epoch)
            if window is not None and tool not in self._open:
                self._begin(window, step)
        self._waiting = [window for window in self._waiting if not window.covers(step, epoch)]
        return 1 if "trace" in self._open else math.inf

    @contextlib.contextmanager
    def steps(self, step: int, count: int) -> Iterator[None]:
        """Shows `count` steps after `step` in profilers."""
        name = f"step {step + 1}" if count == 1 else f"steps {step + 1}-{step + count}"
        with contextlib.ExitStack() as stack:
            for mark in self._marks:
                mark.push(name)
                stack.callback(mark.pop)
            if "trace" in self._open:
                stack.enter_context(jax.profiler.StepTraceAnnotation("train", step_num=step + 1))
            yield

    def leave(self, step: int, epoch: int) -> None:
        """Closes what the next step, which is in this epoch, does not lie in."""
        for tool in [tool for tool in self._open if covered(self._windows, tool, step, epoch) is None]:
            self._end(tool)

    def close(self) -> None:
        """Closes what is open, and names the windows that the run did not come to."""
        for tool in list(self._open):
            self._end(tool)
        for window in self._waiting:
            _logger.warning("profile: the run ended before %s began", window)
        self._waiting = []

    def _begin(self, window: Window, step: int) -> None:
        with self._phases.profile:
            self._settle()
            stack = contextlib.ExitStack()
            stack.enter_context(cudart.profiled() if window.tool == "cuda" else _traced(self._folder / f"step-{step}"))
            self._open[window.tool] = stack

    def _end(self, tool: str) -> None:
        stack = self._open.pop(tool)
        with self._phases.profile, stack:
            self._settle()


@contextlib.contextmanager
def _traced(folder: Path) -> Iterator[None]:
    """Takes a JAX trace of the block, for XProf or Perfetto. Where that fails it says so, and the block runs."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow down what is measured; the phases are annotated
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(folder, profiler_options=options)
            stack.callback(_stop_trace, folder)
        except Exception as error:
            _logger.warning("profile: no trace is taken in %s: %s", folder, error)
        yield


def _stop_trace(folder: Path) -> None:
    try:
        jax.profiler.stop_trace()
    except Exception as error:
        _logger.warning("profile: the trace could not be written to %s: %s", folder, error)
    else:
        _logger.warning("profile: a trace is in %s", folder)
