"""Reading in worker processes, through grain.

A worker is a fresh process that does not run the user's script again: scripts need no main guard,
and datasets may be defined in a script or a notebook cell. They travel by value (cloudpickle), and
the data come back as bytes in shared memory, made into objects of this process's own classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import multiprocessing.spawn
import os
import pickle
import sys
import traceback
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import cloudpickle
import jax
import numpy as np

from learnax.data.reading import DatasetError, error_text

AHEAD = 4
"""Batches that each worker keeps ready."""
_PROCESS_NAME = "grain-process-prefetch-"


class WorkerError(RuntimeError):
    """A worker process died, or could not be given the dataset."""


class Workers:
    """Reads in n processes, which live on from pass to pass; the order is that of one process.

    Args:
        name: the split.
        dataset: what to read; each worker gets a copy.
        ranges: the indices of each batch.
        num_workers: processes.
    """

    def __init__(self, name: str, dataset: Any, ranges: Sequence[range], num_workers: int):
        self._name = name
        self._ranges = ranges
        self._num_workers = min(num_workers, len(ranges))
        _check_sendable(name, dataset)
        self._source = _Source(name, dataset, list(ranges))
        self._stream: Any = None
        self._end: weakref.finalize | None = None
        self._next = 0

    def read(self, start: int) -> Iterator[list[Any]]:
        """Takes each batch from the worker whose turn it is."""
        for number in range(start, len(self._ranges)):
            if self._stream is None or self._next != number:
                self._open(number)
            blob = self._take()
            self._next = (number + 1) % len(self._ranges)
            yield self._unpack(blob)

    def close(self) -> None:
        """Ends the processes; a later pass starts new ones."""
        if self._end is not None:
            self._end()
            self._stream = self._end = None

    def _open(self, start: int) -> None:
        self.close()
        _keep_main_from_workers()
        grain = _grain()
        endless = grain.MapDataset.source(self._source).repeat()[start:].to_iter_dataset()
        options = grain.MultiprocessingOptions(num_workers=self._num_workers, per_worker_buffer_size=AHEAD)
        self._stream = iter(endless.mp_prefetch(options, worker_init_fn=_begin_worker))
        # Where nobody closes this reader, its processes end with it, or with the program.
        self._end = weakref.finalize(self, self._stream.close)
        self._next = start

    def _take(self) -> np.ndarray:
        try:
            return next(self._stream)
        except Exception as error:
            self.close()
            raise WorkerError(
                f"dataset {self._name!r}: a worker process died ({error}); it may have run out of memory or been "
                "killed, and num_workers=0 reads in this process"
            ) from error

    def _unpack(self, blob: np.ndarray) -> list[Any]:
        content = _loads(blob.tobytes())
        if not isinstance(content, _Failure):
            return content
        self.close()
        failure, cause = DatasetError(content.text), content.cause()
        (cause or failure).add_note(f"in a worker process:\n{content.traceback}")
        raise failure from cause


def _begin_worker(index: int, count: int) -> None:
    """In a worker, before it gets the dataset."""
    # Data that are JAX arrays must not take a share of the accelerator's memory.
    jax.config.update("jax_platforms", "cpu")
    # grain would wait for ever for the data of a worker that ended with code 0.
    worker, leave = os.getpid(), os._exit
    os._exit = lambda status: leave(status or 1 if os.getpid() == worker else status)


class _Source:
    """The batches as a grain source: each is one element, pickled into an array of bytes."""

    def __init__(self, name: str, dataset: Any, ranges: list[range]):
        self._name = name
        self._dataset = dataset
        self._ranges = ranges

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, number: int) -> np.ndarray:
        indices = self._ranges[number]
        data, index = [], -1
        try:
            for index in indices:
                data.append(self._dataset[index])
        except BaseException as error:  # an exit in a dataset must not end the worker in silence
            return _as_array(_dumps(_Failure.of(error, error_text(self._name, index, error))))
        try:
            return _as_array(_dumps(data))
        except Exception as error:
            text = (
                f"dataset {self._name!r}: the data of indices {indices[0]} to {indices[-1]} cannot be sent from a "
                f"worker process: {type(error).__name__}: {error}; num_workers=0 reads in this process"
            )
            return _as_array(_dumps(_Failure.of(error, text)))

    def __repr__(self) -> str:
        return f"_Source({len(self)} batches)"


@dataclasses.dataclass(frozen=True)
class _Failure:
    """What a worker sends in the place of a batch.

    Attributes:
        text: what happened.
        traceback: where in the worker.
        error: the original error, pickled by itself: not every one can be sent.
    """

    text: str
    traceback: str
    error: bytes

    @classmethod
    def of(cls, error: BaseException, text: str) -> _Failure:
        """A failure from the error that is being handled."""
        pickled = b""
        with contextlib.suppress(Exception):
            pickled = _dumps(error)
        return cls(text, traceback.format_exc(), pickled)

    def cause(self) -> BaseException | None:
        """The original error, where it can be had."""
        try:
            error = _loads(self.error)
        except Exception:
            return None
        return error if isinstance(error, BaseException) else None


class _Pickler(cloudpickle.Pickler):
    """Sends classes of the user's script by name: this side's own class is what must come back."""

    def persistent_id(self, obj: Any) -> tuple[str, str] | None:
        if isinstance(obj, type) and obj.__module__ == "__main__" and "<locals>" not in obj.__qualname__:
            return obj.__module__, obj.__qualname__
        return None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, pid: tuple[str, str]) -> Any:
        found: Any = sys.modules[pid[0]]
        for part in pid[1].split("."):
            found = getattr(found, part)
        return found


def _dumps(content: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(content)
    return buffer.getvalue()


def _loads(content: bytes) -> Any:
    return _Unpickler(io.BytesIO(content)).load()


def _as_array(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)


def _check_sendable(name: str, dataset: Any) -> None:
    try:
        cloudpickle.dumps(dataset)
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
            cloudpickle.dumps(value)
        except Exception:
            return f"its attribute {attribute!r} of type {type(value).__name__}: "
    return ""


def _grain() -> Any:
    from absl import flags

    # grain reads absl flags, which only programs started through absl.app have parsed.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    import grain

    return grain


@functools.cache
def _keep_main_from_workers() -> None:
    """From now on, workers are told of no main module, so that they do not run the script again.

    The standard library has no setting for this: it sends the script's path to every spawned
    process. Only grain's processes are concerned, by their name; it starts them in threads of its
    own, at a time of its own, so that this is not taken back.
    """
    original = multiprocessing.spawn.get_preparation_data

    def without_main(name: str) -> dict[str, Any]:
        data = original(name)
        if name.startswith(_PROCESS_NAME):
            for key in ("init_main_from_path", "init_main_from_name"):
                data.pop(key, None)
        return data

    multiprocessing.spawn.get_preparation_data = without_main
