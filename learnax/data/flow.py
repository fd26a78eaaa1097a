"""The loader of a stream: blocks of batches as they come, and where each of them leaves the stream."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import numpy as np

from learnax.data.batch import Block, as_list, copied, signature_of, stack_batches
from learnax.data.plain import from_plain, to_plain
from learnax.data.reading import Collate, Heed
from learnax.data.streams import REPLAY, Batches, EndedError, Feed
from learnax.utils import PyTree, Rows, describe, held, same_structure

_logger = logging.getLogger("learnax")


@dataclasses.dataclass(frozen=True)
class _Batch:
    """A batch that was read, on the host.

    Attributes:
        arguments: leaves `(rows of this process, ...)`.
        real: data of the whole batch that are no padding.
        signature: see `Block`.
        state: where the stream stands after it; None where nobody asks.
    """

    arguments: list[Any]
    real: int
    signature: Hashable
    state: Any


class Flow:
    """A stream as blocks of batches.

    What was read and not used stays here: a run that is stopped and goes on in this process loses nothing.

    Args:
        feed: the stream's items.
        batch_size: data per batch, over all processes.
        tail: whether the batch that is not full is filled up and given, or skipped; with it, each pass begins anew.
        put: starts a block's transfer to the devices.
        share: the rows of each batch that are this process's, the first and the one after the last.
        group: batches that belong together.
        room: batches in a block.
        most: batches in a pass at most; None for no limit.
        heed: raises to stop; called before each item.
        agree: gives each process's number of batches, from this one's; None where nobody has to agree.
        index: of this process.
    """

    keeps = False
    size = 0

    def __init__(
        self,
        feed: Feed,
        batch_size: int,
        *,
        tail: bool,
        put: Callable[[PyTree], PyTree],
        share: tuple[int, int],
        group: int = 1,
        room: int = 1,
        most: int | None = None,
        heed: Callable[[], None] | None = None,
        agree: Callable[[str], list[str]] | None = None,
        index: int = 0,
    ):
        self.name, self.batch_size, self.room = feed.name, batch_size, room
        self._feed, self._tail, self._put, self._share, self._group = feed, tail, put, share, group
        self._heed, self._agree, self._index = Heed(heed), agree, index
        steps = feed.stream.steps_per_epoch
        # A pass that goes on from epoch to epoch, whose epochs have so many batches.
        self._steps = None if steps is None else steps * group
        self._most = most if tail else self._steps
        self._stacked = isinstance(feed.stream, Batches)
        self._collate = Collate(feed.name, batch_size)
        self._structure: list[Any] | None = None
        self._rows = Rows(batch_size, held=True)
        self._ready: deque[_Batch] = deque()
        self._epoch, self._first = 0, 0  # of the batches that are ready
        self._passed: Any = None  # where the stream stands before them
        self._new, self._ended = True, False
        self._short: tuple[int, int] | None = None
        self._error: Exception | None = None
        self._restored: tuple[int, int, Any] | None = None

    def __len__(self) -> int:
        """Batches in one pass; 0 where nobody knows."""
        return self._most or 0

    def __iter__(self) -> Iterator[list[Any]]:
        return (copied(block.batch(n)) for block in self.blocks() for n in range(len(block)))

    def __str__(self) -> str:
        how = "batches as they come" if self._stacked else f"batches of {self.batch_size} data as they come"
        length = f", {self._most} of them in a pass" if self._most else ""
        return f"{self.name}: {how}{length}, from a {self._feed!r}, read by this process in each pass"

    def blocks(self, start: int = 0, epoch: int = 0) -> Iterator[Block]:
        """The batches of an epoch from number `start` on, `room` at a time, on the devices.

        Raises:
            ValueError: the stream cannot be where this begins, or its data do not go together.
            DatasetError: it raised.
        """
        self._seek(start, epoch)
        while batches := self._next(self._first):
            yield self._block(batches)
            for _ in batches:
                self._passed = self._ready.popleft().state
            self._first += len(batches)
        self._close_pass()

    def ahead(self, count: int) -> Iterator[Block]:
        """The next blocks, which are given again later."""
        epoch, start = (self._epoch, self._first) if self._restored is None else self._restored[:2]
        self._seek(start, epoch)
        number = self._first
        for _ in range(count):
            batches = self._next(number)
            if not batches:
                return
            yield self._block(batches)
            number += len(batches)

    def first(self, *, repeat_datum: bool) -> list[Any]:
        """The first batch; or one of the first datum alone, repeated."""
        self._seek(0, 0)
        batches = self._next(0)
        if not batches:
            self._close_pass()
        batch = batches[0].arguments
        return jax.tree.map(lambda leaf: np.repeat(leaf[:1], len(leaf), axis=0), batch) if repeat_datum else batch

    def kept(self, block: Block) -> int:
        """0: nothing stays on the devices."""
        return 0

    def close(self) -> None:
        """Nothing to end: the stream is the user's."""

    # ---- going on

    def state(self, epoch: int, batch: int) -> Any:
        """Where the stream stands before a batch of an epoch, as plain data; None where that is its beginning.

        And where it does not tell. In a run of several processes, each with a stream of its own, those of all of them.
        """
        told = None
        if not batch and (not self._steps or not epoch):
            pass  # another pass begins there
        elif self._restored is not None:
            told = self._restored[2]
        elif self._feed.tells:
            ends = self._steps if self._steps and epoch > self._epoch else 0
            passed = ends + batch - self._first
            told = self._ready[passed - 1].state if passed > 0 else self._passed
        if self._feed.stream.per_process and self._agree is not None:
            return self._agree(json.dumps(told))
        return told

    def go_on(self, state: Any, epoch: int, batch: int) -> None:
        """Goes on before a batch of an epoch, where the stream stood at `state`.

        Raises:
            ValueError: it cannot.
        """
        if self._feed.stream.per_process and self._agree is not None and state is not None:
            if self._index >= len(state):
                raise ValueError(f"dataset {self.name!r} was one of {len(state)} processes' own, which are more now")
            state = json.loads(state[self._index])
        if not batch and (not self._steps or not epoch):
            self._restored = epoch, batch, None
            return
        if self._feed.stream.resume != REPLAY and (state is None or not self._feed.tells):
            kind = type(self._feed.stream).__name__
            raise ValueError(
                f"dataset {self.name!r} cannot go on before batch {batch} of epoch {epoch}: its {self._feed!r} does "
                "not tell where it stands (get_state and set_state, or state_dict and load_state_dict), and the "
                f"checkpoint does not say. {kind}(..., resume='replay') reads again what was seen, and skips it; "
                "load_weights=True begins anew with the checkpoint's parameters"
            )
        self._restored = epoch, batch, None if self._feed.stream.resume == REPLAY else state

    def _seek(self, start: int, epoch: int) -> None:
        """Has the batches from `start` on come next."""
        restored, self._restored = self._restored, None
        if restored is not None and restored[:2] == (epoch, start):
            self._forget(epoch, start)
            self._reach(restored[2])
            return
        if self._tail:
            self._forget(epoch, start)
            self._feed.begin(0)
            return
        # A pass that goes on from epoch to epoch stands in the next one where it stands in this.
        before = self._steps if self._steps and epoch == self._epoch + 1 else 0
        ahead = before + start - self._first
        if self._new or (epoch != self._epoch and not before) or not 0 <= ahead <= len(self._ready):
            self._forget(epoch, start)
            self._reach(None)
            return
        for _ in range(ahead):
            self._passed = self._ready.popleft().state
        self._epoch, self._first = epoch, start
        if self._error is not None and self._feed.tells and self._last_state() is not None:
            count = self._feed.count - self._feed.count % self._items
            self._feed.restore(from_plain(self._last_state()), epoch, count)
            self._rows, self._error = Rows(self.batch_size, held=True), None

    def _reach(self, state: Any) -> None:
        """Brings the stream before the first of the wanted batches: by a state, from its beginning, or by reading."""
        epoch, start = self._epoch, self._first
        if state is not None:
            seen = start + (epoch * self._steps if self._steps else 0)
            self._feed.restore(from_plain(state), epoch, seen * self._items)
            self._passed = state
            return
        skipped = start + (epoch * self._steps if self._steps else 0)
        self._feed.begin(0 if self._steps else epoch)
        if not skipped:
            return
        began = time.perf_counter()
        try:
            for _ in range(skipped * self._items):
                self._heed()
                self._feed.take()
        except EndedError:
            raise ValueError(
                f"dataset {self.name!r} ended after {self._feed.count // self._items} of the {skipped} batches that "
                "the run has seen: it does not yield again what it did"
            ) from None
        if self._feed.tells:
            self._passed = self._told()
        _logger.warning(
            "dataset %r: %d batches that the run has seen were read again and skipped, in %.3g s",
            self.name,
            skipped,
            time.perf_counter() - began,
        )

    def _forget(self, epoch: int, start: int) -> None:
        self._ready.clear()
        self._rows = Rows(self.batch_size, held=True)
        self._epoch, self._first, self._passed = epoch, start, None
        self._new = self._ended = False
        self._short = self._error = None

    # ---- reading

    def _next(self, number: int) -> list[_Batch]:
        """The batches of the next block, of one signature; none at the end of the pass."""
        offset = number - self._first
        error = None
        while len(self._ready) - offset < self.room and not self._is_over(self._first + len(self._ready)):
            try:
                self._read()
            except Exception as raised:
                if raised is self._heed.stop:
                    raise
                error = raised
                break
        batches = list(self._ready)[offset : offset + self.room]
        alike = [batch for batch in batches if batch.signature == batches[0].signature]
        same = next((n for n, batch in enumerate(batches) if batch.signature != batches[0].signature), len(batches))
        if same < len(batches) and same % self._group:
            raise ValueError(
                f"dataset {self.name!r}: the {self._group} batches of one update must be of one shape, but batch "
                f"{number + same} is\n{describe(batches[same].arguments)}\nand the one before it\n"
                f"{describe(batches[same - 1].arguments)}"
            )
        batches = alike[: same - same % self._group]
        if error is not None and not batches:
            raise error
        if self._agree is not None and self._feed.stream.per_process:
            self._check_alike(number, batches)
        return batches

    def _is_over(self, number: int) -> bool:
        """Whether the pass has no batch of this number."""
        if self._error is not None:
            raise self._error
        return self._ended or (self._most is not None and number >= self._most)

    def _read(self) -> None:
        """Reads a batch, or finds the pass at its end."""
        try:
            if self._stacked:
                self._read_stacked()
            else:
                self._read_data()
        except (TypeError, ValueError) as error:
            self._error = self._collate.error(error)
            raise self._error from error
        except Exception as error:
            if error is not self._heed.stop:
                self._error = error
            raise

    def _read_data(self) -> None:
        while len(self._rows) < self.batch_size:
            self._heed()
            number = self._feed.count
            try:
                item = self._feed.take()
            except EndedError:
                self._ended = True
                if self._tail and len(self._rows):
                    break
                return
            self._rows.add(number, as_list(item))
        rows, self._rows = self._rows, Rows(self.batch_size, held=True)
        first, last = self._share
        whole = rows.stacked()
        share = whole if last - first == self.batch_size else jax.tree.map(lambda leaf: leaf[first:last], whole)
        self._add(share, len(rows))

    def _read_stacked(self) -> None:
        self._heed()
        try:
            item = self._feed.take()
        except EndedError:
            self._ended = True
            return
        number = self._feed.count - 1
        if self._short is not None:
            raise ValueError(
                f"batch {self._short[0]} has {self._short[1]} data, fewer than {self._wanted}, and is not the last "
                "one: only the last may be short"
            )
        batch = held(as_list(item))
        sizes = {np.shape(leaf)[0] if np.ndim(leaf) else None for leaf in jax.tree.leaves(batch)}
        size = next(iter(sizes)) if len(sizes) == 1 else None
        if size is None or not 0 < size <= self._wanted:
            share = f" ({self.batch_size} divided over the processes)" if self._wanted != self.batch_size else ""
            raise ValueError(
                f"batch {number} must have {self._wanted} data{share}, the first axis of each leaf, but is\n"
                f"{describe(batch)}"
            )
        if size < self._wanted:
            self._short = number, size
            if not self._tail:
                self._read_stacked()  # an error, where there is another one
                return
            if self._feed.stream.per_process and self._agree is not None:
                raise ValueError(
                    f"batch {number} has {size} data, fewer than {self._wanted}: with per_process=True, validation "
                    "needs whole batches"
                )
            repeats = self._wanted - size
            batch = jax.tree.map(lambda leaf: np.concatenate([leaf, np.repeat(leaf[-1:], repeats, axis=0)]), batch)
        first, last = (0, self._wanted) if self._wanted != self.batch_size else self._share
        share_of = batch if last - first == self._wanted else jax.tree.map(lambda leaf: leaf[first:last], batch)
        own = self._wanted != self.batch_size
        self._add(share_of, self.batch_size if own else size)

    @property
    def _items(self) -> int:
        """Items of the stream in a batch."""
        return 1 if self._stacked else self.batch_size

    @property
    def _wanted(self) -> int:
        """Data of a full batch of a stream of batches."""
        first, last = self._share
        return last - first if self._feed.stream.per_process else self.batch_size

    def _add(self, arguments: list[Any], real: int) -> None:
        number = self._first + len(self._ready)
        if self._structure is None:
            self._structure = arguments
        elif not same_structure(arguments, self._structure):
            raise ValueError(
                f"batch {number} has another structure than the first one:\n{describe(arguments)}\nand the first one\n"
                f"{describe(self._structure)}"
            )
        state = None if self._tail or not self._feed.tells else self._told()
        self._ready.append(_Batch(arguments, real, signature_of(arguments), state))

    def _told(self) -> Any:
        try:
            return to_plain(self._feed.state())
        except TypeError as error:
            raise ValueError(
                f"where its {self._feed!r} stands cannot be kept in a checkpoint: {error}; with resume='replay' it is "
                "not asked"
            ) from None

    def _last_state(self) -> Any:
        return self._ready[-1].state if self._ready else self._passed

    def _block(self, batches: list[_Batch]) -> Block:
        host = stack_batches([batch.arguments for batch in batches], self.room)
        device = self._put(host)
        size = sum(batch.real for batch in batches)
        return Block(host, device, size, self.batch_size, signature_of(device))

    def _close_pass(self) -> None:
        """Looks whether a pass had what it was to have, at its end.

        Raises:
            ValueError: it had less.
        """
        if self._steps and not self._tail and self._first < self._steps:
            raise ValueError(
                f"dataset {self.name!r} ended after {self._first // self._group} of the {self._steps // self._group} "
                f"steps of epoch {self._epoch}: steps_per_epoch is for streams that go on (.repeat()); without it an "
                "epoch is one pass"
            )
        if not self._first:
            least = f"one batch of {self.batch_size}" if self._group == 1 else f"the {self._group} batches of an update"
            few = "" if self._tail else f" or fewer data than {least}"
            raise ValueError(f"dataset {self.name!r} yielded nothing{few} in epoch {self._epoch}")

    def _check_alike(self, number: int, batches: list[_Batch]) -> None:
        """Raises ValueError where processes have unequal numbers of batches: none of them waits for the others."""
        assert self._agree is not None
        counts = [int(count) for count in self._agree(str(len(batches)))]
        if len(set(counts)) > 1:
            told = ", ".join(f"{number + count} on process {index}" for index, count in enumerate(counts))
            raise ValueError(
                f"dataset {self.name!r}: the processes have unequal numbers of batches by now: {told}; with "
                "per_process=True all of them must yield as many"
            )
