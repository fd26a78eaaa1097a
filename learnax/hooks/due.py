"""What happens between two steps: when (`next_due`) apart from what (the call)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from learnax.step.state import TrainState
from learnax.utils import PyTree


class Point:
    """The place right after a training step, or after an epoch.

    Args:
        step: updates made, this one included.
        epoch: the epoch that it lies in, from 0.
        look: gives the state.
        metrics: the step's metrics, or the last values of those that the epoch added to.
        batch: gives what the step was trained on, on the host: arguments with leaves `(batch_size, ...)`; None where
            there is no step. A device may read this memory: user code gets it `copied`.
        outputs: gives the model's outputs, on the host; None where the program gives none.
    """

    def __init__(
        self,
        step: int,
        epoch: int,
        look: Callable[[], TrainState],
        metrics: Mapping[str, float] | None = None,
        batch: Callable[[], list[Any]] | None = None,
        outputs: Callable[[], PyTree] | None = None,
    ):
        self.step = step
        self.epoch = epoch
        self.metrics = {} if metrics is None else metrics
        self._look, self._batch, self._outputs = look, batch, outputs

    @property
    def state(self) -> TrainState:
        """The state after it, on the devices; the next step takes over its buffers."""
        return self._look()

    @functools.cached_property
    def batch(self) -> list[Any]:
        """The batch, fetched the first time that it is asked for."""
        assert self._batch is not None
        return self._batch()

    @functools.cached_property
    def outputs(self) -> PyTree:
        """The outputs, fetched the first time that they are asked for."""
        assert self._outputs is not None
        return self._outputs()

    @property
    def has_batch(self) -> bool:
        """Whether it comes right after a step."""
        return self._batch is not None


class Action(Protocol):
    """Something done at some steps, or after some epochs."""

    def next_due(self, count: int) -> float:
        """The first of its own steps (or epochs) after this many; infinity where there is none."""
        ...

    def __call__(self, point: Point) -> Mapping[str, float]:
        """Does it; returns metrics that join the step's."""
        ...


class Cadence:
    """Every `every` steps; None is never."""

    def __init__(self, every: int | None):
        self._every = every

    def next_due(self, count: int) -> float:
        """The next multiple of the cadence."""
        return math.inf if self._every is None else count - count % self._every + self._every


@dataclasses.dataclass
class Hooks:
    """What a run does between its steps, by the order in which it is done.

    Attributes:
        shows: look at a step's batch and outputs, and may add to its metrics.
        saves: come after that step's metrics are kept: a checkpoint holds the history up to its step.
        ends: come after an epoch, which they count in place of steps.
    """

    shows: list[Action] = dataclasses.field(default_factory=list)
    saves: list[Action] = dataclasses.field(default_factory=list)
    ends: list[Action] = dataclasses.field(default_factory=list)

    def next_due(self, step: int) -> float:
        """The first step after this one at which something is due."""
        return min((action.next_due(step) for action in (*self.shows, *self.saves)), default=math.inf)


def due(actions: Iterable[Action], count: int) -> list[Action]:
    """Those of some actions that are due at this step (or after this many epochs)."""
    return [action for action in actions if action.next_due(count - 1) == count]


def to_host(tree: PyTree) -> PyTree:
    """Waits for arrays and copies them to numpy: a view would keep the next step from reusing the buffer."""
    return jax.tree.map(np.array, tree)
