"""Evaluation: sums of losses and metrics over batches, without gradients."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from learnax.metrics import Amount, Max, Mean, Min, Sum, terms_of
from learnax.step.amounts import Part, Parts, over_devices, reduced
from learnax.step.gradients import batch_losses
from learnax.step.many import many
from learnax.step.recipe import Recipe, batch_of, keys_of, shard_index, wide, with_axis
from learnax.step.scalars import Scalars
from learnax.step.scaling import inner
from learnax.step.state import TrainState
from learnax.utils import PyTree


def evaluated(params: PyTree, state: TrainState) -> TrainState:
    """A state as evaluation sees it: some parameters, what the model carries on, and nothing of the optimiser."""
    return TrainState(params, (), state.step, inner(state.model_state))


def evaluate(
    recipe: Recipe, state: TrainState, seq: jax.Array, batches: PyTree, index: jax.Array, size: jax.Array
) -> tuple[jax.Array, Scalars]:
    """Sums of loss and metrics over the data of a batch, without gradients.

    Args:
        recipe: what the step is made of.
        state: see `evaluated`.
        seq: the run's random sequence.
        batches: this device's share of n batches, the last filled up to the full size.
        index: the batch among the n.
        size: data of all n batches that are real; the rest is padding.

    Returns:
        The random sequence after it (a full batch takes a key from it, a tail does not), and the parts of loss and
        metrics over all devices, one row; their names are `Part`s. A NaN stays a NaN.
    """
    left = size - index * recipe.batch_size
    after, keys = keys_of_left(recipe, seq, left)
    losses, metrics = _evaluated(recipe, state, keys, batch_of(batches, index))
    share = recipe.batch_size // recipe.shards
    real = shard_index(recipe) * share + jnp.arange(share, dtype=jnp.int32) < left
    parts = over_devices(recipe, _parts({**metrics, "loss": losses}, share, real if recipe.by_datum else None))
    return after, Scalars.row(_exact(parts))


def keys_of_left(recipe: Recipe, seq: jax.Array, left: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The random sequence after a batch, and this device's keys for it; it is a tail where fewer data are left."""
    after, key = jax.random.split(seq)
    full = left >= recipe.batch_size
    # A tail draws from a key beside the sequence, so that the sequence is the same with tails as without.
    keys = keys_of(recipe, jnp.where(full, key, jax.random.fold_in(key, left)))
    return jnp.where(full, after, seq), keys


def evaluate_tail(
    recipe: Recipe, mapped: bool, size: int, state: TrainState, seq: jax.Array, batches: PyTree, index: jax.Array
) -> tuple[Scalars]:
    """`evaluate` of a tail by losses that see a whole share: of its real data alone, by all devices together.

    Args:
        recipe: what the step is made of.
        mapped: whether user code names the axis over the devices.
        size: data of the tail.
        state: see `evaluate`.
        seq: see `evaluate`.
        batches: whole batches, as for `evaluate`.
        index: the tail's batch among them.
    """
    key = jax.random.split(seq)[1]
    batch = jax.tree.map(lambda leaf: leaf[:size], batch_of(batches, index))
    recipe = dataclasses.replace(recipe, shards=1, batch_size=size)

    def evaluated() -> tuple[Any, dict[str, Any]]:
        return _evaluated(recipe, state, keys_of(recipe, jax.random.fold_in(key, size)), batch)

    losses, metrics = with_axis(evaluated) if mapped else evaluated()
    row = Scalars.row(_exact(_parts({**metrics, "loss": losses}, size, None)))
    return (Scalars(row.names, row.values[None]),)


def _evaluated(recipe: Recipe, state: TrainState, keys: jax.Array, batch: PyTree) -> tuple[Any, dict[str, Any]]:
    _, losses, metrics, _ = batch_losses(
        recipe, state.params, state.model_state, keys, batch, state.step, training=False
    )
    return losses, metrics


_DIGIT, _DIGITS = 11, 3
"""Whole numbers are summed in digits of so many bits: of up to 2**20 data each sum fits into an int32."""


def _parts(values: Mapping[str, Any], share: int, real: jax.Array | None) -> Parts:
    """What the values of a share come to, as numbers whose sums are accurate.

    Args:
        values: loss and metrics, `(share,)`, or of the whole share.
        share: data in it.
        real: which of the data count; None where all do.
    """
    parts: Parts = {}
    for name, value in values.items():
        for term, amount in enumerate(terms_of(value)):
            parts |= _sums(name, term, _real(amount, real), share)
    return parts


def _real(amount: Any, real: jax.Array | None) -> Any:
    """An amount in which padding counts as nothing."""
    if real is None:
        return amount
    neutral = {Max: -jnp.inf, Min: jnp.inf}.get(type(amount), 0)
    keep = lambda x: jnp.where(real, x, jnp.full_like(x, neutral))  # noqa: E731
    if isinstance(amount, Mean):
        # A weight that is the same for each of the data comes as one number.
        return Mean(keep(amount.total), keep(jnp.broadcast_to(amount.weight, amount.total.shape)))
    return jax.tree.map(keep, amount)


def _sums(name: str, term: int, amount: Any, share: int) -> Parts:
    if isinstance(amount, (Mean, Max, Min)):
        return {Part(name, how, term): number for how, number in reduced(amount).items()}
    how = "sum" if isinstance(amount, Sum) else "data"
    values = amount.total if isinstance(amount, Sum) else amount
    assert not isinstance(values, Amount)
    if how == "data" and not values.ndim:  # the mean of the share
        return {Part(name, how, term): values.astype(wide(values.dtype)) * share}
    return {Part(name, how, term, unit): number.sum() for unit, number in _digits(values).items()}


def _digits(values: jax.Array) -> dict[int, jax.Array]:
    """Values of each datum as numbers whose sums are accurate, by what each counts.

    Half precision is made wide. Whole numbers, exact beyond what float32 holds, are taken apart into digits; where
    there are 64 bits, those hold them.
    """
    if jnp.issubdtype(values.dtype, jnp.inexact):
        return {1: values.astype(wide(values.dtype))}
    if jax.dtypes.canonicalize_dtype(int) == jnp.int64:
        return {1: values.astype(jnp.int64)}
    whole = jnp.uint32 if values.dtype == jnp.uint32 else jnp.int32
    number = values.astype(whole)
    places = [(number >> whole(_DIGIT * place)) for place in range(_DIGITS)]
    digits = [(part & whole((1 << _DIGIT) - 1)).astype(jnp.int32) for part in places[:-1]]
    digits.append(places[-1].astype(jnp.int32))  # with the sign
    return {1 << _DIGIT * place: digit for place, digit in enumerate(digits)}


def _exact(sums: Parts) -> Parts:
    """The same sums in numbers that a row of float32 holds exactly: an int32 in two halves."""
    exact: Parts = {}
    for part, value in sums.items():
        if value.dtype == jnp.int32:
            exact[part], exact[part._replace(unit=part.unit << 16)] = value & 0xFFFF, value >> 16
        else:
            exact[part] = value
    return exact


def evaluate_many(
    recipe: Recipe,
    room: int,
    state: TrainState,
    seq: jax.Array,
    batches: PyTree,
    count: jax.Array,
    size: jax.Array,
) -> tuple[jax.Array, Scalars]:
    """`evaluate` for the first `count` of n batches, 1 to `room`; a row of parts for each."""
    batch_sums = jax.jit(functools.partial(evaluate, recipe), inline=True)

    def one(seq: jax.Array, number: Any) -> tuple[jax.Array, Scalars, None]:
        return *batch_sums(state, seq, batches, number, size), None

    seq, scalars, _ = many(one, room, seq, count)
    return seq, scalars
