"""What a run reports beside its loss: metrics of one output, pipes of them, and how their values are put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


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


# ---- how values are put together, over data, accumulated batches, devices and processes


class Amount:
    """A loss or metric that says how it is put together. It can be scaled and added to others, as a loss is in a pipe.

    A plain number is the mean of one datum, `Mean(x, 1)`.
    """

    __array_ufunc__ = None  # numpy's numbers leave the arithmetic to this class

    def __add__(self, other: Any) -> Amount:
        """A loss of several terms, each put together by itself."""
        return self if isinstance(other, (int, float)) and other == 0 else Terms((*terms_of(self), *terms_of(other)))

    def __radd__(self, other: Any) -> Amount:
        """As `__add__`, in the order of the terms."""
        return self if isinstance(other, (int, float)) and other == 0 else Terms((*terms_of(other), *terms_of(self)))

    def __mul__(self, factor: Any) -> Amount:
        """Scaled."""
        raise NotImplementedError

    def __rmul__(self, factor: Any) -> Amount:
        """Scaled."""
        return self * factor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean(Amount):
    """A mean in which values have weights: the sum of all totals, divided once by the sum of all weights.

    `Mean((ce * mask).sum(), mask.sum())` is the mean over all tokens that count, whatever batch, device or process
    they are in. As a loss, its gradient is that of this quotient; weights are data, no gradient goes through them.
    Where all weights are 0, the mean is 0.

    Attributes:
        total: the sum of weight times value.
        weight: the sum of the weights, 0 or more.
    """

    total: Any
    weight: Any = 1.0

    def __mul__(self, factor: Any) -> Mean:
        """The mean, scaled."""
        return Mean(self.total * factor, self.weight)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum(Amount):
    """A sum over the data of a step, or of a validation."""

    total: Any

    def __mul__(self, factor: Any) -> Sum:
        """The sum, scaled."""
        return Sum(self.total * factor)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Max(Amount):
    """The largest value among the data of a step, or of a validation; a metric, not a loss."""

    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Min(Amount):
    """The smallest value among the data of a step, or of a validation; a metric, not a loss."""

    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Terms(Amount):
    """A loss that is a sum of several: each is put together by itself, then they are added."""

    terms: tuple[Any, ...]

    def __mul__(self, factor: Any) -> Terms:
        """Each term, scaled."""
        return Terms(tuple(term * factor for term in self.terms))


def terms_of(value: Any) -> tuple[Any, ...]:
    """The terms of a loss; of one that has no others, itself."""
    return value.terms if isinstance(value, Terms) else (value,)
