"""Evaluation: sums of losses and metrics over batches, without gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from learnax.step.gradients import batch_losses
from learnax.step.many import many
from learnax.step.recipe import AXIS, Recipe, batch_of, keys_of, shard_index, wide
from learnax.step.scalars import Scalars
from learnax.utils import PyTree


def evaluate(
    recipe: Recipe, params: PyTree, step: jax.Array, seq: jax.Array, batches: PyTree, index: jax.Array, size: jax.Array
) -> tuple[jax.Array, Scalars]:
    """Sums of loss and metrics over the data of a batch, without gradients.

    Args:
        recipe: what the step is made of.
        params: the parameters.
        step: the training step, for schedules in losses.
        seq: the run's random sequence.
        batches: this device's share of n batches, the last filled up to the full size.
        index: the batch among the n.
        size: data of all n batches that are real; the rest is padding.

    Returns:
        The random sequence after it (a full batch takes a key from it, a tail does not), and sums
        over all devices, one row: names are pairs of a metric and what its number counts, so that the
        sum of products is the metric's sum. A NaN stays a NaN.
    """
    after, key = jax.random.split(seq)
    left = size - index * recipe.batch_size
    full = left >= recipe.batch_size
    # A tail draws from a key beside the sequence, so that the sequence is the same with tails as without.
    keys = keys_of(recipe, jnp.where(full, key, jax.random.fold_in(key, left)))
    _, losses, metrics = batch_losses(recipe, params, keys, batch_of(batches, index), step)
    share = recipe.batch_size // recipe.shards
    real = shard_index(recipe) * share + jnp.arange(share, dtype=jnp.int32) < left
    sums = {
        name: jnp.where(real, part, jnp.zeros_like(part)).sum()
        for metric, values in {**metrics, "loss": losses}.items()
        for name, part in _parts(metric, values).items()
    }
    if recipe.shards > 1:
        sums = jax.lax.psum(sums, AXIS)
    return jnp.where(full, after, seq), Scalars.row(_exact(sums))


_DIGIT, _DIGITS = 11, 3
"""Whole numbers are summed in digits of so many bits: of up to 2**20 data each sum fits into an int32."""


def _parts(name: str, values: jax.Array) -> dict[tuple[str, int], jax.Array]:
    """A metric of each datum as numbers whose sums are accurate, by what each counts.

    Half precision is made wide. Whole numbers, exact beyond what float32 holds, are taken apart into digits; where
    there are 64 bits, those hold them.
    """
    if jnp.issubdtype(values.dtype, jnp.inexact):
        return {(name, 1): values.astype(wide(values.dtype))}
    if jax.dtypes.canonicalize_dtype(int) == jnp.int64:
        return {(name, 1): values.astype(jnp.int64)}
    whole = jnp.uint32 if values.dtype == jnp.uint32 else jnp.int32
    number = values.astype(whole)
    places = [(number >> whole(_DIGIT * place)) for place in range(_DIGITS)]
    digits = [(part & whole((1 << _DIGIT) - 1)).astype(jnp.int32) for part in places[:-1]]
    digits.append(places[-1].astype(jnp.int32))  # with the sign
    return {(name, 1 << _DIGIT * place): digit for place, digit in enumerate(digits)}


def _exact(sums: dict[tuple[str, int], jax.Array]) -> dict[tuple[str, int], jax.Array]:
    """The same sums in numbers that a row of float32 holds exactly: an int32 in two halves."""
    exact: dict[tuple[str, int], jax.Array] = {}
    for (name, unit), value in sums.items():
        if value.dtype == jnp.int32:
            exact[name, unit], exact[name, unit << 16] = value & 0xFFFF, value >> 16
        else:
            exact[name, unit] = value
    return exact


def evaluate_many(
    recipe: Recipe,
    room: int,
    params: PyTree,
    step: jax.Array,
    seq: jax.Array,
    batches: PyTree,
    count: jax.Array,
    size: jax.Array,
) -> tuple[jax.Array, Scalars]:
    """`evaluate` for the first `count` of n batches, 1 to `room`; a row of sums for each."""
    batch_sums = jax.jit(functools.partial(evaluate, recipe), inline=True)

    def one(seq: jax.Array, number: Any) -> tuple[jax.Array, Scalars, None]:
        return *batch_sums(params, step, seq, batches, number, size), None

    seq, scalars, _ = many(one, room, seq, count)
    return seq, scalars
