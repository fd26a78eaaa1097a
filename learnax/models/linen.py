"""A flax linen module as functions of one datum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from learnax.models.streams import asked_streams, init_variables, lifted_streams, rngs_of
from learnax.utils import PyTree


def apply_model(
    model: Any, params: PyTree, key: jax.Array, datum: list[Any], streams: tuple[str, ...] | None = None
) -> Any:
    """The model's output for one datum; every random stream it asks for is drawn from `key`.

    Args:
        model: the flax module.
        params: its parameters.
        key: of this datum.
        datum: the module's arguments.
        streams: those that get a key of their own; None finds out, at the price of tracing the module again.
    """
    if streams is None:
        streams = lifted_streams(model, params, datum, asked_streams(model, params, datum)[0])
    return model.apply({"params": params}, *datum, rngs=rngs_of(key, streams))


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
