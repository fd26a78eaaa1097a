"""What a run starts from: its random sequence, and a fresh state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from learnax.models import Model
from learnax.step.patterns import split
from learnax.step.recipe import wide
from learnax.step.scaling import start
from learnax.step.state import TrainState
from learnax.utils import PyTree, is_key

Init = Callable[[jax.Array, list[Any]], tuple[PyTree, PyTree]]


def key_pair(seed: Any) -> tuple[jax.Array, jax.Array]:
    """The random sequence of a run, and the key that its parameters are drawn from."""
    seq, init = jax.random.split(jax.random.key(seed))
    return seq, jax.random.split(init)[0]


def fresh_state(
    model: Model,
    init: Init,
    optimizer: Any,
    averages: bool,
    made: tuple[PyTree, PyTree] | None,
    key: jax.Array,
    datum: list[Any],
) -> TrainState:
    """Initialises parameters and optimiser state; pure, so that it can be compiled or traced.

    Args:
        model: what is trained.
        init: see `initial`.
        optimizer: the optax transformation.
        averages: whether an average of the parameters is kept beside them.
        made: what the model has already, see `Model.made`.
        key: what parameters are drawn from.
        datum: the model's arguments for one datum.
    """
    params, model_state = init(key, datum) if made is None else made
    trained, _ = split(optimizer, params)
    ema = jax.tree.map(lambda x: jnp.asarray(x).astype(wide(x.dtype)), params) if averages else None
    carried = start(model.scaled, model_state)
    return strong(TrainState(params, optimizer.init(trained), jnp.zeros((), jnp.int32), carried, ema))


def initial(model: Model) -> Init:
    """What makes a model's fresh parameters, and what it carries on, from a key and its arguments for one datum.

    The model is traced once, however often it is called. One that sees batches is shown a batch of one datum.
    """

    def init(key: jax.Array, datum: list[Any]) -> tuple[PyTree, PyTree]:
        arguments = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], datum) if model.batched else datum
        return model.init(key, *arguments)

    made: Init = jax.jit(init, inline=True)
    return made


def strong(tree: PyTree) -> PyTree:
    """The same arrays with no weak types: a compiled program takes one type, and gives it back."""
    return jax.tree.map(lambda x: x if is_key(x) else jax.lax.convert_element_type(x, jnp.asarray(x).dtype), tree)
