"""Loaders: one split of the data as a sequence of batches, the same for every number of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from learnax.data.batch import Batch, signature_of, stack_on_host
from learnax.data.reading import Here, Reader
from learnax.utils import PyTree


class Loader:
    """A dataset as batches, in its own order.

    Iterating gives stacked batches on the host; `batches` gives them laid out on the devices.

    Args:
        name: the split.
        dataset: anything with `__len__` and `__getitem__`.
        batch_size: data per batch.
        tail: whether the batch that is not full is filled up and given, or skipped.
        num_workers: processes that read; 0 reads here, between one step's dispatch and the next.
        put: starts a batch's transfer to the devices.

    Raises:
        TypeError: not a dataset.
        ValueError: an empty dataset, or one with no full batch where the tail is skipped.
    """

    def __init__(
        self,
        name: str,
        dataset: Any,
        batch_size: int,
        *,
        tail: bool,
        num_workers: int,
        put: Callable[[PyTree], PyTree],
    ):
        _check_dataset(name, dataset, batch_size, tail)
        self.name = name
        self.dataset = dataset
        self.batch_size = batch_size
        self._put = put
        size = len(dataset)
        stop = size if tail else size - size % batch_size
        self._ranges = [range(start, min(start + batch_size, size)) for start in range(0, stop, batch_size)]
        self._reader: Reader = Here(name, dataset, self._ranges)
        if num_workers:
            from learnax.data.workers import Workers

            self._reader = Workers(name, dataset, self._ranges, num_workers)

    def __len__(self) -> int:
        """Batches in one pass."""
        return len(self._ranges)

    def __iter__(self) -> Iterator[list[Any]]:
        return (batch.host for batch in self.batches())

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """One pass over the batches from number `start` on, on the devices."""
        for indices, data in zip(self._ranges[start:], self._reader.read(start), strict=False):
            yield self._batch(indices, data)

    def first(self, *, repeat_datum: bool) -> Batch:
        """The first batch, read here; or one of its first datum alone, repeated."""
        indices = range(1) if repeat_datum else self._ranges[0]
        (data,) = Here(self.name, self.dataset, [indices]).read(0)
        return self._batch(indices, data)

    def close(self) -> None:
        """Ends worker processes; a later pass starts new ones."""
        self._reader.close()

    def _batch(self, indices: range, data: list[Any]) -> Batch:
        padding = self.batch_size - len(data)
        names = [*indices, *[indices[-1]] * padding]
        try:
            host = stack_on_host([*data, *[data[-1]] * padding], names)
        except ValueError as error:
            raise ValueError(f"dataset {self.name!r}: {error}") from error
        device = self._put(host)
        return Batch(host, device, len(data), signature_of(device))


class Repeated:
    """One batch, `length` times: every step of an epoch sees the same data.

    Args:
        loader: where the batch comes from.
        length: batches in one pass.
        datum: whether the batch is its first datum repeated.
    """

    def __init__(self, loader: Loader, length: int, *, datum: bool):
        self._loader = loader
        self._length = length
        self._datum = datum
        self._batch: Batch | None = None

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[Any]]:
        return (batch.host for batch in self.batches())

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """The batch, from number `start` on."""
        if self._batch is None:
            self._batch = self._loader.first(repeat_datum=self._datum)
        for _ in range(start, self._length):
            yield self._batch

    def close(self) -> None:
        """Nothing to end: the batch was read once."""


def _check_dataset(name: str, dataset: Any, batch_size: int, tail: bool) -> None:
    """Raises where a dataset cannot give a single batch."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"dataset {name!r} must have __len__ and __getitem__, but is {type(dataset).__name__}; "
            "a list of data is the simplest"
        )
    size = len(dataset)
    if size == 0:
        raise ValueError(f"dataset {name!r} is empty; expected at least {1 if tail else batch_size} data")
    if size < batch_size and not tail:
        raise ValueError(
            f"dataset {name!r} has {size} data, fewer than one batch of {batch_size}: every batch would be skipped; "
            f"use batch_size <= {size}"
        )


class FirstDatum(NamedTuple):
    """A dataset's first datum.

    Attributes:
        arguments: as the step sees each: a list, with arrays for numbers and None for text.
        is_list: whether the dataset gave it as a list.
    """

    arguments: list[Any]
    is_list: bool


def first_datum(name: str, dataset: Any) -> FirstDatum:
    """Reads a dataset's first datum."""
    (data,) = Here(name, dataset, [range(1)]).read(0)
    stacked = stack_on_host(data, [0])
    return FirstDatum(jax.tree.map(lambda leaf: leaf[0], stacked), isinstance(data[0], list))
