"""Loaders: one split of the data as blocks of batches, the same for every number of workers.

What the kinds of loaders have in common is `Split`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from learnax.data.arrays import Arrays
from learnax.data.at_once import SLICED, stacked_at_once
from learnax.data.batch import Block, ShuffledBlock, copied, signature_of, stack_batches, stack_on_host
from learnax.data.flow import Flow
from learnax.data.order import Order
from learnax.data.reading import (
    Collate,
    Heed,
    Here,
    Only,
    Ranges,
    Reader,
    indices_text,
    read_item,
    takes_epochs,
    tell_epoch,
)
from learnax.data.streams import Batches, Feed
from learnax.utils import PyTree, describe, same_structure, tree_bytes
from learnax.utils.permutation import Shuffled


class Split(Protocol):
    """One split of the data as batches on the devices.

    Attributes:
        size: data in a pass; 0 where nobody knows.
        room: batches in a block.
    """

    size: int
    room: int

    def __len__(self) -> int:
        """Batches in a pass; 0 where nobody knows."""

    def __iter__(self) -> Iterator[list[Any]]:
        """Stacked batches on the host."""

    def blocks(self, start: int = 0, epoch: int = 0) -> Iterator[Block]:
        """The batches of an epoch from number `start` on, several at a time, on the devices."""

    @property
    def keeps(self) -> bool:
        """Whether its data stay on the devices where they fit the budget."""

    def kept(self, block: Block) -> int:
        """Bytes of a whole pass of blocks like this one, if it stays on the devices; 0 if it does not."""

    def ahead(self, count: int) -> Iterator[Block]:
        """The next blocks, which come again later."""

    def close(self) -> None:
        """Ends worker processes; a later pass starts new ones."""


class Loader:
    """A dataset as batches, in its own order or in one of each epoch's own.

    Iterating gives stacked batches on the host; `blocks` gives several at a time, laid out on the devices.
    A list or tuple is read and stacked once, in the first whole pass, and its blocks stay on the devices
    where they fit the budget; any other dataset is read again in each pass.

    Args:
        name: the split.
        dataset: anything with `__len__` and `__getitem__`.
        batch_size: data per batch.
        most: batches in a pass at most; None for no limit.
        tail: whether the batch that is not full is filled up and given, or skipped.
        num_workers: processes that read; 0 reads here, while the devices compute.
        put: starts a block's transfer to the devices.
        share: the rows of each batch that are read here, the first and the one after the last; None for all.
        group: batches that belong together; a group that is not whole is skipped with the tail.
        room: batches in a block.
        budget: bytes that a list may take on the devices.
        heed: raises to stop. It is called before each datum that is read here (of a list or array, each block), and
            about every second, in another thread, while a worker is waited for; what is half read then is read again.
        seed: of the order of each epoch; None for the dataset's own order.
        told: whether a dataset with `set_epoch` is told each epoch's number before it is read.
    """

    def __init__(
        self,
        name: str,
        dataset: Any,
        batch_size: int,
        *,
        most: int | None = None,
        tail: bool,
        num_workers: int,
        put: Callable[[PyTree], PyTree],
        share: tuple[int, int] | None = None,
        group: int = 1,
        room: int = 1,
        budget: int = 0,
        heed: Callable[[], None] | None = None,
        seed: int | None = None,
        told: bool = False,
    ):
        self.name = name
        self.dataset = dataset
        self.batch_size = batch_size
        self.room = room
        self._group = group
        self._put = put
        size = len(dataset)
        self.size = size = size if most is None else min(size, most * batch_size)
        stop = size if tail else size - size % (batch_size * group)
        first, last = share or (0, batch_size)
        self._ranges = Ranges(size, stop, batch_size, (first, last), seed)
        self._collate = Collate(name, last - first)
        self._heed = Heed(heed)
        self._at_once = seed is None and not num_workers and last - first == batch_size
        told = told and takes_epochs(dataset)
        self._reader: Reader = Here(name, dataset, self._ranges, self._collate, self._heed, told=told)
        self._workers = num_workers
        if num_workers:
            from learnax.data.workers import Workers

            self._reader = Workers(name, dataset, self._ranges, self._collate, num_workers, self._heed, told=told)
        # In an order of its own, each epoch has other blocks.
        self._budget = budget if is_list(dataset) and seed is None else 0
        self._resident: list[Block] = []

    def __len__(self) -> int:
        """Batches in one pass."""
        return len(self._ranges)

    def __iter__(self) -> Iterator[list[Any]]:
        return _batches(self.blocks())

    def __str__(self) -> str:
        reader = f"{self._workers} worker processes" if self._workers else "this process"
        order = ", in an order of each epoch's own" if self._ranges.shuffled else ""
        read = f"{self.name}: {self.size} data in {len(self)} batches{order}, read by {reader}"
        if not self._budget:
            return f"{read} in each pass"
        return f"{read} once, kept on the devices while it takes at most {self._budget >> 20} MB"

    def blocks(self, start: int = 0, epoch: int = 0) -> Iterator[Block]:
        """The batches of an epoch from number `start` on, `room` at a time, on the devices."""
        if self._resident:
            begin = 0
            for block in self._resident:
                end = begin + len(block)
                if end > start:
                    yield block if begin >= start else dataclasses.replace(block, first=start - begin)
                begin = end
            return
        kept: list[Block] = []
        left = self._budget if start == 0 else 0
        for block in self._read(start, epoch):
            left -= tree_bytes(block.device)
            if left >= 0:
                kept.append(block)
            else:
                kept.clear()
            yield block
        if left >= 0:
            self._resident = kept

    def ahead(self, count: int) -> Iterator[Block]:
        """The first blocks."""
        return itertools.islice(self.blocks(), count)

    @property
    def keeps(self) -> bool:
        """Whether its data stay on the devices where they fit the budget."""
        return self._budget > 0

    def kept(self, block: Block) -> int:
        """Bytes of a whole pass of blocks like this one, if it stays on the devices; 0 if it does not."""
        size = tree_bytes(block.device) * -(-len(self) // self.room)
        return size if size <= self._budget else 0

    def first(self, *, repeat_datum: bool) -> list[Any]:
        """This process's share of the first batch in the dataset's own order; or of the first datum, repeated."""
        indices = range(1) if repeat_datum else self._ranges[0]
        (batch,) = Here(self.name, self.dataset, Only(indices), self._collate, self._heed).read(0)
        return batch

    def close(self) -> None:
        """Ends worker processes; a later pass starts new ones."""
        self._reader.close()

    def _read(self, start: int, epoch: int) -> Iterator[Block]:
        """Blocks of batches of one signature each; what was read before an error of the data is given first."""
        if self._at_once and type(self.dataset) in SLICED:
            start = yield from self._read_at_once(start)
        batches: list[list[Any]] = []
        size = 0
        try:
            for number, batch in enumerate(self._reader.read(start, epoch), start):
                if batches and signature_of(batch) != signature_of(batches[0]):
                    if len(batches) % self._group:
                        indices = self._ranges.indices(number, epoch)
                        raise ValueError(self._group_text(indices, batches[-1], batch))
                    yield self._block(batches, size)
                    batches, size = [], 0
                batches.append(batch)
                size += self._ranges.real(number)
                if len(batches) == self.room:
                    yield self._block(batches, size)
                    batches, size = [], 0
        except Exception as error:
            if error is self._heed.stop:
                raise
            whole = len(batches) - len(batches) % self._group
            if whole:
                yield self._block(batches[:whole], min(size, whole * self.batch_size))
            raise
        if batches:
            yield self._block(batches, size)

    def _read_at_once(self, start: int) -> Generator[Block, None, int]:
        """Blocks of a list or array; returns the number of the batch from which on it is to be read one by one."""
        for number in range(start, len(self), self.room):
            self._heed()
            end = min(number + self.room, len(self)) * self.batch_size
            indices = range(number * self.batch_size, min(end, self.size))
            data = self.dataset[indices.start : indices.stop]
            if len(data) < len(indices):  # it is shorter by now
                return number
            host = stacked_at_once(data, (self.room, self.batch_size))
            if host is None:
                return number
            device = self._put(host)
            yield Block(host, device, len(data), self.batch_size, signature_of(device))
        return len(self)

    def _group_text(self, indices: Sequence[int], before: list[Any], batch: list[Any]) -> str:
        return (
            f"dataset {self.name!r}: the {self._group} batches of one update must be of one shape, but that of data "
            f"{indices_text(indices)} is\n{describe(batch)}\nand the one before it\n{describe(before)}"
        )

    def _block(self, batches: list[list[Any]], size: int) -> Block:
        return _stacked(batches, self.room, size, self.batch_size, self._put)


def _stacked(batches: list[list[Any]], room: int, size: int, batch_size: int, put: Callable[[PyTree], PyTree]) -> Block:
    """Batches of one signature as a block, with room for more, on the host and on the devices."""
    host = stack_batches(batches, room)
    device = put(host)
    return Block(host, device, size, batch_size, signature_of(device))


def _batches(blocks: Iterator[Block]) -> Iterator[list[Any]]:
    return (copied(block.batch(number)) for block in blocks for number in range(len(block)))


class Repeated:
    """One batch, `length` times: every step of an epoch sees the same data.

    Args:
        loader: where the batch comes from.
        length: batches in one pass.
        datum: whether the batch is its first datum repeated.
        put: starts its transfer to the devices.
    """

    def __init__(self, loader: Loader | Flow, length: int, *, datum: bool, put: Callable[[PyTree], PyTree]):
        self._loader = loader
        self._length = length
        self._datum = datum
        self._put = put
        self.room = 1
        self.size = length * loader.batch_size
        self._block: Block | None = None

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[Any]]:
        return _batches(self.blocks())

    def __str__(self) -> str:
        what = "datum" if self._datum else "batch"
        return f"{self._loader.name}: the first {what}, {self._length} times, kept on the devices"

    def blocks(self, start: int = 0, epoch: int = 0) -> Iterator[Block]:
        """The batch, from number `start` on, as one block."""
        if self._block is None:
            batch, size = self._loader.first(repeat_datum=self._datum), self._loader.batch_size
            self._block = _stacked([batch], 1, self._length * size, size, self._put)
        if start < self._length:
            yield dataclasses.replace(self._block, first=start)

    def ahead(self, count: int) -> Iterator[Block]:
        """The block."""
        return self.blocks()

    @property
    def keeps(self) -> bool:
        """Its batch stays on the devices."""
        return True

    def kept(self, block: Block) -> int:
        """Bytes of the batch, which stays on the devices."""
        return tree_bytes(block.device)

    def close(self) -> None:
        """Nothing to end: the batch was read once."""


class Gathered:
    """A list that stays on the devices, whole on each: steps gather their batches, in an order of each epoch's own.

    Args:
        name: the split.
        dataset: a list or tuple.
        batch_size: data per batch.
        group: batches that belong together; a group that is not whole is skipped with the tail.
        seed: of the orders.
        put: lays data out on the devices, the same on each.
        lies: see `Shuffled`.
        heed: see `Loader`.
    """

    keeps = True

    def __init__(
        self,
        name: str,
        dataset: Any,
        batch_size: int,
        *,
        group: int,
        seed: int,
        put: Callable[[PyTree], PyTree],
        lies: Any = None,
        heed: Callable[[], None] | None = None,
    ):
        self.name, self.dataset, self.batch_size = name, dataset, batch_size
        self.size = len(dataset)
        self.room = self._length = self.size // (batch_size * group) * group
        self._seed, self._put, self._lies, self._heed = seed, put, lies, Heed(heed)
        self._rows: tuple[list[Any], PyTree] | None = None

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[Any]]:
        return _batches(self.blocks())

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.size} data in {len(self)} batches, in an order of each epoch's own, read by this "
            "process once, kept on each device and gathered there"
        )

    def blocks(self, start: int = 0, epoch: int = 0) -> Iterator[Block]:
        """The batches of an epoch, from number `start` on, as one block."""
        if start >= self._length:
            return
        if self._rows is None:
            ranges, collate = Only(range(self.size)), Collate(self.name, self.size)
            (host,) = Here(self.name, self.dataset, ranges, collate, self._heed).read(0)
            self._rows = host, self._put(host)
        host, rows = self._rows
        order = Order(self.size, self._seed, epoch)
        device = Shuffled(rows, self._put(order.rounds), self.size, self._lies)
        size, signature = self._length * self.batch_size, signature_of(device)
        yield ShuffledBlock(host, device, size, self.batch_size, signature, start, order=order)

    def ahead(self, count: int) -> Iterator[Block]:
        """The block of the first epoch."""
        return self.blocks()

    def kept(self, block: Block) -> int:
        """Bytes of the data on each device."""
        return tree_bytes(block.device)

    def close(self) -> None:
        """Nothing to end: the list was read once."""


def is_list(dataset: Any) -> bool:
    """Whether all data are in this process's memory as they are: a list or tuple, or whole arrays."""
    return type(dataset) in (list, tuple) or (isinstance(dataset, Arrays) and dataset.in_memory)


def stays(dataset: Any, first: FirstDatum, budget: int) -> bool:
    """Whether a dataset is a list that fits a budget of so many bytes, if its data are all like the first."""
    return is_list(dataset) and len(dataset) * tree_bytes(first.arguments) <= budget


class FirstDatum(NamedTuple):
    """A dataset's first datum.

    Attributes:
        arguments: as the step sees each: a list, with arrays for numbers and None for text.
        is_list: whether the dataset gave it as a list.
    """

    arguments: list[Any]
    is_list: bool

    def unwrap(self, arguments: list[Any]) -> PyTree:
        """Arguments as the dataset gives them: a datum that is no list is one argument."""
        return arguments if self.is_list else arguments[0]

    def wrap(self, batch: PyTree) -> list[Any]:
        """A stacked batch as arguments, whether it was given as those or as the dataset gives them."""
        batch = copied(batch)  # devices may read it when the caller changes it
        return batch if same_structure(batch, self.arguments) else [batch]


def first_datum(name: str, dataset: Any, *, told: bool = False) -> FirstDatum:
    """Reads a dataset's first datum; where it is `told` of epochs, as one of the first of them."""
    if isinstance(dataset, Feed):
        item = dataset.look()
        if isinstance(dataset.stream, Batches):
            arguments = Collate(name, 0).held(item)
            return FirstDatum(jax.tree.map(lambda leaf: leaf[0], arguments), isinstance(item, list))
        return FirstDatum(jax.tree.map(lambda leaf: leaf[0], stack_on_host([item], [0])), isinstance(item, list))
    if told and takes_epochs(dataset):
        tell_epoch(name, dataset, 0)
    datum = read_item(name, dataset, 0)
    stacked = stack_on_host([datum], [0])
    return FirstDatum(jax.tree.map(lambda leaf: leaf[0], stacked), isinstance(datum, list))
