"""From gradients to the next state: clipped, and not at all where that would put a NaN into the parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from learnax.step.amounts import finished
from learnax.step.gradients import Share
from learnax.step.optimizers import asked_update, functions_of, last_rate, next_rate
from learnax.step.packing import SMALL, Packing
from learnax.step.patterns import split
from learnax.step.proofs import Conditions, conditions_of
from learnax.step.recipe import Recipe, wide
from learnax.step.scalars import NAN_DATA, Names
from learnax.step.scaling import adjusted, followed
from learnax.step.state import TrainState
from learnax.utils import PyTree


@dataclasses.dataclass(frozen=True)
class _Step:
    """What an update is made from.

    Attributes:
        recipe: what the step is made of.
        packing: how gradients, and maybe moments, are packed.
        grads: packed gradients, before they are clipped.
        norm: their global norm.
        model_state: what the model carries on after it.
        extra: what some optimisers ask for, by name.
    """

    recipe: Recipe
    packing: Packing
    grads: list[jax.Array]
    norm: jax.Array
    model_state: PyTree
    extra: Mapping[str, Any]


def apply(
    recipe: Recipe, packing: Packing, state: TrainState, share: Share, loss_at: Callable[[], Callable[..., jax.Array]]
) -> tuple[TrainState, dict[Any, jax.Array]]:
    """Clips, guards and applies an update from packed gradients; returns the new state and the step's scalars.

    Args:
        recipe: what the step is made of.
        packing: how gradients are packed.
        state: the state before.
        share: what all batches of the step come to on all devices.
        loss_at: makes the step's loss as a function of what is trained; called for optimisers that ask for it.
    """
    squares, norm, sound = _measured(packing, share.grads, selects=recipe.selects)
    values = finished(share.parts)
    known, now = known_of(recipe, state), _own_rate(recipe, state)
    extra = _extra(packing, share, values["loss"], loss_at) if known is None else {}
    after = followed(recipe, state.model_state, share.model_state)
    step = _Step(recipe, packing, share.grads, norm, after, extra)
    overflow = ~sound & (state.model_state.scale > 1) if recipe.model.scaled else None
    if after is not None:
        sound &= _as_finite(state.model_state, after)
    sound &= _finite_update(step, state, known)
    before = state.step
    state = _guarded(step, state, sound)
    rate = last_rate(recipe.learning_rate, state, before) if now is None else now
    scaling: dict[str, jax.Array] = {}
    if overflow is not None:
        scaling = {"overflow": overflow, "loss_scale": state.model_state.scale}
        state = state._replace(model_state=adjusted(state.model_state, overflow))
    loss = values.pop("loss")
    return state, {
        **{name: value for name, value in values.items() if isinstance(name, str)},
        "loss": loss,
        "gradient norm": norm,
        "has_nan": ~sound if overflow is None else ~sound & ~overflow,
        NAN_DATA: jnp.round(share.nan * (recipe.batch_size * recipe.accumulate)),
        **scaling,
        **({} if rate is None else {"learning_rate": rate}),
        Names(f"grads/{path}" for path in packing.paths): jnp.sqrt(squares),
        **{name: value for name, value in values.items() if not isinstance(name, str)},
    }


def looked_into(
    recipe: Recipe, packing: Packing, state: TrainState, share: Share, loss_at: Callable[[], Callable[..., jax.Array]]
) -> tuple[PyTree, PyTree, PyTree]:
    """Gradients as they come, updates, and the parameters after them, of what `apply` would apply; nothing is guarded.

    Args: as for `apply`.
    """
    _, norm, _ = _measured(packing, share.grads, selects=recipe.selects)
    loss = finished(share.parts)["loss"]
    extra = _extra(packing, share, loss, loss_at) if known_of(recipe, state) is None else {}
    after = followed(recipe, state.model_state, share.model_state)
    updates, _ = _updates(_Step(recipe, packing, share.grads, norm, after, extra), state)
    trained, whole = split(recipe.optimizer, state.params)
    return packing.unpack(share.grads), updates, whole(_applied(trained, updates))


def _extra(
    packing: Packing, share: Share, loss: jax.Array, loss_at: Callable[[], Callable[..., jax.Array]]
) -> dict[str, Any]:
    """What optax's optimisers may ask for: of the whole step, before any clipping."""
    return {"value": loss, "grad": packing.unpack(share.grads), **functions_of(loss_at())}


def _own_rate(recipe: Recipe, state: TrainState) -> jax.Array | None:
    """The rate that the default optimiser is about to use; None for another one."""
    if not (recipe.trusted and _is_exact(state.params)):
        return None
    assert recipe.learning_rate is not None  # Adam was made from it
    return next_rate(recipe.learning_rate, state)


def known_of(recipe: Recipe, state: TrainState) -> Conditions | None:
    """What has to hold for a finite update of finite gradients; None where nobody knows.

    Args:
        recipe: what the step is made of.
        state: the state before the update.
    """
    rate = _own_rate(recipe, state)
    if rate is not None:
        return Conditions(needed=[jnp.isfinite(rate)])
    if recipe.trusted or not recipe.safe or not _is_exact(state.params):
        return None
    trained, _ = split(recipe.optimizer, state.params)
    return conditions_of(recipe.optimizer, state.opt_state, trained, recipe.max_grad)


def treats_elements_alone(recipe: Recipe, state: TrainState) -> bool:
    """Whether the optimiser is known to treat each element of the parameters alone; of a state, or its shapes."""
    if recipe.trusted:
        return True
    found: list[bool] = []

    def look(state: TrainState) -> None:
        known = known_of(recipe, state)
        found.append(known is not None and known.by_element)

    jax.eval_shape(look, state)
    return found[0]


def _is_exact(params: PyTree) -> bool:
    """Whether an optimiser's arithmetic for such parameters overflows nowhere where gradients are finite."""
    return all(leaf.dtype in (jnp.float32, jnp.float64) for leaf in jax.tree.leaves(params))


def _finite_update(step: _Step, state: TrainState, known: Conditions | None) -> jax.Array:
    """Whether an update from finite gradients is finite, and leaves the parameters so."""

    def looked_at() -> jax.Array:
        # Updates are computed here only to look for NaN, and again where they are made: on a CPU that is cheaper than
        # memory for a second state. Where the guard selects, the compiler sees that both are the same.
        updates, _ = _updates(step, state)
        trained, _ = split(step.recipe.optimizer, state.params)
        return _all_finite(updates) & _not_overflown(trained, updates)

    if known is None:
        return looked_at()
    needed = _all(known.needed)
    if not known.enough:
        return needed
    if step.recipe.selects:
        return needed & (_all(known.enough) | looked_at())
    return needed & jax.lax.cond(_all(known.enough), lambda: jnp.asarray(True), looked_at)


def _not_overflown(params: PyTree, updates: PyTree) -> jax.Array:
    """Whether parameters that are finite stay so, where their type overflows at numbers that training may come to."""

    def stays(leaf: jax.Array, after: jax.Array) -> jax.Array:
        if wide(leaf.dtype) == leaf.dtype:
            return jnp.asarray(True)
        return (jnp.isfinite(after) | ~jnp.isfinite(leaf)).all()

    return _all(jax.tree.leaves(jax.tree.map(stays, params, _applied(params, updates))))


def _applied(params: PyTree, updates: PyTree) -> PyTree:
    """Parameters after updates, of the types that they have; updates of half-precision parameters may be wider."""
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates)


def _measured(packing: Packing, grads: list[jax.Array], *, selects: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The squares of each gradient, the global norm, and whether the clipped gradients are free of NaN.

    A finite norm says the last at no cost. An infinite one may only have overflowed, with every gradient
    finite; that is looked at leaf by leaf, in the rare case alone where a branch costs little.
    """
    if selects:
        squares, sound = packing.squares_and_finite(grads)
        return squares, jnp.sqrt(squares.sum()), sound
    # Behind a barrier: the compiler would take the sum of all apart again, into one of each leaf.
    squares = jax.lax.optimization_barrier(packing.squares(grads))
    norm = jnp.sqrt(squares.sum())
    return squares, norm, jax.lax.cond(jnp.isfinite(norm), lambda: jnp.asarray(True), lambda: _all_finite(grads))


def _all_finite(tree: PyTree) -> jax.Array:
    return _all([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)])


def _all(conditions: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.logical_and, conditions, jnp.asarray(True))


def _updates(step: _Step, state: TrainState) -> tuple[PyTree, Any]:
    """The optimiser's updates of what is trained, from clipped gradients, and its new state, both packed as it came."""
    recipe, packing, norm = step.recipe, step.packing, step.norm
    scale = jnp.where(norm > recipe.max_grad, recipe.max_grad / norm, jnp.ones_like(norm))
    # In float32 at least: a small scale is 0 in half precision.
    grads = [(g.astype(wide(g.dtype)) * scale.astype(wide(g.dtype))).astype(g.dtype) for g in step.grads]
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic is not clean under "strict"
        trained, _ = split(recipe.optimizer, state.params)
        if packing.moments:
            params = trained if packing.params else packing.pack(trained)
            updates, opt_state = recipe.optimizer.update(grads, state.opt_state, params)
            return updates if packing.params else packing.unpack(updates), opt_state
        return asked_update(recipe.optimizer, packing.unpack(grads), state.opt_state, trained, step.extra)


def _guarded(step: _Step, state: TrainState, sound: jax.Array) -> TrainState:
    """The update, made or not made.

    On a CPU it is a loop of one trip or none: a `where` or `cond` between the old and the new state makes XLA keep
    both there and copy one, and a loop carries the state in place, so that a donated state is updated in its own
    buffers. On a GPU it is the other way round (compiled for an H100: a select costs no copy and no memory), and a loop
    is one whose count is read on the host.
    """

    def made(old: TrainState) -> TrainState:
        updates, opt_state = _updates(step, old)
        trained, whole = split(step.recipe.optimizer, old.params)
        params = whole(_applied(trained, updates))
        new = old._replace(
            params=params,
            opt_state=opt_state,
            step=old.step + jnp.ones_like(old.step),
            model_state=step.model_state,
            ema=averaged(step.recipe, old, params),
        )
        return jax.tree.map(lambda n, o: jnp.asarray(n).astype(o.dtype), new, old)

    if step.recipe.selects:
        return jax.tree.map(lambda n, o: jnp.where(sound, n, o), made(state), state)
    close, opened = step.packing.close, step.packing.opened
    update = lambda carry: (jnp.asarray(False), close(made(opened(carry[1]))))  # noqa: E731
    return opened(jax.lax.while_loop(lambda carry: carry[0], update, (sound, close(state)))[1])


def averaged(recipe: Recipe, old: TrainState, params: PyTree) -> PyTree:
    """The average of the parameters with the new ones: `decay * ema + (1 - decay) * params`, in float32 at least."""
    if recipe.ema is None:
        return None
    with jax.numpy_dtype_promotion("standard"):  # as for optax's schedules
        given = recipe.ema(old.step) if callable(recipe.ema) else recipe.ema
    decay = jnp.clip(jnp.asarray(given, jnp.float32), 0, 1)

    def one(average: jax.Array, new: jax.Array) -> jax.Array:
        own = decay.astype(average.real.dtype)
        return own * average + (1 - own) * new.astype(average.dtype)

    return jax.tree.map(one, old.ema, params)


def _as_finite(before: PyTree, after: PyTree) -> jax.Array:
    """Whether what a model carries on is as finite as it was."""
    small: list[tuple[jax.Array, jax.Array]] = []
    large: list[tuple[jax.Array, jax.Array]] = []
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if jnp.issubdtype(old.dtype, jnp.inexact):
            (small if old.size <= SMALL and old.dtype == jnp.float32 else large).append((old, new))
    if small:  # side by side: an operation on each costs more than what it does
        sides = zip(*small, strict=True)
        before, after = (jnp.concatenate([leaf.reshape(-1) for leaf in side]) for side in sides)
        large.append((before, after))
    return _all([(jnp.isfinite(new) | ~jnp.isfinite(old)).all() for old, new in large])
