"""The scalars of training steps, on their way from the devices and on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from learnax.step import Scalars


class Steps(NamedTuple):
    """The scalars of one dispatch, on their way.

    Attributes:
        scalars: on the devices.
        steps: of the dispatch.
        epoch: that they lie in.
        seconds: since the dispatch before.
        seen: gives what else joins the metrics of the first of them; or None.
    """

    scalars: Scalars
    steps: int
    epoch: int
    seconds: float
    seen: Callable[[], Mapping[str, float]] | None


class Rows(NamedTuple):
    """The scalars of dispatches on the host: a row for each step.

    Attributes:
        names: of the columns.
        values: `(rows, len(names))`.
        steps: updates that were made after each.
        epoch: that they lie in.
        joined: what joins some of the rows, by their number: metrics by name.
    """

    names: tuple[str, ...]
    values: np.ndarray
    steps: list[int]
    epoch: int
    joined: Mapping[int, Mapping[str, float]] = MappingProxyType({})

    def but_last(self) -> tuple[Rows, Rows]:
        """All rows but the last one, and that one."""
        last = len(self.steps) - 1
        joined = {row: more for row, more in self.joined.items() if row < last}
        return (
            self._replace(values=self.values[:-1], steps=self.steps[:-1], joined=joined),
            self._replace(values=self.values[-1:], steps=self.steps[-1:], joined={0: self.joined.get(last, {})}),
        )

    def named(self) -> Iterator[dict[str, Any]]:
        """The rows as the run gets them."""
        names = [full_name(name) for name in self.names]
        for number, (row, step) in enumerate(zip(self.values.tolist(), self.steps, strict=True)):
            more = {full_name(name): value for name, value in self.joined.get(number, {}).items()}
            yield {**dict(zip(names, row, strict=True)), **more, "step": step, "epoch": self.epoch}


def joined_of(dispatches: Sequence[Steps], dropped: np.ndarray) -> dict[int, Mapping[str, float]]:
    """What joins the first row of some dispatches, by its number among the rows of all."""
    joined: dict[int, Mapping[str, float]] = {}
    row = 0
    for dispatch in dispatches:
        if dispatch.seen is not None and not dropped[row]:
            joined[row] = dispatch.seen()
        row += dispatch.steps
    return joined


def full_name(name: str) -> str:
    """What a metric of a training step is kept under."""
    return name if name.startswith("grads/") else f"train/{name}"
