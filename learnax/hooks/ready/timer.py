"""How fast a run is."""

from __future__ import annotations

import time

from learnax.hooks.given import Hook, whole_number
from learnax.hooks.moment import Moment


class Timer(Hook):
    """Measures the wall time of a step, as the mean over the steps since its last call, in `train/seconds per step`.

    All that happened in between is in it: validation, saves, waiting for data. The first call after the beginning of
    `train()` counts from there, with what is compiled at first use.

    Args:
        every: steps from one call to the next, 1 or more.
        name: see `learnax.hooks.Hook`.

    Raises:
        TypeError, ValueError: `every` is no whole number above 0.
    """

    def __init__(self, every: int, *, name: str | None = None):
        self.name = name
        self._every = whole_number("Timer: every", every)
        self._step, self._time = 0, time.perf_counter()

    def begin(self, moment: Moment) -> None:
        """Time counts from here."""
        self._step, self._time = moment.step, time.perf_counter()

    def next_due(self, step: int) -> float:
        """The next multiple of `every`."""
        return step - step % self._every + self._every

    def __call__(self, moment: Moment) -> dict[str, float]:
        """Seconds per step."""
        now, steps = time.perf_counter(), moment.step - self._step
        seconds, self._step, self._time = (now - self._time) / max(steps, 1), moment.step, now
        return {"seconds per step": seconds}
