"""Many steps of one kind in one program: a loop whose count is an argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from learnax.step.scalars import Scalars

Carry = TypeVar("Carry")


def many(
    one: Callable[[Carry, Any], tuple[Carry, Scalars, Any]], room: int, carry: Carry, count: jax.Array
) -> tuple[Carry, Scalars, Any]:
    """Calls a step `count` times: the same program and the same bits however a run is cut.

    Args:
        one: `(carry, number) -> (carry, row, extra)` for the steps from 0 on: what the next step takes, a row of
            scalars, and what is wanted of the last step alone.
        room: steps at most; with a room of one there is no loop.
        carry: what the first step takes.
        count: steps, 1 to `room`.

    Returns:
        `(carry, scalars, extra)` after the last step; `room` rows of scalars, of which the first `count` are meant.
    """
    if room == 1:
        carry, row, extra = one(carry, jnp.int32(0))
        return carry, Scalars(row.names, row.values[None]), extra
    _, row, like = jax.eval_shape(one, carry, jnp.int32(0))
    rows = jnp.zeros((room, len(row.names)), row.values.dtype)
    extra = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    def body(number: jax.Array, held: tuple[Any, ...]) -> tuple[Any, ...]:
        carry, rows, _ = held
        carry, row, extra = one(carry, number)
        return carry, jax.lax.dynamic_update_index_in_dim(rows, row.values, number, 0), extra

    carry, rows, extra = jax.lax.fori_loop(0, count, body, (carry, rows, extra))
    return carry, Scalars(row.names, rows), extra
