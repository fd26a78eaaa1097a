"""What a run reports beside its loss: metrics of one output, and pipes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Metric:
    """A measurement of one datum's output: implement `_call`, or override `__call__` itself.

    Both are given what the metric is called with, `(output, batch)` in a loss, `(sample, datum)` as `sample_metrics`.

    Args:
        transform: applied to the first of these before `_call` sees it; None leaves it. A class that overrides
            `__call__` has it as `self.transform`.
    """

    # A class attribute, so that a subclass need not call `super().__init__`.
    transform: Callable[[Any], Any] | None = None

    def __init__(self, transform: Callable[[Any], Any] | None = None):
        self.transform = transform

    def _call(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """A dict of scalars by name."""
        raise NotImplementedError(f"{type(self).__name__} must implement _call(output, batch) or override __call__")

    def __call__(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """What `_call` measures, behind the transform."""
        if self.transform is not None and args:
            args = (self.transform(args[0]), *args[1:])
        return self._call(*args, **kwargs)


class MetricPipe:
    """Several metrics of one output, as one.

    Args:
        metrics_list: callables that return a dict of scalars; each is given what the pipe is called with.
    """

    def __init__(self, metrics_list: Sequence[Callable[..., Mapping[str, Any]]]):
        self.metrics_list = list(metrics_list)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """All metrics in one dict; of two of one name the later one's stays."""
        merged: dict[str, Any] = {}
        for metric in self.metrics_list:
            merged.update(metric(*args, **kwargs))
        return merged
