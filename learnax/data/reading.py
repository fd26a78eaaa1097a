"""Reading a dataset's items: in this process, and what every reader promises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol


class DatasetError(RuntimeError):
    """A dataset raised: the index and the original error are in the text."""


class Reader(Protocol):
    """Reads the batches of one split, in order."""

    def read(self, start: int) -> Iterator[list[Any]]:
        """The data of each batch of one pass, from batch `start` on.

        Raises:
            DatasetError: the dataset raised.
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
    """

    def __init__(self, name: str, dataset: Any, ranges: Sequence[range]):
        self._name = name
        self._dataset = dataset
        self._ranges = ranges

    def read(self, start: int) -> Iterator[list[Any]]:
        """Reads each batch when it is asked for."""
        for indices in self._ranges[start:]:
            yield [self._item(index) for index in indices]

    def close(self) -> None:
        """Nothing to let go of."""

    def _item(self, index: int) -> Any:
        try:
            return self._dataset[index]
        except Exception as error:
            raise DatasetError(error_text(self._name, index, error)) from error


def error_text(name: str, index: int, error: BaseException) -> str:
    """What a DatasetError says."""
    return f"dataset {name!r} raised at index {index}: {type(error).__name__}: {error}"
