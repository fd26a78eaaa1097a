"""Parameters by what a user calls them: the run's own, those of a checkpoint, or a tree given by hand."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from learnax import checks
from learnax.checkpoint import Checkpointer
from learnax.checks import Settings
from learnax.engine import SAME, Engine
from learnax.engine.programs import Programs
from learnax.parts.progress import Progress
from learnax.step import evaluated, has_own_evaluation
from learnax.step.state import TrainState


class Weights:
    """States as evaluation sees them, see `learnax.engine.programs.Programs.evaluated`. The run stays as it is.

    Args:
        settings: of the run.
        engine: lays them out.
        programs: what makes of a training state what evaluation sees.
        progress: has the run's state.
        checkpointer: reads those of checkpoints; or None.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        programs: Programs,
        progress: Progress,
        checkpointer: Checkpointer | None,
    ):
        self._settings = settings
        self._engine = engine
        self._programs = programs
        self._progress = progress
        self._checkpointer = checkpointer

    def __call__(self, given: Any) -> TrainState:
        """The state that evaluation is to see.

        Args:
            given: None for the run's; "best", "latest" or a step for a checkpoint's; or a tree of parameters, which
                goes with what the model of the run carries on.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: parameters that are not this model's, by name; a checkpoint of another model.
            TypeError: none of these.
        """
        if given is None:
            return self._programs.evaluated(self._progress.state)
        asked = checks.checkpoint_of(given)
        if asked is not None:
            return self._loaded(given, asked)
        params = checks.check_params(given, self._progress.shapes.params)
        return evaluated(self._engine.own(params, self._engine.params_layout), self._progress.state)

    def _loaded(self, given: Any, asked: Any) -> TrainState:
        if self._checkpointer is None:
            raise FileNotFoundError(
                f"params={given!r} asks for a checkpoint, but this trainer keeps none: registry= says where they are"
            )
        shapes, engine = self._progress.shapes, self._engine
        average = shapes.ema is not None and self._settings.ema_eval
        whole = not average and has_own_evaluation(shapes.opt_state)
        target = shapes if whole else shapes._replace(opt_state=None, ema=shapes.ema if average else None)
        try:
            loaded = self._checkpointer.load(asked, target=target, resume=False)
        except FileNotFoundError as error:
            best = given == "best" and not self._settings.keep_best_checkpoint
            hint = "; keep_best_checkpoint=True keeps the best" if best else ""
            raise FileNotFoundError(f"params={given!r}: {error}{hint}") from error
        if loaded is None:
            raise FileNotFoundError(
                f"params={given!r}: no checkpoint in {self._checkpointer.path} yet; the first one is saved after "
                f"save_every={self._settings.save_every} steps, or at the end of train()"
            )
        state: TrainState = loaded["state"]
        state = state._replace(step=np.int32(loaded["step"]))
        if whole:
            return self._programs.evaluated(engine.own(state, engine.layout))
        params = state.params
        if average:
            params = jax.tree.map(lambda own, like: own.astype(like.dtype), state.ema, shapes.params)
        layout = SAME if engine.layout == SAME else engine.layout.model_state
        carried, step = engine.own(state.model_state, layout), engine.own(state.step)
        return evaluated(engine.own(params, engine.params_layout), state._replace(step=step, model_state=carried))
