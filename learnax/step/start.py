"""What a run starts from: its random sequence, and a fresh state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from learnax.models.linen import init_params
from learnax.step.state import TrainState
from learnax.utils import PyTree


def key_pair(seed: int) -> tuple[jax.Array, jax.Array]:
    """The random sequence of a run, and the key that its parameters are drawn from."""
    seq, init = jax.random.split(jax.random.key(seed))
    return seq, jax.random.split(init)[0]


def fresh_state(model: Any, optimizer: optax.GradientTransformation, key: jax.Array, datum: list[Any]) -> TrainState:
    """Initialises parameters and optimiser state; pure, so that it can be compiled or traced."""
    params = init_params(model, key, datum)
    return strong(TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32)))


def strong(tree: PyTree) -> PyTree:
    """The same arrays with no weak types: a compiled program takes one type, and gives it back."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), tree)
