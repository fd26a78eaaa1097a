"""Reading a dataset: in this process, and what every reader promises."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from learnax.data.batch import stack_on_host


class DatasetError(RuntimeError):
    """A dataset raised: the index and the original error are in the text."""


class Reader(Protocol):
    """Reads the batches of one split, in order."""

    def read(self, start: int) -> Iterator[list[Any]]:
        """Each batch of one pass, from batch `start` on, stacked on the host.

        Raises:
            DatasetError: the dataset raised.
            ValueError: the data of a batch do not go together.
        """
        ...

    def close(self) -> None:
        """Lets go of processes and files."""
        ...


class Here:
    """Reads in this process, one batch at a time.

    A step is dispatched and not waited for, so the next batch is read while the devices compute.

    Args:
        name: the split.
        dataset: what to read.
        ranges: the indices of each batch.
        collate: stacks a batch.
    """

    def __init__(self, name: str, dataset: Any, ranges: Sequence[range], collate: Collate):
        self._name = name
        self._dataset = dataset
        self._ranges = ranges
        self._collate = collate

    def read(self, start: int) -> Iterator[list[Any]]:
        """Reads each batch when it is asked for."""
        for indices in self._ranges[start:]:
            yield self._collate(indices, [read_item(self._name, self._dataset, index) for index in indices])

    def close(self) -> None:
        """Nothing to let go of."""


@dataclasses.dataclass(frozen=True)
class Collate:
    """Stacks the data of a batch, the last one repeated where it is not full.

    Attributes:
        name: the split, for errors.
        batch_size: data in a full batch.
    """

    name: str
    batch_size: int

    def __call__(self, indices: range, data: list[Any]) -> list[Any]:
        """The batch, leaves `(batch_size, ...)`; a ValueError where data do not go together."""
        padding = self.batch_size - len(data)
        try:
            return stack_on_host([*data, *[data[-1]] * padding], [*indices, *[indices[-1]] * padding])
        except ValueError as error:
            raise ValueError(f"dataset {self.name!r}: {error}") from error


def read_item(name: str, dataset: Any, index: int) -> Any:
    """One datum of a split; a DatasetError where the dataset raises."""
    try:
        return dataset[index]
    except Exception as error:
        raise DatasetError(error_text(name, index, error)) from error


def error_text(name: str, index: int, error: BaseException) -> str:
    """What a DatasetError says."""
    return f"dataset {name!r} raised at index {index}: {type(error).__name__}: {error}"
