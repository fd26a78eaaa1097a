"""Updates that are left out where the loss jumps, decided in the compiled step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

FEW = 8
"""Losses before which none is a spike."""


class SkipState(NamedTuple):
    """The state of an optimiser that leaves out spikes.

    Attributes:
        losses: the last ones that were no spikes, `(window,)`, in a ring; infinite where there is none yet.
        calm: losses that were no spikes.
        skipped: updates that were left out.
        inner: the state of the optimiser itself.
    """

    losses: jax.Array
    calm: jax.Array
    skipped: jax.Array
    inner: Any


def without_spikes(
    optimizer: optax.GradientTransformation, factor: float, window: int
) -> optax.GradientTransformationExtraArgs:
    """An optimiser that makes no update where the loss is more than `factor` times the median of those before.

    Parameters and the optimiser's own state stay as they are there. The median of `window` losses is computed in each
    step, by sorting them.

    Args:
        optimizer: any of optax's.
        factor: above 1.
        window: losses that the median is of.
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> SkipState:
        zero = jnp.zeros((), jnp.int32)
        return SkipState(jnp.full((window,), jnp.inf), zero, zero, inner.init(params))

    def update(
        updates: Any, state: SkipState, params: Any = None, *, value: jax.Array, **extra: Any
    ) -> tuple[Any, SkipState]:
        loss = jnp.asarray(value, state.losses.dtype)
        known = jnp.minimum(state.calm, window)
        ordered = jnp.sort(state.losses)
        usual = (ordered[jnp.maximum(known - 1, 0) // 2] + ordered[known // 2]) / 2
        spike = (known >= FEW) & ~(loss <= factor * usual)

        def kept(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(spike, o, n), new, old)

        made, after = inner.update(updates, state.inner, params, value=value, **extra)
        losses = kept(state.losses.at[state.calm % window].set(loss), state.losses)
        state = SkipState(losses, state.calm + ~spike, state.skipped + spike, kept(after, state.inner))
        return jax.tree.map(lambda u: jnp.where(spike, jnp.zeros_like(u), u), made), state

    return optax.GradientTransformationExtraArgs(init, update)
