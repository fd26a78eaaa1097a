"""The default optimiser, and the rates and hyperparameters that optimisers use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from learnax.step.state import TrainState
from learnax.utils import PyTree

LearningRate = float | Callable[[Any], Any]


def adam(learning_rate: LearningRate) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015, https://arxiv.org/abs/1412.6980) with its hyperparameters kept in its state.

    The hyperparameters are float32 whatever the parameters are, or float64 beside parameters of that. By default
    optax casts them to the parameters' own dtype, and in bfloat16 b2 = 0.999 is 1: the bias correction `1 - b2**count`
    is 0 then, and the first update divides by it.

    Args:
        learning_rate: a number, or an optax schedule `update count -> rate`.
    """

    def of(tree: PyTree) -> optax.GradientTransformation:
        wide = any(leaf.dtype in (jnp.float64, jnp.complex128) for leaf in jax.tree.leaves(tree))
        inject = optax.inject_hyperparams(optax.adam, hyperparam_dtype=jnp.float64 if wide else jnp.float32)
        return inject(learning_rate=learning_rate, b1=0.9, b2=0.999)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        return of(updates).update(updates, state, params)

    return optax.GradientTransformation(lambda params: of(params).init(params), update)


def next_rate(learning_rate: LearningRate, state: TrainState) -> jax.Array:
    """The rate that Adam will use for the next update, as a scalar."""
    if callable(learning_rate):
        return jnp.asarray(learning_rate(state.opt_state.count))
    return state.opt_state.hyperparams["learning_rate"]


def last_rate(learning_rate: LearningRate, state: TrainState, step: Any) -> jax.Array:
    """The rate that any optimiser has used for the update from `step` on.

    What it keeps in its state (`optax.inject_hyperparams` does) is what it used; else it is what the
    trainer was told.
    """
    kept = optax.tree_utils.tree_get_all_with_path(state.opt_state, "learning_rate")
    if kept:
        return jnp.asarray(kept[0][1])
    return jnp.asarray(learning_rate(step) if callable(learning_rate) else learning_rate, jnp.float32)


def with_rate(learning_rate: LearningRate, opt_state: Any) -> Any:
    """An optimiser state read from a checkpoint, with the rate that the script asks for now."""
    if callable(learning_rate):
        return opt_state
    old = getattr(opt_state, "hyperparams", {}).get("learning_rate")
    if old is None:
        return opt_state
    rate = jnp.asarray(learning_rate, old.dtype)
    return opt_state._replace(hyperparams={**opt_state.hyperparams, "learning_rate": rate})


def hyperparams(opt_state: Any) -> dict[str, Any]:
    """The hyperparameters that an optimiser's state keeps (`optax.inject_hyperparams`), without scheduled ones."""

    def keeps(node: Any) -> bool:
        return hasattr(node, "hyperparams") and hasattr(node, "hyperparams_states")

    found: dict[str, Any] = {}
    for path, node in jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=keeps):
        if keeps(node):
            where = f" at {jax.tree_util.keystr(path)}" if path else ""
            constant = {name: value for name, value in node.hyperparams.items() if name not in node.hyperparams_states}
            found |= {f"{name}{where}": value for name, value in constant.items()}
    return found
