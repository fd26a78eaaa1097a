"""The scale of the loss in float16, whose gradients would else be 0: it follows what overflows.

As in Micikevicius et al. 2018 (https://arxiv.org/abs/1710.03740): halved after a gradient that is not finite, whose
update is dropped, doubled after `PATIENCE` updates in a row without one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from learnax.step.recipe import Recipe
from learnax.utils import PyTree

START = 2.0**15
PATIENCE = 2000
MOST = 2.0**24


class Scaled(NamedTuple):
    """What a model carries on, with the scale of its loss.

    Attributes:
        model: what the model itself carries on, or None.
        scale: what the loss is multiplied by before its gradient is taken, float32.
        since: updates since the scale was changed, int32.
    """

    model: PyTree
    scale: Any
    since: Any


def start(scaled: bool, model_state: PyTree) -> PyTree:
    """What a fresh state carries."""
    return Scaled(model_state, jnp.float32(START), jnp.int32(0)) if scaled else model_state


def inner(model_state: PyTree) -> PyTree:
    """What the model itself carries on."""
    return model_state.model if isinstance(model_state, Scaled) else model_state


def followed(recipe: Recipe, before: PyTree, after: PyTree) -> PyTree:
    """The same with what the model carries on after a step."""
    return before._replace(model=after) if recipe.model.scaled else after


def adjusted(state: Scaled, overflow: jax.Array) -> Scaled:
    """The scale after a step."""
    grows = ~overflow & (state.since + 1 >= PATIENCE)
    scale = jnp.where(overflow, jnp.maximum(state.scale / 2, 1), jnp.where(grows, state.scale * 2, state.scale))
    since = jnp.where(overflow | grows, jnp.zeros_like(state.since), state.since + 1)
    return state._replace(scale=jnp.minimum(scale, MOST), since=since)
