"""Reading in worker processes, through grain.

A worker is a fresh process that does not run the user's script again: scripts need no main guard,
and datasets may be defined in a script or a notebook cell. They travel by value (cloudpickle), and
each batch comes back as bytes in shared memory: stacked where the worker knows how, else as its data,
made into objects of this process's own classes and stacked here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from learnax.data.batch import as_list
from learnax.data.ending import Hold, Lifeline, room_text
from learnax.data.reading import (
    Collate,
    DatasetError,
    Heed,
    Ranges,
    epoch_text,
    error_text,
    indices_text,
)
from learnax.data.sending import Classes, in_main, in_worker, to_main, to_worker
from learnax.data.spawning import PROCESS_NAME, grain_library, keep_main_from_workers
from learnax.utils import Rows
from learnax.utils.leaves import NUMBERS

AHEAD = 4
"""Batches that each worker keeps ready."""
PATIENCE_S = 600.0
"""How long a worker may take for one batch; after that it counts as hanging."""
_BUS_ERROR = f"exit code -{signal.SIGBUS.value}."
_PLAIN = {np.ndarray, np.memmap, str, bytes, *NUMBERS}
"""Leaves that a worker stacks. Another one may be a container that only the main process has registered."""


class WorkerError(RuntimeError):
    """A worker process died or hangs, could not be given the dataset, or could not send the data."""


class Workers:
    """Reads in n processes, which live on from pass to pass; the order is that of one process.

    Args:
        name: the split.
        dataset: what to read; each worker gets a copy.
        ranges: the indices of each batch.
        collate: stacks a batch.
        num_workers: processes.
        heed: is asked about every second while one of them is waited for.
        told: whether each copy of the dataset is told each epoch's number.
    """

    def __init__(
        self,
        name: str,
        dataset: Any,
        ranges: Ranges,
        collate: Collate,
        num_workers: int,
        heed: Heed,
        *,
        told: bool = False,
    ):
        self._name = name
        self._ranges = ranges
        self._collate = collate
        self._num_workers = min(num_workers, len(ranges))
        _check_sendable(name, dataset)
        self._source = _Source(name, dataset, ranges, collate, told)
        # Where epochs are alike, the next pass that workers have begun is the right one, whichever it is.
        self._differ = told or ranges.shuffled
        self._streams: list[tuple[Any, Lifeline]] = []  # grain's iterator, while there are processes
        self._next = self._taken = 0
        self._heed = heed
        self._watchdog = _Watchdog(heed)
        # Where nobody closes this reader, its processes end with it, or with the program.
        weakref.finalize(self, _close, self._streams, self._watchdog)

    def read(self, start: int, epoch: int = 0) -> Iterator[list[Any]]:
        """Takes each batch from the worker whose turn it is."""
        count = len(self._ranges)
        before = epoch * count if self._differ else 0
        for number in range(before + start, before + count):
            if not self._streams or self._next != number:
                self._open(number)
            indices = self._ranges.indices(number % count, number // count)
            blob = self._take(indices)
            self._taken += 1
            self._next = number + 1 if self._differ else (number + 1) % count
            yield self._unpack(indices, blob)

    def close(self) -> None:
        """Ends the processes; a later pass starts new ones."""
        _close(self._streams, self._watchdog)

    def _open(self, start: int) -> None:
        self.close()
        keep_main_from_workers()
        grain = grain_library()
        # One thread in each worker: datasets need not be safe for several, and AHEAD bounds what is kept ready.
        one_thread = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        endless = grain.MapDataset.source(self._source)[start:].to_iter_dataset(one_thread)
        options = grain.MultiprocessingOptions(num_workers=self._num_workers, per_worker_buffer_size=AHEAD)
        lifeline = Lifeline(self._num_workers)
        begin = functools.partial(_begin_worker, lifeline.hold)
        self._streams.append((iter(endless.mp_prefetch(options, worker_init_fn=begin)), lifeline))
        self._next, self._taken = start, 0
        self._watchdog.start()

    def _take(self, indices: Sequence[int]) -> np.ndarray:
        try:
            with self._watchdog.watching():
                return next(self._streams[0][0])
        except Exception as error:
            self.close()
            self._heed()  # a signal, or the watchdog for it, may have ended the worker
            worker = self._taken % self._num_workers
            who, what = f"dataset {self._name!r}: worker process {worker}", f"the data {indices_text(indices)}"
            if self._watchdog.bit:
                raise WorkerError(
                    f"{who} has not given {what} in {PATIENCE_S:g} s and was ended: it hangs, or that is how long "
                    "they take; num_workers=0 reads in this process, and waits"
                ) from error
            raise WorkerError(
                f"{who} died before it gave {what} ({error}){room_text() if _BUS_ERROR in str(error) else ''}; it may "
                "have run out of memory or been killed, and num_workers=0 reads in this process"
            ) from error

    def _unpack(self, indices: Sequence[int], blob: np.ndarray) -> list[Any]:
        content = in_main(blob.tobytes(), self._source.classes)
        if isinstance(content, _Stacked):
            return content.batch
        if not isinstance(content, _Failure):
            return self._collate(indices, (in_main(datum, self._source.classes) for datum in content))
        self.close()
        failure, cause = content.kind(content.text), content.cause(self._source.classes)
        (cause or failure).add_note(f"in a worker process:\n{content.traceback}")
        raise failure from cause


class _Watchdog:
    """Ends the worker processes where one of them is waited for too long: what waits then gets an error.

    Args:
        heed: ends them, too, where it raises while one is waited for.
    """

    def __init__(self, heed: Heed) -> None:
        self.bit = False
        self._heed = heed
        self._since: float | None = None
        self._end = threading.Event()

    def start(self) -> None:
        """Begins to watch, in a thread."""
        self.bit, self._since, self._end = False, None, threading.Event()
        threading.Thread(target=self._watch, args=(self._end,), name="learnax-watchdog", daemon=True).start()

    def end(self) -> None:
        """Ends the thread."""
        self._end.set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, a worker is waited for."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def _watch(self, end: threading.Event) -> None:
        while not end.wait(min(0.5, PATIENCE_S / 4)):
            since = self._since
            if since is None:
                continue
            self.bit = time.monotonic() - since > PATIENCE_S
            if self.bit or self._asks_to_stop():
                for process in multiprocessing.active_children():
                    if process.name.startswith(PROCESS_NAME):
                        process.kill()
                return

    def _asks_to_stop(self) -> bool:
        try:
            self._heed()
        except BaseException:  # raised again where the worker is waited for
            return True
        return False


def _close(streams: list[tuple[Any, Lifeline]], watchdog: _Watchdog) -> None:
    watchdog.end()
    while streams:
        stream, lifeline = streams.pop()
        lifeline.cut()
        stream.close()
        # A worker that has not had its first turn ends with the last reference to the stream.
        del stream
        lifeline.clear()


def _begin_worker(hold: Hold, index: int, count: int) -> None:
    """In a worker, before it gets the dataset."""
    hold()
    # Data that are JAX arrays must not take a share of the accelerator's memory.
    jax.config.update("jax_platforms", "cpu")
    # Ctrl-C reaches every process of a terminal; this one ends when the main process has done with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # grain would wait for ever for the data of a worker that ended with code 0.
    worker, leave = os.getpid(), os._exit
    os._exit = lambda status: leave(status or 1 if os.getpid() == worker else status)


class _Source:
    """The batches of epoch after epoch as a grain source: each is one element, pickled into an array of bytes.

    Attributes:
        classes: those that this process shares with the other side.
    """

    def __init__(self, name: str, dataset: Any, ranges: Ranges, collate: Collate, told: bool):
        self._told = told
        self._epoch: int | None = None
        self._name = name
        self._dataset = dataset
        self._ranges = ranges
        self._collate = collate
        self._x64 = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
        self._sent = b""
        self.classes: Classes = {}

    def __getstate__(self) -> dict[str, Any]:
        sent, classes = to_worker(self._dataset)
        self.classes.update(classes)
        return self.__dict__ | {"_dataset": None, "_sent": sent, "classes": {}}

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: int) -> np.ndarray:
        epoch, batch = divmod(number, len(self._ranges))
        return np.frombuffer(to_main(self._read(self._ranges.indices(batch, epoch), epoch), self.classes), np.uint8)

    def __repr__(self) -> str:
        return f"_Source({len(self._ranges)} batches)"

    def _read(self, indices: Sequence[int], epoch: int) -> _Stacked | _Failure | list[bytes]:
        # An exit in the user's code must not end the worker in silence, hence BaseException.
        try:
            if self._sent:
                jax.config.update("jax_enable_x64", self._x64)  # it decides the dtypes of what is stacked
                (self._dataset, self.classes), self._sent = in_worker(self._sent), b""
        except BaseException as error:
            what = "it cannot be made again in a worker process"
            return self._failure(error, WorkerError, self._text(what, error))
        if self._told and epoch != self._epoch:
            try:
                self._dataset.set_epoch(epoch)
            except BaseException as error:
                return self._failure(error, DatasetError, epoch_text(self._name, epoch, error))
            self._epoch = epoch
        rows = Rows(self._collate.batch_size, held=True)
        sent: list[bytes] = []
        for index in indices:
            try:
                datum = as_list(self._dataset[index])
            except BaseException as error:
                return self._failure(error, DatasetError, error_text(self._name, index, error))
            # Stacked or pickled before the next one is read, which may be in the same memory.
            try:
                if not sent and all(type(leaf) in _PLAIN for leaf in jax.tree.leaves(datum)):
                    rows.add(index, datum)
                    continue
            except (TypeError, ValueError) as error:
                return self._unfit(error)
            try:
                if not sent:
                    sent = [to_main(rows.tree(number), self.classes) for number in range(len(rows))]
                sent.append(to_main(datum, self.classes))
            except Exception as error:
                what = f"the data at indices {indices_text(indices)} cannot be sent from a worker process"
                return self._failure(error, WorkerError, self._text(what, error))
        if sent:
            return sent
        try:
            return _Stacked(rows.stacked())
        except (TypeError, ValueError) as error:
            return self._unfit(error)

    def _text(self, what: str, error: BaseException) -> str:
        return f"dataset {self._name!r}: {what}: {type(error).__name__}: {error}; num_workers=0 reads in this process"

    def _unfit(self, error: TypeError | ValueError) -> _Failure:
        told = self._collate.error(error)
        return self._failure(error, type(told), str(told))

    def _failure(self, error: BaseException, kind: type[Exception], text: str) -> _Failure:
        pickled = b""
        with contextlib.suppress(Exception):
            pickled = to_main(error, self.classes)
        return _Failure(kind, text, traceback.format_exc(), pickled)


@dataclasses.dataclass(frozen=True)
class _Stacked:
    """What a worker sends: a whole batch."""

    batch: list[Any]


@dataclasses.dataclass(frozen=True)
class _Failure:
    """What a worker sends in the place of a batch.

    Attributes:
        kind: what it is raised as.
        text: what happened.
        traceback: where in the worker.
        error: the original error, pickled by itself: not every one can be.
    """

    kind: type[Exception]
    text: str
    traceback: str
    error: bytes

    def cause(self, classes: Classes) -> BaseException | None:
        """The original error, where it can be had."""
        try:
            error = in_main(self.error, classes)
        except Exception:
            return None
        return error if isinstance(error, BaseException) else None


def _check_sendable(name: str, dataset: Any) -> None:
    try:
        to_worker(dataset)
    except Exception as error:
        raise WorkerError(
            f"dataset {name!r} cannot be sent to worker processes: {_culprit(dataset)}{error}. "
            "Open files, locks and connections cannot travel: open them in __getitem__ at first use, leave them out "
            "in __getstate__, or use num_workers=0"
        ) from error


def _culprit(dataset: Any) -> str:
    """Names the attribute that cannot be pickled, where there is one."""
    for attribute, value in getattr(dataset, "__dict__", {}).items():
        try:
            to_worker(value)
        except Exception:
            return f"its attribute {attribute!r} of type {type(value).__name__}: "
    return ""
