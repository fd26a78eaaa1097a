"""The learning rate, and what is given as an optimizer, before there is a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from learnax.checks.texts import LOOKED_AT, name_of, raised, short, what_is


def number_of(value: Any) -> float | None:
    """A number of Python, numpy or JAX as Python's float; None for anything else, an array of several included."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, (np.generic, np.ndarray, jax.Array)) and np.ndim(value) == 0:
        real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
        return float(value) if real else None
    return None


def is_transformation(value: Any) -> bool:
    """Whether it has what an optax transformation has."""
    return all(callable(getattr(value, name, None)) for name in ("init", "update"))


def checked_rate(rate: Any) -> Any:
    """The learning rate as a Python float, or the schedule that it is.

    Raises:
        TypeError: neither a number nor a schedule that can be compiled and gives a number.
        ValueError: a number that is negative or not finite.
    """
    if is_transformation(rate):
        raise TypeError(
            "learning_rate must be a number or an optax schedule, but is an optax transformation: that is what "
            "optimizer= takes. Write learning_rate=1e-3, optimizer=optax.adamw(1e-3), for instance"
        )
    if callable(rate):
        _check_schedule(rate)
        return rate
    number = number_of(rate)
    if number is None:
        hint = "; write learning_rate=1e-3 for instance, beside an optimizer, too" if rate is None else ""
        raise TypeError(f"learning_rate must be a number or an optax schedule, but is {short(rate)}{hint}")
    if not 0 <= number < float("inf"):
        raise ValueError(f"learning_rate must be finite and at least 0, but is {number}")
    return number


def _check_schedule(schedule: Any) -> None:
    results = []
    try:
        with jax.numpy_dtype_promotion("standard"):  # as optax does
            jax.eval_shape(lambda step: results.append(schedule(step)), jax.ShapeDtypeStruct((), jnp.int32))
    except LOOKED_AT as error:
        raise TypeError(
            f"learning_rate: the schedule {name_of(schedule)} is compiled into the step, so it cannot ask for the "
            f"step's value in Python, by if, float(), int(), a list's index or numpy:\n{raised(error)}\n"
            "write jnp.where(step < 5, 1e-2, 1e-3) in place of the if and jnp in place of numpy, or use "
            "optax.join_schedules or optax.piecewise_constant_schedule"
        ) from error
    except Exception as error:
        raise TypeError(
            f"learning_rate: the schedule {name_of(schedule)} must take the number of updates made, a whole number, "
            f"and return the rate, but fails:\n{raised(error)}"
        ) from error
    (rate,) = results
    if is_transformation(rate):
        raise TypeError(
            f"learning_rate must be a number or an optax schedule, but {name_of(schedule)} makes an optimizer: write "
            f"learning_rate=1e-3, optimizer={_made_by(schedule)}, for instance"
        )
    if not isinstance(rate, jax.core.Tracer):
        number = number_of(rate)
        if number is None or not 0 <= number < float("inf"):
            raise TypeError(
                f"learning_rate: the schedule {name_of(schedule)} must return a finite number of at least 0, but "
                f"returns {what_is(rate)}"
            )
    elif jnp.shape(rate) != () or not jnp.issubdtype(rate.dtype, jnp.floating):
        raise TypeError(
            f"learning_rate: the schedule {name_of(schedule)} must return one float, but returns {what_is(rate)}"
        )


def check_optimizer_type(optimizer: Any) -> None:
    """Raises TypeError for what is no optax transformation."""
    if optimizer is None or (is_transformation(optimizer) and not isinstance(optimizer, type)):
        return
    if isinstance(optimizer, Mapping) and optimizer:
        _check_patterns(optimizer)
        return
    hint = ""
    if callable(optimizer):
        hint = f"; write what it makes, optimizer={_made_by(optimizer)} for instance"
    elif number_of(optimizer) is not None:
        hint = f"; a rate is given as learning_rate={short(optimizer)}"
    elif isinstance(optimizer, str):
        hint = "; optimizer=optax.adamw(1e-3) for instance"
    elif isinstance(optimizer, (list, tuple)):
        hint = "; several become one by optax.chain(...)"
    raise TypeError(f"optimizer must be an optax transformation, with init and update, but is {short(optimizer)}{hint}")


def _check_patterns(patterns: Mapping[Any, Any]) -> None:
    for pattern, part in patterns.items():
        if not isinstance(pattern, str):
            raise TypeError(f"optimizer: a pattern must be text, 'head/.*' for instance, but is {short(pattern)}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"optimizer: the pattern {pattern!r} is no regular expression: {error}") from error
        if part is not None and (not is_transformation(part) or isinstance(part, type)):
            raise TypeError(
                f"optimizer: what {pattern!r} is trained by must be an optax transformation, or None for frozen, but "
                f"is {short(part)}"
            )


def check_ema(ema: Any) -> None:
    """Raises an error for a decay of the parameters' average that is none.

    Raises:
        TypeError: neither a number nor a schedule.
        ValueError: outside 0 to 1.
    """
    if ema is None:
        return
    wanted = "ema must be a decay from 0 to 1, 0.999 for instance, or a schedule `updates made -> decay`,"
    value = ema
    if callable(ema):
        try:
            value = ema(0)
        except Exception as error:
            raise TypeError(f"{wanted} but {name_of(ema)}(0) failed: {type(error).__name__}: {error}") from error
    number = number_of(value)
    if number is None:
        raise TypeError(f"{wanted} but {'returns' if callable(ema) else 'is'} {short(value)}")
    if not 0 <= number <= 1:
        raise ValueError(f"{wanted} but {'returns' if callable(ema) else 'is'} {number:g}")


def _made_by(function: Any) -> str:
    """A call of what makes an optimizer, as it is written."""
    package = "optax." if str(getattr(function, "__module__", "")).startswith("optax") else ""
    return f"{package}{name_of(function)}({'1e-3' if package else '...'})"
