"""Prediction: what the model makes of each datum, without losses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from learnax.models import BATCH_AXIS
from learnax.step.evaluation import keys_of_left
from learnax.step.gradients import by_datum
from learnax.step.recipe import Recipe, batch_of
from learnax.step.state import TrainState
from learnax.utils import PyTree


def predict_many(
    recipe: Recipe, state: TrainState, seq: jax.Array, batches: PyTree, count: jax.Array, size: jax.Array
) -> tuple[jax.Array, PyTree]:
    """The model's outputs, as in evaluation, for the data of the first `count` of n batches.

    Args:
        recipe: what the step is made of.
        state: see `learnax.step.evaluation.evaluated`.
        seq: the run's random sequence.
        batches: this device's share of n batches, the last filled up to the full size.
        count: batches, 1 to n.
        size: data of all n batches that are real; the rest is padding.

    Returns:
        The random sequence after it, as `evaluate_many` leaves it, and the outputs of this device's share, leaves
        `(n, share, ...)`; those of padding are in it.
    """
    room = len(jax.tree.leaves(batches)[0])

    def one(seq: jax.Array, index: jax.Array) -> tuple[jax.Array, PyTree]:
        after, keys = keys_of_left(recipe, seq, size - index * recipe.batch_size)
        return after, _outputs(recipe, state, keys, batch_of(batches, index))

    one = jax.jit(one, inline=True)  # traced once, though it is asked for its shapes first
    if room == 1:
        seq, outputs = one(seq, jnp.int32(0))
        return seq, jax.tree.map(lambda leaf: leaf[None], outputs)
    like = jax.eval_shape(one, seq, jnp.int32(0))[1]
    rows = jax.tree.map(lambda leaf: jnp.zeros((room, *leaf.shape), leaf.dtype), like)

    def body(number: jax.Array, held: tuple[jax.Array, PyTree]) -> tuple[jax.Array, PyTree]:
        seq, rows = held
        seq, outputs = one(seq, number)
        put = lambda row, leaf: jax.lax.dynamic_update_index_in_dim(row, leaf, number, 0)  # noqa: E731
        return seq, jax.tree.map(put, rows, outputs)

    seq, rows = jax.lax.fori_loop(0, count, body, (seq, rows))
    return seq, rows


def _outputs(recipe: Recipe, state: TrainState, keys: jax.Array, batch: list[Any]) -> PyTree:
    """The outputs of a share, `(share, ...)`."""
    model = recipe.model

    def one(params: PyTree, model_state: PyTree, key: jax.Array, arguments: list[Any]) -> Any:
        return model.apply(params, model_state, key, *arguments, training=False)[0]

    def share(params: PyTree, model_state: PyTree, keys: jax.Array, batch: list[Any]) -> Any:
        return by_datum(one(params, model_state, keys[0], batch), len(jax.tree.leaves(batch)[0]))

    name = BATCH_AXIS if recipe.batch_axis else None
    outputs = share if model.batched else jax.vmap(one, in_axes=(None, None, 0, 0), axis_name=name)
    if recipe.gather is not None:
        outputs = recipe.gather(outputs)
    return outputs(state.params, state.model_state, keys, batch)
