"""Datasets to worker processes by value, and data back as objects of this process's own classes."""

from __future__ import annotations

import io
import marshal
import pickle
import types
from collections.abc import Mapping
from typing import Any

import cloudpickle

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
