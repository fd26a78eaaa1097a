"""The training state: what a step takes and gives back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from learnax.utils import PyTree as PyTree


class TrainState(NamedTuple):
    """The state of a run: what a step takes and gives back.

    Attributes:
        params: the model's `params` collection.
        opt_state: the optimiser's state.
        step: updates made so far; an update that was dropped does not count.
        model_state: what else the model carries from step to step, batch statistics for one; or None.
        ema: an average of the parameters; or None.
    """

    params: Any
    opt_state: Any
    step: int | jax.Array | np.integer = 0
    model_state: Any = None
    ema: Any = None

    def trees(self) -> dict[str, PyTree]:
        """The fields that are there, by name, without the step."""
        return {name: tree for name, tree in self._asdict().items() if tree is not None and name != "step"}


def as_train_state(given: Any) -> TrainState:
    """A state from its fields in their order, or from what a checkpoint holds, a mapping with `state`."""
    return TrainState(*(given["state"] if isinstance(given, Mapping) else given))
