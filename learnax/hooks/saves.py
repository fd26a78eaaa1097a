"""Saves: the user's own of the parameters, and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from learnax.checkpoint import Checkpointer
from learnax.engine import Engine
from learnax.hooks.due import Cadence, Point, to_host
from learnax.utils import PyTree


class ModelSaver(Cadence):
    """Calls the user's `save_model(params)` with a copy on the host.

    Args:
        every: steps between calls.
        save_model: `params -> None`.
        engine: brings the parameters to the host.
    """

    def __init__(self, every: int | None, save_model: Callable[[PyTree], Any], engine: Engine):
        super().__init__(every)
        self._save_model = save_model
        self._engine = engine

    def __call__(self, point: Point) -> Mapping[str, float]:
        """Saves."""
        # Array by array: parameters that are divided are nowhere whole but on the host.
        self._save_model(to_host(jax.tree.map(self._engine.whole, point.state.params)))
        return {}


class StateSaver:
    """Saves the checkpoints that are due.

    Args:
        checkpointer: knows when, and writes them.
        resume_point: what a checkpoint holds beside the state.
    """

    def __init__(self, checkpointer: Checkpointer, resume_point: Callable[[], dict[str, Any]]):
        self._checkpointer = checkpointer
        self._resume_point = resume_point

    def next_due(self, count: int) -> float:
        """The next step at which a checkpoint of any sort is due."""
        cadences = Cadence(self._checkpointer.save_every), Cadence(self._checkpointer.checkpoint_every)
        return min(cadence.next_due(count) for cadence in cadences)

    def __call__(self, point: Point) -> Mapping[str, float]:
        """Saves."""
        self._checkpointer.maybe_save_checkpoints(point.state, point.step, point.metrics, resume=self._resume_point())
        return {}


class BestSaver(Cadence):
    """Keeps the state after the epoch whose metric is the best so far.

    Args:
        checkpointer: compares, and writes it.
        metric: the name of what "best" is judged by.
        metrics: of the run, to keep beside the state.
        resume_point: what a checkpoint holds beside the state.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        metric: str,
        metrics: Mapping[str, list[float]],
        resume_point: Callable[[], dict[str, Any]],
    ):
        super().__init__(1)
        self._checkpointer = checkpointer
        self._metric = metric
        self._metrics = metrics
        self._resume_point = resume_point

    def __call__(self, point: Point) -> Mapping[str, float]:
        """Saves it, where the epoch has come to a value, and to a better one."""
        if self._metric in point.metrics:
            latest = {name: values[-1] for name, values in self._metrics.items()}
            self._checkpointer.update_best_checkpoint(
                point.state, latest[self._metric], point.step, metrics=latest, resume=self._resume_point()
            )
        return {}
