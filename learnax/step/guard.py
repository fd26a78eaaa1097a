"""From gradients to the next state: clipped, and not at all where that would put a NaN into the parameters."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from learnax.step.gradients import Means
from learnax.step.optimizers import last_rate, next_rate
from learnax.step.packing import Packing
from learnax.step.recipe import Recipe, wide
from learnax.step.scalars import NAN_DATA
from learnax.step.state import TrainState
from learnax.utils import PyTree


def apply(recipe: Recipe, packing: Packing, state: TrainState, means: Means) -> tuple[TrainState, dict[str, jax.Array]]:
    """Clips, guards and applies an update from packed gradients; returns the new state and the step's scalars."""
    grads = means.grads
    squares = packing.squares(grads)
    norm = jnp.sqrt(squares.sum())
    sound = _sound(grads, norm)
    if recipe.trusted and all(map(_is_trusted, jax.tree.leaves(state.params))):
        rate = next_rate(recipe.learning_rate, state)
        state = _guarded(recipe, packing, state, grads, norm, sound := sound & jnp.isfinite(rate))
    else:
        step = state.step
        # Updates are computed twice, the first time only to look for NaN: cheaper than memory for a second state.
        updates, _ = _updates(recipe, packing, grads, norm, state)
        sound &= _all_finite(updates) & _stay_finite(state.params, updates)
        state = _guarded(recipe, packing, state, grads, norm, sound)
        rate = last_rate(recipe.learning_rate, state, step)
    return state, {
        **means.metrics,
        "loss": means.loss,
        "gradient norm": norm,
        "has_nan": ~sound,
        NAN_DATA: jnp.round(means.nan * (recipe.batch_size * recipe.accumulate)),
        "learning_rate": rate,
        **{f"grads/{path}": own for path, own in zip(packing.paths, jnp.sqrt(squares), strict=True)},
    }


def _is_trusted(leaf: jax.Array) -> bool:
    """Whether Adam's arithmetic for such a parameter overflows nowhere where its gradient is finite."""
    return leaf.dtype in (jnp.float32, jnp.float64)


def _stay_finite(params: PyTree, updates: PyTree) -> jax.Array:
    """Whether parameters that are finite stay so, where their type overflows at numbers that training may come to."""

    def stays(leaf: jax.Array, after: jax.Array) -> jax.Array:
        if wide(leaf.dtype) == leaf.dtype:
            return jnp.asarray(True)
        return (jnp.isfinite(after) | ~jnp.isfinite(leaf)).all()

    kept = jax.tree.map(stays, params, _applied(params, updates))
    return functools.reduce(jnp.logical_and, jax.tree.leaves(kept), jnp.asarray(True))


def _applied(params: PyTree, updates: PyTree) -> PyTree:
    """Parameters after updates, of the types that they have; updates of half-precision parameters may be wider."""
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates)


def _sound(grads: PyTree, norm: jax.Array) -> jax.Array:
    """Whether the clipped gradients are free of NaN.

    A finite norm says so at no cost. An infinite one may only have overflowed, with every gradient
    finite; that is looked at leaf by leaf, in the rare case alone.
    """

    return jax.lax.cond(jnp.isfinite(norm), lambda: jnp.asarray(True), lambda: _all_finite(grads))


def _all_finite(tree: PyTree) -> jax.Array:
    return functools.reduce(jnp.logical_and, [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)], jnp.asarray(True))


def _updates(
    recipe: Recipe, packing: Packing, grads: list[jax.Array], norm: jax.Array, state: TrainState
) -> tuple[PyTree, Any]:
    """The optimiser's updates of the parameters from clipped gradients, and its new state, packed as it came."""
    scale = jnp.where(norm > recipe.max_grad, recipe.max_grad / norm, jnp.ones_like(norm))
    # In float32 at least: a small scale is 0 in half precision.
    grads = [(g.astype(wide(g.dtype)) * scale.astype(wide(g.dtype))).astype(g.dtype) for g in grads]
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic is not clean under "strict"
        if packing.moments:
            updates, opt_state = recipe.optimizer.update(grads, state.opt_state)
            return packing.unpack(updates), opt_state
        return recipe.optimizer.update(packing.unpack(grads), state.opt_state, state.params)


def _guarded(
    recipe: Recipe, packing: Packing, state: TrainState, grads: list[jax.Array], norm: jax.Array, sound: jax.Array
) -> TrainState:
    """The update, made or not made: a loop of one trip or none.

    A `where` or `cond` between the old and the new state makes XLA keep both and copy one; a loop
    carries the state in place, so that a donated state is updated in its own buffers.
    """

    def update(carry: tuple[jax.Array, TrainState]) -> tuple[jax.Array, TrainState]:
        _, old = carry
        updates, opt_state = _updates(recipe, packing, grads, norm, old)
        params, step = _applied(old.params, updates), old.step + jnp.ones_like(old.step)
        new = old._replace(params=params, opt_state=opt_state, step=step)
        return jnp.asarray(False), jax.tree.map(lambda n, o: jnp.asarray(n).astype(o.dtype), new, old)

    return jax.lax.while_loop(lambda carry: carry[0], update, (sound, state))[1]
