"""An optax transformation, traced on a model's parameters before anything is compiled."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from learnax.checks.texts import names_axis, raised
from learnax.step import ByPattern, asked_update, functions_of, in_pairs, split, takes_pairs
from learnax.utils import PyTree, leaves_by_path, same_structure


def checked_optimizer(optimizer: Any, params: PyTree) -> Any:
    """Traces an optimiser's start and one update, without computing anything.

    Args:
        optimizer: the transformation.
        params: the model's parameters, or their shapes.

    Returns:
        The optimiser, as one of the model's parameters: `optax.lookahead` keeps them in pairs.

    Raises:
        TypeError: it asks for more than a step has.
        ValueError: it fails on these parameters, or gives updates that are not theirs; patterns that do not fit them.
    """
    if isinstance(optimizer, ByPattern):
        optimizer.check(params)
    elif takes_pairs(optimizer, params):
        optimizer = in_pairs(optimizer)
    trained, _ = split(optimizer, params)

    def start_and_update(trained: PyTree) -> tuple[PyTree, PyTree]:
        state = optimizer.init(trained)
        called.append("update(gradients, state, params)")
        loss = lambda params: sum((jnp.sum(x).real for x in jax.tree.leaves(params)), jnp.float32(0))  # noqa: E731
        extra = {"value": jnp.float32(1), "grad": trained, **functions_of(loss)}
        return asked_update(optimizer, trained, state, trained, extra)

    called = ["init(params)"]
    try:
        with jax.numpy_dtype_promotion("standard"):  # as in a step
            updates, _ = jax.eval_shape(start_and_update, trained)
    except Exception as error:
        if names_axis(error):
            return optimizer  # a step has the axis
        asked = _asked_for(error)
        if asked:
            raise TypeError(
                f"optimizer: its update asks for {', '.join(asked)}, which a step does not give: it gives gradients, "
                "state and parameters, and by name value, grad, value_fn, grad_fn and obj_fn, optax's extra arguments. "
                "Take a schedule for the rate, optax.cosine_decay_schedule for one, with optax.adam or optax.adamw.\n"
                f"{raised(error)}"
            ) from error
        raise ValueError(_failure_text(called[-1], params, error)) from error
    if not same_structure(updates, trained):
        raise ValueError(
            "optimizer: its update must return (updates, state) with an update for each parameter, but the updates "
            f"have the structure {jax.tree.structure(updates)}, the parameters {jax.tree.structure(trained)}"
        )
    return optimizer


def _asked_for(error: BaseException) -> list[str]:
    """Names of arguments that an update misses."""
    if isinstance(error, TypeError) and "missing" in str(error):
        return re.findall(r"'(\w+)'", str(error))
    found = re.match(r"(\w+) must be provided", str(error))
    return [found[1]] if found else []


def _failure_text(called: str, params: Any, error: BaseException) -> str:
    paths = [f"  {path}: {leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves_by_path(params).items()]
    shown = "\n".join([*paths[:4], *([f"  ... and {len(paths) - 4} more"] if len(paths) > 4 else [])])
    hint = "what it is made of (masks, labels of optax.multi_transform) must name these parameters"
    return f"optimizer: its {called} fails on the model's parameters:\n{shown}\n{raised(error)}\n{hint}"
