"""The best value of a metric so far."""

from __future__ import annotations

import math
from typing import Any

MODES = ("min", "max")


class Record:
    """Tells better values of a metric from others; NaN is never better.

    Args:
        mode: "min" where smaller is better, "max" where larger is.
        min_delta: by how much a value must be better to count, 0 or more.

    Attributes:
        best: the best value so far; None before the first.
        since: values since then that were not better.

    Raises:
        ValueError: another mode, or a `min_delta` below 0.
    """

    def __init__(self, mode: str, min_delta: float = 0.0):
        if mode not in MODES:
            raise ValueError(f"mode must be 'min' or 'max', but is {mode!r}")
        if not min_delta >= 0:
            raise ValueError(f"min_delta must be 0 or more, but is {min_delta!r}")
        self._sign, self._min_delta = (1 if mode == "min" else -1), min_delta
        self.best: float | None = None
        self.since = 0

    def is_better(self, value: float, than: float | None) -> bool:
        """Whether a value is better than another one, or than none."""
        if math.isnan(value):
            return False
        return than is None or self._sign * value < self._sign * than - self._min_delta

    def take(self, value: float) -> bool:
        """Takes the next value; whether it is better than all before."""
        if self.is_better(value, self.best):
            self.best, self.since = value, 0
            return True
        self.since += 1
        return False

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        return {"best": self.best, "since": self.since}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self.best, self.since = state["best"], state["since"]
