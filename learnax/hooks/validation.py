"""Validation: the means of losses and metrics over whole datasets, every datum once."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from learnax.checks.settings import Settings
from learnax.cluster.stops import Stops
from learnax.data import Loader, Repeated
from learnax.engine import SAME, Engine
from learnax.engine.programs import Programs
from learnax.hooks.due import Cadence, Point
from learnax.log import Means
from learnax.profiling.phases import Phases
from learnax.step.state import TrainState

_LAST_STREAM = 0x1A57
"""Folded into the random sequence for the validation of a last epoch that none was due in."""


class Validation:
    """Evaluates the validation sets after the epochs 0, `val_every`, 2 `val_every`, ..., and after the last.

    Args:
        settings: of the run.
        loaders: each split's; all but `train` are evaluated.
        engine: knows the devices.
        programs: evaluate.
        phases: the run's clock.
        stops: may end the run between two dispatches.
    """

    def __init__(
        self,
        settings: Settings,
        loaders: Mapping[str, Loader | Repeated],
        engine: Engine,
        programs: Programs,
        phases: Phases,
        stops: Stops,
    ):
        self._settings = settings
        self._loaders = {name: loader for name, loader in loaders.items() if name != "train"}
        self._engine = engine
        self._programs = programs
        self._phases = phases
        self._stops = stops

    def next_due(self, count: int) -> float:
        """The first number of epochs, after this one, after which it is due."""
        regular, last = self._next_regular(count), self._settings.num_epochs
        return min(regular, last) if count < last else regular

    def __call__(self, point: Point, seq: jax.Array) -> tuple[dict[str, dict[str, float]], jax.Array]:
        """Evaluates all sets, of a model after an epoch.

        Args:
            point: right after its last step.
            seq: the random sequence.

        Returns:
            The means of each, and the random sequence after it.
        """
        if not self._loaders:
            return {}, seq  # and the state is not looked at
        regular = self._next_regular(point.epoch) == point.epoch + 1
        keys, state = seq, self._programs.evaluated(point.state)
        if not regular:
            # The last epoch is validated in any case, by keys beside the run's: one that is made longer later draws
            # what it would have drawn without.
            fold = jax.jit(jax.random.fold_in, out_shardings=self._engine.sharding(SAME))
            keys = fold(seq, np.uint32(_LAST_STREAM))
        means = {}
        for name, loader in self._loaders.items():
            means[name], keys = self._evaluate(name, loader, state, keys)
        return means, keys if regular else seq

    def _next_regular(self, count: int) -> float:
        """`next_due` of a run that has no last epoch."""
        return Cadence(self._settings.val_every or 1).next_due(count - 1) + 1

    def _evaluate(
        self, name: str, loader: Loader | Repeated, state: TrainState, seq: jax.Array
    ) -> tuple[dict[str, float], jax.Array]:
        means = Means(name, self._engine.in_flight)
        with self._phases.validate:
            for block in self._phases.waiting(self._phases.validate_data, loader.blocks()):
                seq, sums = self._programs.evaluate(state, seq, block)
                for scalars, count, size in sums:
                    means.push(scalars, count, size)
                self._stops.check()
            return means.result(), seq
