"""The mathematics of a run: pure functions of one device's share, with no I/O and no host.

A batch's leaves have a leading axis; here they are the share of one device, of
`batch_size // shards` data. Random keys are typed JAX keys.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from learnax.loss import Losses, call_loss, loss_key
from learnax.packing import Packing
from learnax.state import LearningRate, PyTree, TrainState, last_rate, next_rate
from learnax.streams import asked_streams, lifted_streams, rngs_of

AXIS = "devices"
NAN_DATA = "nan_data"
"""The metric that says of how many data the loss is NaN."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that a step is a function of, beside its arrays.

    Attributes:
        model: the flax module.
        losses: `(output, datum[, step]) -> (output, loss, metrics)` for one datum.
        optimizer: the optax transformation.
        learning_rate: what it was built from.
        max_grad: largest global L2 norm of a gradient.
        batch_size: data per batch, over all devices.
        shards: devices that a batch is split over.
        accumulate: batches whose gradients are averaged before an update.
        trusted: whether finite gradients and a finite rate make a finite update, as with Adam behind a clip.
        looped: whether the model is as fast inside a loop as outside.
        streams: random streams of the model that get a key of their own, see `learnax.streams.lifted_streams`.
        gather: makes whole parameters for the loss of those that the state has, where they are divided over devices.
    """

    model: Any
    losses: Losses
    optimizer: optax.GradientTransformation
    learning_rate: LearningRate
    max_grad: float
    batch_size: int
    shards: int
    accumulate: int = 1
    trusted: bool = True
    looped: bool = True
    streams: tuple[str, ...] = ()
    gather: Callable[[PyTree], PyTree] = lambda params: params


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Scalars:
    """Scalars in one array, with a name for each column: one transfer instead of many.

    Attributes:
        names: of the columns; those of an evaluation are pairs, see `evaluate`.
        values: `(n, len(names))`, a row for each step.
    """

    names: tuple[Any, ...]
    values: Any

    @classmethod
    def row(cls, scalars: Mapping[Any, jax.Array]) -> Scalars:
        """One row, `values` of shape `(len(names),)`."""
        dtype = jnp.promote_types(jnp.float32, jax.dtypes.canonicalize_dtype(float))
        values = jnp.stack([jnp.asarray(value).astype(dtype) for value in scalars.values()])
        return cls(tuple(scalars), values)

    def tree_flatten(self) -> tuple[tuple[Any], tuple[Any, ...]]:
        """The array, and the names as part of the structure."""
        return (self.values,), self.names

    @classmethod
    def tree_unflatten(cls, names: tuple[Any, ...], children: tuple[Any]) -> Scalars:
        """The inverse."""
        return cls(names, *children)


def apply_model(
    model: Any, params: PyTree, key: jax.Array, datum: list[Any], streams: tuple[str, ...] | None = None
) -> Any:
    """The model's output for one datum; every random stream it asks for is drawn from `key`.

    Args:
        model: the flax module.
        params: its parameters.
        key: of this datum.
        datum: the module's arguments.
        streams: those that get a key of their own; None finds out, at the price of tracing the module again.
    """
    if streams is None:
        streams = lifted_streams(model, params, datum, asked_streams(model, params, datum)[0])
    return model.apply({"params": params}, *datum, rngs=rngs_of(key, streams))


def datum_loss(
    model: Any,
    losses: Losses,
    params: PyTree,
    key: jax.Array,
    datum: list[Any],
    step: Any,
    streams: tuple[str, ...] = (),
) -> tuple[Any, jax.Array, dict[str, Any]]:
    """Output, loss and metrics of one datum; a loss or metric that is no scalar is a TypeError."""
    output = apply_model(model, params, key, datum, streams)
    result = call_loss(losses, output, datum, step, loss_key(losses, key))
    if not isinstance(result, tuple) or len(result) != 3:
        raise TypeError(f"losses must return (output, loss, metrics), but returned {type(result).__name__}")
    output, loss, metrics = result
    _check_scalar("the loss", loss)
    for name, value in metrics.items():
        _check_scalar(f"metric {name!r}", value)
    return output, jnp.asarray(loss), dict(metrics)


def batch_losses(
    recipe: Recipe, params: PyTree, keys: jax.Array, batch: PyTree, step: Any
) -> tuple[Any, jax.Array, dict[str, jax.Array]]:
    """Outputs, losses and metrics of each datum of a share, as they are: a NaN is a NaN."""
    per_datum = functools.partial(datum_loss, recipe.model, recipe.losses, streams=recipe.streams)
    params = recipe.gather(params)
    return jax.vmap(per_datum, in_axes=(None, 0, 0, None))(params, keys, batch, step)


def mean_loss(
    recipe: Recipe, params: PyTree, keys: jax.Array, batch: PyTree, step: Any
) -> tuple[jax.Array, tuple[Any, jax.Array, dict[str, jax.Array]]]:
    """`(loss, (outputs, loss, metrics))`: means over a share, outputs of each datum; a NaN loss counts as 0."""
    loss, (outputs, metrics, _) = _mean_loss(recipe, params, keys, batch, step)
    return loss, (outputs, loss, metrics)


def gradients(
    recipe: Recipe, params: PyTree, keys: jax.Array, batch: PyTree, step: Any
) -> tuple[PyTree, tuple[Any, jax.Array, dict[str, jax.Array]]]:
    """Gradients of `mean_loss`, with its outputs; all but the outputs are means over the devices.

    Of a complex parameter it is the conjugate of `jax.grad`'s: the direction of steepest ascent, as optax expects.
    """
    means, outputs = _own_gradients(recipe, params, keys, batch, step)
    means = _mean_over_devices(recipe, means)
    return means.grads, (outputs, means.loss, means.metrics)


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
    means, outputs = _own_gradients(recipe, state.params, _keys(recipe, key), batch, state.step)
    means = _mean_over_devices(recipe, means._replace(grads=packing.pack(means.grads)))
    state, scalars = _apply(recipe, packing, state, means)
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
        batch = _batch(batches, index + number)
        means, outputs = _own_gradients(recipe, state.params, _keys(recipe, keys[number]), batch, state.step)
        return means._replace(grads=packing.pack(means.grads)), outputs if with_outputs else None

    if recipe.accumulate == 1:
        means, outputs = own(0)
    else:

        def add(number: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            means, outputs = own(number)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype) / recipe.accumulate, carry[0], means), outputs

        like, outputs = jax.eval_shape(own, index)
        outputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)
        # Wide: in half precision, the small part that each batch adds would be lost beside the sum.
        sums = jax.tree.map(lambda x: jnp.zeros(x.shape, _wide(x.dtype)), like)
        sums, outputs = jax.lax.fori_loop(0, recipe.accumulate, add, (sums, outputs), unroll=not recipe.looped)
        means = jax.tree.map(lambda x, like: x.astype(like.dtype), sums, like)
    state, scalars = _apply(recipe, packing, state, _mean_over_devices(recipe, means))
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
    # The default optimiser treats each element alone; of another one nobody knows. Of one step it is not worth it.
    packing = Packing(state.params, moments=recipe.trusted and room > 1)
    # Traced once, for its shapes and for the loop.
    one = jax.jit(functools.partial(train, recipe, packing, with_outputs), inline=True)
    seq, keys = _next_keys(seq, count * recipe.accumulate, room * recipe.accumulate)
    if room == 1:
        state, row, outputs = one(state, keys, batches, start)
        return state, seq, Scalars(row.names, row.values[None]), outputs
    given = state.opt_state
    state = state._replace(opt_state=packing.pack_moments(given))
    _, row, outputs = jax.eval_shape(one, state, keys, batches, start)
    rows = jnp.zeros((room, len(row.names)), row.values.dtype)
    outputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)

    def body(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        state, rows, _ = carry
        own = jax.lax.dynamic_slice_in_dim(keys, i * recipe.accumulate, recipe.accumulate)
        state, row, outputs = one(state, own, batches, start + i * recipe.accumulate)
        return state, jax.lax.dynamic_update_index_in_dim(rows, row.values, i, 0), outputs

    state, rows, outputs = jax.lax.fori_loop(0, count, body, (state, rows, outputs))
    state = state._replace(opt_state=packing.unpack_moments(state.opt_state, given))
    return state, seq, Scalars(row.names, rows), outputs


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
    # A tail draws from a stream beside the sequence: the sequence is the same with tails as without.
    keys = _keys(recipe, jnp.where(full, key, jax.random.fold_in(key, left)))
    _, losses, metrics = batch_losses(recipe, params, keys, _batch(batches, index), step)
    share = recipe.batch_size // recipe.shards
    real = _shard_index(recipe) * share + jnp.arange(share, dtype=jnp.int32) < left
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
        return {(name, 1): values.astype(_wide(values.dtype))}
    if jax.dtypes.canonicalize_dtype(int) == jnp.int64:
        return {(name, 1): values.astype(jnp.int64)}
    wide = jnp.uint32 if values.dtype == jnp.uint32 else jnp.int32
    number = values.astype(wide)
    places = [(number >> wide(_DIGIT * place)) for place in range(_DIGITS)]
    digits = [(part & wide((1 << _DIGIT) - 1)).astype(jnp.int32) for part in places[:-1]]
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
    one = jax.jit(functools.partial(evaluate, recipe), inline=True)
    if room == 1:
        seq, row = one(params, step, seq, batches, jnp.int32(0), size)
        return seq, Scalars(row.names, row.values[None])
    row = jax.eval_shape(one, params, step, seq, batches, jnp.int32(0), size)[1]
    rows = jnp.zeros((room, len(row.names)), row.values.dtype)

    def body(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        seq, rows = carry
        seq, row = one(params, step, seq, batches, i, size)
        return seq, jax.lax.dynamic_update_index_in_dim(rows, row.values, i, 0)

    seq, rows = jax.lax.fori_loop(0, count, body, (seq, rows))
    return seq, Scalars(row.names, rows)


def with_axis(function: Callable[[], PyTree]) -> PyTree:
    """Calls a function with the mapped axis named around it, one long: for work outside the programs."""
    results = jax.vmap(lambda _: function(), axis_name=AXIS)(jnp.zeros((1,)))
    return jax.tree.map(lambda x: x[0], results)


def _batch(batches: PyTree, index: Any) -> PyTree:
    """One of n batches; beyond the last it goes on at the first."""

    def take(leaf: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(leaf, index % leaf.shape[0], keepdims=False)

    return jax.tree.map(take, batches)


class _Means(NamedTuple):
    """Means over data.

    Attributes:
        grads: gradients, packed or not.
        loss: the loss, a NaN counted as 0.
        metrics: by name.
        nan: the part of the data whose loss is NaN.
    """

    grads: PyTree
    loss: jax.Array
    metrics: dict[str, jax.Array]
    nan: jax.Array


def _mean_loss(
    recipe: Recipe, params: PyTree, keys: jax.Array, batch: PyTree, step: Any
) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array], jax.Array]]:
    """`(loss, (outputs, metrics, part of the data whose loss is NaN))`, of this device's share."""
    outputs, losses, metrics = batch_losses(recipe, params, keys, batch, step)
    nan = jnp.isnan(losses)
    loss = jnp.where(nan, jnp.zeros_like(losses), losses).mean()
    return loss, (outputs, {name: jnp.mean(values) for name, values in metrics.items()}, nan.mean(dtype=jnp.float32))


def _own_gradients(recipe: Recipe, params: PyTree, keys: jax.Array, batch: PyTree, step: Any) -> tuple[_Means, Any]:
    """Means over this device's share, before any over the devices; and the outputs."""
    (loss, (outputs, metrics, nan)), grads = jax.value_and_grad(functools.partial(_mean_loss, recipe), has_aux=True)(
        params, keys, batch, step
    )
    # jax.grad of a complex parameter points down, in its imaginary part.
    grads = jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, grads)
    return _Means(grads, loss, metrics, nan), outputs


def _apply(
    recipe: Recipe, packing: Packing, state: TrainState, means: _Means
) -> tuple[TrainState, dict[str, jax.Array]]:
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
        # Its updates are made twice, to be looked at before they touch the state: cheaper than a second state.
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
        if _wide(leaf.dtype) == leaf.dtype:
            return jnp.asarray(True)
        return (jnp.isfinite(after) | ~jnp.isfinite(leaf)).all()

    kept = jax.tree.map(stays, params, _applied(params, updates))
    return functools.reduce(jnp.logical_and, jax.tree.leaves(kept), jnp.asarray(True))


def _applied(params: PyTree, updates: PyTree) -> PyTree:
    """Parameters after updates, of the types that they have; updates of half-precision parameters may be wider."""
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates)


def _wide(dtype: Any) -> Any:
    """The type that sums of such numbers are kept in: float32 at least."""
    return jnp.float32 if jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4 else dtype


def _next_keys(seq: jax.Array, count: Any, room: int) -> tuple[jax.Array, jax.Array]:
    """The random sequence after `count` keys were taken from it, and those keys, with room for more.

    All at once, before they are used: on a CPU, a split amid a step's other work cost 10 µs, here 1.5.
    """
    if room == 1:
        seq, key = jax.random.split(seq)
        return seq, key[None]

    def body(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        seq, key = jax.random.split(carry[0])
        return seq, jax.lax.dynamic_update_index_in_dim(carry[1], key, i, 0)

    return jax.lax.fori_loop(0, count, body, (seq, jnp.broadcast_to(seq, (room,))))


def _shard_index(recipe: Recipe) -> Any:
    return jax.lax.axis_index(AXIS) if recipe.shards > 1 else 0


def _keys(recipe: Recipe, key: jax.Array) -> jax.Array:
    """This device's share of one key per datum: the same keys on any number of devices."""
    keys = jax.random.split(key, recipe.batch_size)
    if recipe.shards == 1:
        return keys
    return keys.reshape(recipe.shards, -1)[_shard_index(recipe)]


def _mean_over_devices(recipe: Recipe, tree: PyTree) -> PyTree:
    return jax.lax.pmean(tree, AXIS) if recipe.shards > 1 else tree


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
    grads = [(g.astype(_wide(g.dtype)) * scale.astype(_wide(g.dtype))).astype(g.dtype) for g in grads]
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
        new = TrainState(_applied(old.params, updates), opt_state, old.step + jnp.ones_like(old.step))
        return jnp.asarray(False), jax.tree.map(lambda n, o: jnp.asarray(n).astype(o.dtype), new, old)

    return jax.lax.while_loop(lambda carry: carry[0], update, (sound, state))[1]


def _check_scalar(name: str, value: Any) -> None:
    if value is None or jnp.shape(value) != ():
        came = "None" if value is None else f"shape {jnp.shape(value)}"
        raise TypeError(f"{name} of one datum must be a scalar, but has {came}; reduce it, with .mean() for one")
