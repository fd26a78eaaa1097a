"""What a run shows of itself while it trains: plots of its outputs, and samples of its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from learnax.data import Batch
from learnax.engine import SAME, Engine, Kind
from learnax.state import PyTree
from learnax.utils import tree_unstack

_SAMPLE_STREAM = 0x5A3
"""Folded into the seed, so that sampling draws beside the training's random sequence."""


def to_host(tree: PyTree) -> PyTree:
    """Waits for arrays and copies them to numpy."""
    return jax.tree.map(np.asarray, tree)


class Plotter:
    """Calls the user's `plot_pipe` with the outputs of a training step.

    Args:
        plot_pipe: `(run, outputs, batch)`, both lists of one pytree per datum, on the host.
        plot_model: maps each output first, or None.
        run: handed on.
        unwrap: turns stacked arguments into stacked data as the dataset gives them.
    """

    def __init__(self, plot_pipe: Callable[..., Any], plot_model: Any, run: Any, unwrap: Callable[[list[Any]], PyTree]):
        self._plot_pipe = plot_pipe
        self._plot_model = plot_model
        self._run = run
        self._unwrap = unwrap

    def __call__(self, outputs: PyTree, batch: Batch) -> None:
        each = tree_unstack(to_host(outputs))
        if self._plot_model is not None:
            each = [self._plot_model(output) for output in each]
        self._plot_pipe(self._run, each, tree_unstack(self._unwrap(batch.host)))


class Sampler:
    """Samples the user's model on the first data of a batch, plots the samples and measures them.

    Args:
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
        self._params = engine.put(dict(sample_params or {}), SAME)
        self._plot = sample_plot
        self._metrics = sample_metrics
        self._size = size
        self._run = run
        self._engine = engine
        self._unwrap = unwrap

        def sample(params: PyTree, over: PyTree, step: jax.Array, data: PyTree) -> tuple[PyTree]:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _SAMPLE_STREAM), step)
            keys = jax.random.split(key, size)
            return (jax.vmap(sample_model, in_axes=(None, 0, 0))(_merged(params, over), keys, data),)

        self._kind = Kind("sample", sample, (SAME, SAME, SAME, SAME), (SAME,))

    def __call__(self, params: PyTree, step: jax.Array, batch: Batch) -> dict[str, float]:
        """Samples once; returns the means of the samples' metrics."""
        data = jax.tree.map(lambda leaf: leaf[: self._size], self._unwrap(batch.host))
        args = (params, self._params, step, self._engine.put(data, SAME))
        (stacked,) = self._engine.program(self._kind, batch.signature, args)(*args)
        samples = tree_unstack(to_host(stacked))
        if self._plot is not None:
            self._plot(self._run, samples, None)
        if self._metrics is None:
            return {}
        rows = [self._metrics(sample, datum) for sample, datum in zip(samples, tree_unstack(data), strict=True)]
        return {name: float(np.mean([np.asarray(row[name]) for row in rows])) for name in rows[0]}


def _merged(params: Any, over: Any) -> Any:
    if not isinstance(over, Mapping) or not isinstance(params, Mapping):
        return over
    return {**params, **{name: _merged(params.get(name), value) for name, value in over.items()}}
