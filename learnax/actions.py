"""What a run does between two steps: plots, samples and saves, each at exactly its own steps.

An action says when (`next_due`) apart from what (the call). A showing action looks at the newest step's
outputs and may add to its metrics; a saving one comes after that step's metrics are written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from learnax.checkpoint import Checkpointer
from learnax.data import copied, signature_of
from learnax.engine import SAME, Engine, Kind, Wanted
from learnax.session import by_step
from learnax.state import PyTree, TrainState
from learnax.utils import tree_unstack

_SAMPLE_STREAM = 0x5A3
"""Folded into the seed, so that sampling draws beside the training's random sequence."""


@dataclasses.dataclass(frozen=True)
class Moment:
    """The moment right after a training step.

    Attributes:
        step: updates made, this one included.
        state: the state after it, on the devices; the next step takes over its buffers.
        batch: what it was trained on, on the host: arguments with leaves `(batch_size, ...)`; empty where nothing is
            shown. A device may read this memory: user code gets it `copied`.
        outputs: the model's outputs, on the host; None where no action asks for them.
        metrics: the step's metrics.
    """

    step: int
    state: TrainState
    batch: list[Any]
    outputs: PyTree
    metrics: Mapping[str, float]


class Action(Protocol):
    """Something done at some steps."""

    def next_due(self, step: int) -> float:
        """The first of its own steps after this one; infinity where there is none."""
        ...

    def __call__(self, moment: Moment) -> Mapping[str, float]:
        """Does it; returns metrics that join the step's."""
        ...


class Every:
    """A cadence: every `every` steps; None is never."""

    def __init__(self, every: int | None):
        self._every = every

    def next_due(self, step: int) -> float:
        """The next multiple of the cadence."""
        return math.inf if self._every is None else step - step % self._every + self._every


class Plotter(Every):
    """Calls the user's `plot_pipe` with the outputs of a training step.

    Args:
        every: steps between plots.
        plot_pipe: `(run, outputs, batch)`, both lists of one pytree per datum, on the host.
        plot_model: maps each output first, or None.
        run: handed on.
        unwrap: turns stacked arguments into stacked data as the dataset gives them.
    """

    def __init__(
        self,
        every: int | None,
        plot_pipe: Callable[..., Any],
        plot_model: Callable[[Any], Any] | None,
        run: Any,
        unwrap: Callable[[list[Any]], PyTree],
    ):
        super().__init__(every)
        self._plot_pipe = plot_pipe
        self._plot_model = plot_model
        self._run = by_step(run)
        self._unwrap = unwrap

    def __call__(self, moment: Moment) -> Mapping[str, float]:
        """Plots."""
        outputs = tree_unstack(_to_host(moment.outputs))
        if self._plot_model is not None:
            outputs = [self._plot_model(output) for output in outputs]
        self._plot_pipe(self._run, outputs, tree_unstack(copied(self._unwrap(moment.batch))))
        return {}


class Sampler(Every):
    """Samples the user's model on the first data of a batch, plots the samples and measures them.

    Args:
        every: steps between samplings.
        sample_model: `(params, key, datum) -> sample`, mapped over the data.
        sample_params: merged over the parameters, a nested mapping or None.
        sample_plot: `(run, samples, None)`, or None.
        sample_metrics: `(sample, datum) -> dict of scalars`, or None.
        size: data that are sampled on.
        seed: of the run; sampling takes nothing from its training sequence.
        run: handed on.
        engine: compiles the sampling.
        unwrap: turns stacked arguments into stacked data as the dataset gives them.
    """

    def __init__(
        self,
        every: int | None,
        sample_model: Callable[..., Any],
        sample_params: Mapping[str, Any] | None,
        sample_plot: Callable[..., Any] | None,
        sample_metrics: Callable[..., Mapping[str, Any]] | None,
        size: int,
        seed: int,
        run: Any,
        engine: Engine,
        unwrap: Callable[[list[Any]], PyTree],
    ):
        super().__init__(every)
        self._params = engine.put(copied(dict(sample_params or {})), SAME)
        self._plot = sample_plot
        self._metrics = sample_metrics
        self._size = size
        self._run = by_step(run)
        self._engine = engine
        self._unwrap = unwrap

        def sample(params: PyTree, over: PyTree, step: jax.Array, data: PyTree) -> tuple[PyTree]:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _SAMPLE_STREAM), step)
            keys = jax.random.split(key, size)
            return (jax.vmap(sample_model, in_axes=(None, 0, 0))(_merged(params, over), keys, data),)

        self._kind = Kind("sample", sample, (engine.params_layout, SAME, SAME, SAME), (SAME,))

    def wanted(self, state: TrainState, batch: list[Any]) -> Wanted:
        """What to ask the engine for: the sampling of a batch, given as arguments or as their shapes."""
        data = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((self._size, *leaf.shape[1:]), leaf.dtype), batch)
        args = (state.params, self._params, state.step, self._unwrap(data))
        return self._kind, signature_of(data), args

    def __call__(self, moment: Moment) -> Mapping[str, float]:
        """Samples once; returns the means of the samples' metrics."""
        data = self._unwrap(jax.tree.map(lambda leaf: leaf[: self._size], moment.batch))
        program = self._engine.program(*self.wanted(moment.state, moment.batch))
        (stacked,) = program(moment.state.params, self._params, moment.state.step, self._engine.put(data, SAME))
        samples = tree_unstack(_to_host(stacked))
        if self._plot is not None:
            self._plot(self._run, samples, None)
        if self._metrics is None:
            return {}
        rows = [self._metrics(sample, datum) for sample, datum in zip(samples, tree_unstack(copied(data)), strict=True)]
        return {name: float(np.mean([np.asarray(row[name]) for row in rows])) for name in rows[0]}


class ModelSaver(Every):
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

    def __call__(self, moment: Moment) -> Mapping[str, float]:
        """Saves."""
        # Array by array: parameters that are divided are nowhere whole but on the host.
        self._save_model(_to_host(jax.tree.map(self._engine.whole, moment.state.params)))
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

    def next_due(self, step: int) -> float:
        """The next step at which a checkpoint of any sort is due."""
        cadences = Every(self._checkpointer.save_every), Every(self._checkpointer.checkpoint_every)
        return min(cadence.next_due(step) for cadence in cadences)

    def __call__(self, moment: Moment) -> Mapping[str, float]:
        """Saves."""
        self._checkpointer.maybe_save_checkpoints(
            moment.state, moment.step, moment.metrics, resume=self._resume_point()
        )
        return {}


def _to_host(tree: PyTree) -> PyTree:
    """Waits for arrays and copies them to numpy: a view would keep the next step from reusing the buffer."""
    return jax.tree.map(np.array, tree)


def _merged(params: Any, over: Any) -> Any:
    if not isinstance(over, Mapping) or not isinstance(params, Mapping):
        return over
    return {**params, **{name: _merged(params.get(name), value) for name, value in over.items()}}
