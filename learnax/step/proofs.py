"""Optimisers that make no NaN of finite numbers: what is known of optax's own, part by part.

An update of such an optimiser is finite where gradients, parameters and its state are, short of parameters of 1e38: the
guard looks at the gradients alone, and the update is made once. What is not known here has its updates looked at before
they count, which makes them twice. A part is known by optax's name for its function and by what that closes over: where
another version of optax has other names, nothing is known, and all is looked at.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Conditions = list[jax.Array]
"""What has to hold when the update is made, beside finite gradients."""


def conditions_of(optimizer: Any, opt_state: Any) -> Conditions | None:
    """What has to hold for finite updates; None where nobody knows.

    Args:
        optimizer: an optax transformation.
        opt_state: its state, or its shapes.
    """
    try:
        with jax.numpy_dtype_promotion("standard"):  # as for optax's schedules
            return _of(optimizer.update, opt_state)
    except (AttributeError, KeyError, TypeError, ValueError):  # not the closure or the state that was expected
        return None


def _of(update: Callable[..., Any], state: Any) -> Conditions | None:
    if not getattr(update, "__module__", "").startswith("optax."):
        return None
    held = dict(inspect.getclosurevars(update).nonlocals)
    name = update.__qualname__.split(".")[0]
    if name == "chain":
        return _all(list(held["update_fns"]), state)
    if name == "with_extra_args_support":
        return _of(held["tx"].update, state)
    if name == "masked":
        return _of(held["inner"].update, state.inner_state)
    if name == "scale_by_schedule":
        return [jnp.isfinite(held["step_size_fn"](state.count)).all()]
    return [] if name in _KNOWN and _KNOWN[name](held) else None


def _all(updates: list[Callable[..., Any]], states: Any) -> Conditions | None:
    found: Conditions = []
    for update, state in zip(updates, states, strict=True):
        own = _of(update, state)
        if own is None:
            return None
        found += own
    return found


def _adam(held: dict[str, Any]) -> bool:
    # mu / (sqrt(nu) + eps): nu is a mean of squares, and eps keeps the divisor from 0.
    return held["mu_dtype"] is None and _share(held["b1"]) and _share(held["b2"]) and _positive(held["eps"])


def _rms(held: dict[str, Any]) -> bool:
    return _share(held["decay"]) and _positive(held["eps"])


def _share(value: Any) -> bool:
    # In float32, as optax computes: 1 - 0.999999999 is 0 there, and a bias correction divides by it.
    return isinstance(value, (int, float)) and value >= 0 and float(np.float32(value)) < 1


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and 1e-30 < value < math.inf


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


_KNOWN: dict[str, Callable[[dict[str, Any]], bool]] = {
    "identity": lambda held: True,
    "clip": lambda held: True,
    "clip_by_global_norm": lambda held: _positive(held["max_norm"]),
    "scale": lambda held: _finite(held["step_size"]),
    "add_decayed_weights": lambda held: _finite(held["weight_decay"]),
    "trace": lambda held: held["accumulator_dtype"] is None and _share(held["decay"]),
    "scale_by_adam": _adam,
    "scale_by_rms": _rms,
    "scale_by_lion": lambda held: held["mu_dtype"] is None and _share(held["b1"]) and _share(held["b2"]),
}
"""By optax's name of what makes the part: whether, with these settings, it makes finite numbers of finite ones."""
