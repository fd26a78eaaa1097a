"""What shows a run's phases in profilers: NVTX ranges for Nsight, annotations for a JAX trace."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import jax

from learnax.profiling.phases import Mark
from learnax.profiling.windows import Window


class Nvtx:
    """Ranges by the `nvtx` package, in a domain of their own, on the thread that trains."""

    def __init__(self) -> None:
        import nvtx

        self._domain = nvtx.get_domain("learnax")
        self._attributes = functools.lru_cache(64)(lambda name: self._domain.get_event_attributes(message=name))

    def push(self, name: str) -> None:
        """A range of this name begins."""
        self._domain.push_range(self._attributes(name))

    def pop(self) -> None:
        """The range that began last ends."""
        self._domain.pop_range()


class Annotations:
    """Annotations in a JAX trace, where one is being taken."""

    def __init__(self) -> None:
        self._ranges: list[jax.profiler.TraceAnnotation] = []

    def push(self, name: str) -> None:
        """A range of this name begins."""
        annotation = jax.profiler.TraceAnnotation(name)
        annotation.__enter__()
        self._ranges.append(annotation)

    def pop(self) -> None:
        """The range that began last ends."""
        self._ranges.pop().__exit__(None, None, None)


def marks_for(windows: Sequence[Window]) -> list[Mark]:
    """What is needed to show phases in these windows; nothing where there are none."""
    marks: list[Any] = []
    if windows and importlib.util.find_spec("nvtx"):
        marks.append(Nvtx())
    if any(window.tool == "trace" for window in windows):
        marks.append(Annotations())
    return marks
