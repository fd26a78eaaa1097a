"""What the texts of errors are made of: structures in a few lines, the line of a script that raised."""

from __future__ import annotations

import functools
import inspect
import os
import re
import traceback
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import optax

import learnax
from learnax.utils import PyTree, describe

_LINES = 5
"""Leaves of a structure that a text shows."""
_BELOW = tuple(f"{Path(module.__path__[0])}{os.sep}" for module in (jax, flax, optax, np))
_HERE = f"{Path(learnax.__path__[0])}{os.sep}"


def structure_of(tree: PyTree, name: str = "") -> str:
    """A pytree's first leaves for a person, `name[path]: dtype[shape]`, a line each."""
    lines = [line.strip().removeprefix("(the whole)") for line in describe(tree).splitlines()]
    lines = [f"  {name}{line}" for line in lines]
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], f"  ... and {len(lines) - _LINES + 1} more"]
    return "\n".join(lines)


def short(value: Any, limit: int = 80) -> str:
    """A value on one line, cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def what_is(value: Any) -> str:
    """A value of user code in words: an array by its type and shape, a tuple by its length."""
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return f"an array {_kind(value)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}: ({', '.join(map(_kind, value[:4]))})"
    if value is None or isinstance(value, (int, float, str)):
        return short(value)
    return f"of type {type(value).__name__}"


def _kind(value: Any) -> str:
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return f"{value.dtype}{list(np.shape(value))}"
    return type(value).__name__


def name_of(function: Any) -> str:
    """What a person calls a callable."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    return getattr(function, "__name__", type(function).__name__)


def call_of(function: Any) -> str:
    """A callable with its parameters, as they are written."""
    try:
        parameters = ", ".join(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        parameters = "..."
    return f"{name_of(function)}({parameters})"


def raised(error: BaseException) -> str:
    """An error's type and first lines, and the line of the script that raised it, in two or three lines."""
    lines = [line for line in str(error).splitlines() if line.strip()] or ["(no text)"]
    first = re.sub(r"\s*\(https?://\S*\)", "", lines[0])
    text = f"{type(error).__name__}: {first if len(first) <= 240 else first[:240] + '...'}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((*_BELOW, _HERE))]
    if own and own[-1].line:
        text += f"\n  in {Path(own[-1].filename).name}, line {own[-1].lineno}: {own[-1].line[:100]}"
    return text


def names_axis(error: BaseException) -> str | None:
    """The mapped axis that user code names where there is none; another trace may have it."""
    if not isinstance(error, NameError):
        return None
    found = re.search(r"unbound axis name: (\w+)", str(error))
    return found[1] if found else None


LOOKED_AT = (
    jax.errors.TracerBoolConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.TracerArrayConversionError,
    jax.errors.ConcretizationTypeError,
)
"""What JAX raises where Python asks for a value that is known only when the program runs."""


def value_lines(error: BaseException, who: str, datum: list[Any]) -> list[str]:
    """What to write where Python was asked for an array's value; nothing where it was not.

    Args:
        error: what was raised.
        who: what is compiled, with its verb.
        datum: what it was called on; numpy fails alike on containers of arrays.
    """
    contained = len(jax.tree.leaves(datum)) > len(datum)
    if not isinstance(error, LOOKED_AT) or (contained and isinstance(error, jax.errors.TracerArrayConversionError)):
        return []
    return [
        f"{who} compiled, so no if, for, float(), int() or numpy can ask for the value of an array: "
        "jnp.where(x > 0, a, b) is an if, and jnp takes the place of numpy"
    ]


def in_file(error: BaseException, file: str) -> bool:
    """Whether an error was raised by a line of this file, or by what that line called of JAX, Flax and the like."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame.filename for frame in frames if not frame.filename.startswith(_BELOW)][-1:] == [file]
