"""Long curves in few numbers: the least, the largest and the mean of as many values as a column of pixels shows."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from learnax.sinks.sink import Source

MOST = 1024
"""Columns of a curve at most; from half as many it grows into them."""
_BYTES = 1_100_000
"""What all curves of a page may take, as text."""
_EACH = 16
"""Bytes of a column of a curve as text: three numbers of four bytes, by base64."""


class Curve:
    """The values of a metric, in columns of 1, 2, 4, ... values each."""

    def __init__(self) -> None:
        self.count = 0
        self.width = 1
        self._low: np.ndarray = np.empty(0)
        self._high: np.ndarray = np.empty(0)
        self._sums: np.ndarray = np.empty(0)
        self._numbers: np.ndarray = np.empty(0)

    def extend(self, values: np.ndarray) -> None:
        """Takes more values; what is not finite counts in none of the three."""
        values = np.asarray(values, np.float64)
        if not len(values):
            return
        values = np.where(np.isfinite(values), values, np.nan)
        # The last column may have room: its values so far are its first part.
        room = -self.count % self.width
        for part in (values[:room], values[room:]):
            if len(part):
                self._add(part, joins=part is not values and room > 0 and self.count % self.width > 0)
        while len(self._low) > MOST:
            self._halve()

    def columns(self, most: int = MOST) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of each column: the number of values up to its end, the least, the largest, the mean; NaN where all are."""
        curve = self
        if len(self._low) > most:
            curve = Curve()
            curve.count, curve.width = self.count, self.width
            curve._low, curve._high, curve._sums, curve._numbers = self._low, self._high, self._sums, self._numbers
            while len(curve._low) > most:
                curve._halve()
        ends = np.minimum(np.arange(1, len(curve._low) + 1) * curve.width, curve.count)
        with np.errstate(invalid="ignore", divide="ignore"):
            return ends, curve._low, curve._high, curve._sums / curve._numbers

    def _add(self, values: np.ndarray, *, joins: bool) -> None:
        more = -len(values) % self.width
        rows = np.concatenate([values, np.full(more, np.nan)]).reshape(-1, self.width)
        low: np.ndarray = np.fmin.reduce(rows, axis=1)
        high: np.ndarray = np.fmax.reduce(rows, axis=1)
        numbers: np.ndarray = np.asarray(np.sum(~np.isnan(rows), axis=1, dtype=np.float64))
        if joins:
            self._low[-1] = np.fmin(self._low[-1], low[0])
            self._high[-1] = np.fmax(self._high[-1], high[0])
            self._sums[-1] += np.nansum(values)
            self._numbers[-1] += numbers[0]
        else:
            self._low, self._high = np.append(self._low, low), np.append(self._high, high)
            self._sums = np.append(self._sums, np.nansum(rows, axis=1))
            self._numbers = np.append(self._numbers, numbers)
        self.count += len(values)

    def _halve(self) -> None:
        def pairs(values: np.ndarray, nothing: float) -> np.ndarray:
            return np.append(values, [nothing] * (len(values) % 2)).reshape(-1, 2)

        self._low = np.fmin.reduce(pairs(self._low, np.nan), axis=1)
        self._high = np.fmax.reduce(pairs(self._high, np.nan), axis=1)
        self._sums = pairs(self._sums, 0).sum(axis=1)
        self._numbers = pairs(self._numbers, 0).sum(axis=1)
        self.width *= 2


class Curves:
    """A run's metrics, followed as they grow: each value is looked at once."""

    def __init__(self) -> None:
        self._dense: dict[str, Curve] = {}
        self._lost = np.empty(0, np.int64)  # the numbers of the training rows that were dropped
        self._rows = 0
        self._offset = 0

    def anchor(self, step: int) -> None:
        """Tells which step the last row that was followed is of: a run may begin with a state that has seen updates."""
        self._offset = max(step - (self._rows - len(self._lost)), 0)

    def follow(self, source: Source) -> None:
        """Takes what has come to the metrics since the last time."""
        metrics = source.metrics
        flags = [np.asarray(metrics[name][self._rows :], np.float64) for name in _FLAGS if metrics.get(name)]
        if flags:
            made = min(map(len, flags))
            lost = np.flatnonzero(np.sum([flag[:made] > 0 for flag in flags], axis=0)) + self._rows
            self._lost = np.append(self._lost, lost)
            self._rows += made
        for name in list(metrics):
            if self._is_dense(source, name):
                curve = self._dense.setdefault(name, Curve())
                values = metrics[name]
                curve.extend(np.asarray(values[curve.count :], np.float64))

    def packed(self, source: Source, facts: Mapping[str, Any]) -> dict[str, Any]:
        """All curves as plain data: `x` by key, and for each metric its name, the key of its x, and its numbers."""
        names = [name for name in source.metrics if _shown(name, source.metrics)]
        most = max(min(MOST, _BYTES // _EACH // max(len(names), 1)), 8)
        places: dict[str, str] = {}
        curves = []
        for name in names:
            if name in self._dense:
                curve = self._dense[name]
                ends, low, high, mean = curve.columns(most)
                x = self._steps(ends + max(self._rows - curve.count, 0))
            else:
                values = np.asarray(list(source.metrics[name]), np.float64)
                at = self._made_at(source, name, len(values), facts)
                curve = Curve()
                curve.extend(values)
                ends, low, high, mean = curve.columns(most)
                x = self._steps(at[ends - 1])
            text = pack(x)
            key = places.setdefault(text, f"x{len(places)}")
            packed = {"name": name, "x": key, "mean": pack(mean), "count": curve.count}
            packed |= {"dense": True} if name in self._dense else {}
            packed |= {"last": _finite(source.metrics[name][-1])} if source.metrics[name] else {}
            if not np.array_equal(low, high, equal_nan=True):
                packed |= {"low": pack(low), "high": pack(high)}
            curves.append(packed)
        return {"x": {key: text for text, key in places.items()}, "curves": curves}

    def dropped(self, most: int = 200) -> dict[str, Any]:
        """Updates that were dropped; of many, some that are spread evenly."""
        some = self._lost
        if len(some) > most:
            some = some[np.linspace(0, len(some) - 1, most).astype(int)]
        return {"steps": self._steps(some).astype(int).tolist(), "count": len(self._lost)}

    def _is_dense(self, source: Source, name: str) -> bool:
        """Whether a metric has a value for each step."""
        if not name.startswith("train/") or name in source.made_at:
            return False
        return name in self._dense or 2 * len(source.metrics[name]) > self._rows

    def _steps(self, rows: np.ndarray) -> np.ndarray:
        """The step that the run was at when so many training rows were made."""
        return self._offset + rows - np.searchsorted(self._lost, rows, side="left")

    def _made_at(self, source: Source, name: str, count: int, facts: Mapping[str, Any]) -> np.ndarray:
        """How many training rows were made when each value of a metric was kept."""
        known = np.asarray(list(source.made_at.get(name, []))[:count], np.int64)
        before = count - len(known)
        if not before:
            return known
        # Values from before this process: the checkpoint has them, not when they came. They came by a cadence.
        until = int(known[0]) if len(known) else self._rows
        epoch, every = int(facts.get("epoch_steps") or 0), int(facts.get("val_every") or 1)
        split = name.partition("/")[0]
        if epoch and not name.startswith("train/"):
            every = 1 if split == "train_epoch" else every
            first = np.minimum((np.arange(before) * every + 1) * epoch, until)
        else:
            first = np.linspace(0, until, before + (2 if len(known) else 1))[1 : before + 1].astype(np.int64)
        return np.append(first, known)


_FLAGS = ("train/has_nan", "train/overflow")


def pack(values: Any) -> str:
    """Numbers as text: base64 of little-endian float32."""
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()


def unpack(text: str) -> np.ndarray:
    """The inverse of `pack`."""
    return np.frombuffer(base64.b64decode(text), "<f4")


def _shown(name: str, metrics: Mapping[str, Sequence[float]]) -> bool:
    """Whether a metric says something that no other one does."""
    split, _, rest = name.partition("/")
    plain = split.removesuffix("_epoch")
    return plain == split or not metrics.get(f"{plain}/{rest}")


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
