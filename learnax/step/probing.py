"""A look into a training step: what it is made from and what it makes, beside the step itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from learnax.step.guard import looked_into
from learnax.step.packed import Form, Packed
from learnax.step.packing import Packing
from learnax.step.patterns import split
from learnax.step.recipe import AXIS, Recipe, batch_of, keys_of, next_keys, shares_of
from learnax.step.state import TrainState
from learnax.step.training import loss_at, of_all
from learnax.utils import PyTree, is_key, key_data, like_key


class View(NamedTuple):
    """What a probe sees of a training step; the same on all devices, however many there are.

    Attributes:
        params: the parameters before the step.
        grads: gradients of the whole step, before they are clipped; None for each parameter that is frozen.
        updates: what the optimiser adds to the parameters, made of clipped gradients; None as for `grads`. An update
            that is dropped, for a NaN in it, is seen all the same.
        new_params: the parameters after it.
        batch: the data as the dataset gives them, leaves `(batch_size, ...)`; of accumulated batches, the last one.
        outputs: the model's, leaves `(batch_size, ...)`.
        keys: random keys of the data, `(batch_size,)`; of a batched model one for each device, `(devices,)`.
        step: updates made before it.
    """

    params: PyTree
    grads: PyTree
    updates: PyTree
    new_params: PyTree
    batch: PyTree
    outputs: PyTree
    keys: jax.Array
    step: jax.Array


def probe(
    recipe: Recipe,
    unwrap: Callable[[list[Any]], PyTree],
    look: Callable[[View], PyTree],
    live: TrainState | Packed,
    seq: jax.Array,
    batches: PyTree,
    start: jax.Array,
) -> tuple[PyTree]:
    """What a function makes of the step that `learnax.step.train_many` would make of the same arguments.

    Args:
        recipe: what the step is made of.
        unwrap: turns stacked arguments into stacked data as the dataset gives them.
        look: `view -> values`.
        live: the state before; it stays as it is.
        seq: the numbers of the run's random sequence.
        batches: this device's share of n batches, leaves `(n, batch_size // shards, ...)`; or all data, see `Shuffled`.
        start: the step's batch (the first of `accumulate`) among the n.
    """
    state = live.form.whole(live, Form.small) if isinstance(live, Packed) else live
    packing = Packing(split(recipe.optimizer, state.params)[0])
    _, keys = next_keys(jax.random.wrap_key_data(seq), recipe.accumulate, recipe.accumulate)
    batches, start = shares_of(recipe, batches, start, recipe.accumulate)

    def take(number: Any) -> tuple[jax.Array, PyTree]:
        return keys_of(recipe, keys[number]), batch_of(batches, start + number)

    share, outputs = of_all(recipe, packing, True, state, state.params, take)
    value = functools.partial(loss_at, recipe, packing, state, take)
    grads, updates, new_params = looked_into(recipe, packing, state, share, value)
    own, batch = take(recipe.accumulate - 1)
    seen = (unwrap(batch), outputs, own)
    batch, outputs, own = jax.tree.map(functools.partial(_gathered, recipe), seen)
    return (look(View(state.params, grads, updates, new_params, batch, outputs, own, jnp.asarray(state.step))),)


def _gathered(recipe: Recipe, leaf: jax.Array) -> jax.Array:
    """A leaf of the whole batch, from each device's share: where nobody looks at it, the compiler leaves it out."""
    if recipe.shards == 1:
        return leaf
    if is_key(leaf):
        return like_key(leaf, _gathered(recipe, key_data(leaf)))
    return jax.lax.all_gather(leaf, AXIS, tiled=True)
