"""Reading in worker processes, through grain.

A worker is a fresh process that does not run the user's script again: scripts need no main guard,
and datasets may be defined in a script or a notebook cell. They travel by value (cloudpickle), and
the data come back as bytes in shared memory, made into objects of this process's own classes.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing.spawn
import pickle
import sys
import traceback
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
        self._source = _Source(dataset, list(ranges))
        self._stream: Any = None
        self._next = 0

    def read(self, start: int) -> Iterator[list[Any]]:
        """Takes each batch from the worker whose turn it is."""
        if self._stream is None or self._next != start % len(self._ranges):
            self._open(start)
        for number in range(start, len(self._ranges)):
            blob = self._take()
            self._next = (number + 1) % len(self._ranges)
            yield self._unpack(blob)

    def close(self) -> None:
        """Ends the processes; a later pass starts new ones."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _open(self, start: int) -> None:
        self.close()
        grain = _grain()
        endless = grain.MapDataset.source(self._source).repeat()[start:].to_iter_dataset()
        options = grain.MultiprocessingOptions(num_workers=self._num_workers, per_worker_buffer_size=AHEAD)
        self._stream = iter(endless.mp_prefetch(options, worker_init_fn=_stay_on_host))
        self._next = start

    def _take(self) -> np.ndarray:
        try:
            with _no_second_main():
                return next(self._stream)
        except Exception as error:
            self._stream.close()
            self._stream = None
            raise WorkerError(
                f"dataset {self._name!r}: a worker process died ({error}); it may have run out of memory or been "
                "killed, and num_workers=0 reads in this process"
            ) from error

    def _unpack(self, blob: np.ndarray) -> list[Any]:
        failure, data = _Unpickler(io.BytesIO(blob.tobytes())).load()
        if failure is None:
            return data
        index, error, text = failure
        self.close()
        if isinstance(error, BaseException):
            error.add_note(f"in a worker process:\n{text}")
            raise DatasetError(error_text(self._name, index, error)) from error
        raise DatasetError(f"dataset {self._name!r} raised at index {index}: {error}\nin a worker process:\n{text}")


def _stay_on_host(index: int, count: int) -> None:
    """In a worker: data that are JAX arrays must not take a share of the accelerator's memory."""
    jax.config.update("jax_platforms", "cpu")


class _Source:
    """The batches as a grain source: each is one element, pickled into an array of bytes."""

    def __init__(self, dataset: Any, ranges: list[range]):
        self._dataset = dataset
        self._ranges = ranges

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, number: int) -> np.ndarray:
        data, index = [], -1
        try:
            for index in self._ranges[number]:
                data.append(self._dataset[index])
        except BaseException as error:  # an exit in a dataset must not end the worker in silence
            return _pack((index, _sendable(error), traceback.format_exc()), None)
        return _pack(None, data)

    def __repr__(self) -> str:
        return f"_Source({len(self)} batches)"


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


def _pack(failure: Any, data: list[Any] | None) -> np.ndarray:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump((failure, data))
    return np.frombuffer(buffer.getvalue(), np.uint8)


def _sendable(error: BaseException) -> BaseException | str:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return f"{type(error).__name__}: {error}"


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


@contextlib.contextmanager
def _no_second_main() -> Iterator[None]:
    """While workers start, they are told of no main module, so that they do not run the script again.

    The standard library has no setting for this: it sends the script's path to every spawned
    process. Only grain's processes are concerned, by their name.
    """
    original = multiprocessing.spawn.get_preparation_data

    def without_main(name: str) -> dict[str, Any]:
        data = original(name)
        if name.startswith(_PROCESS_NAME):
            for key in ("init_main_from_path", "init_main_from_name"):
                data.pop(key, None)
        return data

    multiprocessing.spawn.get_preparation_data = without_main
    try:
        yield
    finally:
        multiprocessing.spawn.get_preparation_data = original
