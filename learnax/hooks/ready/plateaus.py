"""What to do where a metric gets no better: end the run, or take a smaller learning rate."""

from __future__ import annotations

from typing import Any

from learnax.hooks.given import Hook, whole_number
from learnax.hooks.moment import Moment
from learnax.hooks.ready.record import Record


class _Patient(Hook):
    """Watches whether a metric gets better; see `EarlyStop` for the arguments."""

    def __init__(self, metric: str, patience: int, min_delta: float, mode: str, name: str | None):
        self.metric, self.name = metric, name
        self._patience = whole_number(f"{type(self).__name__}: patience", patience)
        self._record = Record(mode, min_delta)

    def _is_over(self, moment: Moment) -> bool:
        """Takes the value of a validation; whether it was one too many without a better one."""
        assert self.metric is not None
        return not self._record.take(moment.metrics[self.metric]) and self._record.since >= self._patience

    def state(self) -> Any:
        """The best value, and how long ago it was."""
        return self._record.state()

    def restore(self, state: Any) -> None:
        """Goes on with it."""
        self._record.restore(state)


class EarlyStop(_Patient):
    """Ends the run once a metric has got no better for some validations.

    Args:
        metric: its name, `"val/loss"` for instance.
        patience: validations in a row without a better value, 1 or more.
        min_delta: by how much a value must be better to count, in the metric's unit.
        mode: "min" where smaller is better, "max" where larger is. NaN is never better.
        name: see `learnax.hooks.Hook`.

    Raises:
        TypeError, ValueError: an argument out of its range.
    """

    def __init__(
        self, metric: str, patience: int, min_delta: float = 0.0, mode: str = "min", *, name: str | None = None
    ):
        super().__init__(metric, patience, min_delta, mode, name)

    def after_validation(self, moment: Moment) -> None:
        """Compares."""
        if self._is_over(moment):
            best = "no value" if self._record.best is None else f"{self._record.best:.6g}"
            moment.stop(f"{self.metric} has got no better than {best} for {self._record.since} validation(s)")


class ScaleRateOnPlateau(_Patient):
    """Multiplies the learning rate each time that a metric has got no better for some validations.

    Args:
        metric: its name, `"val/loss"` for instance.
        patience: validations in a row without a better value, 1 or more; after each scaling they are counted anew.
        factor: what the rate is multiplied by, above 0 and below 1; see `learnax.hooks.Moment.scale_rate`.
        min_delta: by how much a value must be better to count, in the metric's unit.
        mode: "min" where smaller is better, "max" where larger is. NaN is never better.
        name: see `learnax.hooks.Hook`.

    Raises:
        TypeError, ValueError: an argument out of its range.
    """

    def __init__(
        self,
        metric: str,
        patience: int,
        factor: float,
        min_delta: float = 0.0,
        mode: str = "min",
        *,
        name: str | None = None,
    ):
        super().__init__(metric, patience, min_delta, mode, name)
        if not 0 < factor < 1:
            raise ValueError(f"ScaleRateOnPlateau: factor must be above 0 and below 1, but is {factor!r}")
        self._factor = factor

    def after_validation(self, moment: Moment) -> None:
        """Compares."""
        if self._is_over(moment):
            self._record.since = 0
            moment.scale_rate(self._factor)
