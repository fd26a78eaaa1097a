"""Losses, metrics and gradients: of one datum, of a device's share, of all devices."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from learnax.loss import Losses, call_loss, loss_key
from learnax.models.linen import apply_model
from learnax.step.recipe import Recipe, mean_over_devices
from learnax.utils import PyTree


class Means(NamedTuple):
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
    if recipe.gather is not None:
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
    means, outputs = own_gradients(recipe, params, keys, batch, step)
    means = mean_over_devices(recipe, means)
    return means.grads, (outputs, means.loss, means.metrics)


def own_gradients(recipe: Recipe, params: PyTree, keys: jax.Array, batch: PyTree, step: Any) -> tuple[Means, Any]:
    """Means over this device's share, before any over the devices; and the outputs."""
    (loss, (outputs, metrics, nan)), grads = jax.value_and_grad(functools.partial(_mean_loss, recipe), has_aux=True)(
        params, keys, batch, step
    )
    # jax.grad of a complex parameter has the imaginary part's sign reversed.
    grads = jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, grads)
    return Means(grads, loss, metrics, nan), outputs


def _mean_loss(
    recipe: Recipe, params: PyTree, keys: jax.Array, batch: PyTree, step: Any
) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array], jax.Array]]:
    """`(loss, (outputs, metrics, part of the data whose loss is NaN))`, of this device's share."""
    outputs, losses, metrics = batch_losses(recipe, params, keys, batch, step)
    nan = jnp.isnan(losses)
    loss = jnp.where(nan, jnp.zeros_like(losses), losses).mean()
    return loss, (outputs, {name: jnp.mean(values) for name, values in metrics.items()}, nan.mean(dtype=jnp.float32))


def _check_scalar(name: str, value: Any) -> None:
    if value is None or jnp.shape(value) != ():
        came = "None" if value is None else f"shape {jnp.shape(value)}"
        raise TypeError(f"{name} of one datum must be a scalar, but has {came}; reduce it, with .mean() for one")
