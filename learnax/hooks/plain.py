"""Plain data: what a checkpoint keeps of hooks, as JSON has it, and reads back as it was."""

from __future__ import annotations

from typing import Any

import numpy as np


def plain(value: Any, path: str = "") -> Any:
    """A copy of plain data in Python's own types.

    Args:
        value: numbers, text, True, False, None; lists; dicts whose keys are text. Of numpy, numbers.
        path: where it lies, for errors.

    Raises:
        TypeError: anything else; where it lies, what it is and what to write are in the text.
    """
    where = path or "the state"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return plain(value.item(), path)
    if type(value) is list:
        return [plain(item, f"{path}[{place}]") for place, item in enumerate(value)]
    if type(value) is dict:
        wrong = next((key for key in value if not isinstance(key, str)), None)
        if wrong is not None:
            raise TypeError(f"{where} has the key {wrong!r}, but keys are text: write {str(wrong)!r}")
        return {key: plain(item, f"{path}[{key!r}]") for key, item in value.items()}
    hint = "write a list" if isinstance(value, (tuple, set)) else "keep numbers, text, lists and dicts"
    if hasattr(value, "tolist"):
        hint = "write .tolist(), and make an array of it in restore()"
    raise TypeError(f"{where} is of type {type(value).__name__}, which is no plain data; {hint}")
