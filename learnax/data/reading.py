"""Reading a dataset: in this process, and what every reader promises."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, overload

from learnax.data.batch import as_list, stack_on_host
from learnax.data.order import Order
from learnax.utils import held


class DatasetError(RuntimeError):
    """A dataset raised: the index and the original error are in the text."""


class Ranges(Sequence[range]):
    """The indices of each batch, by arithmetic: a dataset may be as long as it likes.

    Args:
        size: data.
        stop: where the last batch ends, or would end if it were full.
        batch_size: data per batch.
        share: the rows of each batch that are wanted, the first and the one after the last.
        seed: of the order of each epoch; None for the dataset's own order.
    """

    def __init__(self, size: int, stop: int, batch_size: int, share: tuple[int, int], seed: int | None = None):
        self._size = size
        self._starts = range(0, stop, batch_size)
        self._share = share
        self._seed = seed
        self._order: tuple[int, Order] | None = None

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, number: int) -> range: ...

    @overload
    def __getitem__(self, number: slice) -> list[range]: ...

    def __getitem__(self, number: int | slice) -> range | list[range]:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        start, (first, last) = self._starts[number], self._share
        # A share that lies behind the end of the data is all padding: the last datum, as for one that ends there.
        return range(min(start + first, self._size - 1), min(start + last, self._size))

    def indices(self, number: int, epoch: int) -> Sequence[int]:
        """The indices of a batch of an epoch."""
        places = self[number]
        if self._seed is None:
            return places
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, Order(self._size, self._seed, epoch)
        order = self._order[1]
        return [order[place] for place in places]

    @property
    def shuffled(self) -> bool:
        """Whether epochs have orders of their own."""
        return self._seed is not None

    def real(self, number: int) -> int:
        """Data in a whole batch, those that others read included."""
        return min(self._starts.step, self._size - self._starts[number])


class Only(Ranges):
    """One batch of these indices alone."""

    def __init__(self, indices: range):
        super().__init__(len(indices), 1, 1, (0, 1))
        self._indices = indices

    def indices(self, number: int, epoch: int) -> Sequence[int]:
        """The indices."""
        return self._indices


class Heed:
    """Asks, while data are waited for, whether to go on.

    Args:
        ask: raises to stop; it may be called in another thread, too.

    Attributes:
        stop: what it raised. That is no error of the data.
    """

    def __init__(self, ask: Callable[[], None] | None = None):
        self._ask = ask
        self.stop: BaseException | None = None

    def __call__(self) -> None:
        """Returns where nothing asks for a stop."""
        if self._ask is None:
            return
        try:
            self._ask()
        except BaseException as stop:
            self.stop = stop
            raise


class Reader(Protocol):
    """Reads the batches of one split, in order."""

    def read(self, start: int, epoch: int = 0) -> Iterator[list[Any]]:
        """Each batch of an epoch, from batch `start` on, stacked on the host.

        Raises:
            DatasetError: the dataset raised.
            ValueError: the data of a batch do not go together, or do not fit the dtype that devices hold.
            TypeError: a datum has what is no array.
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
        heed: is asked before each datum.
        told: whether the dataset is told each epoch's number.
    """

    def __init__(self, name: str, dataset: Any, ranges: Ranges, collate: Collate, heed: Heed, *, told: bool = False):
        self._name = name
        self._dataset = dataset
        self._ranges = ranges
        self._collate = collate
        self._heed = heed
        self._told = told

    def read(self, start: int, epoch: int = 0) -> Iterator[list[Any]]:
        """Reads each batch when it is asked for."""
        if self._told:
            tell_epoch(self._name, self._dataset, epoch)
        for number in range(start, len(self._ranges)):
            indices = self._ranges.indices(number, epoch)
            yield self._collate(indices, self._items(indices))

    def close(self) -> None:
        """Nothing to let go of."""

    def _items(self, indices: Sequence[int]) -> Iterator[Any]:
        dataset, heed = self._dataset, self._heed
        for index in indices:
            heed()
            try:
                datum = dataset[index]
            except Exception as error:
                raise DatasetError(error_text(self._name, index, error)) from error
            yield datum


@dataclasses.dataclass(frozen=True)
class Collate:
    """Stacks the data of a batch, the last one repeated where it is not full.

    Attributes:
        name: the split, for errors.
        batch_size: data in a full batch.
    """

    name: str
    batch_size: int

    def __call__(self, indices: Sequence[int], data: Iterable[Any]) -> list[Any]:
        """The batch, leaves `(batch_size, ...)`; each datum is copied before the next one is asked for.

        Raises:
            ValueError, TypeError: data do not go together, or cannot be stacked.
        """
        try:
            return stack_on_host(data, indices, self.batch_size)
        except (TypeError, ValueError) as error:
            raise self.error(error) from error

    def held(self, item: Any) -> list[Any]:
        """A batch that came stacked, as arguments, in memory of their own.

        Raises:
            ValueError, TypeError: it has what is no array, or a number that does not fit.
        """
        try:
            return held(as_list(item))
        except (TypeError, ValueError) as error:
            raise self.error(error) from error

    def error(self, error: TypeError | ValueError) -> TypeError | ValueError:
        """What went wrong with the data of a batch, with the name of the split."""
        kind = TypeError if isinstance(error, TypeError) else ValueError
        return kind(f"dataset {self.name!r}: {error}")


def read_item(name: str, dataset: Any, index: int) -> Any:
    """One datum of a split; a DatasetError where the dataset raises."""
    try:
        return dataset[index]
    except Exception as error:
        raise DatasetError(error_text(name, index, error)) from error


def takes_epochs(dataset: Any) -> bool:
    """Whether a dataset wants to be told the number of each epoch: it has `set_epoch`."""
    return callable(getattr(dataset, "set_epoch", None))


def tell_epoch(name: str, dataset: Any, epoch: int) -> None:
    """Tells a dataset which epoch is read next; a DatasetError where it raises."""
    try:
        dataset.set_epoch(epoch)
    except Exception as error:
        raise DatasetError(epoch_text(name, epoch, error)) from error


def error_text(name: str, index: int, error: BaseException) -> str:
    """What a DatasetError says."""
    return f"dataset {name!r} raised at index {index}: {type(error).__name__}: {error}"


def epoch_text(name: str, epoch: int, error: BaseException) -> str:
    """What a DatasetError says of a dataset that was told an epoch."""
    return f"dataset {name!r} raised in set_epoch({epoch}): {type(error).__name__}: {error}"


def indices_text(indices: Sequence[int]) -> str:
    """Some indices for a person."""
    if isinstance(indices, range):
        return f"{indices[0]} to {indices[-1]}"
    return ", ".join(map(str, indices[:5])) + (", ..." if len(indices) > 5 else "")
