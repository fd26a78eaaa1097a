"""How losses and metrics are put together: over a device's share, accumulated batches, devices, and divided once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from learnax.metrics import Amount, Max, Mean, Min, Sum, terms_of
from learnax.step.recipe import AXIS, Recipe, wide


class Part(NamedTuple):
    """A number that is put together by itself.

    Attributes:
        name: the metric's, or "loss".
        how: "mean" of equal shares, "data" for a sum to be divided by the number of data, "total" or "weight" of a mean
            with weights, "sum", "max", "min".
        term: of a loss that is a sum of several.
        unit: what the number counts; whole numbers are summed in digits, see `learnax.step.evaluation`.
    """

    name: str
    how: str
    term: int = 0
    unit: int = 1


Parts = dict[Part, jax.Array]


def is_weighted(losses: Any) -> bool:
    """Whether a loss is anything else than a plain number for each datum, or for a share."""
    return isinstance(losses, Amount)


def share_parts(values: Mapping[str, Any]) -> Parts:
    """What the values of a share come to. A plain value is `(n,)`, or a number for the whole share."""
    parts: Parts = {}
    for name, value in values.items():
        for term, amount in enumerate(terms_of(value)):
            parts |= {Part(name, how, term): number for how, number in reduced(amount).items()}
    return parts


def as_arrays(value: Any) -> Any:
    """A loss or metric as arrays. What a mean, a largest or a smallest value is made of is at least float32."""

    def one(amount: Any) -> Any:
        return jax.tree.map(_wide if isinstance(amount, (Mean, Max, Min)) else jnp.asarray, amount)

    return jax.tree.map(one, value, is_leaf=lambda part: isinstance(part, (Mean, Max, Min)))


def reduced(amount: Any) -> dict[str, jax.Array]:
    """What an amount of a share, as `as_arrays` gives it, comes to: numbers by how they are put together."""
    if isinstance(amount, Mean):
        return {"total": amount.total.sum(), "weight": weight_of(amount)}
    if isinstance(amount, Sum):
        return {"sum": _wide(amount.total).sum()}
    if isinstance(amount, Max):
        return {"max": jnp.max(amount.value)}
    if isinstance(amount, Min):
        return {"min": jnp.min(amount.value)}
    return {"mean": jnp.mean(amount)}


def weight_of(amount: Mean) -> jax.Array:
    """The sum of a share's weights; NaN where one is negative or NaN, which is told of on the host."""
    weight = jax.lax.stop_gradient(amount.weight)
    # A weight that is the same for each of the data comes as one number.
    spread = jnp.broadcast_to(weight, jnp.broadcast_shapes(jnp.shape(weight), jnp.shape(amount.total)))
    return jnp.where((spread >= 0).all(), spread.sum(), jnp.nan)


def _wide(values: Any) -> jax.Array:
    values = jnp.asarray(values)
    return values.astype(wide(values.dtype) if jnp.issubdtype(values.dtype, jnp.inexact) else jnp.float32)


_WITH: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {"max": jnp.maximum, "min": jnp.minimum}
_OVER = {"max": jax.lax.pmax, "min": jax.lax.pmin, "mean": jax.lax.pmean}


def added(recipe: Recipe, sums: Parts, more: Parts) -> Parts:
    """The parts of some accumulated batches and of one more."""

    def add(part: Part, number: jax.Array) -> jax.Array:
        number = number.astype(sums[part].dtype)
        if part.how == "mean":
            return sums[part] + number / recipe.accumulate
        return _WITH.get(part.how, jnp.add)(sums[part], number)

    return {part: add(part, number) for part, number in more.items()}


def nothing(part: Part, like: Any) -> jax.Array:
    """What the first of accumulated batches is added to."""
    start = {"max": -jnp.inf, "min": jnp.inf}.get(part.how, 0)
    return jnp.full(like.shape, start, wide(like.dtype))


def over_devices(recipe: Recipe, parts: Parts) -> Parts:
    """The parts of all devices."""
    if recipe.shards == 1:
        return parts
    return {part: _OVER.get(part.how, jax.lax.psum)(number, AXIS) for part, number in parts.items()}


def quotient(total: jax.Array, weight: jax.Array) -> jax.Array:
    """A mean; 0 where nothing has weight."""
    return jnp.where(weight == 0, jnp.zeros_like(total), total / jnp.where(weight == 0, jnp.ones_like(weight), weight))


def finished(parts: Parts) -> dict[Any, jax.Array]:
    """Values by name; under `("weight", name)` the weights of those that have any: of several terms, the smallest."""
    values: dict[Any, jax.Array] = {}
    for part, number in parts.items():
        if part.how == "weight":
            key = ("weight", part.name)
            values[key] = jnp.minimum(values[key], number) if key in values else number
            continue
        number = quotient(number, parts[part._replace(how="weight")]) if part.how == "total" else number
        values[part.name] = values[part.name] + number if part.name in values else number
    return values


def told_loss(parts: Parts) -> jax.Array:
    """The loss that some parts come to."""
    return finished({part: number for part, number in parts.items() if part.name == "loss"})["loss"]
