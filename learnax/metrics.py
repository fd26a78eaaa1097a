"""What a run reports beside its loss: metrics of one output, and pipes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Metric:
    """A measurement of one datum's output: implement `__call__(output, batch)`."""

    def __call__(self, output: Any, batch: Any) -> Mapping[str, Any]:
        """A dict of scalars by name."""
        raise NotImplementedError(f"{type(self).__name__} must implement __call__(output, batch)")


class MetricPipe:
    """Several metrics of one output, as one.

    Args:
        metric_list: callables `(output, batch) -> dict of scalars`.
    """

    def __init__(self, metric_list: Sequence[Callable[[Any, Any], Mapping[str, Any]]]):
        self.metric_list = list(metric_list)

    def __call__(self, output: Any, batch: Any) -> dict[str, Any]:
        """All metrics in one dict; of two of one name the later one's stays."""
        merged: dict[str, Any] = {}
        for metric in self.metric_list:
            merged.update(metric(output, batch))
        return merged
