"""Datasets that draw random numbers from a generator of their own."""

from __future__ import annotations

import itertools
import logging
import random
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

_logger = logging.getLogger("learnax")
_told: set[tuple[str, str, str]] = set()
_DEPTH = 4
"""How deep generators are looked for: a dataset, what it wraps, its transforms, and a list of those."""
_OBJECTS, _EACH = 5000, 100
"""Objects that are looked at at most, and attributes or elements of each."""
_NO_INSIDE = ("builtins", "numpy", "types", "functools")


def tell_of_generators(name: str, dataset: Any) -> None:
    """Says once that a dataset has a random generator of its own, where that can be seen."""
    attribute = find_generator(dataset)
    if attribute is None or (name, type(dataset).__qualname__, attribute) in _told:
        return
    _told.add((name, type(dataset).__qualname__, attribute))
    _logger.warning(
        "dataset %r has a random generator, its attribute %r: where __getitem__ draws from it, a resumed run sees "
        "other data than one that was not stopped, and the data depend on num_workers, for each worker process has a "
        "copy of its own. Make what is random a function of the index: np.random.default_rng((seed, index))",
        name,
        attribute,
    )


def find_generator(value: Any) -> str | None:
    """Where an object has a random generator, as one would write it: `transform.rng`; None where none is seen."""
    seen: set[int] = set()
    waiting = deque([("", value, 0)])
    while waiting and len(seen) < _OBJECTS:
        path, value, depth = waiting.popleft()
        for name, inside in itertools.islice(_inside(value), _EACH):
            if _is_generator(inside):
                return (path + name).removeprefix(".")
            if depth + 1 < _DEPTH and id(inside) not in seen:
                seen.add(id(inside))
                waiting.append((path + name, inside, depth + 1))
    return None


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (list, tuple)):
        yield from ((f"[{index}]", element) for index, element in enumerate(value))
    elif isinstance(value, dict):
        yield from ((f"[{key!r}]", element) for key, element in value.items())
    elif not isinstance(value, type) and type(value).__module__ not in _NO_INSIDE:
        attributes = dict(getattr(value, "__dict__", {}))
        for kind in type(value).__mro__:  # a generator of the class is a generator, too
            if kind.__module__ not in _NO_INSIDE:
                attributes = {**vars(kind), **attributes}
        yield from ((f".{name}", one) for name, one in attributes.items() if not name.startswith("__"))


def _is_generator(value: Any) -> bool:
    if isinstance(value, (np.random.Generator, np.random.RandomState, random.Random)):
        return True
    if isinstance(value, (type, types.ModuleType)):
        return False
    # As those of torch, of which nothing is imported here.
    return all(callable(getattr(type(value), name, None)) for name in ("manual_seed", "initial_seed"))
