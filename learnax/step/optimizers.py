"""The default optimiser, and the rates and hyperparameters that optimisers use."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

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


def last_rate(learning_rate: LearningRate | None, state: TrainState, step: Any) -> jax.Array | None:
    """The rate that any optimiser has used for the update from `step` on.

    What it keeps in its state (`optax.inject_hyperparams` does) is what it used; else it is what the
    trainer was told; None where that is nothing.
    """
    kept = optax.tree_utils.tree_get_all_with_path(state.opt_state, "learning_rate")
    if kept:
        return jnp.asarray(kept[0][1])
    if learning_rate is None:
        return None
    return jnp.asarray(learning_rate(step) if callable(learning_rate) else learning_rate, jnp.float32)


def with_rate(learning_rate: LearningRate | None, opt_state: Any) -> Any:
    """An optimiser state read from a checkpoint, with the rate that the script asks for now."""
    if callable(learning_rate):
        return opt_state
    old = getattr(opt_state, "hyperparams", {}).get("learning_rate")
    if old is None:
        return opt_state
    rate = jnp.asarray(learning_rate, old.dtype)
    return opt_state._replace(hyperparams={**opt_state.hyperparams, "learning_rate": rate})


def scaled_rates(opt_state: PyTree, factor: float) -> PyTree:
    """An optimiser's state with each learning rate that it keeps multiplied.

    Raises:
        ValueError: it keeps none, or one that follows a schedule.
    """
    found: list[str] = []

    def scaled(node: Any) -> Any:
        if not _keeps(node) or "learning_rate" not in node.hyperparams:
            return node
        if "learning_rate" in node.hyperparams_states:
            raise ValueError(
                "the learning rate follows a schedule, which says it anew at each step: scale the schedule"
            )
        found.append("learning_rate")
        rate = node.hyperparams["learning_rate"]
        return node._replace(hyperparams={**node.hyperparams, "learning_rate": rate * jnp.asarray(factor, rate.dtype)})

    state = jax.tree.map(scaled, opt_state, is_leaf=_keeps)
    if not found:
        raise ValueError(
            "the optimizer keeps no learning rate in its state: optax.inject_hyperparams(optax.sgd)(learning_rate=0.1) "
            "is one that does, and so is the default one"
        )
    return state


def _keeps(node: Any) -> bool:
    """Whether a part of an optimiser's state has hyperparameters (`optax.inject_hyperparams`)."""
    return hasattr(node, "hyperparams") and hasattr(node, "hyperparams_states")


def hyperparams(opt_state: Any) -> dict[str, Any]:
    """The hyperparameters that an optimiser's state keeps (`optax.inject_hyperparams`), without scheduled ones."""
    found: dict[str, Any] = {}
    for path, node in jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=_keeps):
        if _keeps(node):
            where = f" at {jax.tree_util.keystr(path)}" if path else ""
            constant = {name: value for name, value in node.hyperparams.items() if name not in node.hyperparams_states}
            found |= {f"{name}{where}": value for name, value in constant.items()}
    return found


# ---- what some optimisers ask for, and keep


def asked_update(
    optimizer: Any, grads: PyTree, opt_state: Any, params: PyTree, extra: Mapping[str, Any]
) -> tuple[PyTree, Any]:
    """An optimiser's update, given of `extra` what its signature takes."""
    if isinstance(optimizer, optax.GradientTransformation) and not isinstance(
        optimizer, optax.GradientTransformationExtraArgs
    ):
        return optimizer.update(grads, opt_state, params)
    parameters = inspect.signature(optimizer.update).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        extra = {name: value for name, value in extra.items() if name in parameters}
    return optimizer.update(grads, opt_state, params, **extra)


def functions_of(loss: Callable[[PyTree], jax.Array]) -> dict[str, Callable[..., Any]]:
    """The functions of what is trained that optax's optimisers ask for, by the names that they go by there."""

    def value_fn(params: PyTree, *, obj_fn: Any = None, grad_fn: Any = None) -> jax.Array:
        del obj_fn, grad_fn  # a line search hands on all that it does not know
        return loss(params)

    def grad_fn(params: PyTree, number: int = 0) -> PyTree:
        del number  # which of several batches: a step has one
        return jax.grad(loss)(params)

    return {"value_fn": value_fn, "obj_fn": loss, "grad_fn": grad_fn}


class SlowState(NamedTuple):
    """The state of an optimiser that keeps its parameters in pairs (`optax.lookahead`).

    Attributes:
        slow: the slow ones; the fast ones are the model's.
        inner: the optimiser's own state.
    """

    slow: PyTree
    inner: Any


def in_pairs(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optimiser of `optax.LookaheadParams` as one of the model's parameters, which are the fast ones."""

    def init(params: PyTree) -> SlowState:
        return SlowState(params, optimizer.init(optax.LookaheadParams(fast=params, slow=params)))

    def update(
        updates: PyTree, state: SlowState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, SlowState]:
        pairs = optax.LookaheadParams(fast=params, slow=state.slow)
        both, inner = asked_update(optimizer, updates, state.inner, pairs, extra)
        return both.fast, SlowState(optax.apply_updates(state.slow, both.slow), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def takes_pairs(optimizer: Any, params: PyTree) -> bool:
    """Whether an optimiser keeps its parameters in pairs."""

    def updates(params: PyTree) -> PyTree:
        pairs = optax.LookaheadParams(fast=params, slow=params)
        made = optimizer.update(params, optimizer.init(pairs), pairs)[0]
        return made if isinstance(made, optax.LookaheadParams) else ()

    try:
        with jax.numpy_dtype_promotion("standard"):  # as in a step
            return isinstance(jax.eval_shape(updates, params), optax.LookaheadParams)
    except Exception:  # it takes no pairs
        return False


def _evaluates(node: Any) -> bool:
    return isinstance(node, (SlowState, optax.contrib.ScheduleFreeState))


def has_own_evaluation(opt_state: Any) -> bool:
    """Whether an optimiser keeps other parameters for evaluation than it trains (lookahead, schedule-free)."""
    return any(map(_evaluates, jax.tree.leaves(opt_state, is_leaf=_evaluates)))


def evaluation_params(params: PyTree, opt_state: Any) -> PyTree:
    """The parameters that an optimiser means for evaluation."""
    for node in jax.tree.leaves(opt_state, is_leaf=_evaluates):
        if isinstance(node, SlowState):
            return node.slow
        if isinstance(node, optax.contrib.ScheduleFreeState):
            return optax.contrib.schedule_free_eval_params(node, params)
    return params
