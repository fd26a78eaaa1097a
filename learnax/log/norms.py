"""The gradients' norms at some steps of a run, kept for pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_MOST = 512
"""Steps at most: at twice as many, every second one is forgotten."""


class Norms:
    """A sample of the gradients' norms, spread evenly over the steps; a step that is not kept costs nothing."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[str, ...], list[tuple[int, np.ndarray]]] = ((), [])
        self._names: tuple[str, ...] = ()
        self._places = slice(0)
        self._every = 1
        self._left = 0
        """Rows until the next one that is kept."""

    @property
    def kept(self) -> tuple[tuple[str, ...], list[tuple[int, np.ndarray]]]:
        """Names, and for each step that was kept the norms; safe to read beside the thread that trains."""
        names, rows = self._kept
        return names, list(rows)

    def take(self, names: tuple[str, ...], values: np.ndarray, steps: Sequence[int]) -> None:
        """Takes rows of a dispatch's scalars.

        Args:
            names: of the columns; those of norms begin with `grads/`, and are side by side.
            values: a row for each step.
            steps: of the rows.
        """
        if self._left >= len(steps):
            self._left -= len(steps)
            return
        if names is not self._names:
            self._names = names
            of_norms = [place for place, name in enumerate(names) if name.startswith("grads/")]
            self._places = slice(of_norms[0], of_norms[-1] + 1) if of_norms else slice(0)
            kept = names[self._places]
            if kept != self._kept[0]:
                self._kept = (kept, [])
        rows = self._kept[1]
        for row in range(self._left, len(steps), self._every):
            rows.append((steps[row], values[row, self._places].astype(np.float32)))
        self._left = (self._left - len(steps)) % self._every
        while len(rows) > 2 * _MOST:
            rows = rows[::2]
            self._kept, self._every = (self._kept[0], rows), 2 * self._every
