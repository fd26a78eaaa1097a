"""Training: one guarded update from a batch, and many of them in one program."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from learnax.step.gradients import own_gradients
from learnax.step.guard import apply
from learnax.step.many import many
from learnax.step.packing import Packing
from learnax.step.recipe import Recipe, batch_of, keys_of, mean_over_devices, next_keys, wide
from learnax.step.scalars import Scalars
from learnax.step.state import TrainState
from learnax.utils import PyTree


def update(
    recipe: Recipe, state: TrainState, key: jax.Array, batch: PyTree
) -> tuple[TrainState, dict[str, jax.Array], Any]:
    """One guarded update from one batch.

    Args:
        recipe: what the step is made of.
        state: the state before.
        key: the batch's key; datum i gets `split(key, batch_size)[i]`.
        batch: this device's share.

    Returns:
        `(state, scalars, outputs)`: the state after, or the same where the update would have put a
        NaN into the parameters; the step's metrics and the norm of each gradient, by name; the
        outputs of this device's data.
    """
    packing = Packing(state.params)
    means, outputs = own_gradients(recipe, state.params, keys_of(recipe, key), batch, state.step)
    means = mean_over_devices(recipe, means._replace(grads=packing.pack(means.grads)))
    state, scalars = apply(recipe, packing, state, means)
    return state, scalars, outputs


def train(
    recipe: Recipe,
    packing: Packing,
    with_outputs: bool,
    state: TrainState,
    keys: jax.Array,
    batches: PyTree,
    index: jax.Array,
) -> tuple[TrainState, Scalars, Any]:
    """One training step: `update`, from batches that are picked here.

    Args:
        recipe: what the step is made of.
        packing: how gradients are packed, and the optimiser's state where that is.
        with_outputs: whether the outputs are given, or None; of several batches, those of the last.
        state: the state before.
        keys: a key for each of `accumulate` batches, and maybe more behind them.
        batches: this device's share of n batches, leaves `(n, batch_size // shards, ...)`.
        index: the step's batch (the first of `accumulate`) among the n; beyond the last it goes on at the first.

    Returns:
        `(state, scalars, outputs)`: as for `update`, but one row of scalars.
    """

    def own(number: Any) -> tuple[Any, Any]:
        batch = batch_of(batches, index + number)
        means, outputs = own_gradients(recipe, state.params, keys_of(recipe, keys[number]), batch, state.step)
        return means._replace(grads=packing.pack(means.grads)), outputs if with_outputs else None

    if recipe.accumulate == 1:
        means, outputs = own(0)
    else:

        def add(number: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            means, outputs = own(number)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype) / recipe.accumulate, carry[0], means), outputs

        like, outputs = jax.eval_shape(own, index)
        outputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)
        # In float32: in half precision, what each batch adds would be rounded away beside the sum.
        sums = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), like)
        sums, outputs = jax.lax.fori_loop(0, recipe.accumulate, add, (sums, outputs), unroll=not recipe.looped)
        means = jax.tree.map(lambda x, like: x.astype(like.dtype), sums, like)
    state, scalars = apply(recipe, packing, state, mean_over_devices(recipe, means))
    return state, Scalars.row(scalars), outputs


def train_many(
    recipe: Recipe,
    room: int,
    with_outputs: bool,
    state: TrainState,
    seq: jax.Array,
    batches: PyTree,
    start: jax.Array,
    count: jax.Array,
) -> tuple[TrainState, jax.Array, Scalars, Any]:
    """Training steps, as many as `count` says, in one loop: the same program and the same bits however they are cut.

    Args:
        recipe: what the step is made of.
        room: steps at most; with a room of one there is no loop.
        with_outputs: whether the outputs of the last step are given, or None.
        state: the state before.
        seq: the run's random sequence.
        batches: this device's share of n batches, leaves `(n, batch_size // shards, ...)`.
        start: the first step's batch among the n.
        count: steps, 1 to `room`.

    Returns:
        `(state, seq, scalars, outputs)`: the sequence after the steps; `room` rows of scalars, of which the
        first `count` are meant; the outputs of the last step.
    """
    # Moments can be packed where the optimiser treats each element alone, as the default one does; another one may
    # not. For a single step, packing costs more than it saves.
    packing = Packing(state.params, moments=recipe.trusted and room > 1)
    # A jitted function is traced once, for both uses below: its shapes, and the loop.
    step = jax.jit(functools.partial(train, recipe, packing, with_outputs), inline=True)
    seq, keys = next_keys(seq, count * recipe.accumulate, room * recipe.accumulate)

    def one(state: TrainState, number: Any) -> tuple[TrainState, Scalars, Any]:
        first = number * recipe.accumulate
        own = keys if room == 1 else jax.lax.dynamic_slice_in_dim(keys, first, recipe.accumulate)
        return step(state, own, batches, start + first)

    given = state.opt_state
    state = state._replace(opt_state=packing.pack_moments(given))
    state, scalars, outputs = many(one, room, state, count)
    state = state._replace(opt_state=packing.unpack_moments(state.opt_state, given))
    return state, seq, scalars, outputs
