"""Training: one guarded update from a batch, and many of them in one program."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from learnax.step.amounts import added, nothing, told_loss
from learnax.step.gradients import Share, loss_weights, of_all_devices, own_gradients
from learnax.step.guard import apply, treats_elements_alone
from learnax.step.many import many
from learnax.step.packed import Packed
from learnax.step.packing import Packing
from learnax.step.patterns import split
from learnax.step.recipe import Recipe, batch_of, keys_of, next_keys, shares_of, sum_over_devices, wide
from learnax.step.scalars import Names, Scalars
from learnax.step.scaling import followed, inner
from learnax.step.state import TrainState
from learnax.utils import PyTree

Take = Callable[[Any], tuple[jax.Array, PyTree]]
"""The key and this device's share of an accumulated batch, by its number."""


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
    recipe = recipe.of_one_batch()
    packing = Packing(split(recipe.optimizer, state.params)[0])
    state, scalars, outputs = _step(recipe, packing, True, state, lambda number: (keys_of(recipe, key), batch))
    values = {name: value for name, value in scalars.items() if isinstance(name, str)}
    norms = ((names, vector) for names, vector in scalars.items() if isinstance(names, Names))
    values |= {name: norm for names, vector in norms for name, norm in zip(names, vector, strict=True)}
    return state, values, outputs


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

    def take(number: Any) -> tuple[jax.Array, PyTree]:
        batch = batch_of(batches, index + number)
        return keys_of(recipe, keys[number]), batch

    state, scalars, outputs = _step(recipe, packing, with_outputs, state, take)
    return state, Scalars.row(scalars), outputs


def _step(
    recipe: Recipe, packing: Packing, with_outputs: bool, state: TrainState, take: Take
) -> tuple[TrainState, dict[Any, jax.Array], Any]:
    """One guarded update from the batches that `take` gives."""
    params = packing.unpack(state.params) if packing.params else state.params
    share, outputs = of_all(recipe, packing, with_outputs, state, params, take)
    value = functools.partial(loss_at, recipe, packing, state, take)
    state, scalars = apply(recipe, packing, state, share, value)
    return state, scalars, outputs


def of_all(
    recipe: Recipe, packing: Packing, with_outputs: bool, state: TrainState, params: PyTree, take: Take
) -> tuple[Share, Any]:
    """What all accumulated batches come to on all devices, with packed gradients; and the last one's outputs."""

    def own(number: Any, model_state: PyTree, weights: Any = None) -> tuple[Share, Any]:
        keys, batch = take(number)
        share, outputs = own_gradients(recipe, params, model_state, keys, batch, state.step, weights)
        return share._replace(grads=packing.pack(share.grads)), outputs if with_outputs else None

    if recipe.accumulate == 1:
        share, outputs = own(0, state.model_state)
        return of_all_devices(recipe, share), outputs

    weights = _all_weights(recipe, state, params, take) if recipe.weighted else None

    def add(number: Any, carry: tuple[Share, Any]) -> tuple[Share, Any]:
        sums = carry[0]
        # Each batch sees what the model carried on from the one before.
        more, outputs = own(number, followed(recipe, state.model_state, sums.model_state), weights)
        factor = 1 if recipe.weighted else recipe.accumulate
        grads = jax.tree.map(lambda a, b: a + b.astype(a.dtype) / factor, sums.grads, more.grads)
        nan = sums.nan + more.nan / recipe.accumulate
        return Share(grads, added(recipe, sums.parts, more.parts), nan, more.model_state), outputs

    like, outputs = jax.eval_shape(own, jnp.int32(0), state.model_state, weights)
    outputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)
    sums = Share(
        # In float32: in half precision, what each batch adds would be rounded away beside the sum.
        jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), like.grads),
        {part: nothing(part, number) for part, number in like.parts.items()},
        jnp.zeros(like.nan.shape, like.nan.dtype),
        inner(state.model_state),
    )
    sums, outputs = jax.lax.fori_loop(0, recipe.accumulate, add, (sums, outputs), unroll=not recipe.looped)
    grads, parts, nan = jax.tree.map(lambda x, like: x.astype(like.dtype), sums[:-1], like[:-1])
    return of_all_devices(recipe, Share(grads, parts, nan, sums.model_state)), outputs


def _all_weights(recipe: Recipe, state: TrainState, params: PyTree, take: Take) -> Any:
    """The weights of the loss's terms over all accumulated batches and devices: what each gradient is divided by."""

    def own(number: Any) -> Any:
        keys, batch = take(number)
        return loss_weights(recipe, params, state.model_state, keys, batch, state.step)

    def add(number: Any, sums: Any) -> Any:
        return jax.tree.map(jnp.add, sums, own(number))

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(own, jnp.int32(0)))
    return sum_over_devices(recipe, jax.lax.fori_loop(0, recipe.accumulate, add, zeros))


def loss_at(recipe: Recipe, packing: Packing, state: TrainState, take: Take) -> Callable[[PyTree], jax.Array]:
    """The step's loss as a function of what is trained, for optimisers that ask for it.

    Its gradient is that of the whole step, over accumulated batches and devices.
    """
    whole = split(recipe.optimizer, state.params)[1]

    def shares(trained: PyTree) -> Share:
        return of_all(recipe, packing, False, state, whole(trained), take)[0]

    def plain(trained: PyTree) -> jax.Array:
        return told_loss(shares(trained).parts)

    def forward(trained: PyTree) -> tuple[jax.Array, PyTree]:
        return plain(trained), trained

    def backward(trained: PyTree, cotangent: jax.Array) -> tuple[PyTree]:
        grads = packing.unpack(shares(trained).grads)
        return (jax.tree.map(lambda g: (g * cotangent).astype(g.dtype), grads),)

    loss = jax.custom_vjp(plain)
    loss.defvjp(forward, backward)
    return loss


def train_many(
    recipe: Recipe,
    room: int,
    with_outputs: bool,
    live: TrainState | Packed,
    seq: jax.Array,
    batches: PyTree,
    start: jax.Array,
    count: jax.Array,
) -> tuple[TrainState | Packed, jax.Array, Scalars, Any]:
    """Training steps, as many as `count` says, in one loop: the same program and the same bits however they are cut.

    Args:
        recipe: what the step is made of.
        room: steps at most; with a room of one there is no loop.
        with_outputs: whether the outputs of the last step are given, or None.
        live: the state before; packed where `packs` says so.
        seq: the numbers of the run's random sequence.
        batches: this device's share of n batches, leaves `(n, batch_size // shards, ...)`; or `Shuffled` data.
        start: the first step's batch among the n.
        count: steps, 1 to `room`.

    Returns:
        `(live, seq, scalars, outputs)`: the sequence after the steps; `room` rows of scalars, of which the
        first `count` are meant; the outputs of the last step.
    """
    packing, state, after = _taken(recipe, room, live)
    # A jitted function is traced once, for both uses below: its shapes, and the loop.
    step = jax.jit(functools.partial(train, recipe, packing, with_outputs), inline=True)
    sequence, keys = next_keys(jax.random.wrap_key_data(seq), count * recipe.accumulate, room * recipe.accumulate)
    batches, start = shares_of(recipe, batches, start, room * recipe.accumulate)

    def one(state: TrainState, number: Any) -> tuple[TrainState, Scalars, Any]:
        first = number * recipe.accumulate
        own = keys if room == 1 else jax.lax.dynamic_slice_in_dim(keys, first, recipe.accumulate)
        return step(state, own, batches, start + first)

    state, scalars, outputs = many(one, room, state, count)
    return after(state), jax.random.key_data(sequence), scalars, outputs


def _taken(
    recipe: Recipe, room: int, live: TrainState | Packed
) -> tuple[Packing, TrainState, Callable[[TrainState], TrainState | Packed]]:
    """How a program packs gradients and moments, the state so packed, and what makes it like the given one again."""
    if isinstance(live, Packed):
        form, state = live.form, live.opened()
        packing = form.packing.at(state.step)
        if room == 1:
            return packing, state, form.close
        # In a loop the model would take its parameters out of their vector in each turn.
        plain = form.with_params(packing.unpack, state)

        def close(state: TrainState) -> Packed:
            return form.close(form.with_params(form.packing.pack, state))

        return Packing(plain.params, moments=True, step=state.step), plain, close
    # Moments can be packed where the optimiser treats each element alone. For a single step, packing costs more than
    # it saves.
    apart = room == 1 and recipe.shards == 1 and not recipe.selects
    trained, _ = split(recipe.optimizer, live.params)
    # On other devices than a CPU, whose compilers do not gain, a branch is one that the host waits for.
    step = None if recipe.selects else live.step
    moments = room > 1 and treats_elements_alone(recipe, live)
    packing = Packing(trained, moments=moments, apart=apart, step=step, aligned=recipe.selects)
    given = live.opt_state

    def unpacked(state: TrainState) -> TrainState:
        return state._replace(opt_state=packing.unpack_moments(state.opt_state, given))

    return packing, live._replace(opt_state=packing.pack_moments(given)), unpacked
