"""The user's plots of training outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from learnax.data import copied
from learnax.hooks.due import Cadence, Point, to_host
from learnax.utils import PyTree, tree_unstack


class Plotter(Cadence):
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
        self._run = run
        self._unwrap = unwrap

    def __call__(self, point: Point) -> Mapping[str, float]:
        """Plots."""
        outputs = tree_unstack(to_host(point.outputs))
        if self._plot_model is not None:
            outputs = [self._plot_model(output) for output in outputs]
        self._plot_pipe(self._run, outputs, tree_unstack(copied(self._unwrap(point.batch))))
        return {}
