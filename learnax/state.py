"""What training changes: the parameters, the optimiser's state, the step, and the place in the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from learnax.streams import init_variables

PyTree = Any
LearningRate = float | Callable[[Any], Any]


class TrainState(NamedTuple):
    """The state of a run: what a step takes and gives back.

    Attributes:
        params: the model's `params` collection.
        opt_state: the optimiser's state.
        step: updates made so far; an update that was dropped does not count.
    """

    params: Any
    opt_state: Any
    step: int | jax.Array | np.integer = 0


def as_train_state(given: Any) -> TrainState:
    """A state from its fields in their order, or from what a checkpoint holds, a mapping with `state`."""
    return TrainState(*(given["state"] if isinstance(given, Mapping) else given))


@dataclasses.dataclass
class Position:
    """Where a run stands in its data.

    Attributes:
        epoch: the epoch that runs, from 0.
        batch: training batches of it that were trained on.
        marks: length of each metric's history when the epoch began.
    """

    epoch: int = 0
    batch: int = 0
    marks: dict[str, int] = dataclasses.field(default_factory=dict)


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


def key_pair(seed: int) -> tuple[jax.Array, jax.Array]:
    """The random sequence of a run, and the key that its parameters are drawn from."""
    seq, init = jax.random.split(jax.random.key(seed))
    return seq, jax.random.split(init)[0]


def init_params(model: Any, key: jax.Array, datum: list[Any]) -> PyTree:
    """The model's fresh `params` collection; see `params_of`."""
    return params_of(init_variables(model, key, datum))


def params_of(variables: Mapping[str, PyTree]) -> PyTree:
    """The `params` collection of a model's variables.

    Raises:
        ValueError: there are other collections, batch statistics for one: a step carries parameters alone.
    """
    others = sorted(set(variables) - {"params"})
    if others:
        raise ValueError(
            f"the model has variables besides its parameters: {', '.join(others)}; a step keeps the 'params' "
            "collection alone for now, so batch statistics and other running state are not carried from step to step. "
            "Use layers without it, nn.LayerNorm() in place of nn.BatchNorm for instance"
        )
    return variables.get("params", {})


def fresh_state(model: Any, optimizer: optax.GradientTransformation, key: jax.Array, datum: list[Any]) -> TrainState:
    """Initialises parameters and optimiser state; pure, so that it can be compiled or traced."""
    params = init_params(model, key, datum)
    return strong(TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32)))


def strong(tree: PyTree) -> PyTree:
    """The same arrays with no weak types: a compiled program takes one type, and gives it back."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), tree)
