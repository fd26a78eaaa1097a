"""Losses, metrics and gradients: of one datum, of a device's share, of all devices."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from learnax.loss import Losses, call_loss, loss_key
from learnax.metrics import Amount, Mean, Sum, terms_of
from learnax.models import BATCH_AXIS, Model
from learnax.step.amounts import (
    Part,
    Parts,
    as_arrays,
    finished,
    over_devices,
    quotient,
    reduced,
    share_parts,
    weight_of,
)
from learnax.step.patterns import split
from learnax.step.recipe import (
    Recipe,
    alike_over_devices,
    mean_over_devices,
    sum_over_devices,
    wide,
)
from learnax.step.scaling import inner
from learnax.utils import PyTree


class Share(NamedTuple):
    """What a share of a batch comes to, or several together.

    Attributes:
        grads: gradients of what is trained, packed or not.
        parts: of loss and metrics.
        nan: the part of the data whose loss is NaN.
        model_state: what the model carries on.
    """

    grads: PyTree
    parts: Parts
    nan: jax.Array
    model_state: PyTree


Seen = tuple[Any, Any, dict[str, Any], PyTree]
"""Output, loss and metrics, and what the model carries on."""


def datum_loss(
    model: Model,
    losses: Losses,
    params: PyTree,
    model_state: PyTree,
    key: jax.Array,
    datum: list[Any],
    step: Any,
    *,
    training: bool = True,
) -> Seen:
    """Output, loss and metrics of one datum; a loss or metric that is no scalar is a TypeError."""
    output, after = model.apply(params, model_state, key, *datum, training=training)
    result = call_loss(losses, output, datum, step, loss_key(losses, key))
    if not isinstance(result, tuple) or len(result) != 3:
        raise TypeError(f"losses must return (output, loss, metrics), but returned {type(result).__name__}")
    output, loss, metrics = result
    _check_scalar("the loss", loss)
    for name, value in metrics.items():
        _check_scalar(f"metric {name!r}", value)
    return output, as_arrays(loss), {name: as_arrays(value) for name, value in metrics.items()}, after


def share_loss(
    model: Model,
    losses: Losses,
    params: PyTree,
    model_state: PyTree,
    key: jax.Array,
    batch: list[Any],
    step: Any,
    *,
    training: bool = True,
) -> Seen:
    """The same of a share, for a model that sees all of it; a loss or metric is `(n,)`, or one for the whole share."""
    output, after = model.apply(params, model_state, key, *batch, training=training)
    output, loss, metrics = call_loss(losses, output, batch, step, loss_key(losses, key))
    output = by_datum(output, len(jax.tree.leaves(batch)[0]))
    return output, as_arrays(loss), {name: as_arrays(value) for name, value in metrics.items()}, after


def by_datum(output: Any, rows: int) -> Any:
    """The output of a model that sees a share of so many data: what is of the whole share is given to each of them."""

    def one(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        return leaf if leaf.ndim and len(leaf) == rows else jnp.broadcast_to(leaf, (rows, *leaf.shape))

    return jax.tree.map(one, output)


def batch_losses(
    recipe: Recipe,
    params: PyTree,
    model_state: PyTree,
    keys: jax.Array,
    batch: PyTree,
    step: Any,
    *,
    training: bool,
) -> Seen:
    """Outputs, losses and metrics of each datum of a share, as they are (a NaN is a NaN); what the model carries on."""
    loss = share_loss if recipe.model.batched else datum_loss
    one = functools.partial(loss, recipe.model, recipe.losses, training=training)
    if recipe.model.batched:
        losses: Callable[..., Seen] = lambda params, state, keys, *rest: one(params, state, keys[0], *rest)  # noqa: E731
    else:
        # What is carried on has no axis: it is the same whichever datum it comes from, or that is an error.
        axes = (None, None, 0, 0, None)
        # The axis has a name where somebody asks for it: without, the model needs not be traced anew inside of it.
        name = BATCH_AXIS if recipe.batch_axis else None
        losses = jax.vmap(one, in_axes=axes, out_axes=(0, 0, 0, None), axis_name=name)
    if recipe.gather is not None:
        losses = recipe.gather(losses)
    return losses(params, model_state, keys, batch, step)


def mean_loss(
    recipe: Recipe, params: PyTree, model_state: PyTree, keys: jax.Array, batch: PyTree, step: Any
) -> tuple[jax.Array, tuple[Any, jax.Array, dict[str, jax.Array]]]:
    """`(loss, (outputs, loss, metrics))`: means over a share, outputs of each datum; a NaN loss counts as 0."""
    alone = dataclasses.replace(recipe, shards=1, accumulate=1)
    _, (outputs, parts, _, _) = _objective(alone, None, lambda whole: whole, params, model_state, keys, batch, step)
    loss, metrics = told(parts)
    return loss, (outputs, loss, metrics)


def gradients(
    recipe: Recipe, params: PyTree, model_state: PyTree, keys: jax.Array, batch: PyTree, step: Any
) -> tuple[PyTree, tuple[Any, jax.Array, dict[str, jax.Array]]]:
    """Gradients of `mean_loss`, with its outputs; all but the outputs are means over the devices.

    Of a complex parameter it is the conjugate of `jax.grad`'s: the direction of steepest ascent, as optax expects.
    """
    share, outputs = own_gradients(recipe, params, model_state, keys, batch, step)
    share = of_all_devices(recipe, share)
    loss, metrics = told(share.parts)
    return share.grads, (outputs, loss, metrics)


def own_gradients(
    recipe: Recipe,
    params: PyTree,
    model_state: PyTree,
    keys: jax.Array,
    batch: PyTree,
    step: Any,
    weights: Mapping[int, jax.Array] | None = None,
) -> tuple[Share, Any]:
    """What this device's share comes to, before anything over the devices; and the outputs.

    Args:
        recipe: what the step is made of.
        params: the parameters.
        model_state: what the model carries on.
        keys: see `learnax.step.recipe.keys_of`.
        batch: the share.
        step: the training step.
        weights: of a loss that has any: those of all shares and accumulated batches, by its terms; by default those of
            this batch's shares.
    """
    trained, whole = split(recipe.optimizer, params)
    objective = functools.partial(_objective, recipe, weights, whole)
    (_, (outputs, parts, nan, after)), grads = jax.value_and_grad(objective, has_aux=True)(
        trained, model_state, keys, batch, step
    )
    # jax.grad of a complex parameter has the imaginary part's sign reversed.
    grads = jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, grads)
    if recipe.model.scaled:
        grads = jax.tree.map(lambda g: g / model_state.scale.astype(g.dtype), grads)
    return Share(grads, parts, nan, after), outputs


def of_all_devices(recipe: Recipe, share: Share) -> Share:
    """What the shares of all devices come to."""
    means = {part: number for part, number in share.parts.items() if part.how == "mean"}
    others = over_devices(recipe, {part: number for part, number in share.parts.items() if part.how != "mean"})
    if recipe.weighted:
        grads = sum_over_devices(recipe, share.grads)
        means, nan = mean_over_devices(recipe, (means, share.nan))
    else:
        grads, means, nan = mean_over_devices(recipe, (share.grads, means, share.nan))
    both = means | others
    return Share(grads, {part: both[part] for part in share.parts}, nan, alike_over_devices(recipe, share.model_state))


def loss_weights(
    recipe: Recipe, params: PyTree, model_state: PyTree, keys: jax.Array, batch: PyTree, step: Any
) -> dict[int, jax.Array]:
    """The weights of a share's loss, by its terms, before anything over the devices.

    Where weights are of the data alone, the compiler leaves out all that they do not need, the model above all.
    """
    carried = inner(model_state)
    _, losses, _, _ = batch_losses(recipe, params, carried, keys, batch, step, training=True)
    return {term: weight_of(amount) for term, amount in enumerate(terms_of(losses)) if isinstance(amount, Mean)}


def told(parts: Parts) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and metrics, without their weights."""
    values = {name: value for name, value in finished(parts).items() if isinstance(name, str)}
    return values.pop("loss"), values


def _objective(
    recipe: Recipe,
    weights: Mapping[int, jax.Array] | None,
    whole: Callable[[PyTree], PyTree],
    trained: PyTree,
    model_state: PyTree,
    keys: jax.Array,
    batch: PyTree,
    step: Any,
) -> tuple[jax.Array, tuple[Any, Parts, jax.Array, PyTree]]:
    """What is differentiated, and `(outputs, parts, part of the data whose loss is NaN, what is carried on)`.

    It is the mean over this share; of a loss with weights, this share's part of the whole loss.
    """
    carried = inner(model_state)
    outputs, losses, metrics, after = batch_losses(recipe, whole(trained), carried, keys, batch, step, training=True)
    terms = [_without_nan(term) for term in terms_of(losses)]
    nan = functools.reduce(jnp.logical_or, (lost for _, lost in terms))
    amounts = [amount for amount, _ in terms]
    parts = share_parts({**metrics, "loss": _as_loss(losses, amounts)})
    if recipe.weighted:
        shares = (_share_of(recipe, weights, term, amount) for term, amount in enumerate(amounts))
        loss = functools.reduce(operator.add, shares)
    else:
        loss = parts[Part("loss", "mean")]
    if recipe.model.scaled:
        loss = loss * model_state.scale
    return loss, (outputs, parts, nan.mean(dtype=jnp.float32), after)


def _share_of(recipe: Recipe, weights: Mapping[int, jax.Array] | None, term: int, amount: Any) -> jax.Array:
    """This share's part of one term of a loss with weights: the parts of all shares add up to the term."""
    if isinstance(amount, Mean):
        own = sum_over_devices(recipe, weight_of(amount)) if weights is None else weights[term]
        return quotient(amount.total.sum(), own)
    if isinstance(amount, Sum):
        return reduced(amount)["sum"]
    mean = jnp.mean(amount)
    return mean.astype(wide(mean.dtype)) / (recipe.shards * recipe.accumulate)


def _without_nan(term: Any) -> tuple[Any, jax.Array]:
    """A term of the loss in which a NaN counts as 0, and which of the data have one."""
    value = term.total if isinstance(term, (Mean, Sum)) else term
    lost = jnp.isnan(value)
    value = jnp.where(lost, jnp.zeros_like(value), value)
    if isinstance(term, Mean):
        return Mean(value, term.weight), lost
    return Sum(value) if isinstance(term, Sum) else value, lost


def _as_loss(losses: Any, amounts: list[Any]) -> Any:
    return type(losses)(tuple(amounts)) if len(amounts) > 1 else amounts[0]


def _check_scalar(name: str, value: Any) -> None:
    for leaf in jax.tree.leaves(value) if isinstance(value, Amount) else [value]:
        if leaf is None or jnp.shape(leaf) != ():
            came = "None" if leaf is None else f"shape {jnp.shape(leaf)}"
            raise TypeError(f"{name} of one datum must be a scalar, but has {came}; reduce it, with .mean() for one")
