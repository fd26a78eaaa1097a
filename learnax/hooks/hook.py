"""What happens between two steps: when (`next_due`) apart from what (the call)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from learnax.step.state import TrainState
from learnax.utils import PyTree


@dataclasses.dataclass(frozen=True)
class Moment:
    """The moment right after a training step, or after an epoch.

    Attributes:
        step: updates made, this one included.
        epoch: the epoch that it lies in, from 0.
        look: gives the state.
        batch: what it was trained on, on the host: arguments with leaves `(batch_size, ...)`; empty where nothing is
            shown. A device may read this memory: user code gets it `copied`.
        outputs: the model's outputs, on the host; None where nothing is shown.
        metrics: the step's metrics, or the last values of those that the epoch added to.
    """

    step: int
    epoch: int
    look: Callable[[], TrainState]
    batch: list[Any] = dataclasses.field(default_factory=list)
    outputs: PyTree = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def state(self) -> TrainState:
        """The state after it, on the devices; the next step takes over its buffers."""
        return self.look()


class Hook(Protocol):
    """Something done at some steps, or after some epochs."""

    def next_due(self, count: int) -> float:
        """The first of its own steps (or epochs) after this many; infinity where there is none."""
        ...

    def __call__(self, moment: Moment) -> Mapping[str, float]:
        """Does it; returns metrics that join the step's."""
        ...


class Every:
    """A cadence: every `every` steps; None is never."""

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

    shows: list[Hook] = dataclasses.field(default_factory=list)
    saves: list[Hook] = dataclasses.field(default_factory=list)
    ends: list[Hook] = dataclasses.field(default_factory=list)

    def next_due(self, step: int) -> float:
        """The first step after this one at which something is due."""
        return min((hook.next_due(step) for hook in (*self.shows, *self.saves)), default=math.inf)


def due(hooks: Iterable[Hook], count: int) -> list[Hook]:
    """Those of some hooks that are due at this step (or after this many epochs)."""
    return [hook for hook in hooks if hook.next_due(count - 1) == count]


def to_host(tree: PyTree) -> PyTree:
    """Waits for arrays and copies them to numpy: a view would keep the next step from reusing the buffer."""
    return jax.tree.map(np.array, tree)
