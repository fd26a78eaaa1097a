"""The metrics' histories: beside the saves, in files that only grow, so that a save is as large as its state.

A session appends what each history grew by to a file of its own. A save has the chain of those files that hold its
histories, each with the length that counts and a checksum of that much: what a later save appends is nothing to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FOLDER = "history"
MOST_FILES = 64
"""In a chain; a session that would go on with a longer one writes all of it into one file."""
_HEAD = struct.Struct("<4sI")
_MARK = b"lxh1"
_VALUE = np.dtype("<f8")

_growing: set[str] = set()
"""Files that this process appends to: a save that refers to them may be under way."""


class HistoryLostError(ValueError):
    """Histories are not there as they were written: the file and what is wrong with it are in the text."""


class Grown(NamedTuple):
    """A list that only grows, and how much of it there was at some time."""

    values: Sequence[float]
    length: int


class _Part(NamedTuple):
    """The beginning of a file that counts for a save."""

    file: str
    length: int
    checksum: int


class History:
    """Writes histories: what they grew by since the last time is all that is looked at.

    Args:
        saves: the folder of saves.
    """

    def __init__(self, saves: Path):
        self._folder = saves / FOLDER
        self._seen: dict[str, Grown] = {}
        self._chain: list[_Part] = []
        self._file: str | None = None
        self._loaded: tuple[list[_Part], Mapping[str, np.ndarray]] | None = None

    def loaded(self, kept: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Tells what was read: lists that begin with it go on where its files end."""
        self._loaded = [_Part(*part) for part in kept["files"]], arrays

    def write(self, histories: Mapping[str, Grown]) -> dict[str, Any]:
        """Brings histories to disk; returns what `read` needs to find them.

        Raises:
            OSError: the file cannot be written.
        """
        if not self._goes_on(histories) and not self._takes_up(histories):
            self._chain, self._file, self._seen = [], None, {}
        grown = {}
        for name, (values, length) in histories.items():
            begin = self._seen[name].length if name in self._seen else 0
            if length > begin:
                grown[name] = np.asarray(values[begin:length], _VALUE)
                if len(grown[name]) != length - begin:
                    raise ValueError(f"the history {name!r} became shorter while it was saved")
        if grown:
            self._append(_frame(grown))
        self._seen = dict(histories)
        return {"files": [list(part) for part in self._chain], "lengths": {n: g.length for n, g in histories.items()}}

    def sweep(self, referred: Callable[[], set[str] | None], guard: Callable[[], None]) -> None:
        """Removes files that no save needs.

        Args:
            referred: says which the saves need; None where that is not known. Asked only where there may be others.
            guard: called before each removal.
        """
        with contextlib.suppress(FileNotFoundError):
            spare = {entry.name for entry in os.scandir(self._folder)} - {part.file for part in self._chain} - _growing
            needed = referred() if spare else None
            for name in spare - needed if needed is not None else ():
                guard()
                (self._folder / name).unlink()

    def _goes_on(self, histories: Mapping[str, Grown]) -> bool:
        """Whether these are the lists of the last time, longer by something, and what was written is there."""
        if not self._seen:
            return False
        same = all(
            name in histories and histories[name].values is seen.values and histories[name].length >= seen.length
            for name, seen in self._seen.items()
        )
        return same and all(self._is_there(part) for part in self._chain)

    def _takes_up(self, histories: Mapping[str, Grown]) -> bool:
        """Goes on with the files that were read, where these lists begin with what was in them."""
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return False
        chain, arrays = loaded
        if len(chain) > MOST_FILES or not chain or not all(self._is_there(part) for part in chain):
            return False
        for name, array in arrays.items():
            values, length = histories.get(name, Grown((), 0))
            if length < len(array) or np.asarray(values[: len(array)], _VALUE).tobytes() != array.tobytes():
                return False
        self._chain, self._file = chain, None
        self._seen = {name: Grown(histories[name].values, len(array)) for name, array in arrays.items()}
        return True

    def _is_there(self, part: _Part) -> bool:
        try:
            return (self._folder / part.file).stat().st_size >= part.length
        except FileNotFoundError:
            return False

    def _append(self, frame: bytes) -> None:
        fresh = self._file is None
        last = _Part(f"{secrets.token_hex(8)}.bin", 0, 0) if fresh else self._chain[-1]
        path = self._folder / last.file
        self._file = None  # a failure from here on may leave half a frame, and then the next one begins another file
        _growing.add(last.file)
        try:
            self._folder.mkdir(exist_ok=True)
            with path.open("ab") as file:
                if file.tell() != last.length:
                    raise OSError(f"{path} has {file.tell()} bytes, and this process has written {last.length}")
                file.write(frame)
                file.flush()
                os.fsync(file.fileno())
            if fresh:
                _sync(self._folder)
        except BaseException:
            if fresh:
                _growing.discard(last.file)
                with contextlib.suppress(OSError):
                    path.unlink()
            raise
        part = _Part(last.file, last.length + len(frame), zlib.crc32(frame, last.checksum))
        self._chain = [*(self._chain if fresh else self._chain[:-1]), part]
        self._file = last.file

    def close(self) -> None:
        """Lets go of the file."""
        if self._file is not None:
            _growing.discard(self._file)
        self._file = None


def read(saves: Path, kept: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Histories of a save, by their names.

    Args:
        saves: the folder of saves.
        kept: what `History.write` returned for it.

    Raises:
        HistoryLostError: they are not there as they were written.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for name in kept["lengths"]}
    for file, length, checksum in kept["files"]:
        path = saves / FOLDER / Path(file).name
        content = _content(path, length)
        if zlib.crc32(content) != checksum:
            raise HistoryLostError(f"{path} has other content than was written")
        try:
            for name, values in _values(content):
                found.setdefault(name, []).append(values)
        except (ValueError, TypeError, struct.error) as error:
            raise HistoryLostError(f"{path} cannot be read: {error}") from error
    arrays = {name: np.concatenate(parts) if parts else np.empty(0) for name, parts in found.items()}
    lengths = {name: len(array) for name, array in arrays.items()}
    if lengths != kept["lengths"]:
        raise HistoryLostError(f"{saves / FOLDER} has histories of other lengths than the save")
    return arrays


def blank(kept: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Histories of the right lengths that say nothing."""
    return {name: np.full(length, np.nan) for name, length in kept["lengths"].items()}


def files_of(kept: Any) -> set[str]:
    """The files that a save needs; none of a save that has its histories in itself."""
    return {file for file, *_ in kept["files"]} if isinstance(kept, Mapping) else set()


def share(saves: Path, names: set[str], aside: Path) -> None:
    """Puts files into another folder of saves as well, without a copy where the storage can."""
    if names:
        (aside / FOLDER).mkdir(exist_ok=True)
    for name in names:
        there, here = aside / FOLDER / name, saves / FOLDER / name
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            try:
                os.link(here, there)
            except OSError:
                if not there.exists():
                    there.write_bytes(here.read_bytes())


def _frame(grown: Mapping[str, np.ndarray]) -> bytes:
    names = json.dumps([[name, len(values)] for name, values in grown.items()]).encode()
    return b"".join([_HEAD.pack(_MARK, len(names)), names, *(values.tobytes() for values in grown.values())])


def _values(content: bytes) -> list[tuple[str, np.ndarray]]:
    place, found = 0, []
    while place < len(content):
        mark, size = _HEAD.unpack_from(content, place)
        if mark != _MARK:
            raise ValueError(f"no mark at {place}")
        place += _HEAD.size
        names = json.loads(content[place : place + size])
        place += size
        for name, count in names:
            found.append((name, np.frombuffer(content, _VALUE, count, place).astype(np.float64)))
            place += count * _VALUE.itemsize
    return found


def _content(path: Path, length: int) -> bytes:
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise HistoryLostError(f"{path} is missing") from None
    with os.fdopen(file, "rb") as stream:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise HistoryLostError(f"{path} is no regular file")
        if status.st_size < length:
            raise HistoryLostError(f"{path} is cut short: {status.st_size} bytes of {length}")
        return stream.read(length)


def _sync(folder: Path) -> None:
    """Makes a new file's name last; where folders cannot be opened it does so by itself."""
    with contextlib.suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
