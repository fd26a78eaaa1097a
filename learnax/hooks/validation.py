"""Validation: the means of losses and metrics over whole datasets, every datum once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping

import jax
import numpy as np

from learnax.checks.settings import Settings
from learnax.cluster.stops import Stops
from learnax.data import Split
from learnax.engine import SAME, Engine
from learnax.engine.programs import Programs
from learnax.hooks.due import Cadence, Point
from learnax.log import Means, progress_bar
from learnax.profiling.phases import Phases
from learnax.step.state import TrainState

_LAST_STREAM = 0x1A57
"""Folded into the random sequence for the validation of a last state that none was due at."""


class Validation:
    """Evaluates the validation sets after the epochs 0, `val_every`, 2 `val_every`, ..., or every `val_every_steps`.

    And in any case at the end of the run.

    Args:
        settings: of the run.
        loaders: each split's; all but `train` are evaluated.
        engine: knows the devices.
        programs: evaluate.
        phases: the run's clock.
        stops: may end the run between two dispatches.
        shown: whether this process draws progress.

    Attributes:
        by_steps: when it is due amid an epoch.
    """

    def __init__(
        self,
        settings: Settings,
        loaders: Mapping[str, Split],
        engine: Engine,
        programs: Programs,
        phases: Phases,
        stops: Stops,
        *,
        shown: bool,
    ):
        self._settings = settings
        self._loaders = {name: loader for name, loader in loaders.items() if name != "train"}
        self._engine = engine
        self._programs = programs
        self._phases = phases
        self._stops = stops
        self._shown = shown
        self.by_steps = Cadence(settings.val_every_steps if self._loaders else None)

    def next_due(self, count: int) -> float:
        """The first number of epochs, after this one, after which it is due."""
        regular, last = self._next_regular(count), self._last
        return min(regular, last) if count < last else regular

    def is_regular(self, epoch: int) -> bool:
        """Whether it would be due after this epoch in a run that goes on."""
        return self._next_regular(epoch) == epoch + 1

    def __call__(self, point: Point, seq: jax.Array, *, regular: bool) -> tuple[dict[str, dict[str, float]], jax.Array]:
        """Evaluates all sets, of a model after a step.

        Args:
            point: right after the step.
            seq: the random sequence.
            regular: whether it would be due here in a run that goes on.

        Returns:
            The means of each, and the random sequence after it.
        """
        if not self._loaders:
            return {}, seq  # and the state is not looked at
        keys, state = seq, self._programs.evaluated(point.state)
        if not regular:
            # The last state is validated in any case, by keys beside the run's: one that is made longer later draws
            # what it would have drawn without.
            fold = jax.jit(jax.random.fold_in, out_shardings=self._engine.sharding(SAME))
            keys = fold(seq, np.uint32(_LAST_STREAM))
        means = {}
        for name, loader in self._loaders.items():
            means[name], keys = self._evaluate(name, loader, state, keys)
        return means, keys if regular else seq

    @property
    def _last(self) -> float:
        """Epochs after which the run ends; infinity where it ends amid one."""
        settings = self._settings
        if settings.num_epochs is not None:
            return settings.num_epochs
        if settings.num_steps is None or settings.epoch_steps is None or settings.num_steps % settings.epoch_steps:
            return math.inf
        return settings.epochs

    def _next_regular(self, count: int) -> float:
        """`next_due` of a run that has no last epoch."""
        if self._settings.val_every_steps is not None:
            return math.inf
        return Cadence(self._settings.val_every or 1).next_due(count - 1) + 1

    def _evaluate(
        self, name: str, loader: Split, state: TrainState, seq: jax.Array
    ) -> tuple[dict[str, float], jax.Array]:
        means = Means(name, self._engine.in_flight)
        bar = progress_bar(loader.size or None, shown=self._shown, what=f"validating {name}", passing=True)
        with contextlib.closing(bar), self._phases.validate:
            for block in self._phases.waiting(self._phases.validate_data, loader.blocks()):
                seq, sums = self._programs.evaluate(state, seq, block)
                for scalars, count, size in sums:
                    means.push(scalars, count, size)
                bar.advance(block.size)
                bar.tell([])
                self._stops.check()
            return means.result(), seq
