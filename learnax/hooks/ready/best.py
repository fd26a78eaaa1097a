"""The best checkpoints by a metric."""

from __future__ import annotations

import logging
from typing import Any

from learnax.hooks.given import Hook, whole_number
from learnax.hooks.moment import Moment
from learnax.hooks.ready.record import Record

_logger = logging.getLogger("learnax")


class SaveBest(Hook):
    """Keeps the checkpoints of the `k` validations with the best values of a metric.

    They are kept under the names `<name>-1` to `<name>-<k>`, in no order: a better one takes the place of the worst,
    which is removed once that is whole on disk. A line says which value is where; `load_checkpoint="SaveBest-1"` loads
    one. For the very best one alone, there is `Trainer(keep_best_checkpoint=True)`.

    Args:
        k: how many, 1 or more.
        metric: its name, `"val/loss"` for instance.
        mode: "min" where smaller is better, "max" where larger is. NaN is never kept.
        name: see `learnax.hooks.Hook`.

    Raises:
        TypeError, ValueError: an argument out of its range.
    """

    def __init__(self, k: int, metric: str, mode: str = "min", *, name: str = "SaveBest"):
        self.metric, self.name = metric, name
        self._record = Record(mode)
        self._places: dict[str, list[float]] = {}
        self._names = [f"{name}-{place}" for place in range(1, whole_number("SaveBest: k", k) + 1)]

    def after_validation(self, moment: Moment) -> None:
        """Compares."""
        assert self.metric is not None
        value = moment.metrics[self.metric]
        place, worst = self._worst()
        if self._record.is_better(value, worst):
            moment.save(place)
            self._places[place] = [value, moment.step]
            _logger.info("checkpoint %r is that of step %d: %s is %.6g", place, moment.step, self.metric, value)

    def state(self) -> Any:
        """The values of what is kept, and the steps, by the checkpoints' names."""
        return {place: list(kept) for place, kept in self._places.items()}

    def restore(self, state: Any) -> None:
        """Goes on with them."""
        self._places = {place: kept for place, kept in state.items() if place in self._names}

    def _worst(self) -> tuple[str, float | None]:
        """The place for the next one, and the value that is there; the first that is free has none."""
        for place in self._names:
            if place not in self._places:
                return place, None
        place = self._names[0]
        for other in self._names:
            if self._record.is_better(self._places[place][0], self._places[other][0]):
                place = other
        return place, self._places[place][0]
