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
    """

    params: Any
    opt_state: Any
    step: int | jax.Array | np.integer = 0


def as_train_state(given: Any) -> TrainState:
    """A state from its fields in their order, or from what a checkpoint holds, a mapping with `state`."""
    return TrainState(*(given["state"] if isinstance(given, Mapping) else given))
