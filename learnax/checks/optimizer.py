"""An optax transformation, traced on a model's parameters before anything is compiled."""

from __future__ import annotations

import re
from typing import Any

import jax
import optax

from learnax.checks.texts import names_axis, raised
from learnax.utils import PyTree, leaves_by_path, same_structure


def check_optimizer(optimizer: optax.GradientTransformation, params: PyTree) -> None:
    """Traces an optimiser's start and one update, without computing anything.

    Args:
        optimizer: the transformation.
        params: the model's parameters, or their shapes.

    Raises:
        TypeError: it asks for more than gradients, its state and the parameters.
        ValueError: it fails on these parameters, or gives updates that are not theirs.
    """
    called = "init(params)"
    try:
        with jax.numpy_dtype_promotion("standard"):  # as in a step
            state = jax.eval_shape(optimizer.init, params)
            called = "update(gradients, state, params)"
            updates, _ = jax.eval_shape(optimizer.update, params, state, params)
    except Exception as error:
        if names_axis(error):
            return  # a step has the axis
        asked = _asked_for(error)
        if asked:
            raise TypeError(
                f"optimizer: its update asks for {', '.join(asked)}, which a step does not give yet: it gives "
                f"gradients, state and parameters. {_instead(asked)}\n{raised(error)}"
            ) from error
        raise ValueError(_failure_text(called, params, error)) from error
    if not same_structure(updates, params):
        raise ValueError(
            "optimizer: its update must return (updates, state) with an update for each parameter, but the updates "
            f"have the structure {jax.tree.structure(updates)}, the parameters {jax.tree.structure(params)}"
        )


def _asked_for(error: BaseException) -> list[str]:
    """Names of arguments that an update misses."""
    if isinstance(error, TypeError) and "missing" in str(error):
        return re.findall(r"'(\w+)'", str(error))
    found = re.match(r"(\w+) must be provided", str(error))
    return [found[1]] if found else []


def _instead(asked: list[str]) -> str:
    if "obj_fn" in asked:
        return "Of those that need no more, optax.adamw and optax.contrib.muon are near."
    if "value_fn" in asked:
        return "Line searches are for whole data sets; take optax.adam or optax.adamw."
    return "Take a schedule for the rate, optax.cosine_decay_schedule for one, with optax.adam or optax.adamw."


def _failure_text(called: str, params: Any, error: BaseException) -> str:
    paths = [f"  {path}: {leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves_by_path(params).items()]
    shown = "\n".join([*paths[:4], *([f"  ... and {len(paths) - 4} more"] if len(paths) > 4 else [])])
    hint = "what it is made of (masks, labels of optax.multi_transform) must name these parameters"
    if isinstance(error, AttributeError) and "'fast'" in str(error):
        hint = "optax.lookahead keeps its parameters in pairs, which a model does not; take its inner optimizer alone"
    return f"optimizer: its {called} fails on the model's parameters:\n{shown}\n{raised(error)}\n{hint}"
