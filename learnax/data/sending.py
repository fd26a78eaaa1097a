"""Datasets to worker processes by value, and data back as objects of this process's own classes."""

from __future__ import annotations

import io
import marshal
import mmap
import os
import pickle
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np

Classes = dict[int, type]
"""Classes that travelled by value, by the number that both sides know each by."""


def to_worker(content: Any) -> tuple[bytes, Classes]:
    """Pickles something for a worker; with it go, and come back from here, the classes in it that go by value."""
    buffer = io.BytesIO()
    pickler = _ToWorker(buffer, pickle.HIGHEST_PROTOCOL)
    # Behind the content, when all are known; in one pickle with it, for the worker to have each class once.
    pickler.dump((content, pickler.classes))
    return buffer.getvalue(), pickler.classes


def in_worker(sent: bytes) -> tuple[Any, Classes]:
    """What `to_worker` sent."""
    return pickle.loads(sent)


def to_main(content: Any, classes: Classes) -> bytes:
    """Pickles something for the main process; its own classes go by their numbers."""
    buffer = io.BytesIO()
    _ToMain(buffer, {id(cls): number for number, cls in classes.items()}).dump(content)
    return buffer.getvalue()


def in_main(sent: bytes, classes: Classes) -> Any:
    """What `to_main` sent."""
    return _InMain(io.BytesIO(sent), classes).load()


class _ToWorker(cloudpickle.Pickler):
    def __init__(self, buffer: io.BytesIO, protocol: int):
        super().__init__(buffer, protocol)
        self.classes: Classes = {}

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, types.CodeType):  # cloudpickle leaves out the file's name, and tracebacks lead nowhere
            return marshal.loads, (marshal.dumps(obj),)
        if isinstance(obj, np.ndarray) and obj.size and (whole := _mapped(obj)) is not None:
            return _map_again, _place(obj, whole)
        reduced = super().reducer_override(obj)
        if isinstance(obj, type) and reduced is not NotImplemented:
            self.classes[id(obj)] = obj
        return reduced


class _ToMain(cloudpickle.Pickler):
    def __init__(self, buffer: io.BytesIO, numbers: Mapping[int, int]):
        super().__init__(buffer, pickle.HIGHEST_PROTOCOL)
        self._numbers = numbers

    def persistent_id(self, obj: Any) -> int | None:
        return self._numbers.get(id(obj)) if isinstance(obj, type) else None


class _InMain(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO, classes: Classes):
        super().__init__(buffer)
        self._classes = classes

    def persistent_load(self, pid: int) -> type:
        return self._classes[pid]


def _mapped(array: np.ndarray) -> np.memmap | None:
    """The array of a file's memory that an array is, or is a view of; None where its content must travel."""
    whole: Any = array
    while isinstance(whole, np.ndarray):
        if isinstance(whole, np.memmap) and isinstance(whole.base, mmap.mmap):
            # What is written to a private copy ("c") is not in the file. A file may have no name.
            return whole if whole.filename is not None and whole.mode != "c" else None
        whole = whole.base
    return None


def _place(array: np.ndarray, whole: np.memmap) -> tuple[Any, ...]:
    """What `_map_again` makes an array of that lies in a mapped file."""
    path: Any = whole.filename  # text or a path, as it was given
    if not os.path.exists(path) or _is_replaced(whole.ctypes.data):
        raise ValueError(f"it is mapped from the file {path}, which was removed or replaced since")
    low, high = np.lib.array_utils.byte_bounds(array)
    begin = whole.offset + low - whole.ctypes.data
    mode = "r" if whole.mode == "r" else "c"  # a worker's writes are its own, as those to any copy
    return type(array), path, mode, begin, high - low, array.dtype, array.shape, array.strides, array.ctypes.data - low


def _map_again(
    kind: type, path: Any, mode: Any, begin: int, size: int, dtype: Any, shape: Any, strides: Any, first: int
) -> np.ndarray:
    memory = np.memmap(path, np.uint8, mode, begin, (size,))
    array = np.ndarray(shape, dtype, memory, first, strides)
    if kind is np.ndarray:
        return array
    again: Any = array.view(kind)
    again.__dict__.update(vars(memory), offset=begin + first)
    return again


def _is_replaced(address: int) -> bool:
    """Whether the file whose memory is at this address is no longer there by its name, as far as Linux tells."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return False
    for line in lines:
        begin, end = (int(number, 16) for number in line.split()[0].split("-"))
        if begin <= address < end:
            return line.endswith(" (deleted)")
    return False
