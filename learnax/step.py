"""The mathematics of a run: pure functions of one device's share, with no I/O and no host.

A batch's leaves have a leading axis; here they are the share of one device, of
`batch_size // shards` data. Random keys are typed JAX keys.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from learnax.loss import Losses, call_loss
from learnax.state import LearningRate, PyTree, TrainState, rate_of
from learnax.utils import leaves_by_path

AXIS = "devices"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that a step is a function of, beside its arrays.

    Attributes:
        model: the flax module.
        losses: `(output, datum[, step]) -> (output, loss, metrics)` for one datum.
        optimizer: the optax transformation.
        learning_rate: what it was built from.
        max_grad: largest global L2 norm of a gradient.
        batch_size: data per step, over all devices.
        shards: devices that a batch is split over.
    """

    model: Any
    losses: Losses
    optimizer: optax.GradientTransformation
    learning_rate: LearningRate
    max_grad: float
    batch_size: int
    shards: int


def apply_model(model: Any, params: PyTree, key: jax.Array, datum: list[Any]) -> Any:
    """The model's output for one datum; every random stream it asks for is drawn from `key`."""
    return model.apply({"params": params}, *datum, rngs={"params": key})


def datum_loss(
    model: Any, losses: Losses, params: PyTree, key: jax.Array, datum: list[Any], step: Any
) -> tuple[Any, jax.Array, dict[str, Any]]:
    """Output, loss and metrics of one datum; a loss or metric that is no scalar is a TypeError."""
    result = call_loss(losses, apply_model(model, params, key, datum), datum, step)
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
    """Outputs, losses and metrics of each datum of a share; a NaN loss counts as 0."""
    per_datum = functools.partial(datum_loss, recipe.model, recipe.losses)
    outputs, losses, metrics = jax.vmap(per_datum, in_axes=(None, 0, 0, None))(params, keys, batch, step)
    return outputs, jnp.where(jnp.isnan(losses), jnp.zeros_like(losses), losses), metrics


def mean_loss(
    recipe: Recipe, params: PyTree, keys: jax.Array, batch: PyTree, step: Any
) -> tuple[jax.Array, tuple[Any, jax.Array, dict[str, jax.Array]]]:
    """`(loss, (outputs, loss, metrics))`: means over a share, outputs of each datum."""
    outputs, losses, metrics = batch_losses(recipe, params, keys, batch, step)
    loss = losses.mean()
    return loss, (outputs, loss, {name: jnp.mean(values) for name, values in metrics.items()})


def gradients(
    recipe: Recipe, params: PyTree, keys: jax.Array, batch: PyTree, step: Any
) -> tuple[PyTree, tuple[Any, jax.Array, dict[str, jax.Array]]]:
    """Gradients of `mean_loss`, with its outputs; all but the outputs are means over the devices."""
    loss = jax.grad(functools.partial(mean_loss, recipe), has_aux=True)
    grads, (outputs, value, metrics) = loss(params, keys, batch, step)
    grads, value, metrics = _mean_over_devices(recipe, (grads, value, metrics))
    return grads, (outputs, value, metrics)


def update(
    recipe: Recipe, state: TrainState, key: jax.Array, batch: PyTree
) -> tuple[TrainState, dict[str, jax.Array], Any]:
    """One guarded update.

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
    keys = _keys(recipe, key)
    grads, (outputs, loss, metrics) = gradients(recipe, state.params, keys, batch, state.step)
    squares = {path: jnp.sum(jnp.square(jnp.abs(g.astype(jnp.float32)))) for path, g in leaves_by_path(grads).items()}
    norm = jnp.sqrt(sum(squares.values(), start=jnp.zeros((), jnp.float32)))
    rate = rate_of(recipe.learning_rate, state.opt_state)
    sound = _sound(grads, norm) & jnp.isfinite(rate)
    new_state = _guarded(recipe, state, _clip(grads, norm, recipe.max_grad), sound)
    scalars = {
        **metrics,
        "loss": loss,
        "gradient norm": norm,
        "has_nan": ~sound,
        "learning_rate": rate,
        **{f"grads/{path}": jnp.sqrt(square) for path, square in squares.items()},
    }
    return new_state, scalars, outputs


def train(
    recipe: Recipe, state: TrainState, seq: jax.Array, batch: PyTree
) -> tuple[TrainState, jax.Array, dict[str, jax.Array], Any]:
    """`update` with the next key of the run's random sequence; also returns the sequence after it."""
    seq, key = jax.random.split(seq)
    state, scalars, outputs = update(recipe, state, key, batch)
    return state, seq, scalars, outputs


def evaluate(
    recipe: Recipe, params: PyTree, step: jax.Array, seq: jax.Array, batch: PyTree, count: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sums of loss and metrics over the first `count` data of a batch, without gradients.

    Args:
        recipe: what the step is made of.
        params: the parameters.
        step: the training step, for schedules in losses.
        seq: the run's random sequence.
        batch: this device's share, filled up to the full size.
        count: data of the whole batch that are real; the rest is padding.

    Returns:
        The random sequence after it (a full batch takes a key from it, a tail does not), and sums
        over all devices.
    """
    after, key = jax.random.split(seq)
    full = count == recipe.batch_size
    # A tail draws from a stream beside the sequence: the sequence is the same with tails as without.
    keys = _keys(recipe, jnp.where(full, key, jax.random.fold_in(key, count)))
    _, losses, metrics = batch_losses(recipe, params, keys, batch, step)
    share = recipe.batch_size // recipe.shards
    real = _shard_index(recipe) * share + jnp.arange(share, dtype=jnp.int32) < count
    sums = {
        name: jnp.where(real, values, jnp.zeros_like(values)).sum()
        for name, values in {**metrics, "loss": losses}.items()
    }
    if recipe.shards > 1:
        sums = jax.lax.psum(sums, AXIS)
    return jnp.where(full, after, seq), sums


def with_axis(function: Callable[[], PyTree]) -> PyTree:
    """Calls a function with the mapped axis named around it, one long: for work outside the programs."""
    results = jax.vmap(lambda _: function(), axis_name=AXIS)(jnp.zeros((1,)))
    return jax.tree.map(lambda x: x[0], results)


def pack(scalars: dict[str, jax.Array]) -> jax.Array:
    """Scalars as one vector, in the dict's order: one transfer instead of many."""
    dtype = jnp.promote_types(jnp.float32, jax.dtypes.canonicalize_dtype(float))
    return jnp.stack([jnp.asarray(value).astype(dtype) for value in scalars.values()])


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


def _clip(grads: PyTree, norm: jax.Array, max_grad: float) -> PyTree:
    scale = jnp.where(norm > max_grad, max_grad / norm, jnp.ones_like(norm))
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)


def _sound(grads: PyTree, norm: jax.Array) -> jax.Array:
    """Whether the clipped gradients are free of NaN.

    A finite norm says so at no cost. An infinite one may only have overflowed, with every gradient
    finite; that is looked at leaf by leaf, in the rare case alone.
    """

    def each_finite() -> jax.Array:
        return functools.reduce(
            jnp.logical_and, [jnp.isfinite(g).all() for g in jax.tree.leaves(grads)], jnp.asarray(True)
        )

    return jax.lax.cond(jnp.isfinite(norm), lambda: jnp.asarray(True), each_finite)


def _guarded(recipe: Recipe, state: TrainState, grads: PyTree, sound: jax.Array) -> TrainState:
    """The update, made or not made: a loop of one trip or none.

    A `where` or `cond` between the old and the new state makes XLA keep both and copy one; a loop
    carries the state in place, so that a donated state is updated in its own buffers. Adam behind a
    finite clipped gradient and a finite rate divides by nothing that can be zero.
    """

    def update(carry: tuple[jax.Array, TrainState]) -> tuple[jax.Array, TrainState]:
        _, (params, opt_state, step) = carry
        with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic is not clean under "strict"
            updates, new_opt_state = recipe.optimizer.update(grads, opt_state, params)
        new = TrainState(optax.apply_updates(params, updates), new_opt_state, step + jnp.ones_like(step))
        return jnp.asarray(False), jax.tree.map(lambda n, old: jnp.asarray(n).astype(old.dtype), new, carry[1])

    return jax.lax.while_loop(lambda carry: carry[0], update, (sound, state))[1]


def _check_scalar(name: str, value: Any) -> None:
    if value is None or jnp.shape(value) != ():
        came = "None" if value is None else f"shape {jnp.shape(value)}"
        raise TypeError(f"{name} of one datum must be a scalar, but has {came}; reduce it, with .mean() for one")
