"""A file that one run at a time appends to."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_BLOCK = 1 << 16
_MOST = 64 << 20
"""Bytes that wait for a disk that is full; what comes beyond them is refused."""


def locked(file: int, what: str) -> None:
    """Locks an open file or folder, until it is closed; where there are no locks, nothing is locked.

    Raises:
        BlockingIOError: another run has the lock, in this process or in another one.
    """
    if fcntl is None:
        return
    try:
        # Of the open file, not of the process: a second trainer of this process is kept out as well, and a reader that
        # closes the file takes no lock away.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise BlockingIOError(
                error.errno, f"run: another run is writing to {what}; give each run a place of its own"
            ) from None


def opened_folder(folder: Path, what: str) -> int:
    """An open, locked folder, made where there is none.

    Raises:
        OSError: it cannot be made or written to, is a file, or another run has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            error.errno, f"run: {what} needs a folder, but {_file_on(folder)} is a file; name another folder"
        ) from None
    except OSError as error:
        raise _named(error, f"run: the folder of {what} cannot be made") from None
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(
            errno.EACCES, f"run: {what} cannot write into {folder}: no permission; name another folder"
        )
    file = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        locked(file, what)
    except BaseException:
        os.close(file)
        raise
    return file


def beside(path: Path) -> Path:
    """A name that is free, beside a file or folder: with a number."""
    number = 1
    while (free := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return free


def is_empty(path: Path) -> bool:
    """Whether there is no file, or an empty one."""
    try:
        return path.stat().st_size == 0
    except FileNotFoundError:
        return True


class Appended:
    """An open, locked file.

    What a full disk does not take waits in memory for the next `flush`, to the byte: no line is torn by it.

    Args:
        path: where; folders on the way are made.
        what: its name in errors.

    Raises:
        OSError: it cannot be opened, is a folder, or another run has it.
    """

    def __init__(self, path: Path, what: str):
        self.path = path
        self._what = what
        self._waiting: list[bytes] = []
        self._bytes = 0
        if path.is_dir():
            raise IsADirectoryError(
                errno.EISDIR, f"run: {what} needs a file, but {path} is a folder; name a file in it, {path / 'metrics'}"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise NotADirectoryError(
                error.errno, f"run: {what} cannot be made: {_file_on(path.parent)} is a file, and no folder"
            ) from None
        except OSError as error:
            raise _named(error, f"run: the folder of {what} cannot be made") from None
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _named(error, f"run: {what} cannot be written to") from None
        try:
            locked(self._file, what)
        except BaseException:
            os.close(self._file)
            raise

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return os.fstat(self._file).st_size

    def read(self, start: int, end: int) -> bytes:
        """Bytes on disk from one place to another."""
        return os.pread(self._file, end - start, start)

    def cut(self, size: int) -> None:
        """Forgets what is behind a place."""
        os.ftruncate(self._file, size)

    def lines_backwards(self) -> Iterator[tuple[int, bytes]]:
        """Whole lines, the last one first: where each ends, its newline included, and its text without that."""
        start, tail = self.size, b""
        end = None  # of the whole lines: what is behind the last newline is torn
        while start > 0:
            first = max(start - _BLOCK, 0)
            tail, start = self.read(first, start) + tail, first
            if end is None:
                place = tail.rfind(b"\n")
                if place < 0:
                    continue
                end, tail = start + place + 1, tail[: place + 1]
            lines = tail.split(b"\n")[:-1]
            for line in reversed(lines[1:] if start else lines):
                yield end, line
                end -= len(line) + 1
            tail = lines[0] + b"\n" if start else b""

    def add(self, data: bytes) -> None:
        """Takes bytes, to be written with the next `flush`.

        Raises:
            OSError: the disk has taken nothing for so long that no more can wait.
        """
        if self._bytes + len(data) > _MOST:
            self.flush()  # raises what is wrong with the disk
        self._waiting.append(data)
        self._bytes += len(data)

    def flush(self) -> None:
        """Writes all that was taken.

        Raises:
            OSError: the disk does not take it; it waits for the next call.
        """
        if not self._waiting:
            return
        data = memoryview(b"".join(self._waiting))
        done = 0
        try:
            while done < len(data):
                done += os.write(self._file, data[done:])
        finally:
            self._waiting = [bytes(data[done:])] if done < len(data) else []
            self._bytes = len(data) - done

    def close(self) -> None:
        """Flushes, closes, and gives the lock back.

        Raises:
            OSError: the disk does not take what is left.
        """
        try:
            self.flush()
        except OSError as error:
            raise _named(error, f"{self._bytes:,} bytes of {self._what} could not be written") from None
        finally:
            os.close(self._file)

    def drop(self) -> None:
        """Closes it, and forgets what waits."""
        os.close(self._file)


def check_file(path: Path, what: str) -> None:
    """Opens a file for a moment, and leaves things as they were; raises as `Appended` does."""
    there = path.exists()
    file = Appended(path, what)
    file.close()
    if not there and is_empty(path):
        path.unlink(missing_ok=True)


def _file_on(path: Path) -> Path:
    """The file that lies on the way to a folder."""
    return next((part for part in (path, *path.parents) if part.exists() and not part.is_dir()), path)


def _named(error: OSError, text: str) -> OSError:
    """The same error with a text that says what it was about."""
    return OSError(error.errno, f"{text}: {error.strerror}", error.filename)
