"""Medians, and how sure a ratio of two of them is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000


class Ratio(NamedTuple):
    """A ratio of medians with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def bootstrap_ratio(above: Sequence[float], below: Sequence[float], *, paired: bool, seed: int = 0) -> Ratio:
    """The ratio of the medians of two sets of samples, with its bootstrap 95 % interval.

    Args:
        above: samples of the numerator.
        below: samples of the denominator.
        paired: whether the samples of one number were taken side by side, so that they are drawn together
            and what slowed both of them cancels.
        seed: of the draws; the same samples give the same interval.

    Raises:
        ValueError: no samples, or pairs of unequal number.
    """
    if not len(above) or not len(below):
        raise ValueError("a ratio needs at least one sample on each side")
    if paired and len(above) != len(below):
        raise ValueError(f"paired samples must be equally many, but are {len(above)} and {len(below)}")
    rng = np.random.default_rng(seed)
    tops, bottoms = np.asarray(above, float), np.asarray(below, float)
    drawn = rng.integers(len(tops), size=(RESAMPLES, len(tops)))
    drawn_below = drawn if paired else rng.integers(len(bottoms), size=(RESAMPLES, len(bottoms)))
    ratios = np.median(tops[drawn], axis=1) / np.median(bottoms[drawn_below], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Ratio(float(np.median(tops) / np.median(bottoms)), float(low), float(high))
