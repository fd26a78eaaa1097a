"""Where a stream stands, as text that runs no code when it is read."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np


def to_plain(value: Any, path: str = "state") -> Any:
    """Plain data as what JSON has; what JSON has not, under names that begin with `$`.

    Raises:
        TypeError: something else, by its path.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        items = [to_plain(item, f"{path}[{place}]") for place, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    if type(value) is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, np.generic):
        return {"$number": [value.dtype.str, base64.b64encode(value.tobytes()).decode()]}
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return {"$array": [value.dtype.str, list(value.shape), base64.b64encode(value.tobytes()).decode()]}
    if isinstance(value, Mapping):
        pairs = [[to_plain(key, path), to_plain(item, f"{path}[{key!r}]")] for key, item in value.items()]
        if all(type(key) is str and not key.startswith("$") for key in value):
            return dict(pairs)
        return {"$pairs": pairs}
    raise TypeError(f"{path} is {type(value).__name__}, which is no plain data")


def from_plain(value: Any) -> Any:
    """What `to_plain` was given: dicts for all mappings."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$tuple": items}:
            return tuple(from_plain(item) for item in items)
        case {"$bytes": text}:
            return base64.b64decode(text)
        case {"$number": [dtype, text]}:
            return np.frombuffer(base64.b64decode(text), np.dtype(dtype))[0]
        case {"$array": [dtype, shape, text]}:
            return np.frombuffer(base64.b64decode(text), np.dtype(dtype)).reshape(shape).copy()
        case {"$pairs": pairs}:
            return {_hashable(from_plain(key)): from_plain(item) for key, item in pairs}
    return {key: from_plain(item) for key, item in value.items()}


def _hashable(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key
