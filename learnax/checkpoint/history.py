"""The metrics' histories as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


class History:
    """Turns lists that grow into arrays: what grew since the last time is all that is looked at."""

    def __init__(self) -> None:
        self._known: dict[str, np.ndarray] = {}
        self._seen: dict[str, tuple[Sequence[float], int]] = {}

    def arrays(self, history: Mapping[str, Sequence[float]]) -> dict[str, np.ndarray]:
        """Each history up to now; what a list grows by later does not change it."""
        return {name: self._array(name, values) for name, values in history.items()}

    def _array(self, name: str, values: Sequence[float]) -> np.ndarray:
        known, end = self._known.get(name, np.empty(0)), len(values)
        seen, begin = self._seen.get(name, (values, 0))
        if seen is not values or begin > end:  # another history of this name
            known, begin = np.empty(0), 0
        if end > len(known):
            known = np.concatenate([known[:begin], np.empty(2 * end - begin)])
        known[begin:end] = values[begin:end]
        self._known[name], self._seen[name] = known, (values, end)
        return known[:end]
