"""The user's samples of the model, plotted and measured."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from learnax.checkpoint import Checkpointer
from learnax.data import copied, signature_of
from learnax.engine import SAME, Engine, Kind, Wanted
from learnax.hooks.due import Cadence, Point, to_host
from learnax.step.state import TrainState
from learnax.utils import PyTree, tree_unstack
from learnax.utils.names import expanded

_SAMPLE_STREAM = 0x5A3
"""Folded into the seed, so that sampling draws beside the training's random sequence."""


class Sampler(Cadence):
    """Samples the user's model on the first data of a batch, plots the samples and measures them.

    Args:
        every: steps between samplings.
        sample_model: `(params, key, datum) -> sample`, mapped over the data; one with a parameter `model_state` is
            given there what the model carries on.
        sample_params: merged over the parameters, a nested mapping or None.
        sample_plot: `(run, samples, None)`, or None.
        sample_metrics: `(sample, datum) -> dict of scalars`, or None.
        size: data that are sampled on.
        seed: of the run; sampling takes nothing from its training sequence.
        run: handed on.
        engine: compiles the sampling.
        evaluated: a training state as evaluation sees it: its parameters are what is sampled with.
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
        evaluated: Callable[[TrainState], TrainState],
        unwrap: Callable[[list[Any]], PyTree],
    ):
        super().__init__(every)
        self._params = engine.put(copied(dict(sample_params or {})), SAME)
        self._plot = sample_plot
        self._metrics = sample_metrics
        self._size = size
        self._run = run
        self._engine = engine
        self._evaluated = evaluated
        self._unwrap = unwrap
        stateful = "model_state" in inspect.signature(sample_model).parameters

        def sample(state: TrainState, over: PyTree, data: PyTree) -> tuple[PyTree]:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _SAMPLE_STREAM), state.step)
            keys, params = jax.random.split(key, size), _merged(state.params, over)
            options = {"model_state": state.model_state} if stateful else {}
            one = functools.partial(sample_model, **options)
            return (jax.vmap(one, in_axes=(None, 0, 0))(params, keys, data),)

        self._kind = Kind("sample", sample, (engine.evaluated_layout, SAME, SAME), (SAME,))

    def wanted(self, state: TrainState, batch: list[Any]) -> Wanted:
        """What to ask the engine for: the sampling of a batch, given as arguments or as their shapes.

        Args:
            state: as evaluation sees it.
            batch: arguments with leaves `(batch_size, ...)`.
        """
        data = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((self._size, *leaf.shape[1:]), leaf.dtype), batch)
        return self._kind, signature_of(data), (state, self._params, self._unwrap(data))

    def __call__(self, point: Point) -> Mapping[str, float]:
        """Samples once; returns the means of the samples' metrics."""
        data = self._unwrap(jax.tree.map(lambda leaf: leaf[: self._size], point.batch))
        state = self._evaluated(point.state)
        program = self._engine.program(*self.wanted(state, point.batch))
        (stacked,) = program(state, self._params, self._engine.put(data, SAME))
        samples = tree_unstack(to_host(stacked))
        if self._plot is not None:
            self._plot(self._run, samples, None)
        if self._metrics is None:
            return {}
        rows = [self._metrics(sample, datum) for sample, datum in zip(samples, tree_unstack(copied(data)), strict=True)]
        return {name: float(np.mean([np.asarray(row[name]) for row in rows])) for name in rows[0]}


def _merged(params: Any, over: Any) -> Any:
    if not isinstance(over, Mapping) or not isinstance(params, Mapping):
        return over
    return {**params, **{name: _merged(params.get(name), value) for name, value in over.items()}}


def sample_params(given: Any) -> Mapping[str, Any] | None:
    """Parameters to merge for sampling: a mapping as it is, a path as the checkpoints folder to read."""
    if given is None or isinstance(given, Mapping):
        return given
    loaded = Checkpointer.at(expanded(given, "sample_params")).load_latest(resume=False)
    if loaded is None:
        raise FileNotFoundError(f"sample_params: no checkpoint in {given}; give a checkpoints folder or a mapping")
    return loaded["state"].params
